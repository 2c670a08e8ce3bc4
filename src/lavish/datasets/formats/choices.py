"""Questions with choices, in the forms that people have: A-OKVQA, ScienceQA, tables as MMBench's.

The choices are a list (`choices`, `options`) or columns A, B, C ...; the right one is its place (from 0), its letter or
its words. Sources of the forms: allenai/aokvqa (choices, correct_choice_idx); lupantech/ScienceQA (choices, answer,
hint); open-compass/VLMEvalKit, MMBench's TSV (index, hint, A to D, answer, category, image in base64).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from lavish.common.errors import DataError, shown

PROMPT = "{question}\n{choices}\nAnswer with the option's letter from the given choices directly."
"""LLaVA v1.5's words for such questions."""
RIGHT = ("correct_choice_idx", "answer_idx", "answer", "label")
HINTS = ("hint", "context")
CATEGORIES = ("category", "subject", "topic")
NAMES = ("question_id", "index", "id", "sample_id", "data_id")
_EMPTY = ("", "nan", "none")
_MIN_BASE64 = 256  # characters; no name of a file is so long


@dataclass(frozen=True)
class Asked:
    """A question with its choices."""

    question: str
    """With the hint before it, where there is one."""
    choices: list[str]
    right: int | None
    """Place of the right choice; None where the data hide it."""
    category: str | None = None


def has_choices(row: Mapping[str, Any]) -> bool:
    """Say whether a row asks with choices."""
    return "question" in row and _given(row) is not None


def asked_of(row: Mapping[str, Any]) -> Asked:
    """Read a row.

    Raises:
        DataError: no question, fewer than two choices or more than 26, or a right one that is none of them.
    """
    question, given = row.get("question"), _given(row)
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"question is {shown(question)}; a text is expected.")
    if (
        isinstance(given, str)
        or not isinstance(given, Sequence)
        or not all(isinstance(one, str | int | float) for one in given)
    ):
        raise DataError(f"the choices are {shown(given)}; a list of texts, or columns A, B, C ..., are expected.")
    choices = [str(one).strip() for one in given]
    if not 2 <= len(choices) <= len(ascii_uppercase) or not all(choices):
        raise DataError(f"the choices are {shown(choices)}; 2 to {len(ascii_uppercase)} texts are expected.")
    hint, category = _text(row, HINTS), _text(row, CATEGORIES)
    full = question.strip() if hint is None else f"{hint}\n{question.strip()}"
    return Asked(full, choices, _right(row, choices), category)


def listed(choices: Sequence[str]) -> str:
    """Write choices as lines `A. ...`."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices))


def put(text: str, question: str, choices: str = "") -> str:
    """Fill in `{question}` and `{choices}`; braces of the question itself stay as they are."""
    return choices.join(part.replace("{question}", question) for part in text.split("{choices}"))


def name_of(row: Mapping[str, Any]) -> Any:
    """Give the row's own id; None where it has none."""
    return next((row[name] for name in NAMES if row.get(name) is not None), None)


def with_pictures(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give rows whose pictures in base64 are bytes; in MMBench's form a number names the row that has the picture."""
    by_name = {str(name_of(row)): row.get("image") for row in rows}
    return [{**row, "image": _picture(row["image"], by_name)} if "image" in row else dict(row) for row in rows]


def _picture(image: Any, by_name: Mapping[str, Any]) -> Any:
    if isinstance(image, str) and image.isdecimal() and isinstance(by_name.get(image), str):
        image = by_name[image]
    if not isinstance(image, str) or len(image) < _MIN_BASE64 or image.startswith("data:"):
        return image
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError):
        return image  # whatever it is, whoever opens it says so


def _given(row: Mapping[str, Any]) -> Any:
    """Give the choices as they stand in the row; None where there are none."""
    for name in ("choices", "options"):
        if row.get(name) is not None:
            value = row[name]
            return list(value.values()) if isinstance(value, Mapping) else value
    columns = []
    for letter in ascii_uppercase:
        if row.get(letter) is None or str(row[letter]).strip().lower() in _EMPTY:
            break
        columns.append(row[letter])
    return columns if len(columns) > 1 else None


def _text(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    given = (row[name].strip() for name in names if isinstance(row.get(name), str))
    return next((text for text in given if text.lower() not in _EMPTY), None)


def _right(row: Mapping[str, Any], choices: Sequence[str]) -> int | None:
    """Give the place of the right choice: its words first, then its letter, then its place."""
    given = next((row[name] for name in RIGHT if row.get(name) is not None), None)
    if given is None or str(given).strip().lower() in _EMPTY:
        return None
    said = str(given).strip()
    letter = said.strip("().").upper()
    if isinstance(given, str) and said in choices:
        return choices.index(said)
    if len(letter) == 1 and letter in ascii_uppercase[: len(choices)]:
        return ascii_uppercase.index(letter)
    if not isinstance(given, bool) and said.isdecimal() and int(said) < len(choices):
        return int(said)
    raise DataError(
        f"the right choice is {shown(given)}; one of {', '.join(choices)}, a letter or a place from 0 is expected."
    )
