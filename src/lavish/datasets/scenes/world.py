"""The drawn world of the pocket model: coloured shapes and a number on a light background.

A scene is sampled as data, then drawn at any size, then labelled patch by patch. Everything lies on a grid of 112 x 112
cells, the pixels of the pocket model's input, so that boxes have few distinct values. Needs numpy and Pillow; knows
nothing of text (see `questions`) or tensors.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lavish.common.errors import DataError, did_you_mean, shown

GRID = 112
"""Cells of the scene along each side: the box edges and the pattern of a scene lie on this grid."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black")
SIZES = ("small", "medium", "large")
PATTERNS = ("plain", "striped", "checked", "noisy")

_RGB = {
    "red": (214, 32, 38),
    "orange": (248, 138, 16),
    "yellow": (246, 222, 30),
    "green": (34, 158, 66),
    "blue": (36, 92, 216),
    "purple": (138, 52, 178),
    "black": (22, 22, 26),
}
_COLOUR_JITTER = 10  # levels of 255, either way
_DIAMETERS = {"small": (18, 22), "medium": (30, 35), "large": (46, 54)}  # width in cells, both ends included
_NUMBER_HEIGHT = (20, 28)
_MIN_VISIBLE = 0.65  # share of an item that nothing in front may cover; a little above what the world promises (.6)
_MAX_UNDER_NUMBER = 0.15  # share of an item that the number's plate may cover; digits without a plate stand free
_NOISE_LEVELS = (0, 2, 4, 6)  # standard deviation, in levels of 255

Box = tuple[float, float, float, float]
Rgb = tuple[int, int, int]
Cells = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Item:
    """A drawn shape; `box` is x0, y0, x1, y1 of its whole extent (also what is hidden) in 0..1 of the picture."""

    shape: str
    colour: str
    size: str
    box: Box
    rgb: Rgb

    @property
    def centre(self) -> tuple[float, float]:
        """x and y of the middle of the box, 0..1."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True, slots=True)
class Number:
    """A written number of 1 to 4 digits; `box` is the extent of its digits, `digit_boxes` that of each, 0..1."""

    text: str
    box: Box
    digit_boxes: tuple[Box, ...]
    ink: Rgb
    plate: Rgb | None
    """Colour of the rounded plate behind the digits; None where they stand on the background itself."""


@dataclass(frozen=True, slots=True)
class Background:
    """A pattern of two neutral tints. `period` in grid cells; `seed` chooses the grain."""

    pattern: str
    tints: tuple[Rgb, Rgb]
    period: int
    direction: int
    """0 stripes run down, 1 across, 2 and 3 diagonally."""
    noise: int
    """Standard deviation of the noise over the whole picture, in levels of 255."""
    seed: int


@dataclass(frozen=True, slots=True)
class Words:
    """What a scene is drawn from: some of the names above, sizes from small to large."""

    shapes: Sequence[str] = SHAPES
    colours: Sequence[str] = COLOURS
    sizes: Sequence[str] = SIZES
    patterns: Sequence[str] = PATTERNS

    def __post_init__(self) -> None:
        for name, known in (("shapes", SHAPES), ("colours", COLOURS), ("sizes", SIZES), ("patterns", PATTERNS)):
            given: Sequence[str] = getattr(self, name)
            for word in given:
                if word not in known:
                    hint = did_you_mean(str(word), known)
                    raise DataError(f"{name}: {shown(word)} is not drawn.{hint} Known: {', '.join(known)}.")
            if not given or len(set(given)) < len(given):
                raise DataError(f"{name} is {shown(list(given))}; it names one or more, each once.")


@dataclass(frozen=True, slots=True)
class Scene:
    """Items from back to front, at most one number in front of them, and the background."""

    items: tuple[Item, ...]
    number: Number | None
    background: Background


# --- shapes and glyphs as masks


def _outline(shape: str) -> list[tuple[float, float]]:
    """Give the polygon of a shape in its own coordinates, x right and y down, any scale."""
    if shape == "square":
        return [(0, 0), (1, 0), (1, 1), (0, 1)]
    if shape == "triangle":
        return [(0.5, 0), (1, 1), (0, 1)]
    if shape == "cross":
        low, high = 0.33, 0.67
        upper = [(low, low), (low, 0), (high, 0), (high, low), (1, low), (1, high)]
        return [*upper, *((1 - x, 1 - y) for x, y in upper)]
    turn = 2 * math.pi
    if shape == "star":
        radii = (1.0, 0.42)
        return [(radii[k % 2] * math.sin(turn * k / 10), -radii[k % 2] * math.cos(turn * k / 10)) for k in range(10)]
    steps = [turn * k / 72 for k in range(72)]
    if shape == "circle":
        return [(math.cos(t), math.sin(t)) for t in steps]
    return [  # heart
        (16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
        for t in steps
    ]


@cache
def _unit_outline(shape: str) -> tuple[np.ndarray, float]:
    """Give the polygon stretched to the unit square, and its natural height / width."""
    points = np.array(_outline(shape), dtype=np.float64)
    low, span = points.min(axis=0), np.ptp(points, axis=0)
    return (points - low) / span, 0.9 if shape == "triangle" else float(span[1] / span[0])


@lru_cache(maxsize=4096)
def _shape_mask(shape: str, width: int, height: int, supersample: int) -> Image.Image:
    """Draw the shape to fill `width` x `height` pixels: mode L, 255 inside, antialiased."""
    points, _ = _unit_outline(shape)
    big = Image.new("L", (width * supersample, height * supersample))
    scaled = points * (width * supersample - 1, height * supersample - 1)
    ImageDraw.Draw(big).polygon([tuple(point) for point in scaled], fill=255)
    return big.reduce(supersample) if supersample > 1 else big


@lru_cache(maxsize=4096)
def _hard_mask(shape: str, width: int, height: int) -> np.ndarray:
    """Give which grid cells the shape covers: bool (height, width)."""
    return np.asarray(_shape_mask(shape, width, height, 4)) >= 128


@cache
def _master_glyph(digit: str) -> Image.Image:
    """Draw one digit large with Pillow's bundled font and cut it to its ink."""
    font = ImageFont.load_default(320)
    glyph = Image.new("L", (400, 480))
    ImageDraw.Draw(glyph).text((60, 40), digit, fill=255, font=font)
    return glyph.crop(glyph.getbbox())


