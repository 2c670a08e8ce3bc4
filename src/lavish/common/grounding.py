"""Boxes in text: read `[[x0,y0,x1,y1]]` out of replies, write them into prompts, score them; `draw` is in drawing.py.

A box is four integers in thousandths of the upright width and height of the picture as the model saw it, top left
corner first, three digits each in canonical text; `;` separates the boxes of one phrase. The reader needs no language
model and never raises on what a model wrote: whatever is no box is kept as an issue of its entry.
Source: CogVLM release, utils/utils/grounding_parser.py; `compat="cogvlm"` reproduces it, faults included.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from lavish.common.boxes import Box, Grounding, Rounding
from lavish.common.drawing import draw, palette
from lavish.common.errors import PromptError, did_you_mean

__all__ = [
    "PROMPTS",
    "Box",
    "Grounding",
    "Score",
    "draw",
    "iou",
    "merge_by_phrase",
    "palette",
    "parse",
    "prompt",
    "render",
    "score",
    "strip",
]

Chunker = Callable[[str], Sequence[tuple[int, int]]]

PROMPTS: dict[str, tuple[str, ...]] = {
    "locate": (
        "Where is <expr>? answer in [[x0,y0,x1,y1]] format.",
        "Where is <expr>?",
        "Can you point out <expr> in the image and provide the bounding boxes of its location?",
        "Mark <expr> with a box, written as [[x0,y0,x1,y1]].",
    ),
    "describe": (
        "Can you give me a description of the region <objs> in image?",
        "Tell me what you see within the designated area <objs> in the picture.",
        "Which thing lies inside <objs>?",
    ),
    "caption": (
        "Can you provide a description of the image and include the coordinates [[x0,y0,x1,y1]] "
        "for each mentioned object?",
        "Describe the picture and write the box [[x0,y0,x1,y1]] behind every thing that you name.",
    ),
}


def parse(
    text: str,
    image_size: tuple[int, int] | None = None,
    *,
    rounding: Rounding = "trunc",
    chunker: Chunker | None = None,
    final: bool = True,
    compat: Literal["cogvlm"] | None = None,
) -> list[Grounding]:
    """Read the boxes of a reply, in order of appearance.

    Not for prompts: they hold the literal `[[x0,y0,x1,y1]]`. Spaces and line breaks between the numbers and the form
    `[[a],[b]]` are read too. A value of 1000 is kept as such; in pixels it is the last one.

    Args:
        image_size: (width, height) of the image as the model saw it; fills `boxes_px`.
        chunker: gives the (start, end) of noun chunks; with it a phrase starts at the last chunk that ends before its
            box, as in the release. Without it a phrase is the last clause between two boxes.
        final: False says that more text is coming: a group at the end that is not closed yet is left out.
        compat: "cogvlm" is the release's reader, for comparing: lower-cased phrases, a phrase that occurs twice keeps
            its last boxes only, boxes of any number of values. Only without it is the time linear in the text.

    Raises: ValueError in `compat="cogvlm"` alone, where the release raises it (`[[1,,2,3]]`, superscript digits).
    """
    if compat == "cogvlm":
        return _parse_as_release(text, chunker)
    chunks = None if chunker is None else sorted(chunker(text), key=lambda chunk: chunk[1])
    found: list[Grounding] = []
    previous_end, chunk_index = 0, 0
    for start, end, parts in _brackets(text):
        if parts is None and not final and _MAY_GO_ON.match(text, end):
            break
        boxes, issues = ([], ["unclosed"]) if parts is None else _read_parts(parts)
        if chunks is None:
            phrase = _phrase(text[previous_end:start], follows_box=bool(found))
        else:
            while chunk_index < len(chunks) and chunks[chunk_index][1] <= start:
                chunk_index += 1
            phrase = _chunk_phrase(text, start, chunks[chunk_index - 1][0] if chunk_index else 0)
        boxes_px = [] if image_size is None else [box.pixels(image_size, rounding) for box in boxes]
        found.append(Grounding(phrase, boxes, (start, end), boxes_px, issues))
        previous_end = end
    return found


_OPEN = re.compile(r"\[{2,}")
_INSIDE = re.compile(r"[^\[\]]*")
_NEXT_GROUP = re.compile(r"\]\s*+(?:[,;]\s*+)?\[(?!\[)")
_CLOSE = re.compile(r"\]\s*+\]+")
_MAY_GO_ON = re.compile(r"[\s,;]*+\Z")
_NUMERIC = re.compile(r"[\d\s,;.+-]*", re.ASCII)


def _brackets(text: str) -> Iterable[tuple[int, int, list[str] | None]]:
    """Give (start, end, inner texts) of each `[[...]]`; the inner texts are None where the brackets are not closed."""
    position = 0
    while opened := _OPEN.search(text, position):
        parts: list[str] = []
        cursor = opened.end()
        while True:
            inside = _INSIDE.match(text, cursor)
            cursor = inside.end() if inside else cursor
            parts.append(text[inside.start() : cursor] if inside else "")
            if closed := _CLOSE.match(text, cursor):
                yield opened.start(), closed.end(), parts
                position = closed.end()
                break
            if following := _NEXT_GROUP.match(text, cursor):
                cursor = following.end()
                continue
            numeric = _NUMERIC.match(text, opened.end(), cursor)
            position = numeric.end() if numeric and len(parts) == 1 else cursor
            position += position == cursor and text.startswith("]", cursor)
            yield opened.start(), position, None
            break


def _read_parts(parts: list[str]) -> tuple[list[Box], list[str]]:
    """Give the boxes and the issues of the texts inside one pair of double brackets."""
    boxes: list[Box] = []
    issues: list[str] = []
    groups = [group for part in parts for group in part.split(";") if group.strip()]
    if not groups:
        return boxes, ["not_four_numbers"]
    for group in groups:
        numbers = _read_numbers(group)
        if isinstance(numbers, str):
            issues.append(numbers)
            continue
        x0, y0, x1, y1 = numbers
        if x0 > x1 or y0 > y1:
            issues.append("swapped")
        box = Box(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        if box.x0 == box.x1 or box.y0 == box.y1:
            issues.append("empty")
        boxes.append(box)
    return boxes, issues


_INTEGER = re.compile(r"-?[0-9]+")


def _read_numbers(group: str) -> list[int] | str:
    """Give the four numbers of `a,b,c,d`, or the name of what is wrong with them."""
    tokens = [token.strip() for token in group.split(",")]
    if not all(_INTEGER.fullmatch(token) for token in tokens):
        return "not_a_number"
    if len(tokens) != 4:
        return "not_four_numbers"
    if any(
        token.startswith("-") or len(token.lstrip("0")) > 4 or int(token.lstrip("0") or 0) > 1000 for token in tokens
    ):
        return "out_of_range"
    return [int(token.lstrip("0") or 0) for token in tokens]


_CONNECTIVES = (
    "and also|and then|and|or|but|while|then|also|plus|as well as|along with|together with|with|"
    "next to|close to|to the left of|to the right of|on the left of|on the right of|on top of|in front of|"
    "beside|besides|near|by|on|in|at|under|below|above|over|behind|between|inside|beneath|from|of"
)
_PUNCTUATION = r"""[\s,.;:!?)\]}>"'*•·、，。；：！？）】》”’…–—-]"""
_LEADING = re.compile(rf"(?:{_PUNCTUATION}++|\d+[.)、]\s|(?:{_CONNECTIVES})\b)++", re.IGNORECASE)
_LEADING_AFTER_BOX = re.compile(
    rf"(?:{_PUNCTUATION}++|\d+[.)、]\s|(?:{_CONNECTIVES})\b|以及|还有|并且|而且|和|与|跟|及)++", re.IGNORECASE
)
_LEADING_PUNCTUATION = re.compile(rf"{_PUNCTUATION}++")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？；])\s*|[\r\n]+")
_TRAILING = " \t\r\n\f\v\u3000([{<（【《“‘\"'`:;,.!=、，。；：！–—-"


