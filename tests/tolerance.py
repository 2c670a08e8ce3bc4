"""The tolerances of the tests: one place, each with its reason. Integers, and conversions, are compared exactly.

float32 on one CPU thread. The golden fixtures were made with the same torch, so most stages agree to the last bits;
what is left is the order of sums in attention (grouped heads) and in the 2x2 convolution.
"""

PIXELS = {"rtol": 0.0, "atol": 1e-5}
VISION = {"rtol": 0.0, "atol": 2e-5}  # the fixture's sheet allows 2e-4
LOGITS = {"rtol": 0.0, "atol": 1e-4}  # the sheet allows 5e-4; the values spread over +-10
LOSS = {"rtol": 0.0, "atol": 1e-5}  # the sheet allows 1e-4
GRADIENTS = {"rtol": 1e-4, "atol": 1e-5}  # the sheet allows 1e-3 and 1e-4

SAME_MATH = {"rtol": 1e-5, "atol": 5e-5}  # two ways through our own code: other sums, nothing else
