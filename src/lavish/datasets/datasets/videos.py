"""Videos as samples: read by a processor of one's own, or frame by frame by a picture processor.

LAVIS's video processors take a path; ours are for pictures, so the frames are spread evenly over the clip, processed
alike (one random crop for all of a clip) and stacked behind the colour axis, as LAVIS's ALPRO processors do.
Source: salesforce/LAVIS, lavis/processors/alpro_processors.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lavish.common.video import read_frames
from lavish.processors.blip_processors import ImageProcessor

NUM_FRAMES = 8
"""Frames of a clip, where `build_info.num_frames` does not say."""


def read_video(processor: Any, path: Path, num_frames: int) -> Any:
    """Give what the processor makes of a video; a picture processor gives (3, num_frames, S, S).

    A clip of fewer frames repeats its last one, so that clips can be stacked.

    Raises:
        MediaError: no video, damaged or without frames.
        MissingDependency: PyAV is not installed.
    """
    if not isinstance(processor, ImageProcessor):
        return processor(str(path))
    frames = read_frames(path, num_frames)
    frames += frames[-1:] * (num_frames - len(frames))
    state = torch.get_rng_state()
    processed = []
    for frame in frames:
        torch.set_rng_state(state)
        processed.append(processor(frame))
    return torch.stack(processed, dim=1)
