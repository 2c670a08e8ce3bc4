"""One network on several processes: tensor parallelism, as `torchrun` starts it.

Every process runs the same program and holds a share of each large layer: whole attention heads, columns of the MLPs,
a part of the vocabulary. The shares are cut by the family's plan, in the words of transformers' `base_model_tp_plan`;
a "rowwise" layer adds up what the processes have, so hidden states and logits are whole and the same everywhere.

Local tensors and explicit sums, not DTensor: its ColwiseParallel cuts equal row blocks, which is wrong for a fused
projection, and its dispatch costs about 0.1 ms a layer on the host, 20 ms for the 192 products of one new token, where
reading the weights takes 4 ms.
Not here: training (no gradient passes the sums), saving, several machines' start-up (torchrun's work).
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn
from transformers import PreTrainedModel

from lavish.checkpoints.loading import Cut, load_into
from lavish.checkpoints.placement import resolve_device
from lavish.checkpoints.rules import matches
from lavish.checkpoints.tensor_map import TensorMap
from lavish.common import dist
from lavish.common.errors import ConfigError, did_you_mean
from lavish.models import Family

logger = logging.getLogger(__name__)

PARALLEL = ("tensor",)


class RowwiseLinear(nn.Linear):
    """Some input features of a linear layer, summed over the processes; the bias, whole in each, is added once."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = F.linear(input, self.weight)
        distributed.all_reduce(output)
        return output if self.bias is None else output + self.bias


