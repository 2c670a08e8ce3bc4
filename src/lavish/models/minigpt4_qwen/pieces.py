"""MiniGPT4-Qwen: a conversation as texts and places of pictures, before any of it is encoded.

Source: Coobiw/MPP-LLaVA, minigpt4qwen.py (preprocess) and chat_utils.py. In a user's turn each picture stands as
`<Img>` + its slots + `</Img>`, a video as one such pair around the slots of all its frames. Not here: ChatML and ids
(processor.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lavish.common.errors import PromptError, shown
from lavish.common.messages import ImagePart, Message, TextPart

PLACE = "<ImageHere>"
"""Where a picture stands in a text, as the release's datasets and demos write it."""


@dataclass(frozen=True)
class Slot:
    """The place of one picture: what `open_image` takes, or None where the caller has the pixels already."""

    source: Any = None


Piece = str | Slot


@dataclass(frozen=True)
class Spoken:
    """A conversation as pieces: the system message, if any, the questions, and the answers that there are."""

    system: str | None
    questions: list[list[Piece]]
    answers: list[str]

    @property
    def is_finished(self) -> bool:
        """True if the last question has its answer."""
        return len(self.answers) == len(self.questions)


def user_pieces(message: Message, frames: Callable[[Any], list[Any]]) -> list[Piece]:
    """Give the pieces of a user's message: a picture in its place, a video as all its frames in one."""
    shown_parts = [
        [Slot(part.source)] if isinstance(part, ImagePart) else [Slot(frame) for frame in frames(part.source)]
        for part in message.parts
        if not isinstance(part, TextPart)
    ]
    places = sum(part.text.count(PLACE) for part in message.parts if isinstance(part, TextPart))
    if places:
        each_frame = [[slot] for slots in shown_parts for slot in slots]
        filling = each_frame if places == len(each_frame) else shown_parts
        check_count(places, len(filling), "The message")
        return _fill(split_places(message.text()), filling)
    pieces: list[Piece] = []
    remaining = iter(shown_parts)
    was_text = False
    for part in message.parts:
        if isinstance(part, TextPart):
            pieces += [f" {part.text}" if was_text else part.text]
        else:
            pieces += ["<Img>", *next(remaining), "</Img>"]
        was_text = isinstance(part, TextPart)
    return pieces


def _fill(pieces: Sequence[Piece], filling: Iterable[Sequence[Slot]]) -> list[Piece]:
    slots = iter(filling)
    return [one for piece in pieces for one in (next(slots) if isinstance(piece, Slot) else [piece])]


def split_places(text: str) -> list[Piece]:
    """Give the pieces of a text that holds `<ImageHere>`."""
    pieces: list[Piece] = []
    for index, part in enumerate(text.split(PLACE)):
        pieces += [Slot(), part] if index else [part]
    return pieces


def joined(content: Sequence[Piece]) -> list[Piece]:
    """Join neighbouring texts: byte pairs reach over their border."""
    pieces: list[Piece] = []
    for piece in content:
        if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += piece
        elif piece != "":
            pieces.append(piece)
    return pieces


def from_release(sample: Sequence[Mapping[str, str]], system_message: str | None, index: int) -> Spoken:
    """Read a sample of the release's datasets; a first turn that is not the user's is left out, as there.

    Raises:
        PromptError: no list of turns that alternate from a user's on.
    """
    if not isinstance(sample, list | tuple):
        raise PromptError(f"Sample {index}: a conversation is a list of turns, not {shown(sample)}.")
    for turn in sample:
        if (
            not isinstance(turn, Mapping)
            or turn.get("from") not in ("user", "assistant")
            or not isinstance(turn.get("value"), str)
        ):
            raise PromptError(
                f"Sample {index}: a turn must be {{'from': 'user' or 'assistant', 'value': text}}, not {shown(turn)}."
            )
    spoken = list(sample[1:] if sample and sample[0]["from"] == "assistant" else sample)
    expected = ["user", "assistant"] * len(spoken)
    if not spoken or [turn["from"] for turn in spoken] != expected[: len(spoken)]:
        raise PromptError(f"Sample {index}: turns must alternate from a user's on; found {len(sample)} turns.")
    questions = [split_places(turn["value"]) for turn in spoken[::2]]
    return Spoken(system_message, questions, [turn["value"] for turn in spoken[1::2]])


def check_count(places: int, given: int, what: str) -> None:
    """Hold the places of pictures against the pictures.

    Raises:
        PromptError: they differ.
    """
    if places != given:
        raise PromptError(
            f"{what} hold(s) {places} place(s) {PLACE} and {given} image(s) were given; each image needs one place and "
            "each place one image."
        )
