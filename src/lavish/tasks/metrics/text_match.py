"""Scores of short texts: ANLS of read text, and which choice of a multiple-choice question an answer names.

ANLS: Biten et al. 2019, Scene Text Visual Question Answering, section 4, threshold 0.5.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

ANLS_THRESHOLD = 0.5
_SPACES = re.compile(r"\s+")


def edit_distance(first: str, second: str) -> int:
    """Give the Levenshtein distance in characters."""
    row = list(range(len(second) + 1))
    for index, letter in enumerate(first, 1):
        diagonal, row[0] = row[0], index
        for place, other in enumerate(second, 1):
            changed = diagonal + (letter != other)
            diagonal, row[place] = row[place], min(changed, row[place] + 1, row[place - 1] + 1)
    return row[-1]


def anls(prediction: str, answers: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Give the average normalised Levenshtein similarity of one prediction: the best over the answers, 0..1.

    Case and the number of spaces do not count. A similarity below the threshold is 0.
    """
    found = _fold(prediction)
    best = 0.0
    for answer in map(_fold, answers):
        longest = max(len(found), len(answer))
        best = max(best, 1 - edit_distance(found, answer) / longest if longest else 1.0)
    return best if best >= threshold else 0.0


def _fold(text: str) -> str:
    return _SPACES.sub(" ", text.strip().lower())


def read_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Give the index of the choice that an answer names, or None where it names none or several.

    In this order: the answer is a letter or a choice's text; it says "the answer is ..." with one of them; it begins
    with a letter and a mark, as in "B. a cat"; it holds the text of one choice alone, or a capital letter of one alone.
    Where a choice's text lies within another's, the longer one counts.
    """
    letters = string.ascii_uppercase[: len(choices)]
    text = _SPACES.sub(" ", answer.strip())
    whole = _named(text, choices, letters)
    if whole is not None:
        return whole
    for said in reversed(re.findall(r"(?:answer|choice|option)\b(?: is)?:? *(.+?)(?:[.;\n]|$)", text, re.IGNORECASE)):
        found = _named(said, choices, letters)
        if found is not None:
            return found
    if start := re.match(rf"[(\[]?([{letters}{letters.lower()}])(?:[)\].:,]|\s*-)(?=\s|$)", text):
        return letters.index(start[1].upper())
    if (found := _mentioned(text, choices)) is not None:
        return found
    alone = set(re.findall(rf"(?<![\w'])([{letters.replace('A', '')}]|A(?=[\s]*(?:[).:,]|$)))(?![\w'])", text))
    return letters.index(alone.pop()) if len(alone) == 1 else None


def _named(text: str, choices: Sequence[str], letters: str) -> int | None:
    """Give the choice that a text is: its letter or its words, in brackets, quotes or bold, with a mark behind."""
    bare = text.strip(" .,:;!*\"'`()[]")
    if len(bare) == 1 and bare.upper() in letters and bare not in choices:
        return letters.index(bare.upper())
    same = [index for index, choice in enumerate(choices) if _bare(choice) == _bare(text)]
    return same[0] if len(same) == 1 else None


def _bare(text: str) -> str:
    return _fold(text).strip(" .,:;!*\"'`")


def _mentioned(text: str, choices: Sequence[str]) -> int | None:
    """Give the only choice whose words stand in the text; what lies within a longer choice there does not count."""
    left = _fold(text)
    found = []
    for index in sorted(range(len(choices)), key=lambda index: -len(choices[index])):
        pattern = rf"(?<!\w){re.escape(_bare(choices[index]))}(?!\w)"
        if _bare(choices[index]) and re.search(pattern, left):
            found.append(index)
            left = re.sub(pattern, " ", left)
    return found[0] if len(found) == 1 else None
