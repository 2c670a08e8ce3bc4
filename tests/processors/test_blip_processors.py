"""The named processors against LAVIS's own output: pixels and texts exactly; the random ones by what they promise."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from lavish.common.errors import ConfigError, MediaError
from lavish.common.registry import registry
from lavish.processors import augment, blip_processors
from lavish.processors.base_processor import BaseProcessor

FIXTURE = Path(__file__).resolve().parent.parent / "fixtures" / "lavis_processors" / "open"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))
TEXTS = json.loads((FIXTURE / "inputs" / "texts.json").read_text(encoding="utf-8"))["texts"]
TRAIN = ("blip_image_train", "blip2_image_train", "clip_image_train")


def stored() -> list[str]:
    with safe_open(FIXTURE / "expected.safetensors", "pt") as file:
        return list(file.keys())


def processor(name: str, **settings) -> BaseProcessor:
    return registry.get_processor_class(name).from_config({"name": name, **settings})


def picture(name: str = "img0.png") -> Image.Image:
    with Image.open(FIXTURE / "inputs" / name) as image:
        return image.convert("RGB")


@pytest.mark.parametrize("key", stored())
def test_pixels_of_evaluation(key: str) -> None:
    name, *middle, size, file = key.replace(".png", "").split(".")
    normal = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 1.0]} if middle else {}
    with safe_open(FIXTURE / "expected.safetensors", "pt") as opened:
        expected = opened.get_tensor(key)
    actual = processor(name, image_size=int(size), **normal)(picture(f"{file}.png"))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("key", EXPECTED)
def test_texts(key: str) -> None:
    name, _, settings = key.partition("{")
    cleaned = [processor(name, **json.loads("{" + settings))(text) for text in TEXTS]
    assert cleaned == EXPECTED[key]


def test_base_text() -> None:
    assert processor("base_text", max_words=3)("A Big  Red Cat  ") == "a big "


@pytest.mark.parametrize("name", TRAIN)
def test_training_pixels(name: str) -> None:
    make, square = processor(name, image_size=32), picture().resize((60, 60))
    torch.manual_seed(1)
    drawn = [make(square) for _ in range(6)]
    torch.manual_seed(1)
    again = [make(square) for _ in range(6)]
    assert all(value.shape == (3, 32, 32) and value.dtype == torch.float32 for value in drawn)
    assert all(torch.equal(one, other) for one, other in zip(drawn, again, strict=True))
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("size", [(64, 48), (20, 200), (300, 10), (1, 1)])
def test_boxes_lie_inside(size: tuple[int, int]) -> None:
    for _ in range(100):
        left, top, width, height = blip_processors.random_box(*size, 0.5, 1.0)
        assert left >= 0
        assert top >= 0
        assert 0 < width <= size[0] - left
        assert 0 < height <= size[1] - top


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_changes(name: str, sign: int) -> None:
    image = picture()
    changed = augment.OPERATIONS[name](image, sign)
    assert (changed.size, changed.mode) == (image.size, "RGB")
    if name in ("Identity", "Brightness", "Sharpness"):
        assert changed.tobytes() == image.tobytes()
    if name in ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"):
        pixels = [changed.getpixel((x, y)) for x in (0, image.width - 1) for y in (0, image.height - 1)]
        assert augment.FILL in pixels, "what comes in from outside is grey"


def test_the_base_gives_its_input_back() -> None:
    thing = object()
    assert BaseProcessor.from_config()(thing) is thing
    assert BaseProcessor.build()(3) == 3


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("blip_image_eval", {"image_sise": 3}, "image_sise.*Did you mean 'image_size'"),
        ("blip_image_eval", {"image_size": 0}, "image_size is 0"),
        ("blip_image_eval", {"std": [1, 0, 1]}, "above 0"),
        ("blip_image_train", {"min_scale": 2.0}, "min_scale 2.0"),
        ("blip_caption", {"max_words": "3"}, "max_words is '3'"),
    ],
)
def test_wrong_settings(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        processor(name, **settings)


def test_wrong_items() -> None:
    with pytest.raises(MediaError, match=r"takes a PIL picture, not 'photo\.jpg'"):
        processor("blip_image_eval")("photo.jpg")
    with pytest.raises(ConfigError, match="takes a text, not 3"):
        processor("blip_caption")(3)


def test_a_processor_by_name():
    from lavish.processors import load_processor

    assert load_processor("blip_caption", {"prompt": "a "})("Red Dog.") == "a red dog"
    assert load_processor("blip_question")("What?!") == "what?"
    with pytest.raises(ConfigError, match="Did you mean 'blip_caption'"):
        load_processor("blip_captoin")
