"""Draw grounded phrases on a picture: boxes, and labels that stay readable and inside the image.

Source of sizes, rounding and colours: CogVLM release, utils/utils/grounding_parser.py, with seaborn's husl palette.
With `upscale=True, labels=False` the pixels equal the release's. Nothing here writes a file or looks for fonts.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lavish.common.boxes import Grounding
from lavish.common.errors import MediaError

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.TransposedFont | ImageFont.ImageFont
Area = tuple[int, int, int, int]

FULL_SIZE = (1920, 1080)  # where the release's line width of 5 and text of 26 pixels hold
FONT_SIZE = 26
MIN_FONT_SIZE = 11


def draw(
    image: Image.Image,
    groundings: Iterable[Grounding],
    *,
    max_size: tuple[int, int] = FULL_SIZE,
    upscale: bool = False,
    width: int | None = None,
    labels: bool = True,
    font: Font | str | Path | None = None,
) -> Image.Image:
    """Give a copy of `image` in RGB, fitted into `max_size` (width, height), with the boxes of `groundings` on it.

    Each phrase has its colour. A label that the font has no letters for becomes the phrase's number, and
    `.info["legend"]` of the result maps these numbers to phrases.

    Args:
        upscale: also enlarge small images, as the release does.
        width: of the line in pixels; by default 5 on a full HD picture and thinner on smaller ones, at least 2.
        font: a Pillow font, or the path of one, for example to write Chinese labels; by default Pillow's own, which has
            hardly more letters than ASCII.

    Raises: MediaError when `font` is a path that holds no font.
    """
    canvas = fit(image, max_size, upscale=upscale)
    scale = min(1.0, max(canvas.width / FULL_SIZE[0], canvas.height / FULL_SIZE[1]))
    line = max(2, round(5 * scale)) if width is None else width
    entries = [entry for entry in groundings if entry.boxes]
    keys = [entry.phrase_key or index for index, entry in enumerate(entries)]
    colours = dict(zip(dict.fromkeys(keys), palette(len(set(keys))), strict=True))
    pen = ImageDraw.Draw(canvas)
    outlined: list[tuple[Area, str, Colour]] = []
    for key, entry in zip(keys, entries, strict=True):
        for box in entry.boxes:
            if len(box) >= 4:  # compat="cogvlm" may hold a box of three numbers
                area = _pixels(box, canvas.size)
                pen.rectangle(area, outline=colours[key], width=line)
                outlined.append((area, entry.phrase, colours[key]))
    legend: dict[str, str] = {}
    if labels:
        used = _font(font, max(MIN_FONT_SIZE, round(FONT_SIZE * scale)))
        numbers = {phrase: str(number) for number, phrase in enumerate(dict.fromkeys(item[1] for item in outlined), 1)}
        taken: list[Area] = []
        for area, phrase, colour in outlined:
            text = " ".join(phrase.split())
            if text and not _can_write(used, text):
                text = numbers[phrase]
                legend[text] = phrase
            if text:
                _label(pen, area, text, colour, used, line, canvas.size, taken)
    canvas.info["legend"] = legend
    return canvas


def fit(image: Image.Image, max_size: tuple[int, int] = FULL_SIZE, *, upscale: bool = False) -> Image.Image:
    """Give an RGB copy scaled by min(max width / width, max height / height), sides truncated; never up unless asked.

    Lanczos in two passes, horizontal first, so that the pixels do not depend on the installed Pillow.
    """
    ratio = min(max_size[0] / image.width, max_size[1] / image.height)
    rgb = image.convert("RGB")
    if ratio == 1 or (ratio > 1 and not upscale):
        return rgb.copy() if rgb is image else rgb
    width, height = max(1, int(image.width * ratio)), max(1, int(image.height * ratio))
    return rgb.resize((width, image.height), Image.Resampling.LANCZOS).resize((width, height), Image.Resampling.LANCZOS)


def _pixels(box: Iterable[int], size: tuple[int, int]) -> Area:
    """Give the corners in pixels, truncated as in the release, clipped to the image."""
    x0, y0, x1, y1 = list(box)[:4]
    return (
        min(int(min(x0, x1) / 1000 * size[0]), size[0] - 1),
        min(int(min(y0, y1) / 1000 * size[1]), size[1] - 1),
        min(int(max(x0, x1) / 1000 * size[0]), size[0] - 1),
        min(int(max(y0, y1) / 1000 * size[1]), size[1] - 1),
    )


# --- labels ---------------------------------------------------------------------------------------------------------


def _label(
    pen: ImageDraw.ImageDraw,
    area: Area,
    text: str,
    colour: Colour,
    font: Font,
    line: int,
    size: tuple[int, int],
    taken: list[Area],
) -> None:
    """Write a tag in the box's colour inside the image: at a free corner of the box, else the nearest free row."""
    left, top, _, bottom = pen.textbbox((0, 0), "Agjy", font=font)
    padding = max(2, round((bottom - top) * 0.2))
    height = int(bottom - top) + 2 * padding
    x0, y0, x1, y1 = area
    text = _shorten(pen, text, font, min(size[0], max(x1 - x0, size[0] // 2)) - 2 * padding)
    if not text or height > size[1]:
        return
    width = math.ceil(pen.textlength(text, font=font)) + 2 * padding
    places = [(x, y) for y in (y0 - height, y1 + 1) for x in (x0, x1 + 1 - width)]
    places += [(x, y) for y in (y0 + line, y1 + 1 - line - height) for x in (x0 + line, x1 + 1 - line - width)]
    places += [(x0, y) for y in sorted(range(0, size[1], height), key=lambda y: abs(y - y0))]
    places = [(min(max(x, 0), size[0] - width), y) for x, y in places if 0 <= y <= size[1] - height]
    x, y = next((place for place in places if not _overlaps(place, width, height, taken)), places[0])
    taken.append((x, y, x + width, y + height))
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    pen.text((x + padding - left, y + padding - top), text, fill=_ink(colour), font=font)


def _shorten(pen: ImageDraw.ImageDraw, text: str, font: Font, room: float) -> str:
    """Give the text, or as much of its beginning as fits into `room` pixels; empty when not one letter does."""
    if pen.textlength(text[:500], font=font) <= room and len(text) <= 500:
        return text
    low, high = 0, min(len(text), 500)
    while low < high:
        middle = (low + high + 1) // 2
        fits = pen.textlength(text[:middle].rstrip() + "...", font=font) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return text[:low].rstrip() + "..." if low else ""


def _overlaps(place: tuple[int, int], width: int, height: int, taken: list[Area]) -> bool:
    x, y = place
    return any(x < right and left < x + width and y < bottom and top < y + height for left, top, right, bottom in taken)


def _ink(colour: Colour) -> Colour:
    """Give near-black or white, whichever contrasts more with the tag's colour."""
    red, green, blue = (_linear(value / 255) for value in colour)
    return (16, 16, 16) if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else (255, 255, 255)


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _font(font: Font | str | Path | None, size: int) -> Font:
    if font is None:
        return ImageFont.load_default(size)
    if not isinstance(font, (str, Path)):
        return font
    try:
        return ImageFont.truetype(str(font), size)
    except OSError as error:
        raise MediaError(f"{font}: no font that Pillow can read ({error}). Give a .ttf, .ttc or .otf file.") from error


def _can_write(font: Font, text: str) -> bool:
    """Say whether the font has a glyph for every letter: a missing one is drawn as the glyph of U+FFFF is."""
    if not isinstance(font, ImageFont.FreeTypeFont):
        return text.isascii()
    missing = _glyph(font, "\uffff")
    return all(letter.isascii() or _glyph(font, letter) != missing for letter in set(text))


def _glyph(font: ImageFont.FreeTypeFont, letter: str) -> bytes:
    side = round(2 * font.size)
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).text((0, 0), letter, fill=255, font=font)
    return canvas.tobytes()


# --- colours --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def palette(count: int) -> list[Colour]:
    """Give `count` colours evenly apart in hue, of one lightness: seaborn's husl palette, 8 bits by truncation."""
    return [_husl((index / count + 0.01) % 1 * 359, 0.9 * 99, 0.65 * 99) for index in range(count)]


_XYZ_TO_RGB = ((3.2406, -1.5372, -0.4986), (-0.9689, 1.8758, 0.0415), (0.0557, -0.2040, 1.0570))
_WHITE_U, _WHITE_V = 0.19784, 0.46834


def _husl(hue: float, saturation: float, lightness: float) -> Colour:
    """Convert HUSL (degrees, 0..100, 0..100) to RGB by way of CIE LCh and Luv.

    Source: husl-colors.org, version 2 of the formulas, with that version's rounded constants.
    """
    sine, cosine = math.sin(math.radians(hue)), math.cos(math.radians(hue))
    chroma = _max_chroma(lightness, sine, cosine) / 100 * saturation
    u = cosine * chroma / (13 * lightness) + _WHITE_U
    v = sine * chroma / (13 * lightness) + _WHITE_V
    y = ((lightness + 16) / 116) ** 3
    x = -(9 * y * u) / ((u - 4) * v - u * v)
    z = (9 * y - 15 * v * y - v * x) / (3 * v)
    red, green, blue = (_encode(row[0] * x + row[1] * y + row[2] * z) for row in _XYZ_TO_RGB)
    return red, green, blue


def _max_chroma(lightness: float, sine: float, cosine: float) -> float:
    """Give the largest chroma at this lightness and hue that RGB can show."""
    scaled = (lightness + 16) ** 3 / 1560896
    limits: list[float] = []
    for m1, m2, m3 in _XYZ_TO_RGB:
        top = (0.99915 * m1 + 1.05122 * m2 + 1.14460 * m3) * scaled
        bottom = ((0.86330 * m3 - 0.17266 * m2) * sine + (0.12949 * m3 - 0.38848 * m1) * cosine) * scaled
        limits += [lightness * (top - 1.05122 * edge) / (bottom + 0.17266 * sine * edge) for edge in (0, 1)]
    return min(limit for limit in limits if limit > 0)


def _encode(value: float) -> int:
    """Give the 8-bit sRGB value of a linear one, truncated."""
    encoded = 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
    return int(min(max(encoded, 0.0), 1.0) * 255)
