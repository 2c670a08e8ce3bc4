"""The named processors of BLIP in LAVIS: pictures to tensors, and the cleaning of captions and questions.

Source: salesforce/LAVIS, lavis/processors/{blip_processors,clip_processors}.py; base_instruction and base_text are of
Coobiw/MPP-LLaVA. Evaluation pixels equal those of LAVIS bit for bit, whatever Pillow is installed
(`processors/pixels.py`). The training processors follow LAVIS's description; their random draws come from torch's
generator, and no seed is promised to give the numbers that it gives in LAVIS.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from lavish.common.errors import ConfigError, MediaError, shown
from lavish.processors.augment import random_augment
from lavish.processors.base_processor import BaseProcessor
from lavish.processors.pixels import CLIP_MEAN, CLIP_STD, normalize, resize_two_pass, to_rgb

PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
"""What is taken out of captions and questions; `?` and `,` stay."""


class ImageProcessor(BaseProcessor):
    """The size and the mean and deviation of the pixels, which all picture processors share."""

    def __init__(self, image_size: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
            raise ConfigError(f"image_size is {shown(image_size)} and must be a whole number of pixels above 0.")
        self.image_size = image_size
        self.mean = CLIP_MEAN if mean is None else tuple(mean)
        self.std = CLIP_STD if std is None else tuple(std)
        if len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise ConfigError(f"mean {self.mean} and std {self.std}: three numbers each, those of std above 0.")

    def __call__(self, item: Any) -> torch.Tensor:
        """Give the pixels of one picture: (3, image_size, image_size) float32."""
        if not isinstance(item, Image.Image):
            raise MediaError(f"{type(self).__name__} takes a PIL picture, not {shown(item)} ({type(item).__name__}).")
        return torch.from_numpy(np.ascontiguousarray(normalize(self.cut(to_rgb(item)), self.mean, self.std)))

    def cut(self, image: Image.Image) -> Image.Image:
        """Bring an RGB picture to image_size x image_size."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it cuts; override cut(image).")


