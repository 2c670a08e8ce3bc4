"""Frames of a video as CogVLM2-Video and cogvlm2-llama3-caption take them: which, and as which pixels.

Source: the release's video_demo/inference.py (sampling) and modeling_cogvlm.py of cogvlm2-llama3-caption (pixels), read
through the copy csbhr/Vivid-VR, VRDiT/cogvlm2-llama3-caption; the sampling by what is published of it. Unlike the
image models the frames are normalised first, then resized without antialiasing by their short side, and cropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lavish.common.errors import MediaError
from lavish.common.video import sample_frames
from lavish.processors.pixels import CLIP_MEAN, CLIP_STD, normalize

BASE_SECONDS = 60.0
"""How much of a clip a base model sees."""


def read_clip(source: Any, max_frames: int, *, is_base: bool, allow_paths: bool = True) -> list[Any]:
    """Give the frames of a video that the release would take; a list of pictures are the frames already.

    Trap: a chat model sees one frame a second of the first `max_frames` seconds, and nothing of what follows. A base
    model sees `max_frames` frames of the first minute, some twice where there are fewer.

    Raises:
        MediaError: as `lavish.common.video.sample_frames`; also more pictures than `max_frames`.
        MissingDependency: PyAV is not installed.
    """
    if isinstance(source, list | tuple):
        if len(source) > max_frames:
            raise MediaError(
                f"{len(source)} frames were given and this model takes {max_frames}. Choose among them, or give the "
                "video itself."
            )
        return sample_frames(source, lambda times: range(len(times)))
    rule: Callable[[Sequence[float], int], list[int]] = base_frames if is_base else chat_frames
    return sample_frames(source, lambda times: rule(times, max_frames), allow_paths=allow_paths)


def chat_frames(times: Sequence[float], max_frames: int) -> list[int]:
    """Give the frame nearest to each whole second, the first of two that are as near."""
    seconds = np.arange(min(round(max(times)) + 1, max_frames))
    distances = np.abs(np.asarray(times)[None, :] - seconds[:, None])  # (seconds, frames)
    return distances.argmin(axis=1).tolist()


def base_frames(times: Sequence[float], max_frames: int) -> list[int]:
    """Give `max_frames` frames spread over the first minute, by the clip's mean rate."""
    rate = (len(times) - 1) / times[-1] if len(times) > 1 and times[-1] > 0 else 1.0
    end = max(min(len(times), int(BASE_SECONDS * rate)), 1)
    return np.linspace(0, end - 1, max_frames, dtype=int).tolist()


def frame_pixels(frame: Any, image_size: int) -> np.ndarray:
    """Give one frame as the tower takes it: normalised, short side to `image_size` (bilinear, no antialiasing; the long
    side rounded down), the middle cut out. Pictures of any mode. -> (3, image_size, image_size) float32.
    """
    pixels = torch.from_numpy(normalize(frame, CLIP_MEAN, CLIP_STD))
    height, width = pixels.shape[1:]
    short = min(height, width)
    size = [image_size if side == short else side * image_size // short for side in (height, width)]
    scaled = F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0]
    top, left = (round((side - image_size) / 2.0) for side in size)
    return scaled[:, top : top + image_size, left : left + image_size].numpy()
