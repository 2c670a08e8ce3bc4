"""From pixels to what fills an image's slots, as steps that follow one another: a training that changes the later ones
alone may keep what the earlier ones gave.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


class ImageStep(NamedTuple):
    """One step. Each picture is computed by itself, whatever else is in the batch."""

    name: str
    weights: tuple[nn.Module | nn.Parameter, ...]
    """What it computes with."""
    run: Callable[[torch.Tensor], torch.Tensor]
    """(images, ...) -> (images, ...); the first step takes `pixel_values`, the last one gives `image_features`."""
