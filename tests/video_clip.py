"""A clip that goes from black to white: the level of a frame says where it stands. Tests with it need PyAV."""

import io

import numpy as np
import pytest


def clip(num_frames: int, *, size: int = 64, rate: int = 10) -> bytes:
    """Make an mp4; skips the test where PyAV is not installed."""
    av = pytest.importorskip("av")
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for index in range(num_frames):
            level = index * 255 // max(num_frames - 1, 1)
            picture = np.full((size, size, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return content.getvalue()
