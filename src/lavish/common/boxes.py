"""A box in thousandths of a picture, and the phrase that it belongs to: what `grounding` reads and `drawing` draws."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Rounding = Literal["trunc", "round"]


class Box(NamedTuple):
    """One box in thousandths: integers 0..1000, top left corner before bottom right."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def rel(self) -> tuple[float, float, float, float]:
        """The corners as fractions 0..1 of width and height."""
        return self.x0 / 1000, self.y0 / 1000, self.x1 / 1000, self.y1 / 1000

    def pixels(self, image_size: tuple[int, int], rounding: Rounding = "trunc") -> tuple[int, int, int, int]:
        """Give the corners as pixels of an image of `image_size` (width, height), each inside the image.

        `trunc` is what the release draws; `round` takes the nearest pixel.
        """
        shift = {"trunc": 0.0, "round": 0.5}[rounding]
        width, height = image_size
        scaled = (value / 1000 * side for value, side in zip(self, (width, height, width, height), strict=True))
        x0, y0, x1, y1 = (
            min(int(value + shift), max(side - 1, 0))
            for value, side in zip(scaled, (width, height, width, height), strict=True)
        )
        return x0, y0, x1, y1

    @classmethod
    def from_pixels(cls, box: Sequence[float], image_size: tuple[int, int]) -> "Box":
        """Give the box, sorted and within 0..999, of pixel corners on an image of `image_size` (width, height)."""
        width, height = image_size
        x0, x1 = sorted(min(max(round(1000 * x / width), 0), 999) for x in (box[0], box[2]))
        y0, y1 = sorted(min(max(round(1000 * y / height), 0), 999) for y in (box[1], box[3]))
        return cls(x0, y0, x1, y1)

    def __str__(self) -> str:
        return ",".join(f"{min(max(value, 0), 999):03d}" for value in self)


@dataclass(frozen=True)
class Grounding:
    """One bracket group of a reply: the phrase before it and the boxes in it.

    `span` is where the brackets stand in the text. `boxes_px` is filled when the image size was given. `issues` holds
    one word for each part that is no box (`not_four_numbers`, `not_a_number`, `out_of_range`, `unclosed`) and for each
    box that was mended or is degenerate (`swapped`, `empty`).
    """

    phrase: str
    boxes: list[Box]
    span: tuple[int, int]
    boxes_px: list[tuple[int, int, int, int]] = field(default_factory=list)
    issues: list[str] = field(default_factory=list)

    @property
    def phrase_key(self) -> str:
        """The phrase in lower case, for comparing."""
        return self.phrase.lower()

    @property
    def rel(self) -> list[tuple[float, ...]]:
        """The boxes as fractions 0..1."""
        return [tuple(value / 1000 for value in box) for box in self.boxes]
