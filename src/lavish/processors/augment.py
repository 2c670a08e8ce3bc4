"""The small random changes of LAVIS's training pictures: two of ten operations, each applied in one of two cases.

Source: facts of salesforce/LAVIS, lavis/processors/randaugment.py (RandomAugment(2, 5)) and blip_processors.py, which
names the ten. At level 5 of 10 brightness and sharpness have the factor 1.0, so both leave the picture as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image, ImageOps

NUM_OPERATIONS = 2
PROBABILITY = 0.5
SHEAR = 0.15  # level 5 of 10 of 0.3
TRANSLATE = 5  # pixels; level 5 of 10 of 10
ROTATE = 15.0  # degrees; level 5 of 10 of 30
FILL = (128, 128, 128)


def _same(image: Image.Image, sign: int) -> Image.Image:
    return image


def _affine(image: Image.Image, shear_x: float = 0, shift_x: float = 0, shear_y: float = 0, shift_y: float = 0):
    """Move the content: output (x, y) shows input (x + shear_x y + shift_x, shear_y x + y + shift_y)."""
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        (1, shear_x, shift_x, shear_y, 1, shift_y),
        resample=Image.Resampling.BILINEAR,
        fillcolor=FILL,
    )


OPERATIONS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "Identity": _same,
    "AutoContrast": lambda image, sign: ImageOps.autocontrast(image),
    "Brightness": _same,
    "Sharpness": _same,
    "Equalize": lambda image, sign: ImageOps.equalize(image),
    "ShearX": lambda image, sign: _affine(image, shear_x=sign * SHEAR),
    "ShearY": lambda image, sign: _affine(image, shear_y=sign * SHEAR),
    "TranslateX": lambda image, sign: _affine(image, shift_x=sign * TRANSLATE),
    "TranslateY": lambda image, sign: _affine(image, shift_y=sign * TRANSLATE),
    "Rotate": lambda image, sign: image.rotate(sign * ROTATE, Image.Resampling.BILINEAR, fillcolor=FILL),
}
"""What each does at level 5; the second argument, 1 or -1, is the direction."""


def random_augment(image: Image.Image) -> Image.Image:
    """Apply two operations, drawn with replacement from torch's generator."""
    names = list(OPERATIONS)
    for _ in range(NUM_OPERATIONS):
        name = names[int(torch.randint(len(names), ()))]
        is_applied, sign = float(torch.rand(())) < PROBABILITY, 1 if float(torch.rand(())) < 0.5 else -1
        if is_applied:
            image = OPERATIONS[name](image, sign)
    return image
