"""Put a network's linear layers into the CPU's own layout, for faster answers; see `nn/packed.py`.

No weight changes its value, and saving gives the same files. Training, adapters and quantisation come before it:
none of them knows the packed layers.
"""

from __future__ import annotations

from collections import Counter

from torch import nn

from lavish.nn.packed import PackedLinear, can_pack

MIN_BYTES = 2 * 2**20
"""Up to this size a layer is left alone: a packed product costs some 30 microseconds more to call, which is what the
better layout of two megabytes saves."""


def pack(network: nn.Module, *, min_bytes: int = MIN_BYTES) -> int:
    """Pack the linear layers of a network larger than `min_bytes`, in place and one after the other, and give how many.

    0 where nothing can be: on another device than the CPU, or in another dtype than bfloat16 and float32. A weight that
    two modules share stays as it is.
    """
    uses = Counter(id(parameter) for module in network.modules() for parameter in module.parameters(recurse=False))
    num_packed = 0
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or uses[id(layer.weight)] > 1 or layer.weight.nbytes <= min_bytes:
                continue
            if can_pack(layer.weight):
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