def _phrase(text: str, follows_box: bool) -> str:
    """Give the phrase that a box belongs to, from the text between the box before it and itself."""
    text = text.strip().rstrip(_TRAILING)
    start = 0
    for boundary in _SENTENCE_END.finditer(text):
        if boundary.end() < len(text):
            start = boundary.end()
    clause = text[start:]
    if clause.endswith(("?", "？")):
        leading = _LEADING_PUNCTUATION.match(clause, 0, len(clause) - 1)
    else:
        leading = (_LEADING_AFTER_BOX if follows_box else _LEADING).match(clause)
    return clause[leading.end() :] if leading else clause


def _chunk_phrase(text: str, box_start: int, chunk_start: int) -> str:
    """Give the text from the last noun chunk to the box, or all before the box if that is a question."""
    phrase = text[chunk_start:box_start].strip()
    return text[:box_start].strip() if phrase.endswith("?") else phrase


def _parse_as_release(text: str, chunker: Chunker | None) -> list[Grounding]:
    """Read as the release does: `\\[\\[([^\\]]+)\\]\\]`, found here in linear time; see `parse`."""
    chunks = [] if chunker is None else chunker(text)
    found: dict[str, Grounding] = {}
    position = 0
    while (close := text.find("]", position)) >= 0:
        start = text.find("[[", position, close - 1) if text.startswith("]]", close) and close > position else -1
        if start < 0:
            position = close + 1
            continue
        position = close + 2
        before = [chunk for chunk in chunks if chunk[1] <= start]
        phrase = _chunk_phrase(text, start, before[-1][0] if before else 0).lower()
        parts = [part for part in text[start + 2 : close].split(";") if part.replace(",", "").isdigit()]
        boxes = [tuple(int(number) for number in part.split(",")) for part in parts]
        found[phrase] = Grounding(phrase, boxes, (start, position))  # type: ignore[arg-type]  # a box of any length
    return list(found.values())


