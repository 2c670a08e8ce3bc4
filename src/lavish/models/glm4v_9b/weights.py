"""Rules from the released GLM-4V tensors to our modules. The names are the same; what is here is what may differ."""

from collections.abc import Iterable
from types import MappingProxyType

from lavish.checkpoints.rules import Optional, Rule
from lavish.common.errors import CheckpointError
from lavish.models.glm4v_9b.model import Glm4v9bForCausalLM, inv_freq

INV_FREQ = "transformer.rotary_pos_emb.inv_freq"

RULES: tuple[Rule, ...] = (Optional(INV_FREQ, why="computed from the config; the stored values are never read"),)

TENSOR_PARALLEL_PLAN = MappingProxyType(
    {
        "transformer.encoder.layers.*.self_attention.query_key_value": "colwise_heads",
        "transformer.encoder.layers.*.self_attention.dense": "rowwise",
        "transformer.encoder.layers.*.mlp.dense_h_to_4h": "colwise_halves",
        "transformer.encoder.layers.*.mlp.dense_4h_to_h": "rowwise",
        "transformer.vision.transformer.layers.*.attention.query_key_value": "colwise_heads",
        "transformer.vision.transformer.layers.*.attention.dense": "rowwise",
        "transformer.vision.transformer.layers.*.mlp.fc1": "colwise",
        "transformer.vision.transformer.layers.*.mlp.fc2": "rowwise",
        "transformer.vision.linear_proj.gate_proj": "colwise",
        "transformer.vision.linear_proj.dense_h_to_4h": "colwise",
        "transformer.vision.linear_proj.dense_4h_to_h": "rowwise",
        "transformer.output_layer": "colwise_gather_output",
    }
)
"""What several processes share (`inference/parallel.py` says what the styles are). Whole in each of them: embedding
table, norms, patch embedding, 2x2 convolution and the projector's first layer, 5 % of the weights."""


def complete(network: Glm4v9bForCausalLM, absent: Iterable[str] = ()) -> None:
    """Make the tensors that the files did not hold. Call it after every load.

    Args:
        absent: the names that loading left on the meta device.
    Raises:
        CheckpointError: a name that cannot be computed.
    """
    for name in absent:
        if name != INV_FREQ:
            raise CheckpointError(f"{name!r} is in no file and cannot be computed. Fetch the checkpoint again.")
        module, weight = network.transformer.rotary_pos_emb, network.transformer.output_layer.weight
        module.inv_freq = inv_freq(module.head_dim, module.base).to(weight.device, weight.dtype)
