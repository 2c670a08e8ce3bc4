"""Pixels: equal to the fixtures of both CogVLM releases, whatever Pillow is installed."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from lavish.processors.pixels import CLIP_MEAN, CLIP_STD, normalize, resize_two_pass, to_rgb

FIXTURES = Path(__file__).parent.parent / "fixtures"
PICTURES = ("landscape.png", "portrait.png", "square.png")


@pytest.mark.parametrize("family", ["cogvlm", "cogvlm2"])
@pytest.mark.parametrize("picture", PICTURES)
def test_fixture_pixels(family, picture):
    folder = FIXTURES / family / "open"
    expected = load_file(folder / "expected.safetensors")[f"pixels.{picture}"]
    with Image.open(folder / "inputs" / picture) as image:
        found = normalize(resize_two_pass(to_rgb(image), expected.shape[:0:-1]), CLIP_MEAN, CLIP_STD)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)  # the facts allow 1e-5; nothing is lost on the way


def test_size_is_width_then_height():
    assert resize_two_pass(Image.new("RGB", (9, 7)), (4, 3)).size == (4, 3)


def test_alpha_is_dropped_not_blended():
    image = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert to_rgb(image).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "I", "RGB"])
def test_any_mode_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def _noise(width: int, height: int) -> Image.Image:
    levels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


@pytest.mark.parametrize("size", [(97, 61), (45, 120), (33, 91), (7, 700), (500, 3)])
def test_the_passes_are_horizontal_then_vertical(size):
    image = _noise(*size)
    expected = image.resize((56, size[1]), Image.Resampling.BICUBIC).resize((56, 40), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(resize_two_pass(image, (56, 40))), np.asarray(expected))


def test_very_tall_pictures_that_shrink_go_vertical_first():
    tall = _noise(4, 401)  # more than 100 times taller than wide
    vertical_first = tall.resize((4, 56), Image.Resampling.BICUBIC).resize((56, 56), Image.Resampling.BICUBIC)
    horizontal_first = tall.resize((56, 401), Image.Resampling.BICUBIC).resize((56, 56), Image.Resampling.BICUBIC)
    assert not np.array_equal(np.asarray(vertical_first), np.asarray(horizontal_first))
    assert np.array_equal(np.asarray(resize_two_pass(tall, (56, 56))), np.asarray(vertical_first))
    at_the_limit = _noise(4, 400)
    expected = at_the_limit.resize((56, 400), Image.Resampling.BICUBIC).resize((56, 56), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(resize_two_pass(at_the_limit, (56, 56))), np.asarray(expected))


@pytest.mark.skipif(int(Image.__version__.split(".")[0]) >= 13, reason="Pillow 13 chooses its own pass order")
@pytest.mark.parametrize("size", [(97, 61), (45, 120), (33, 91), (4, 401), (4, 400), (1, 1), (300, 2)])
def test_equals_one_call_of_older_pillow(size):
    image = _noise(*size)
    expected = image.resize((56, 56), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(resize_two_pass(image, (56, 56))), np.asarray(expected))


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_extreme_shapes(size):
    pixels = normalize(resize_two_pass(Image.new("RGB", size, (255, 0, 128)), (56, 56)), CLIP_MEAN, CLIP_STD)
    assert pixels.shape == (3, 56, 56)
    assert (
        pixels[0].max()
        == pixels[0].min()
        == np.float32((np.float32(1) - np.float32(CLIP_MEAN[0])) / np.float32(CLIP_STD[0]))
    )