class BlipImageEvalProcessor(ImageProcessor):
    """Resize to the square, bicubic; the aspect ratio is not kept."""

    def __init__(self, image_size: int = 384, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        super().__init__(image_size, mean, std)

    def cut(self, image: Image.Image) -> Image.Image:
        """Resize to the square."""
        return resize_two_pass(image, (self.image_size, self.image_size))


class ClipImageEvalProcessor(ImageProcessor):
    """Resize the short side, bicubic (the other side is truncated to a whole number), and cut out the centre."""

    def __init__(self, image_size: int = 224, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        super().__init__(image_size, mean, std)

    def cut(self, image: Image.Image) -> Image.Image:
        """Resize, then crop."""
        size, short = self.image_size, min(image.size)
        width, height = (int(size * side / short) if side != short else size for side in image.size)
        resized = resize_two_pass(image, (width, height))
        left, top = round((width - size) / 2.0), round((height - size) / 2.0)
        return resized.crop((left, top, left + size, top + size))


class RandomCropProcessor(ImageProcessor):
    """Cut a random part of the picture out and resize it to the square, bicubic.

    `min_scale` to `max_scale` is the part's share of the area; its sides are between 3:4 and 4:3.
    """

    def __init__(
        self,
        image_size: int,
        min_scale: float,
        max_scale: float,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        super().__init__(image_size, mean, std)
        if not 0 < min_scale <= max_scale <= 1:
            raise ConfigError(f"min_scale {min_scale}, max_scale {max_scale}: shares of the area, 0 < min <= max <= 1.")
        self.min_scale, self.max_scale = min_scale, max_scale

    def cut(self, image: Image.Image) -> Image.Image:
        """Crop at random, then resize."""
        left, top, width, height = random_box(image.width, image.height, self.min_scale, self.max_scale)
        part = image.crop((left, top, left + width, top + height))
        return resize_two_pass(part, (self.image_size, self.image_size))


class ClipImageTrainProcessor(RandomCropProcessor):
    """A random part of nearly the whole picture; no flip."""

    def __init__(
        self,
        image_size: int = 224,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        min_scale: float = 0.9,
        max_scale: float = 1.0,
    ):
        super().__init__(image_size, min_scale, max_scale, mean, std)


class Blip2ImageTrainProcessor(RandomCropProcessor):
    """A random part, flipped in one of two cases."""

    def __init__(
        self,
        image_size: int = 364,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        min_scale: float = 0.5,
        max_scale: float = 1.0,
    ):
        super().__init__(image_size, min_scale, max_scale, mean, std)

    def cut(self, image: Image.Image) -> Image.Image:
        """Crop, resize, flip."""
        part = super().cut(image)
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if uniform(0, 1) < 0.5 else part


class BlipImageTrainProcessor(Blip2ImageTrainProcessor):
    """The same, then two of ten small changes (`processors/augment.py`)."""

    def __init__(
        self,
        image_size: int = 384,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        min_scale: float = 0.5,
        max_scale: float = 1.0,
    ):
        super().__init__(image_size, mean, std, min_scale, max_scale)

    def cut(self, image: Image.Image) -> Image.Image:
        """Crop, resize, flip, change."""
        return random_augment(super().cut(image))


def random_box(width: int, height: int, min_scale: float, max_scale: float) -> tuple[int, int, int, int]:
    """Draw (left, top, width, height) of a part; after ten misses the largest centred one of an allowed shape.

    Source: torchvision's documentation of RandomResizedCrop, which LAVIS uses with its ratio 3/4 to 4/3.
    """
    for _ in range(10):
        area = width * height * uniform(min_scale, max_scale)
        ratio = math.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
        part_width, part_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < part_width <= width and 0 < part_height <= height:
            top = int(torch.randint(height - part_height + 1, ()))
            left = int(torch.randint(width - part_width + 1, ()))
            return left, top, part_width, part_height
    part_width, part_height = width, height
    if width / height < 3 / 4:
        part_height = min(height, round(width / (3 / 4)))
    elif width / height > 4 / 3:
        part_width = min(width, round(height * (4 / 3)))
    return (width - part_width) // 2, (height - part_height) // 2, part_width, part_height


def uniform(low: float, high: float) -> float:
    """Draw a number from torch's generator, which data loaders seed for each worker."""
    return low + (high - low) * float(torch.rand(()))


class BlipCaptionProcessor(BaseProcessor):
    """Clean a caption and put the prompt in front of it."""

    def __init__(self, prompt: str = "", max_words: int = 50):
        self.prompt = prompt
        self.max_words = _max_words(max_words)

    def __call__(self, item: Any) -> str:
        """Give the cleaned caption; stop characters become spaces, runs of white space one space."""
        caption = re.sub(r"\s{2,}", " ", PUNCTUATION.sub(" ", _text(self, item).lower()))
        caption = caption.rstrip("\n").strip(" ")
        return self.prompt + _first_words(caption, self.max_words)


class BlipQuestionProcessor(BaseProcessor):
    """Clean a question."""

    def __init__(self, max_words: int = 50):
        self.max_words = _max_words(max_words)

    def __call__(self, item: Any) -> str:
        """Give the cleaned question; stop characters are taken out, inner spaces stay."""
        return _first_words(PUNCTUATION.sub("", _text(self, item).lower()).rstrip(" "), self.max_words)


class BaseInstructionProcessor(BaseProcessor):
    """Leave an instruction as it is. `max_words` is read and has no effect, as in the release."""

    def __init__(self, max_words: int | None = None):
        self.max_words = max_words

    def __call__(self, item: Any) -> str:
        """Give the text itself."""
        return _text(self, item)


class BaseTextProcessor(BaseProcessor):
    """Lower case, without trailing spaces, cut after `max_words`."""

    def __init__(self, max_words: int = 50):
        self.max_words = _max_words(max_words)

    def __call__(self, item: Any) -> str:
        """Give the cleaned text."""
        return _first_words(_text(self, item).lower().rstrip(" "), self.max_words)


def _first_words(text: str, max_words: int) -> str:
    """Cut after `max_words` words; single spaces separate them, so two spaces hold an empty word."""
    return " ".join(text.split(" ")[:max_words])


def _max_words(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"max_words is {shown(value)} and must be a whole number above 0.")
    return value


def _text(processor: BaseProcessor, item: Any) -> str:
    if not isinstance(item, str):
        raise ConfigError(f"{type(processor).__name__} takes a text, not {shown(item)} ({type(item).__name__}).")
    return item
