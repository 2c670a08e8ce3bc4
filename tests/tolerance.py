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
LOSS_ON_CUDA = 1e-3
"""Losses of four steps of AdamW on another device, as a share: each step takes the other order of sums along."""

SAT_PIXELS = {"rtol": 0.0, "atol": 1e-5}
"""Absolute, of the sheet of SAT's checkpoints, as the two below; measured: 0.0."""
SAT_LOGITS = {"rtol": 0.0, "atol": 5e-4}
"""Measured: 1.3e-5, of one rank and of two."""
SAT_LOSS = {"rtol": 0.0, "atol": 1e-4}
"""Measured: 1e-6."""

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


GLM4V = {"rtol": 1e-5, "atol": 1e-4}
"""GLM-4V-9B: logits and features; the fixture's sheet allows twice as much. Measured: 2.2e-5 at logits of 9.6, and
4.8e-5 behind a merged adapter."""

GLM4V_GRADIENTS = {"rtol": 1e-4, "atol": 1e-4}
"""GLM-4V-9B: gradients and their norm, by the same sheet."""

MINIGPT4_QWEN = 2e-5
"""Absolute, of the sheet of MiniGPT4-Qwen; measured: 9.6e-6 in the logits, 2.1e-6 in the features of the image."""

PIXELS = {"rtol": 0.0, "atol": 1e-6}
"""Normalised pixels, up to 2.7: the last bit of a quotient and a difference in float32 (measured: up to 2.4e-7)."""
RESIZED_PIXELS = {"rtol": 0.0, "atol": 1e-5}
"""Normalised pixels whose picture was resized as floats: a sum of some products in another order."""

RELEASE_WAY = {"rtol": 0.0, "atol": 5e-4}
"""Logits of the routing of the release, which a benchmark rebuilds, against its fixture's: the sheet's bound (measured:
1e-5)."""

MERGED_ADAPTER = {"rtol": 0.0, "atol": 1e-4}
"""Logits up to 14, adapter beside the weight against adapter in it: the product of its two matrices is rounded once
more (measured: up to 3.9e-5)."""
MERGED_WEIGHT = {"rtol": 0.0, "atol": 1e-6}
"""A weight with its adapter in it, below 1: the same product, rounded in another library's order."""
ADAPTER_SHOWS = {"rtol": 0.0, "atol": 1e-2}
"""Not this near: logits with and without an adapter that does anything (measured: 13 and more)."""

INT8 = {"rtol": 0.0, "atol": 2e-4}
"""Logits up to 14 of int8 weights, multiplied as they are and as floats: other sums (measured: 2.5e-5)."""
INT8_PRODUCT = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Absolute, one layer against float64: bfloat16 keeps 8 bits of results up to 2.2 (measured: 0.011)."""

ROUNDING = {"rtol": 0.0, "atol": 1e-5}
"""Numbers up to 8 by two ways of the same few sums in float32, which round to 5e-7 (measured)."""
FEATURES_BY_TWO_WAYS = {"rtol": 1e-4, "atol": 1e-5}
"""Features of a picture through the tower of training and through that of inference."""
BIGGER_BATCH = {"rtol": 1e-5, "atol": 1e-6}
"""Weights of a few steps of AdamW whose gradients were summed in parts, in passes or on processes (measured: 6e-8)."""

BOX_JITTER = {"rtol": 0.0, "atol": 0.0051}
"""Corners of a box that a question names: drawn up to 4 thousandths aside, and cut to whole ones."""

ANGLES = {"rtol": 0.0, "atol": 3e-4}
"""Cosines of float32 angles of up to 4095 against float64's: half a step of such a number is 1.2e-4."""
JOINED_ROWS = {"rtol": 1e-6, "atol": 0.0}
"""A loss of a batch and of the same conversations in shared rows, float32: the same terms in another order."""