class GatheredLinear(nn.Linear):
    """Some output features of a linear layer; every process gets those of all, `num_features`.

    They need not divide: the last processes may hold fewer, and send padding for the rest.
    """

    num_features: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        size = dist.world_size()
        share = -(-self.num_features // size)
        part = F.pad(super().forward(input), (0, share - self.out_features)).contiguous()
        parts = [torch.empty_like(part) for _ in range(size)]
        distributed.all_gather(parts, part)
        return torch.cat(parts, dim=-1)[..., : self.num_features]


STYLES: dict[str, type[nn.Linear]] = {
    "colwise": nn.Linear,
    "colwise_heads": nn.Linear,
    "colwise_halves": nn.Linear,
    "rowwise": RowwiseLinear,
    "colwise_gather_output": GatheredLinear,
}
"""What a plan may say of a layer, and the layer that holds a share. "colwise" cuts output features, "colwise_heads"
those of a fused projection by heads, "colwise_halves" those of a fused gate and up inside each, "rowwise" input
features."""


def check_parallel(parallel: str | None) -> None:
    """Check that a way to share a network is known, and that there are processes to share it.

    None among several processes is logged: each of them then holds the whole network, which may be meant.

    Raises:
        ConfigError: an unknown name, or one process only: that would be a silent run alone.
    """
    if parallel is None:
        if dist.world_size() > 1 and dist.is_main():
            logger.warning(
                "This run has %d processes, and each loads the whole network for itself. parallel='tensor' shares it.",
                dist.world_size(),
            )
        return
    if parallel not in PARALLEL:
        raise ConfigError(
            f"No parallel={parallel!r}.{did_you_mean(str(parallel), PARALLEL)} Known: {', '.join(PARALLEL)}, or None."
        )
    if dist.world_size() == 1:
        raise ConfigError(
            f"parallel={parallel!r} shares the network among several processes, and this program is one. Start it "
            "with: torchrun --nproc-per-node 2 program.py"
        )


def refuse_with_parallel(*, is_quantized: bool, has_adapter: bool, pack: bool | str, device_map: Any) -> None:
    """Refuse what is not made for shares of layers.

    Raises:
        ConfigError: a quantised network, an adapter, packing that was asked for, or a second way to split.
    """
    if device_map is not None:
        raise ConfigError(
            "parallel='tensor' gives each process a device, and device_map= gives the blocks of one process several; "
            "give one of them."
        )
    if pack is True:
        raise ConfigError(
            "parallel='tensor' takes no pack=True: its layers add up and gather between the processes, and no packed "
            "layer does. Leave pack out."
        )
    if is_quantized:
        raise ConfigError(
            "parallel='tensor' takes no quantised network; load it without quantization, or in one process."
        )
    if has_adapter:
        raise ConfigError("parallel='tensor' takes no adapter: merge it into its base, save, and load the result.")


def load_share(
    family: Family, config: Any, tensors: TensorMap, *, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Load this process's share of a network, and join the processes; no other share is read.

    Raises: as `cut_network` and `load_into`, before the first weight is read.
    """
    with torch.device("meta"):
        network = family.model_class(config)
    cuts = cut_network(network, family.tensor_parallel_plan)
    dist.start(device.type)
    left = load_into(network, tensors, dtype=dtype, device=device, rules=family.rules, cuts=cuts)
    family.complete(network, left)
    config.dtype = dtype
    network.requires_grad_(False)  # a training step would miss the gradients of the other shares
    network.register_state_dict_pre_hook(_refuse_state_dict)
    # Apart from the hook, because transformers writes config.json before it asks for the state.
    network.save_pretrained = partial(_refuse_saving, network)
    return network.eval()


def local_device(device: str | torch.device) -> torch.device:
    """Give the device of this process: on CUDA the one of its number on this machine.

    Raises:
        ConfigError: a device that the processes cannot share out, or more processes than devices.
    """
    found = resolve_device(device)
    if found.type == "mps":
        raise ConfigError("Several processes cannot share one MPS device. Use device='cpu', or one process.")
    if found.type != "cuda":
        return found
    if found.index is not None:
        raise ConfigError(f"device={str(device)!r} would be every process's; under torchrun give 'cuda', or 'auto'.")
    found = resolve_device(f"cuda:{os.environ.get('LOCAL_RANK', dist.rank())}")
    torch.cuda.set_device(found)
    return found


def cut_network(network: nn.Module, plan: Mapping[str, str]) -> dict[str, Cut]:
    """Replace each layer of the plan by this process's share, on the meta device, and give what to cut out of which
    stored tensor.

    Trap: a fused query_key_value is cut by heads inside each of q, k and v. Equal blocks of its rows would give one
    process queries alone.

    Raises:
        ConfigError: a number of heads or features that the processes cannot share out evenly.
    """
    rank, size = dist.rank(), dist.world_size()
    layers = dict(_layers(network, plan))
    _check_sizes(network, layers, size)
    cuts: dict[str, Cut] = {}
    for name, style in layers.items():
        whole: Any = network.get_submodule(name)
        owner, _, leaf = name.rpartition(".")
        attention = network.get_submodule(owner)
        dim = 1 if style == "rowwise" else 0
        if style == "colwise_heads":
            spans = head_spans(*_heads(attention), whole.weight.shape[0], rank, size)
        elif style == "colwise_halves":
            half = whole.weight.shape[0] // 2
            share = half // size
            spans = tuple((start + rank * share, start + (rank + 1) * share) for start in (0, half))
        else:
            length = whole.weight.shape[dim]
            share = -(-length // size)
            spans = ((min(rank * share, length), min((rank + 1) * share, length)),)
        cuts[f"{name}.weight"] = Cut(dim, spans, tuple(whole.weight.shape))
        if whole.bias is not None and style != "rowwise":
            cuts[f"{name}.bias"] = Cut(0, spans, tuple(whole.bias.shape))
        features = [whole.in_features, whole.out_features]
        features[1 - dim] = sum(stop - start for start, stop in spans)
        layer = STYLES[style](*features, bias=whole.bias is not None, device="meta", dtype=whole.weight.dtype)
        if isinstance(layer, GatheredLinear):
            layer.num_features = whole.out_features
        setattr(attention, leaf, layer)
    for attention in {network.get_submodule(name.rpartition(".")[0]) for name in _fused(layers)}:
        _set_local_heads(attention, size)
    return cuts


def head_spans(
    num_heads: int, num_key_value_heads: int, num_rows: int, rank: int, size: int
) -> tuple[tuple[int, int], ...]:
    """Give the rows of q, k and v in a fused projection that belong to one process.

    With more processes than key/value heads each of those is held by several processes, beside different queries of
    its group.
    """
    head_dim = num_rows // (num_heads + 2 * num_key_value_heads)
    num_local, num_local_kv = num_heads // size, max(1, num_key_value_heads // size)
    first_kv = rank * num_key_value_heads // size
    starts = (
        (rank * num_local, num_local),
        (num_heads + first_kv, num_local_kv),
        (num_heads + num_key_value_heads + first_kv, num_local_kv),
    )
    return tuple((start * head_dim, (start + count) * head_dim) for start, count in starts)


def shared_seeds(device: torch.device) -> random.Random:
    """Give a stream of seeds that is the same in all processes: started by the first, used in step."""
    seed = torch.tensor([random.SystemRandom().getrandbits(62)], device=device)
    distributed.broadcast(seed, src=0)
    return random.Random(int(seed))


def _refuse_state_dict(network: nn.Module, prefix: str, keep_vars: bool) -> None:
    _refuse_saving(network)


def _refuse_saving(network: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Take the place of `save_pretrained`, whatever it was called with."""
    raise ConfigError(
        f"This {type(network).__name__} is one of {dist.world_size()} shares of a network (parallel='tensor'), which "
        "cannot be saved. Load it in one process to save it."
    )


def _layers(network: nn.Module, plan: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Give the linear layers that the plan names, and their style."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            style = next((style for pattern, style in plan.items() if matches([pattern], name)), None)
            if style is not None:
                yield name, style


def _fused(layers: Mapping[str, str]) -> Iterator[str]:
    return (name for name, style in layers.items() if style == "colwise_heads")


def _heads(attention: Any) -> tuple[int, int]:
    """Give heads and key/value heads; the tower's attention has as many of both and names one."""
    return attention.num_heads, getattr(attention, "num_key_value_heads", attention.num_heads)


def _set_local_heads(attention: Any, size: int) -> None:
    num_heads, num_key_value_heads = _heads(attention)
    attention.num_heads = num_heads // size
    if num_key_value_heads != num_heads or hasattr(attention, "num_key_value_heads"):  # as in _heads
        attention.num_key_value_heads = max(1, num_key_value_heads // size)


def _check_sizes(network: nn.Module, layers: Mapping[str, str], size: int) -> None:
    problem = _problem(network, layers, size)
    if problem is None:
        return
    owners = [network.get_submodule(name.rpartition(".")[0]) for name in layers]
    most = max((_heads(owner)[0] for owner in owners if hasattr(owner, "num_heads")), default=1)
    possible = [str(number) for number in range(2, most + 1) if _problem(network, layers, number) is None]
    advice = f"Use {' or '.join(possible)} of them." if possible else "This network runs in one process only."
    raise ConfigError(f"parallel='tensor' with {size} processes: {problem}. {advice}")


def _problem(network: nn.Module, layers: Mapping[str, str], size: int) -> str | None:
    """Say what does not divide among `size` processes, or None."""
    for name, style in layers.items():
        layer: Any = network.get_submodule(name)
        if style == "colwise_heads":
            heads, kv_heads = _heads(network.get_submodule(name.rpartition(".")[0]))
            if heads % size:
                return f"the {heads} heads of {name!r} do not divide"
            if kv_heads % size and size % kv_heads:
                return f"the {kv_heads} key/value heads of {name!r} neither divide nor can be repeated evenly"
            continue
        num_heads = getattr(network.get_submodule(name.rpartition(".")[0]), "num_heads", size)  # an MLP has none
        if style == "colwise" and num_heads % size:  # q, k and v apart: whole heads too
            return f"the {num_heads} heads of {name!r} do not divide"
        features = layer.in_features if style == "rowwise" else layer.out_features
        if style == "colwise_halves":
            features //= 2
        if features % size and style != "colwise_gather_output":
            return f"the {features} features of {name!r} do not divide"
    return None
