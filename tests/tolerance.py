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

GPT_DIALOGUE_LOGITS = {"rtol": 0.0, "atol": 2e-5}  # measured: 5.2e-6; made with transformers 4.26
GPT_DIALOGUE_LOSS = {"rtol": 0.0, "atol": 5e-6}  # measured: 1e-6

BLIP_IMAGES = 5e-6
"""Image states of BLIP: its sheet's bound; 0.0 was measured. An epsilon of 1e-5 in the tower moves them by 2.1e-5."""
BLIP_LOGITS = 2e-5
"""Logits and losses of BLIP: its sheet's bound; 0.0 was measured, but for a padded question (1.2e-5)."""
BLIP_PADDED = 5e-5
"""Answers to a question with padding against those without: its sheet's bound. Without the mask they move by 3.45."""


def close(actual: torch.Tensor, expected: torch.Tensor, factor: float = PARITY) -> None:
    """Hold a float32 tensor against the expected one; a single number has no spread but its own size."""
    spread = float(expected.std()) if expected.numel() > 1 else float(expected.abs())
    bounds = {"rtol": factor * 1e-5, "atol": factor * 2e-5 * spread}
    torch.testing.assert_close(actual.to(expected.dtype), expected, **bounds)


QWEN_FEATURES, QWEN_LOGITS, QWEN_LOSS = 1e-4, 2e-4, 1e-5
"""Absolute, of the sheet of CLIP + Qwen: the release's own sums of attention and rotation."""
QWEN_TRAIN_LOSS, QWEN_TRAINED_WEIGHTS = 5e-4, 2e-3
"""Absolute, of the same sheet: after some steps of AdamW."""


def qwen_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Hold logits of a network with the Qwen v1 decoder against the release's."""
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=QWEN_LOGITS)


GLM4V = {"rtol": 1e-4, "atol": 2e-4}
"""GLM-4V-9B: logits and features as the fixture's sheet allows; measured: 2e-5 at logits of 8."""

GLM4V_GRADIENTS = {"rtol": 1e-4, "atol": 1e-4}
"""GLM-4V-9B: gradients and their norm, by the same sheet."""

MINIGPT4_QWEN = 2e-5
"""Absolute, of the sheet of MiniGPT4-Qwen; measured: 9.6e-6 in the logits, 2.1e-6 in the features of the image."""
