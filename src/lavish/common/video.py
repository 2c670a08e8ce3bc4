"""Pictures out of a video: the times of all frames first, then only the frames that were chosen.

`read_frames` spreads them over the whole clip; `sample_frames` takes a rule of its own on the times. Needs PyAV (extra
`video`), imported on use. A video may be a stranger's: only container formats that hold their own frames are opened
(no playlist that names other files or URLs), and nothing is fetched. Frames stand as a player shows them: the matrix by
which phones turn them is followed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lavish.common.errors import ConfigError, MediaError, MissingDependency, shown

if TYPE_CHECKING:
    from PIL import Image

FORMATS = "mov,matroska,webm,avi,gif,flv,asf,mpeg,mpegts,ogg,m4v,mjpeg,apng"
"""Names of FFmpeg's readers that may open a video: containers of frames, none that follows a reference elsewhere."""


@dataclass(frozen=True)
class VideoLimits:
    """Bounds within which a video is read."""

    max_video_bytes: int = 2_000_000_000
    """Encoded size, bytes."""
    max_frames: int = 400_000
    """Frames of the clip (3.7 hours at 30 a second): all of them are looked at once, none is kept."""
    max_pixels: int = 40_000_000
    """Width times height of a frame."""


DEFAULT_LIMITS = VideoLimits()


def read_frames(
    source: Any, num_frames: int, *, limits: VideoLimits = DEFAULT_LIMITS, allow_paths: bool = True
) -> list[Image.Image]:
    """Give `num_frames` RGB pictures spread evenly over the whole clip, its first and last frame among them.

    A clip of fewer frames gives all that it has; for a single one its middle. `source`: a path, the encoded bytes, an
    open binary file, or a sequence of Pillow images, which are the frames already.

    Raises:
        ConfigError: `num_frames` is no whole number above 0.
        MediaError: not a video, damaged, over a limit, or without frames.
        MissingDependency: PyAV is not installed.
    """
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise ConfigError(f"num_frames must be a whole number, at least 1, not {shown(num_frames)}.")
    return sample_frames(source, lambda times: spread(len(times), num_frames), limits=limits, allow_paths=allow_paths)


