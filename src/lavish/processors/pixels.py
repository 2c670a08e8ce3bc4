"""Pictures to pixel arrays, equal whatever Pillow is installed. No torch here, and nothing is opened.

Trap: Pillow 13 resizes vertical first in many cases, older versions horizontal first, which moves single pixels by up
to 15 of 255 levels. The released models ran on the old order, so both passes are done here one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Pillow < 13 itself takes the vertical pass first for pictures this many times taller than wide that shrink in height.
TALL_RATIO = 100


def to_rgb(image: Image.Image) -> Image.Image:
    """Give the picture as RGB; an alpha channel is dropped, not blended on a background, as the releases do."""
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_two_pass(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Resize with antialiasing in two explicit passes, horizontal then vertical, each rounded to 8 bits.

    Shapes: `size` is (width, height), as in PIL; the aspect ratio is not kept. Equals `image.resize(size, resample)` of
    Pillow < 13 bit for bit, also for pictures over 100 times taller than wide that shrink in height: those go vertical
    first, as they did there.
    """
    width, height = size
    vertical_first = image.height > TALL_RATIO * image.width and height < image.height
    middle = (image.width, height) if vertical_first else (width, image.height)
    return image.resize(middle, resample).resize((width, height), resample)


def normalize(image: Image.Image, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> np.ndarray:
    """Give an RGB picture as float32 (3, height, width): levels / 255, minus `mean`, over `std`, all in float32."""
    levels = np.asarray(to_rgb(image), dtype=np.uint8).transpose(2, 0, 1)
    pixels = levels.astype(np.float32) / np.float32(255)
    channel_shape = (3, 1, 1)
    return (pixels - np.asarray(mean, np.float32).reshape(channel_shape)) / np.asarray(std, np.float32).reshape(
        channel_shape
    )


def clip_square(image: Image.Image, side: int) -> np.ndarray:
    """Give a picture as most towers take it: RGB, bicubic with antialiasing to a square, CLIP's mean and std.

    The aspect ratio is not kept, and alpha is dropped. Shapes: (3, side, side), float32.
    """
    return normalize(resize_two_pass(to_rgb(image), (side, side)))
