"""Rules from the released CogVLM tensors to our modules. The names are the same; what is here is what may differ.

The other layouts come to these names first: SAT's in `sat.py`, MindFormers' in `mindspore.py`. torch is imported where
weights are touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lavish.checkpoints.release import Release
from lavish.checkpoints.rules import Optional, Rule, matches
from lavish.checkpoints.sat import find_root
from lavish.common.errors import CheckpointError
from lavish.models.cogvlm import mindspore, sat

if TYPE_CHECKING:
    import torch

    from lavish.models.cogvlm.model import CogVLMForCausalLM

PIECES: tuple[str, ...] = ()
"""No release of CogVLM comes in pieces."""

INV_FREQ = "model.layers.*.self_attn.rotary_emb.inv_freq"

RULES: tuple[Rule, ...] = (
    Optional(INV_FREQ, why="computed from the rotary base; stored in every v2 file, not known of v1's"),
)

TENSOR_PARALLEL_PLAN = MappingProxyType(
    {
        "model.layers.*.self_attn.language_expert_query_key_value": "colwise_heads",
        "model.layers.*.self_attn.vision_expert_query_key_value": "colwise_heads",
        "model.layers.*.self_attn.language_expert_dense": "rowwise",
        "model.layers.*.self_attn.vision_expert_dense": "rowwise",
        "model.layers.*.mlp.*.gate_proj": "colwise",
        "model.layers.*.mlp.*.up_proj": "colwise",
        "model.layers.*.mlp.*.down_proj": "rowwise",
        "model.vision.transformer.layers.*.attention.query_key_value": "colwise_heads",
        "model.vision.transformer.layers.*.attention.dense": "rowwise",
        "model.vision.transformer.layers.*.mlp.fc1": "colwise",
        "model.vision.transformer.layers.*.mlp.fc2": "rowwise",
        "model.vision.linear_proj.gate_proj": "colwise",
        "model.vision.linear_proj.dense_h_to_4h": "colwise",
        "model.vision.linear_proj.dense_4h_to_h": "rowwise",
        "lm_head": "colwise_gather_output",
    }
)
"""What several processes share (`inference/parallel.py` says what the styles are). Whole in each of them: embedding
table, norms, patch embedding, 2x2 convolution and the projector's first layer, 1 (v1) to 3 % (v2) of the weights."""


def open_release(path: Path, pieces: Mapping[str, Path]) -> Release:
    """Open a release that no config.json describes.

    Raises: as `sat.open_release` and `mindspore.open_release`.
    """
    return mindspore.open_release(path) if find_root(path) is None else sat.open_release(path)


def computed(config: Any, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Give a tensor that a layout does not hold and the release's files do: `inv_freq`, of `rope="float32"` cast, of
    "reference" built in the dtype of the weights, as the release does: in bf16 the two differ in 17 of 64 entries.

    Raises:
        CheckpointError: a name that cannot be computed.
    """
    import torch

    from lavish.models.cogvlm.model import reference_inv_freq

    if not matches((INV_FREQ,), name):
        raise CheckpointError(f"{name!r} is in no file and cannot be computed. Fetch the checkpoint again.")
    built_in = torch.float32 if config.rope == "float32" else dtype
    return reference_inv_freq(config.head_dim, config.rotary_base, built_in).to(dtype)


def complete(network: CogVLMForCausalLM, absent: Iterable[str] = ()) -> None:
    """Make the tensors that the files did not hold, and check those that must agree. Call it after every load.

    Args:
        absent: the names that loading left on the meta device.
    Raises:
        CheckpointError: a name that cannot be computed, or layers with different `inv_freq` (one table serves all).
    """
    import torch

    from lavish.models.cogvlm.model import RotaryEmbedding

    rotary = [module for module in network.modules() if isinstance(module, RotaryEmbedding)]  # in the order of layers
    names = {INV_FREQ.replace("*", str(index)): module for index, module in enumerate(rotary)}
    for name in absent:
        weight = network.lm_head.weight
        value = computed(network.config, name, weight.dtype)
        names[name].inv_freq = value.to(weight.device)
    first = rotary[0].inv_freq
    for index, module in enumerate(rotary[1:], start=1):
        if not first.is_meta and not torch.equal(module.inv_freq.to(first.device), first):
            raise CheckpointError(
                f"inv_freq of layer {index} differs from layer 0's; in every CogVLM they are equal. The checkpoint is "
                "damaged or of another model: compare its files with the release."
            )
