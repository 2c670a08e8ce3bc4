"""Weight-only int8 linear layers: one float scale an output channel, activations untouched.

The arithmetic is `(x @ weight_int8.T) * scale`: int8 values are exact in every float type, so the scale is applied
once, to the output. On CPU few bfloat16 rows go through torch's packed int8 product, which reads half the bytes of bf16
and is what decoding is bound by; float32 rows convert the weight block by block, each staying in the cache; many rows
(prefill) and other devices convert the weight first. Quantising a tensor that is on disk is in
`inference/quantization.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_MAX_PACKED_ROWS = 8
"""Rows of bfloat16 up to which the packed CPU product is faster than converting the weight (measured, weights of
4096 x 1024, two threads). That of float32 is four times slower than converting.
"""
_BLOCK_BYTES = 2**20
"""What a core's own cache holds of a converted weight."""


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to int8 with one scale a row: the largest absolute value of the row becomes 127.

    Shapes: (out, in) -> int8 (out, in), float32 (out). The error of an entry is at most half a scale.
    """
    weight = weight.float()
    scale = weight.abs().amax(dim=1) / 127.0
    # A row of zeros has scale 0: any divisor gives zeros back.
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (weight / divisor[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight and one scale an output channel. It is made by `from_linear` or filled from a
    checkpoint.

    The buffer is named `weight` as in `nn.Linear`, so that key names keep their meaning; `weight_scale` is (out), in
    the activations' dtype. Shapes: (..., in) -> (..., out).
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, dtype=dtype, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        """Quantise a linear layer; its dtype stays that of the scales, the bias and so of the result."""
        source = linear.weight
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta", dtype=source.dtype)
        weight, scale = quantize_weight(source.detach())
        layer.weight, layer.weight_scale = weight, scale.to(source.dtype)
        if linear.bias is not None:
            layer.bias = linear.bias.detach()
        return layer

    def dequantized(self) -> torch.Tensor:
        """Give the float matrix that this layer stands for. Shapes: -> (out, in)."""
        return self.weight.to(self.weight_scale.dtype) * self.weight_scale[:, None]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.reshape(-1, self.in_features)
        if self._can_use_packed(rows):
            product = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.weight, self.weight_scale)
        elif self._can_use_blocks(rows):
            product = self._product_by_blocks(rows).mul_(self.weight_scale)
        else:
            product = F.linear(rows, self.weight.to(rows.dtype)) * self.weight_scale
        if self.bias is not None:
            product = product + self.bias
        return product.view(*hidden_states.shape[:-1], self.out_features)

    def _can_use_packed(self, rows: torch.Tensor) -> bool:
        return (
            rows.device.type == "cpu"
            and rows.dtype == torch.bfloat16 == self.weight_scale.dtype
            and 0 < rows.shape[0] <= _MAX_PACKED_ROWS
            and not rows.requires_grad  # the packed product has no backward
        )

    def _can_use_blocks(self, rows: torch.Tensor) -> bool:
        return (
            rows.device.type == "cpu"
            and rows.dtype == torch.float32 == self.weight_scale.dtype
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )

    def _product_by_blocks(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply with the bare int8 values. Shapes: (rows, in) -> (rows, out)."""
        num_rows = max(1, _BLOCK_BYTES // (4 * self.in_features))
        block = rows.new_empty(min(num_rows, self.out_features), self.in_features)
        product = rows.new_empty(rows.shape[0], self.out_features)
        for weight, part in zip(self.weight.split(num_rows), product.split(num_rows, dim=1), strict=True):
            converted = block[: weight.shape[0]].copy_(weight)
            torch.mm(rows, converted.t(), out=part)
        return product

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, int8"