@lru_cache(maxsize=4096)
def _glyph_mask(digit: str, width: int, height: int) -> Image.Image:
    return _master_glyph(digit).resize((width, height), Image.Resampling.BOX)


# --- sampling


def _relative(cells: Cells) -> Box:
    return cells[0] / GRID, cells[1] / GRID, cells[2] / GRID, cells[3] / GRID


def _cells(box: Box, size: int = GRID) -> Cells:
    return round(box[0] * size), round(box[1] * size), round(box[2] * size), round(box[3] * size)


def _jitter(dice: random.Random, rgb: Rgb, by: int) -> Rgb:
    red, green, blue = (min(255, max(0, level + dice.randint(-by, by))) for level in rgb)
    return red, green, blue


def _sample_background(dice: random.Random, patterns: Sequence[str]) -> Background:
    base = dice.randint(185, 245)
    first = _jitter(dice, (base, base, base), 6)
    step = dice.randint(22, 40)
    second = (max(0, first[0] - step), max(0, first[1] - step), max(0, first[2] - step))
    return Background(
        pattern=dice.choice(patterns),
        tints=(first, second),
        period=dice.randint(7, 14),
        direction=dice.randrange(4),
        noise=dice.choice(_NOISE_LEVELS),
        seed=dice.randrange(1 << 16),
    )


