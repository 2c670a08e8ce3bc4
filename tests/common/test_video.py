"""Frames of a video: spread over the whole clip, by a rule of one's own, and what is refused."""

import builtins
import io
import struct

import numpy as np
import pytest
from PIL import Image
from video_clip import clip

from lavish.common.errors import ConfigError, MediaError, MissingDependency
from lavish.common.video import VideoLimits, read_frames, sample_frames, spread

av = pytest.importorskip("av")


def levels(frames: list[Image.Image]) -> list[float]:
    return [float(np.asarray(frame).mean()) for frame in frames]


def test_the_last_second_is_reached():
    """Trap 14: 32 of 63 frames by whole steps end at frame 31."""
    frames = read_frames(clip(63), 32)
    assert len(frames) == 32
    found = levels(frames)
    assert found == sorted(found)
    assert found[0] < 8
    assert found[-1] > 247
    assert all(frame.mode == "RGB" and frame.size == (64, 64) for frame in frames)


@pytest.mark.parametrize(
    ("num_frames", "count", "expected"),
    [(10, 1, [5]), (10, 2, [0, 9]), (3, 8, [0, 1, 2]), (5, 5, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8])],
)
def test_spread(num_frames, count, expected):
    assert spread(num_frames, count) == expected


def test_a_short_clip_gives_all_it_has(tmp_path):
    path = tmp_path / "short clip.mp4"
    path.write_bytes(clip(3))
    assert len(read_frames(path, 8)) == 3
    assert len(read_frames(str(path), 8)) == 3
    with path.open("rb") as file:
        assert len(read_frames(file, 2)) == 2


def test_times_are_in_seconds():
    seen = []
    frames = sample_frames(clip(21, rate=10), lambda times: seen.extend(times) or [20, 0])
    assert seen == pytest.approx([index / 10 for index in range(21)])
    assert levels(frames)[0] > 247
    assert levels(frames)[1] < 8


def test_frames_may_be_given_as_pictures():
    pictures = [Image.new("L", (4, 4), level) for level in (0, 100, 200)]
    assert levels(read_frames(pictures, 2)) == [0, 200]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "not a video"),
        (b"no video at all", "not a video"),
        (clip(20)[:400], "not a video"),
        (b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n#EXT-X-ENDLIST\n", "not a video"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "not a video"),
        ("nowhere.mp4", "does not exist"),
        ("https://example.org/clip.mp4", "URLs are not fetched"),
        (".", "no regular file"),
        (7, "cannot be opened from int"),
        ([], "holds no frames"),
    ],
)
def test_what_is_no_video(source, message):
    with pytest.raises(MediaError, match=message):
        read_frames(source, 4)


def test_sound_alone_has_no_frames():
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="without pictures"):
        read_frames(content.getvalue(), 4)


def test_limits():
    video = clip(20)
    with pytest.raises(MediaError, match="over the limit of 10"):
        read_frames(video, 2, limits=VideoLimits(max_video_bytes=10))
    with pytest.raises(MediaError, match="over 5 frames"):
        read_frames(video, 2, limits=VideoLimits(max_frames=5))
    with pytest.raises(MediaError, match="64 x 64, over the limit"):
        read_frames(video, 2, limits=VideoLimits(max_pixels=100))
    with pytest.raises(MediaError, match="paths are not opened here"):
        read_frames("clip.mp4", 2, allow_paths=False)
    for count in (0, True, 1.5):
        with pytest.raises(ConfigError, match="num_frames"):
            read_frames(video, count)
    with pytest.raises(MediaError, match="frame 20 was asked"):
        sample_frames(video, lambda _: [20])


def test_without_av(monkeypatch):
    found = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingDependency, match=r"pip install 'lavish\[video\]'"):
        read_frames(b"...", 4)


def lying_clip(matrix: tuple[int, int, int, int]) -> bytes:
    """Make an mp4 of 96 x 64 with a white upper left quarter, which its track header turns by (a, b, c, d)."""
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        picture = np.zeros((64, 96, 3), np.uint8)
        picture[:32, :48] = 255
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    header = content.getvalue().index(b"tkhd") + 4
    at = header + 40  # version and flags, times, number, length, place: 40 bytes in version 0
    a, b, c, d = (value * 0x10000 for value in matrix)
    rows = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    made = content.getvalue()
    assert made[header] == 0
    assert made[at : at + 36] == struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    return made[:at] + rows + made[at + 36 :]


@pytest.mark.parametrize(
    ("matrix", "size", "corner"),
    [
        ((1, 0, 0, 1), (96, 64), (0, 0)),
        ((0, 1, -1, 0), (64, 96), (1, 0)),  # right becomes down: a quarter turn with the clock
        ((-1, 0, 0, -1), (96, 64), (1, 1)),
        ((0, -1, 1, 0), (64, 96), (0, 1)),
    ],
)
def test_frames_of_a_phone_are_turned_upright(matrix, size, corner):
    (frame,) = read_frames(lying_clip(matrix), 1)
    assert frame.size == size
    width, height = size
    levels_of = {
        (x, y): np.asarray(frame)[y * height // 2 :, x * width // 2 :][: height // 2, : width // 2].mean()
        for x in (0, 1)
        for y in (0, 1)
    }
    assert {place for place, level in levels_of.items() if level > 128} == {corner}
