"""The VQA accuracy with its official normalisation of answers, and the accuracies of GQA and A-OKVQA beside it.

Rules: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py, with the marks that salesforce/LAVIS takes
(lavis/common/vqa_tools/vqa_eval.py: `-{}!` are marks, `:` and `'` are none), which is the version of VQA v2. GQA as
LAVIS counts it (lavis/tasks/vqa.py), A-OKVQA as allenai/aokvqa, evaluation/eval_predictions.py.
`tests/fixtures/metrics/vqa.json` holds what the released code gives.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MARKS = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_DIGITS)}}
_SHORT_FORMS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    form[:place] + form[place + 1 :]: form
    for form in _SHORT_FORMS.split()
    for place, letter in enumerate(form)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the one entry of the official table that takes an apostrophe out
"""A short form with one of its apostrophes left out -> the short form."""

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32  # the official call gives a flag of this value in the place of the count
ENOUGH_ANNOTATORS = 3


def strip_marks(text: str) -> str:
    """Take marks out of a text: those beside a space vanish, others become a space; full stops that end no number go.

    A comma within a number makes every mark vanish.
    """
    vanish = _COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for mark in MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if vanish or beside_space else " ")
    return _FULL_STOP.sub("", stripped, count=_MOST_FULL_STOPS)


def fold_words(text: str) -> str:
    """Lower-case a text, write number words as digits, drop articles, and put apostrophes into short forms."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalise(answer: str) -> str:
    """Give a prediction as the official score compares it."""
    return fold_words(strip_marks(answer.replace("\n", " ").replace("\t", " ").strip()))


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Give the VQA accuracy of one prediction, 0..1: over all annotators, min(1, other annotators who agree / 3).

    Annotators' answers lose their marks where they do not all agree, and are compared as they are otherwise; articles,
    number words and short forms are those of the prediction alone.
    """
    found = normalise(prediction)
    references = [strip_marks(answer) for answer in answers] if len(set(answers)) > 1 else list(answers)
    agree = [reference == found for reference in references]
    total = sum(agree)
    return sum(min(1.0, (total - own) / ENOUGH_ANNOTATORS) for own in agree) / len(agree)


def has_annotators(answers: Sequence[str]) -> bool:
    """Say whether the official score can be 1 at all: an annotator needs three others who agree."""
    return len(answers) > ENOUGH_ANNOTATORS


def is_one_of(prediction: str, answers: Sequence[str]) -> float:
    """Give 1 where the prediction is one of the answers, both normalised as predictions are, else 0."""
    return float(normalise(prediction) in map(normalise, answers))


def gqa_accuracy(prediction: str, answer: str, *, is_generated: bool = True) -> float:
    """Give 1 where the prediction is the answer, else 0; a text that was generated is normalised, a choice is not."""
    return float((fold_words(strip_marks(prediction)) if is_generated else prediction) == answer)


def direct_answer_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Give A-OKVQA's score of a direct answer: min(1, annotators who gave it / 3), without any normalisation."""
    return min(1.0, sum(answer == prediction for answer in answers) / ENOUGH_ANNOTATORS)
