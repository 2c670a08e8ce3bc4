"""Linear layers whose weight lies in oneDNN's blocked layout: the same values in another order, for inference on a CPU.

A row-major bfloat16 matrix is read at half to two thirds of the speed of the blocked one when one token is multiplied
with it, which is what decoding on a CPU is bound by; float32 gains in a prefill only (`nn/linear.py` decodes faster).
The operators are torch's own (its compiler emits them) but not public: where they are absent, nothing is packed. Which
layers to pack is in `inference/packing.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PACKED_DTYPES = (torch.bfloat16, torch.float32)


def can_pack(weight: torch.Tensor) -> bool:
    """Tell whether this torch and this CPU have packed products for a weight like this one."""
    operators = torch.ops.mkldnn
    if weight.device.type != "cpu" or weight.dtype not in PACKED_DTYPES or not torch.backends.mkldnn.is_available():
        return False
    if not (hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")):
        return False
    return weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedLinear(nn.Module):
    """A linear layer with a packed weight. Shapes: (..., in) -> (..., out).

    `weight` gives the ordinary matrix, copied out bit for bit; `state_dict` and copies hold that, so that a packed
    network is saved as if it were not. It follows `.to(dtype)` on the CPU, and refuses other devices. Where gradients
    are asked for it computes as `nn.Linear` does, with the copied matrix.
    """

    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias)
        self._pack(weight)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> PackedLinear:
        """Pack a linear layer. Its own weight is not shared: let the layer go and its memory goes."""
        return cls(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())

    def to_linear(self) -> nn.Linear:
        """Give the ordinary layer back, bit for bit."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias, requires_grad=False)
        return linear

    @property
    def weight(self) -> torch.Tensor:
        """The ordinary matrix, (out, in), as a copy."""
        return self._packed.to_dense(self.dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight, without unpacking it."""
        return self.out_features * self.in_features * self.dtype.itemsize

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != self.dtype or hidden_states.requires_grad or not hidden_states.numel():
            return F.linear(hidden_states, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(hidden_states, self._packed, self.bias, "none", [], "")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, packed"

    def _pack(self, weight: torch.Tensor) -> None:
        self.dtype = weight.dtype
        # 1: the layout that is best for one row, which decoding has; many rows lose nothing by it.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        moved = fn(self.weight)
        if not can_pack(moved):
            raise RuntimeError(
                f"A packed layer stays on the CPU in bfloat16 or float32, and {moved.dtype} on {moved.device} was "
                "asked. Undo the packing first: lavish.inference.packing.unpack(network)."
            )
        super()._apply(fn, recurse)
        self._pack(moved)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        return PackedLinear(self.weight, None if self.bias is None else self.bias.clone())