def _sample_number(dice: random.Random) -> Number:
    length = dice.randint(1, 4)
    text = str(dice.randint(10 ** (length - 1), 10**length - 1)) if length > 1 else str(dice.randrange(10))
    height = dice.randint(*_NUMBER_HEIGHT)
    widths = [max(6, round(height * _master_glyph(digit).width / _master_glyph(digit).height)) for digit in text]
    gap = max(3, round(height * 0.14))
    width = sum(widths) + gap * (length - 1)
    x, y = dice.randint(4, GRID - 4 - width), dice.randint(4, GRID - 4 - height)
    boxes, left = [], x
    for digit_width in widths:
        boxes.append(_relative((left, y, left + digit_width, y + height)))
        left += digit_width + gap
    style = dice.random()
    if style < 0.35:
        grey = dice.randint(84, 108)
        ink, plate = (250, 250, 250), (grey, grey, grey)
    else:
        ink, plate = (12, 12, 12), None if style < 0.65 else (252, 252, 252)
    return Number(text, _relative((x, y, x + width, y + height)), tuple(boxes), ink, plate)


def _plate_cells(number: Number, size: int = GRID) -> Cells:
    """Give the rectangle that the number keeps for itself, three grid cells wider than its digits on each side."""
    margin = max(1, round(3 * size / GRID))
    x0, y0, x1, y1 = _cells(number.box, size)
    return max(0, x0 - margin), max(0, y0 - margin), min(size, x1 + margin), min(size, y1 + margin)


class _Canvas:
    """The grid while a scene is being filled: which item owns each cell, and how much of each item is left."""

    def __init__(self, number: Number | None) -> None:
        self.owner = np.zeros((GRID, GRID), dtype=np.int8)  # 0 nobody, 1.. item, -1 the number's plate
        self.areas: list[int] = []
        self.colours: list[str] = []
        self.max_under_number = 0.0 if number is None or number.plate is None else _MAX_UNDER_NUMBER
        if number is not None:
            x0, y0, x1, y1 = _plate_cells(number)
            self.owner[y0:y1, x0:x1] = -1

    def try_place(self, shape: str, colour: str, cells: Cells) -> bool:
        """Put the shape in front of the others if everything stays visible enough; say whether it was put."""
        x0, y0, x1, y1 = cells
        mask = _hard_mask(shape, x1 - x0, y1 - y0)
        region = self.owner[y0:y1, x0:x1]
        area = int(mask.sum())
        counts = np.bincount(region[mask] + 1, minlength=len(self.areas) + 2).tolist()
        if counts[0] > self.max_under_number * area:
            return False
        near = self.owner[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1]
        present = set(np.unique(near).tolist())
        for index, (whole, other) in enumerate(zip(self.areas, self.colours, strict=True), start=1):
            if index not in present:
                continue
            if other == colour:  # two touching items of one colour would look like one
                return False
            if int((self.owner == index).sum()) - counts[index + 1] < _MIN_VISIBLE * whole:
                return False
        region[mask & (region >= 0)] = len(self.areas) + 1
        self.areas.append(area)
        self.colours.append(colour)
        return True


def _sample_item(dice: random.Random, canvas: _Canvas, so_far: Sequence[Item], words: Words) -> Item | None:
    shape = dice.choice(so_far).shape if so_far and dice.random() < 0.2 else dice.choice(words.shapes)
    colour = dice.choice(so_far).colour if so_far and dice.random() < 0.15 else dice.choice(words.colours)
    start = dice.randrange(len(words.sizes))
    for size in reversed(words.sizes[: start + 1]):  # a crowded picture has room for a smaller one only
        width = dice.randint(*_DIAMETERS[size])
        height = round(width * _unit_outline(shape)[1])
        for _ in range(12):
            x, y = dice.randint(1, GRID - 1 - width), dice.randint(1, GRID - 1 - height)
            cells = (x, y, x + width, y + height)
            if canvas.try_place(shape, colour, cells):
                return Item(shape, colour, size, _relative(cells), _jitter(dice, _RGB[colour], _COLOUR_JITTER))
    return None


