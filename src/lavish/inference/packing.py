"""Put a network's linear layers into the CPU's own layout, for faster answers: `lavish.load(..., pack=True)`; see
`nn/packed.py`.

No weight changes its value, and saving gives the same files. Training, adapters and quantisation come before it:
none of them knows the packed layers.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from lavish.common.errors import ConfigError
from lavish.nn.linear import Linear
from lavish.nn.packed import PackedLinear, can_pack

MIN_BYTES = 2 * 2**20
"""Up to this size a layer is left alone: a packed product costs some 30 microseconds more to call, which is what the
better layout of two megabytes saves."""


def should_pack(
    asked: bool | str, *, dtype: torch.dtype, device: torch.device, is_quantized: bool, has_adapter: bool
) -> bool:
    """Tell whether a network that is to be loaded gets packed. "auto" is bfloat16 where nothing stands against it.

    A float32 network gains in a prefill and loses in decoding, where `nn/linear.py` is faster: that has to be asked.

    Raises:
        ConfigError: True was asked where it cannot be, or something else than True, False and "auto".
    """
    if asked is False:
        return False
    if asked is not True and asked != "auto":
        raise ConfigError(f'pack must be True, False or "auto", not {asked!r}.')
    against = None
    if device.type != "cpu":
        against = f"is for the CPU, and the device is {str(device)!r}"
    elif is_quantized:
        against = "takes float weights, and these are quantised"
    elif has_adapter:
        against = "does not take an adapter; merge it into the weights and save them, or leave pack out"
    elif not can_pack(torch.empty(0, dtype=dtype)):
        against = f"needs bfloat16 or float32 and a torch and a CPU that have packed products; asked: {dtype}"
    if against is not None and asked is True:
        raise ConfigError(f"pack=True {against}.")
    return against is None and (asked is True or dtype == torch.bfloat16)


def pack(network: nn.Module, *, min_bytes: int = MIN_BYTES) -> int:
    """Pack the linear layers of a network larger than `min_bytes`, in place and one after the other, and give how many.

    0 where nothing can be: on another device than the CPU, or in another dtype than bfloat16 and float32. A weight that
    two modules share stays as it is.
    """
    uses = Counter(id(parameter) for module in network.modules() for parameter in module.parameters(recurse=False))
    num_packed = 0
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, Linear):
                continue
            if uses[id(layer.weight)] == 1 and layer.weight.nbytes > min_bytes and can_pack(layer.weight):
                setattr(parent, name, PackedLinear.from_linear(layer))
                num_packed += 1
    return num_packed


def unpack(network: nn.Module) -> int:
    """Undo `pack`, and give how many layers were packed."""
    num_packed = 0
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, PackedLinear):
                setattr(parent, name, layer.to_linear())
                num_packed += 1
    return num_packed


def weight_bytes(network: nn.Module) -> int:
    """Bytes of all weights and buffers of a network; packed weights are neither to torch and are counted here."""
    tensors = [*network.parameters(), *network.buffers()]
    packed = sum(module.weight_bytes for module in network.modules() if isinstance(module, PackedLinear))
    return packed + sum(tensor.nbytes for tensor in tensors)
