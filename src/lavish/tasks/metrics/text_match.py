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

    In this order: the answer is a letter or a choice's text; it says "the answer is ..." (or "答案是 ...") with one of
    them; it begins with a letter and a mark, as in "B. a cat"; it holds the text of one choice alone, or a capital
    letter of one alone. Where a choice's text lies within another's, the longer one counts.
    """
    letters = string.ascii_uppercase[: len(choices)]
    text = _SPACES.sub(" ", answer.strip())
    whole = _named(text, choices, letters)
    if whole is not None:
        return whole
    for said in reversed(_SAID.findall(text)):
        found = _named(said, choices, letters)
        if found is None and (start := re.match(rf"[\s(\[（*\"']*({_letter(letters)})", said)):
            found = letters.index(start[1])
        if found is not None:
            return found
    if start := re.match(
        rf"[(\[（*]*([{letters}{letters.lower()}])(?:[)\]）.:,：、．*]+|\s*-)(?=\s|$|[^\x00-\x7f])", text
    ):
        return letters.index(start[1].upper())
    if (found := _mentioned(text, choices)) is not None:
        return found
    alone = set(re.findall(_letter(letters), text))
    return letters.index(alone.pop()) if len(alone) == 1 else None


_SAID = re.compile(
    r"(?:\b(?:answer|choice|option)\b(?: is)?|答案|应?选(?:项|择)?)(?:是|为)?[:：]? *(.+?)(?:\.(?!\d)|[;\n。；]|$)",
    re.IGNORECASE,
)
_MARKS = " .,:;!*\"'`。，：；！、．“”（）"
_ASCII = "A-Za-z0-9_'"  # beside a letter; Chinese stands without a space


def _letter(letters: str) -> str:
    """Give the pattern of a capital letter that stands alone; A and I are words too, unless something ends them."""
    words = [letter for letter in "AI" if letter in letters]
    others = "".join(letter for letter in letters if letter not in words)
    ended = r"(?=\s*(?:[^\w\s(\"']|$|[^\x00-\x7f]|(?:is|or|and|because|since|as)\b))"
    either = [*([f"[{others}]"] if others else []), *(f"{letter}{ended}" for letter in words)]
    return f"(?<![{_ASCII}])(?:{'|'.join(either)})(?![{_ASCII}])"


def _named(text: str, choices: Sequence[str], letters: str) -> int | None:
    """Give the choice that a text is: its letter or its words, in brackets, quotes or bold, with a mark behind."""
    bare = text.strip(f"{_MARKS}()[]")
    if len(bare) == 1 and bare.upper() in letters and bare not in choices:
        return letters.index(bare.upper())
    same = [index for index, choice in enumerate(choices) if _bare(choice) == _bare(text)]
    exact = [index for index in same if choices[index].strip() == text.strip()]
    return exact[0] if len(exact) == 1 else same[0] if len(same) == 1 else None


def _bare(text: str) -> str:
    return _fold(text).strip(_MARKS)


def _mentioned(text: str, choices: Sequence[str]) -> int | None:
    """Give the only choice whose words stand in the text; what lies within a longer choice there does not count."""
    left = _fold(text)
    bare = list(map(_bare, choices))
    found = []
    for index in sorted(range(len(choices)), key=lambda index: -len(choices[index])):
        words = bare[index]
        if words and re.search(_standing(words), left):
            found += [index] * bare.count(words)
            left = re.sub(_standing(words), " ", left)
    return found[0] if len(found) == 1 else None


def _standing(words: str) -> str:
    """Give the pattern of words that stand by themselves: no part of a longer word, and no digits of a longer number.

    Chinese has no spaces, so words that begin or end with it may stand anywhere.
    """
    part = r"[^\W\u2e80-\U0010ffff]"
    before = "" if words[0] >= "\u2e80" else rf"(?<!{part})(?<!\d[.,])" if words[0].isdigit() else rf"(?<!{part})"
    after = "" if words[-1] >= "\u2e80" else rf"(?!{part})(?![.,]\d)" if words[-1].isdigit() else rf"(?!{part})"
    return before + re.escape(words) + after
