"""A linear layer that takes the fastest way there is to a float32 product on a CPU: few rows (decoding) and many.

torch gives a single row to the BLAS as a matrix times a vector, and MKL's product of that kind reads half of what a
core can (measured, 1,024 inputs, one thread: 15 of 29 GB/s; two rows 8). The same sums as a batch of small matrix
products read 27 (two rows 18), and memory is what bounds decoding. For many rows (a prefill) oneDNN's product, which
torch takes for bfloat16 by itself, was 1.2 to 1.4 times as fast as MKL's (AMD EPYC, one thread, 129 and 1,026 rows,
1,024 and 4,096 inputs). Its operator is torch's own (its compiler emits it) but not public: without it the plain
product is taken.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

_MAX_ROWS = 3
_MAX_PARTS = 16
_MAX_IN_FEATURES = 4095
"""From 4,096 inputs on, where rows of the weight fall into the same cache sets, the batch is slower (17 against 19)."""
_MANY_ROWS = 32
_LARGE_WEIGHT = 256 * 256
"""Elements; the product of a smaller one is over before another way to it pays."""


class Linear(nn.Linear):
    """`nn.Linear`, with other ways to the same product for float32 rows without gradient on a CPU.

    A compiler and autocast get the plain product, and so does a torch that was built without MKL or oneDNN. Shapes:
    (..., in) -> (..., out).
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or not self._is_plain_float32(input):
            return F.linear(input, self.weight, self.bias)
        if self._is_many_rows(input):
            return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        if not self._is_few_rows(input):
            return F.linear(input, self.weight, self.bias)
        rows = input.reshape(1, -1, self.in_features)
        num_parts = math.gcd(self.out_features, _MAX_PARTS)
        parts = self.weight.view(num_parts, -1, self.in_features)
        # Trap: the rows must be a transposed view. Contiguous columns take another path, five times as slow.
        product = torch.bmm(parts, rows.expand(num_parts, -1, -1).transpose(1, 2))  # (parts, out / parts, rows)
        product = product.view(self.out_features, -1).t().reshape(*input.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias

    def _is_plain_float32(self, states: torch.Tensor) -> bool:
        return (
            states.dtype == torch.float32 == self.weight.dtype
            and states.device.type == "cpu" == self.weight.device.type
            and states.shape[-1] == self.in_features
            and self.weight.is_contiguous()
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )

    def _is_few_rows(self, states: torch.Tensor) -> bool:
        return (
            0 < states.numel() <= _MAX_ROWS * self.in_features <= _MAX_ROWS * _MAX_IN_FEATURES
            and torch.backends.mkl.is_available()
        )

    def _is_many_rows(self, states: torch.Tensor) -> bool:
        return (
            states.numel() >= _MANY_ROWS * self.in_features
            and self.weight.numel() >= _LARGE_WEIGHT
            and torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        )
