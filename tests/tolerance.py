"""The tolerances of the tests: one place, each with its reason. Integers, and conversions, are compared exactly.

float32 on one CPU thread: `rtol=1e-5, atol=2e-5 * expected.std()`, times a factor with a reason. The golden fixtures
were made with the same torch, so most stages agree to the last bits; what is left is the order of sums in attention
(grouped heads) and in the 2x2 convolution.
"""

import torch

PARITY = 1.0  # measured: up to 0.43 of the bound in the logits, 0.14 in the features of the image
GRADIENTS = 2.0  # measured: up to 0.74 of the bound; they pass every sum twice
SAME_MATH = 2.0  # two ways through our own code: other sums, nothing else

LOGITS_APART = (
    1e-4  # the largest difference of right logits, which spread over +-10; a known fault moves them by over 1e-3
)

ON_CUDA = {"rtol": 0.0, "atol": 5e-4}
"""Logits of another device: what the fixtures' sheet allows for the other order of its sums."""


def close(actual: torch.Tensor, expected: torch.Tensor, factor: float = PARITY) -> None:
    """Hold a float32 tensor against the expected one; a single number has no spread but its own size."""
    spread = float(expected.std()) if expected.numel() > 1 else float(expected.abs())
    bounds = {"rtol": factor * 1e-5, "atol": factor * 2e-5 * spread}
    torch.testing.assert_close(actual.to(expected.dtype), expected, **bounds)
