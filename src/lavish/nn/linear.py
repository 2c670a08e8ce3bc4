"""A linear layer that multiplies one to three float32 rows at the speed of memory, which bounds decoding on a CPU.

torch gives a single row to the BLAS as a matrix times a vector, and MKL's product of that kind reads half of what a
core can (measured, 1,024 inputs, one thread: 15 of 29 GB/s; two rows 8). The same sums as a batch of small matrix
products read 27 (two rows 18).
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


class Linear(nn.Linear):
    """`nn.Linear`, with another way to the same product for a few float32 rows without gradient on a CPU.

    A compiler gets the plain product, and so does a torch that was built without MKL. Shapes: (..., in) -> (..., out).
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or not self._is_few_rows(input):
            return F.linear(input, self.weight, self.bias)
        rows = input.reshape(1, -1, self.in_features)
        num_parts = math.gcd(self.out_features, _MAX_PARTS)
        parts = self.weight.view(num_parts, -1, self.in_features)
        # Trap: the rows must be a transposed view. Contiguous columns take another path, five times as slow.
        product = torch.bmm(parts, rows.expand(num_parts, -1, -1).transpose(1, 2))  # (parts, out / parts, rows)
        product = product.view(self.out_features, -1).t().reshape(*input.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias

    def _is_few_rows(self, states: torch.Tensor) -> bool:
        size = self.in_features
        return (
            states.dtype == torch.float32 == self.weight.dtype
            and states.device.type == "cpu" == self.weight.device.type
            and 0 < states.numel() <= _MAX_ROWS * size
            and states.shape[-1] == size <= _MAX_IN_FEATURES
            and self.weight.is_contiguous()
            and not torch.is_grad_enabled()
            and torch.backends.mkl.is_available()
        )
