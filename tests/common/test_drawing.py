"""Drawing: the release's pictures and colours exactly, then labels that are readable and inside the image."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageFont

from lavish.common.drawing import draw, fit, palette
from lavish.common.errors import MediaError
from lavish.common.grounding import Box, Grounding, parse

FIXTURE = Path(__file__).parents[1] / "fixtures/cogvlm/grounding"
GOLDEN = json.loads((FIXTURE / "expected/grounding.json").read_text())
GREY = (90, 90, 90)


def picture(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


@pytest.mark.parametrize("name", ["draw_wide", "draw_tall"])
def test_the_golden_pictures_are_equal_pixel_by_pixel(name: str) -> None:
    case = GOLDEN["cases"][name]
    boxes = [[Box(*(round(value * 1000) for value in box)) for box in group] for group in case["boxes"]]
    assert [[list(box.pixels(tuple(case["resized"]))) for box in group] for group in boxes] == case["absolute"]
    with (
        Image.open(FIXTURE / "inputs" / case["image"]) as image,
        Image.open(FIXTURE / "expected" / case["output"]) as expected,
    ):
        drawn = draw(image, [Grounding("", group, (0, 0)) for group in boxes], upscale=True, labels=False)
        assert drawn.size == expected.size == tuple(case["resized"])
        assert ImageChops.difference(drawn, expected.convert("RGB")).getbbox() is None


@pytest.mark.parametrize("count", GOLDEN["husl_palette"])
def test_the_palette_is_the_releases(count: str) -> None:
    assert palette(int(count)) == [tuple(colour) for colour in GOLDEN["husl_palette"][count]]


@pytest.mark.parametrize("name", GOLDEN["resize"])
def test_the_size_is_the_releases_when_small_images_are_enlarged(name: str) -> None:
    case = GOLDEN["resize"][name]
    assert fit(picture(*case["input"]), upscale=True).size == tuple(case["resized"])
    assert fit(picture(*case["input"])).size == tuple(case["input"])


@pytest.mark.parametrize(
    ("size", "expected"), [((4000, 3000), (1440, 1080)), ((20000, 1), (1920, 1)), ((1, 1), (1, 1))]
)
def test_large_images_are_made_to_fit(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit(picture(*size)).size == expected


def test_the_source_is_not_changed() -> None:
    image = picture(64, 48)
    drawn = draw(image, parse("a cat[[0,0,1000,1000]]"))
    assert image.getcolors() == [(64 * 48, GREY)]
    assert drawn.size == (64, 48)
    assert drawn.getcolors() != image.getcolors()


@pytest.mark.parametrize("size", [(1, 1), (1, 20), (3, 500), (50, 140), (112, 112), (640, 480), (1200, 40)])
def test_any_box_can_be_drawn_on_any_size(size: tuple[int, int]) -> None:
    entries = parse(
        "everything[[0,0,1000,1000]] a corner[[999,999,1000,1000]] a point [[0,0,0,0]] a label that is far too long "
        "for any picture of this size and goes on and on[[990,0,1000,10;0,990,10,1000]] 红色[[500,500,700,700]]"
    )
    assert draw(picture(*size), entries).size == size


@pytest.mark.parametrize(
    "box", ["000,000,050,050", "950,000,999,050", "000,950,050,999", "950,950,999,999", "0,0,1000,1000"]
)
def test_a_label_at_the_border_lies_inside_and_can_be_read(box: str) -> None:
    image = picture(400, 300)
    labelled = draw(image, parse(f"a cat[[{box}]]"))
    plain = draw(image, parse(f"a cat[[{box}]]"), labels=False)
    tag = ImageChops.difference(labelled, plain).convert("L").point(lambda value: 255 * (value > 0)).getbbox()
    assert tag is not None
    ink = [colour for _, colour in labelled.crop(tag).getcolors(100_000) if sum(colour) < 60]
    assert ink  # near-black letters on the tag
    assert draw(image, parse(f"a dog[[{box}]]")).tobytes() != labelled.tobytes()
    assert tag[2] - tag[0] >= 20  # the whole word, not a sliver cut at the border


def test_labels_of_neighbours_do_not_cover_one_another() -> None:
    image = picture(600, 400)
    both = draw(image, parse("first[[300,300,600,600]] second[[300,300,600,600]]"))
    colours = palette(2)
    counts = {colour: count for count, colour in both.getcolors(100_000)}
    assert all(counts.get(colour, 0) > 150 for colour in colours)


def test_letters_that_the_font_lacks_become_a_number_with_a_legend() -> None:
    entries = parse("a cat[[100,100,300,300]]，红色的圆形[[500,500,700,700;0,0,90,90]]和 é[[10,10,20,20]]")
    drawn = draw(picture(640, 480), entries)
    assert drawn.info["legend"] == {"2": "红色的圆形", "3": "é"}
    assert draw(picture(640, 480), entries[:1]).info["legend"] == {}


def test_equal_phrases_share_a_colour() -> None:
    drawn = draw(picture(200, 200), parse("a cat[[0,0,300,300]] A cat[[500,500,900,900]]"), labels=False)
    assert {colour for _, colour in drawn.getcolors()} == {GREY, *palette(1)}


def test_the_line_is_thinner_on_small_images_unless_given() -> None:
    def line_width(size: tuple[int, int], **options: int) -> int:
        drawn = draw(picture(*size), parse("[[0,0,1000,1000]]"), **options)
        return next(x for x in range(size[0]) if drawn.getpixel((x, size[1] // 2)) == GREY)

    assert line_width((1920, 1080)) == 5
    assert line_width((320, 240)) == 2
    assert line_width((320, 240), width=7) == 7


def test_a_font_can_be_given() -> None:
    entries = parse("a cat[[300,300,600,600]]")
    small, large = (draw(picture(400, 300), entries, font=ImageFont.load_default(size)) for size in (10, 40))
    assert small.tobytes() != large.tobytes()
    with pytest.raises(MediaError, match="no font that Pillow can read"):
        draw(picture(40, 30), entries, font="no-such-font.ttf")


def test_a_box_of_the_releases_reader_with_three_numbers_is_left_out() -> None:
    drawn = draw(picture(40, 30), parse("a cat [[10,20,30]] [[1,2,3,4]]", compat="cogvlm"), labels=False)
    assert drawn.getcolors() != [(1200, GREY)]