def sample_scene(
    rng: np.random.Generator, *, max_items: int = 4, number_probability: float = 0.35, words: Words | None = None
) -> Scene:
    """Draw a random scene of up to `max_items` shapes; the same state of `rng` gives the same scene.

    Raises:
        DataError: `max_items` is negative.
    """
    if max_items < 0:
        raise DataError(f"sample_scene(max_items={max_items}): the number of items is 0 or more.")
    words = words or Words()
    dice = random.Random(int(rng.integers(1 << 62)))
    background = _sample_background(dice, words.patterns)
    number = _sample_number(dice) if dice.random() < number_probability else None
    wanted = 0 if max_items == 0 or dice.random() < 0.03 else dice.randint(1, max_items)
    canvas, items = _Canvas(number), []
    for _ in range(wanted):
        item = _sample_item(dice, canvas, items, words)
        if item is not None:
            items.append(item)
    return Scene(tuple(items), number, background)


# --- drawing


@lru_cache(maxsize=1)
def _grain() -> np.ndarray:
    """A fixed tile of unit noise, (2 x GRID, 2 x GRID, 3); pictures take a window of it."""
    return np.random.default_rng(20240519).standard_normal((2 * GRID, 2 * GRID, 3)).astype(np.float32)


@lru_cache(maxsize=16)
def _scaled_grain(deviation: int, channels: int) -> np.ndarray:
    return np.rint(_grain()[..., :channels] * deviation).astype(np.int16)


def _noise(seed: int, deviation: int, channels: int, size: int) -> np.ndarray:
    """Give int16 noise (size, size, channels): one value a grid cell, so that larger drawings shrink to the same."""
    y, x = divmod(seed, 256)
    window = _scaled_grain(deviation, channels)[y % GRID : y % GRID + GRID, x % GRID : x % GRID + GRID]
    if size == GRID:
        return window
    index = np.arange(size) * GRID // size
    return window[index][:, index]