def merge_by_phrase(groundings: Iterable[Grounding]) -> list[Grounding]:
    """Join the entries of the same phrase (case apart) into the first of them; entries without a phrase stay apart."""
    merged: dict[str | int, Grounding] = {}
    for index, entry in enumerate(groundings):
        key = entry.phrase_key or index
        first = merged.get(key)
        merged[key] = (
            entry
            if first is None
            else replace(
                first,
                boxes=first.boxes + entry.boxes,
                boxes_px=first.boxes_px + entry.boxes_px,
                issues=first.issues + entry.issues,
            )
        )
    return list(merged.values())


def strip(text: str, *, final: bool = True) -> str:
    """Give the reply without its box text, for display. `final=False`: more is coming, a begun `[` is held back."""
    pieces: list[str] = []
    position = 0
    for start, end, parts in _brackets(text):
        piece = text[position:start]
        if parts is None and not final and _MAY_GO_ON.match(text, end):
            end = len(text)
        if piece.rstrip().endswith(("(", "（")) and text[end : end + 1] in (")", "）"):
            piece, end = piece.rstrip()[:-1], end + 1
        following = text[end : end + 1]
        pieces.append(piece if following.isalnum() else piece.rstrip(" \t"))
        position = end
    rest = text[position:]
    if not final and rest.endswith("["):
        rest = rest[:-1].rstrip(" \t")
    pieces.append(rest)
    return "".join(pieces).strip()


def render(phrases: Iterable[Grounding | tuple[str, Iterable[Sequence[int]]]]) -> str:
    """Write phrases with their boxes (thousandths) in the canonical format; entries without a box are left out."""
    written: list[str] = []
    for entry in phrases:
        phrase, boxes = (entry.phrase, entry.boxes) if isinstance(entry, Grounding) else entry
        text = _boxes_text(boxes)
        if text:
            written.append(f"{phrase}{text}")
    return ", ".join(written)


def _boxes_text(boxes: Iterable[Sequence[int]]) -> str:
    text = ";".join(str(Box(*box)) for box in boxes)
    return f"[[{text}]]" if text else ""


def prompt(
    kind: str,
    *,
    expr: str | None = None,
    boxes: Iterable[Sequence[float]] | None = None,
    image_size: tuple[int, int] | None = None,
    variant: int = 0,
) -> str:
    """Write the question of a grounding task: `locate` a phrase, `describe` boxes, or `caption` with boxes.

    `boxes` are thousandths, or pixels when `image_size` (width, height) is given. `variant` picks a phrasing of
    `PROMPTS[kind]`, modulo their number.

    Raises: PromptError for an unknown kind, or when the kind's `expr` or `boxes` is missing.
    """
    if kind not in PROMPTS:
        raise PromptError(
            f"Grounding prompt {kind!r} is not one of {', '.join(map(repr, PROMPTS))}.{did_you_mean(kind, PROMPTS)}"
        )
    text = PROMPTS[kind][variant % len(PROMPTS[kind])]
    if kind == "locate":
        if not expr or not expr.strip():
            raise PromptError(
                "Grounding prompt 'locate' needs the phrase to look for: prompt('locate', expr='the dog')."
            )
        return text.replace("<expr>", expr.strip())
    if kind == "describe":
        asked = [Box(*map(int, b)) if image_size is None else Box.from_pixels(b, image_size) for b in boxes or ()]
        if not asked:
            raise PromptError(
                "Grounding prompt 'describe' needs boxes: prompt('describe', boxes=[(86, 540, 400, 760)])."
            )
        return text.replace("<objs>", _boxes_text(asked))
    return text


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Give intersection over union of two boxes in the same unit; 0 where both are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0) * max(height, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return shared / (areas - shared) if areas > shared else 0.0


class Score(NamedTuple):
    """Counts of a RefCOCO style evaluation; replies without a readable box are counted as wrong, never skipped."""

    num_correct: int
    num_replies: int
    num_unparsable: int
    mean_iou: float

    @property
    def accuracy(self) -> float:
        """Share of replies whose first box is right, 0..1; nan without replies."""
        return self.num_correct / self.num_replies if self.num_replies else math.nan


def score(replies: Iterable[str], targets: Iterable[Sequence[float]], threshold: float = 0.5) -> Score:
    """Compare the first box of each reply with its target box, given as fractions 0..1; right at IoU >= `threshold`.

    Raises: ValueError when there are not as many targets as replies.
    """
    overlaps: list[float | None] = []
    for reply, target in zip(replies, targets, strict=True):
        box = next((box for entry in parse(reply) for box in entry.boxes), None)
        overlaps.append(None if box is None else iou(box.rel, target))
    read = [overlap for overlap in overlaps if overlap is not None]
    return Score(
        num_correct=sum(overlap >= threshold for overlap in read),
        num_replies=len(overlaps),
        num_unparsable=len(overlaps) - len(read),
        mean_iou=sum(read) / len(overlaps) if overlaps else math.nan,
    )