def spread(num_frames: int, count: int) -> list[int]:
    """Give `count` (or all, if there are fewer) indices from the first to the last of `num_frames` frames.

    Trap: the release steps by whole frames from the start (`max(1, total // count)`): 32 of 63 frames end at frame 31,
    in the middle of the clip. Source: Coobiw/MPP-LLaVA, webui_demo.py.
    """
    if count >= num_frames:
        return list(range(num_frames))
    if count == 1:
        return [num_frames // 2]
    return [round(index * (num_frames - 1) / (count - 1)) for index in range(count)]


def sample_frames(
    source: Any,
    choose: Callable[[Sequence[float]], Sequence[int]],
    *,
    limits: VideoLimits = DEFAULT_LIMITS,
    allow_paths: bool = True,
) -> list[Image.Image]:
    """Give the frames that `choose` names, in its order: it gets the time of every frame in seconds, from 0.

    Raises: as `read_frames`; also MediaError if `choose` names no frame, or one that is not there.
    """
    if isinstance(source, list | tuple):
        return _of_pictures(source, choose)
    av = _av()
    label = f"the video {os.fspath(source)!r:.200}" if isinstance(source, str | os.PathLike) else "the video"
    content = _content(source, label, limits, allow_paths)
    with content:
        times = _read(av, content, label, limits, lambda container: _times(container, label, limits))
        chosen = _chosen(choose, times, label)
        content.seek(0)
        found = _read(av, content, label, limits, lambda container: _pictures(container, set(chosen)))
    missing = [index for index in chosen if index not in found]
    if missing:
        raise MediaError(f"{label}: frame {missing[0]} of {len(times)} cannot be decoded; the file is damaged.")
    return [found[index] for index in chosen]


def _of_pictures(source: Sequence[Any], choose: Callable[[Sequence[float]], Sequence[int]]) -> list[Image.Image]:
    from lavish.common.media import open_image

    pictures = [open_image(frame) for frame in source]
    times = [float(index) for index in range(len(pictures))]
    return [pictures[index] for index in _chosen(choose, times, "the list of frames")]


def _chosen(choose: Callable[[Sequence[float]], Sequence[int]], times: Sequence[float], label: str) -> list[int]:
    if not times:
        raise MediaError(f"{label}: holds no frames.")
    chosen = list(choose(times))
    wrong = [index for index in chosen if not 0 <= index < len(times)]
    if wrong or not chosen:
        asked = f"frame {wrong[0]}" if wrong else "no frame"
        raise MediaError(f"{label}: {asked} was asked, and it has frames 0 to {len(times) - 1}.")
    return chosen


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingDependency(
            "Reading a video needs PyAV, which is not installed: pip install 'lavish[video]'. Without it, give the "
            "frames as a list of images."
        ) from error
    return av


def _content(source: Any, label: str, limits: VideoLimits, allow_paths: bool) -> Any:
    """Give an open, seekable binary file: FFmpeg is never handed a name, which it might take for a URL."""
    if isinstance(source, str | os.PathLike):
        if not allow_paths:
            raise MediaError("This video is named by a path, and paths are not opened here; send its bytes.")
        path = os.fspath(source)
        if not os.path.isfile(path):
            kind = "is no regular file" if os.path.exists(path) else f"does not exist (looked from {os.getcwd()!r})"
            raise MediaError(f"{label} {kind}; give the path of a video file. URLs are not fetched.")
        content: Any = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    elif isinstance(source, bytes | bytearray | memoryview):
        content = io.BytesIO(source)
    elif callable(getattr(source, "read", None)):  # binary files have no common base class
        content = io.BytesIO(source.read(limits.max_video_bytes + 1))
    else:
        raise MediaError(
            f"A video cannot be opened from {type(source).__name__}; give a path, bytes, an open binary file, or a "
            "list of images."
        )
    size = content.seek(0, os.SEEK_END)
    content.seek(0)
    if size > limits.max_video_bytes:
        content.close()
        raise MediaError(f"{label}: {size} bytes, over the limit of {limits.max_video_bytes}.")
    return content


def _read(av: Any, content: Any, label: str, limits: VideoLimits, what: Callable[[Any], Any]) -> Any:
    """Open the container, check it, and run `what` on it."""
    try:
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
        with closing(av.open(content, mode="r", options=options)) as container:
            if not container.streams.video:
                raise MediaError(f"{label}: a {container.format.name} file without pictures.")
            size = container.streams.video[0].codec_context
            if size.width * size.height > limits.max_pixels:
                raise MediaError(
                    f"{label}: frames of {size.width} x {size.height}, over the limit of {limits.max_pixels} pixels."
                )
            return what(container)
    except (av.error.FFmpegError, ValueError, EOFError, OSError, LookupError) as error:
        if isinstance(error, MediaError):
            raise
        reason = str(getattr(error, "strerror", None) or error).lower()  # FFmpeg's errors and OSError have a strerror
        raise MediaError(f"{label}: not a video that can be read ({reason}).") from error


def _times(container: Any, label: str, limits: VideoLimits) -> list[float]:
    """Give the time of every frame, in the order in which they are shown. All are decoded: what packets say of their
    number and times is not always so.
    """
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    times: list[float] = []
    for frame in container.decode(stream):
        times.append(float(len(times)) if frame.time is None else float(frame.time))
        if len(times) > limits.max_frames:
            raise MediaError(f"{label}: over {limits.max_frames} frames; cut it into shorter clips.")
    return [time - times[0] for time in times]


def _pictures(container: Any, wanted: set[int]) -> dict[int, Image.Image]:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    found: dict[int, Image.Image] = {}
    for index, frame in enumerate(container.decode(stream)):
        if index in wanted:
            found[index] = _upright(frame)
        if len(found) == len(wanted):
            break
    return found


def _upright(frame: Any) -> Image.Image:
    """Give a frame as players show it: a phone held upright writes its frames lying, and a matrix that turns them.

    Quarter turns alone are made, the only ones that cameras write; `rotation` counts them against the clock.
    """
    from PIL import Image

    picture = frame.to_image()
    turns = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    turn = turns.get(round(frame.rotation) % 360)
    return picture if turn is None else picture.transpose(turn)