def _draw_background(background: Background, size: int) -> Image.Image:
    first, second = background.tints
    image = Image.new("RGB", (size, size), first)
    if background.pattern in ("striped", "checked"):
        ramp = (np.arange(size) + 0.5) * GRID / size
        across, down = ramp[None, :], ramp[:, None]
        if background.pattern == "checked":
            odd = (across // background.period + down // background.period) % 2
        else:
            line = (across, down, (across + down) / math.sqrt(2), (across - down) / math.sqrt(2))[background.direction]
            odd = np.broadcast_to(line // background.period % 2, (size, size))
        image.paste(second, (0, 0), Image.fromarray((odd * 255).astype(np.uint8)))
    elif background.pattern == "noisy":
        grain = _noise(background.seed // 7, 20, 1, size)
        image = Image.fromarray((np.array(first, dtype=np.int16) - 12 + grain).clip(0, 255).astype(np.uint8))
    return image


def _draw_number(image: Image.Image, number: Number, size: int) -> None:
    if number.plate is not None:
        x0, y0, x1, y1 = _plate_cells(number, size)
        ImageDraw.Draw(image).rounded_rectangle((x0, y0, x1 - 1, y1 - 1), radius=3 * size / GRID, fill=number.plate)
    for digit, box in zip(number.text, number.digit_boxes, strict=True):
        x0, y0, x1, y1 = _cells(box, size)
        image.paste(number.ink, (x0, y0), _glyph_mask(digit, max(1, x1 - x0), max(1, y1 - y0)))


def draw(scene: Scene, size: int = GRID, supersample: int = 4) -> Image.Image:
    """Draw the scene as a square RGB picture; the same scene and size give the same pixels.

    Args:
        size: side in pixels. At 112 the boxes lie on pixel borders exactly, elsewhere within half a pixel.
        supersample: subpixels a side for smooth edges.

    Raises:
        DataError: `size` or `supersample` is below 1.
    """
    if size < 1 or supersample < 1:
        raise DataError(f"draw(size={size}, supersample={supersample}): both are 1 or more.")
    image = _draw_background(scene.background, size)
    for item in scene.items:
        x0, y0, x1, y1 = _cells(item.box, size)
        image.paste(item.rgb, (x0, y0), _shape_mask(item.shape, max(1, x1 - x0), max(1, y1 - y0), supersample))
    if scene.number is not None:
        _draw_number(image, scene.number, size)
    if scene.background.noise:
        noise = _noise(scene.background.seed, scene.background.noise, 3, size)
        image = Image.fromarray((np.asarray(image, dtype=np.int16) + noise).clip(0, 255).astype(np.uint8))
    return image


# --- labels


def owner_map(scene: Scene) -> np.ndarray:
    """Give which item shows in each grid cell: int8 (112, 112), 0 none, 1.. the item; the number hides things."""
    owner = np.zeros((GRID, GRID), dtype=np.int8)
    for index, item in enumerate(scene.items, start=1):
        x0, y0, x1, y1 = _cells(item.box)
        owner[y0:y1, x0:x1][_hard_mask(item.shape, x1 - x0, y1 - y0)] = index
    if scene.number is not None:
        x0, y0, x1, y1 = _plate_cells(scene.number)
        owner[y0:y1, x0:x1] = 0
    return owner


def _majority(owner: np.ndarray, num_classes: int, grid: int) -> np.ndarray:
    """Give the class that covers most of each patch if it covers a quarter of it, else 0: int64 (grid, grid)."""
    side = GRID // grid
    if num_classes == 0:
        return np.zeros((grid, grid), dtype=np.int64)
    hits = owner[None] == np.arange(1, num_classes + 1, dtype=np.int8)[:, None, None]
    counts = hits.reshape(num_classes, grid, side, grid, side).sum(axis=(2, 4), dtype=np.int32)
    best = counts.argmax(axis=0)
    return np.where(counts.max(axis=0) * 4 >= side * side, best + 1, 0)


def _digit_map(number: Number | None) -> np.ndarray:
    owner = np.zeros((GRID, GRID), dtype=np.int8)
    for index, box in enumerate(number.digit_boxes if number else (), start=1):
        x0, y0, x1, y1 = _cells(box)
        owner[y0:y1, x0:x1] = index
    return owner


def dense_labels(scene: Scene, grid: int = 14) -> dict[str, np.ndarray]:
    """Label each of `grid` x `grid` patches with what the drawing shows there.

    A patch belongs to the item (or digit) that covers most of it if that is at least a quarter. Class 0 of all but
    `background` means nothing there; `digit` is 1 + the digit, `digit_index` its place from the left, from 1.

    Shapes: `item`, `shape`, `colour`, `size`, `digit`, `digit_index`, `number_length`, `background` (grid, grid) int64;
    `box` and `number_box` (grid, grid, 4) float32.

    Raises:
        DataError: `grid` does not divide 112.
    """
    if grid < 1 or GRID % grid:
        raise DataError(f"dense_labels(grid={grid}): the number of patches a side must divide {GRID}.")
    item = _majority(owner_map(scene), len(scene.items), grid)
    tables = {
        "shape": [0, *(SHAPES.index(one.shape) + 1 for one in scene.items)],
        "colour": [0, *(COLOURS.index(one.colour) + 1 for one in scene.items)],
        "size": [0, *(SIZES.index(one.size) + 1 for one in scene.items)],
    }
    labels = {"item": item} | {name: np.array(table, dtype=np.int64)[item] for name, table in tables.items()}
    labels["box"] = np.array([(0, 0, 0, 0), *(one.box for one in scene.items)], dtype=np.float32)[item]
    text = scene.number.text if scene.number else ""
    index = _majority(_digit_map(scene.number), len(text), grid)
    labels["digit_index"] = index
    labels["digit"] = np.array([0, *(int(digit) + 1 for digit in text)], dtype=np.int64)[index]
    labels["number_length"] = np.where(index > 0, len(text), 0)
    number_box = scene.number.box if scene.number else (0, 0, 0, 0)
    labels["number_box"] = np.array([(0, 0, 0, 0), number_box], dtype=np.float32)[(index > 0).astype(np.int64)]
    labels["background"] = np.full((grid, grid), PATTERNS.index(scene.background.pattern), dtype=np.int64)
    return labels
