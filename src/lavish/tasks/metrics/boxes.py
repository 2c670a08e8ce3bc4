"""Accuracy of referring expressions: the first box of a reply against the target, right from an overlap of 0.5.

The rule of the RefCOCO evaluations; a reply without a box counts as wrong and is never skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lavish.common import grounding

MIN_OVERLAP = 0.5
_ROUNDING = 1e-9  # an overlap of exactly a half, computed in floats


class BoxScore(NamedTuple):
    """How one reply fits its target."""

    overlap: float
    """Intersection over union, 0..1; 0 where the reply has no box."""
    is_right: bool
    is_readable: bool
    """Whether the reply has a box at all."""


def score_reply(reply: str, target: Sequence[float]) -> BoxScore:
    """Score a reply with boxes in thousandths against a target box (x0, y0, x1, y1) as fractions 0..1."""
    boxes = [box for entry in grounding.parse(reply) for box in entry.boxes]
    if not boxes:
        return BoxScore(0.0, False, False)
    overlap = grounding.iou(boxes[0].rel, target)
    return BoxScore(overlap, overlap > MIN_OVERLAP - _ROUNDING, True)
