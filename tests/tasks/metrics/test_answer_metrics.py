"""Scores of answers: VQA against the released code (make_vqa_expected.py), the others by hand."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lavish.common.errors import DataError
from lavish.tasks.metrics import vqa
from lavish.tasks.metrics.boxes import score_reply
from lavish.tasks.metrics.language import mean_loss, perplexity
from lavish.tasks.metrics.retrieval import ranks, recalls
from lavish.tasks.metrics.text_match import anls, edit_distance, read_choice

FIXTURE = Path(__file__).parents[2] / "fixtures" / "metrics" / "vqa.json"


@cache
def recorded() -> dict[str, Any]:
    return json.loads(FIXTURE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", recorded()["texts"], ids=lambda case: repr(case["text"]))
def test_normalisation_is_the_official_one(case: dict[str, Any]) -> None:
    assert vqa.strip_marks(case["text"]) == case["marks"]
    assert vqa.fold_words(case["text"]) == case["words"]


def test_vqa_accuracy_is_the_official_one() -> None:
    questions = recorded()["questions"]
    found = [100 * vqa.accuracy(one["prediction"], one["answers"]) for one in questions]
    assert found == pytest.approx([one["accuracy"] for one in questions], abs=1e-9)
    assert np.mean(found) == pytest.approx(recorded()["accuracy"]["overall"], abs=1e-9)
    assert len({round(value) for value in found}) > 4  # the cases tell the steps of the score apart


def test_vqa_by_hand() -> None:
    """Three of ten agree: for each of the seven others 3/3, for each of the three 2/3."""
    answers = ["red"] * 3 + ["blue"] * 7
    assert vqa.accuracy("Red.", answers) == pytest.approx((7 * 1 + 3 * 2 / 3) / 10)
    assert vqa.accuracy("the  two", ["2"] * 10) == 1.0
    # The annotators agree, so their full stop stays, and no normalised prediction can equal it.
    assert vqa.accuracy("u.s.a.", ["u.s.a."] * 10) == 0.0
    assert vqa.accuracy("u.s.a.", ["u.s.a."] * 9 + ["france"]) == pytest.approx(1.0)


def test_short_forms() -> None:
    assert vqa.fold_words("dont couldnt've couldn'tve somebody'd its") == "don't couldn't've couldn't've somebodyd its"
    assert vqa.fold_words("Im") == "im"  # the official table spells it with a capital, which no lower-cased word has


def test_gqa_and_aokvqa() -> None:
    assert vqa.gqa_accuracy("The Dog.", "dog") == 1.0
    assert vqa.gqa_accuracy("The Dog.", "dog", is_generated=False) == 0.0
    assert vqa.direct_answer_accuracy("cat", ["cat", "cat", "dog"]) == pytest.approx(2 / 3)
    assert vqa.direct_answer_accuracy("cat", ["cat"] * 10) == 1.0
    assert vqa.direct_answer_accuracy("Cat", ["cat"] * 10) == 0.0


def test_anls() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3 == edit_distance("abc", "")
    assert anls("Coca  Cola", ["coca cola"]) == 1.0
    assert anls("cocacola", ["coca cola", "pepsi"]) == pytest.approx(1 - 1 / 9)
    assert anls("abcd", ["abxy"]) == 0.5  # at the threshold
    assert anls("abcd", ["axyz"]) == 0.0
    assert anls("", [""]) == 1.0
    assert anls("", ["a"]) == 0.0


CHOICES = ["a cat", "a black cat", "a dog", "no"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", 1),
        ("b", 1),
        ("(C)", 2),
        ("**C**", 2),
        ("C. a dog", 2),
        ("D) because it is", 3),
        ("a dog", 2),
        ("A dog.", 2),
        ("The answer is B.", 1),
        ("the answer is: (b)", 1),
        ("Answer: a dog", 2),
        ("First I thought the answer is A. But the answer is C.", 2),
        ("I see a black cat in the picture.", 1),
        ("It is a cat.", 0),
        ("A cat or a dog", None),
        ("A small horse", None),
        ("It must be option C I think", 2),
        ("I would say B", 1),
        ("nothing", None),
        ("", None),
        ("E", None),
    ],
)
def test_choices(answer: str, expected: int | None) -> None:
    assert read_choice(answer, CHOICES) == expected


@pytest.mark.parametrize(
    ("answer", "choices", "expected"),
    [
        ("答案是B", ["猫", "狗"], 1),
        ("答案：（B）", ["猫", "狗"], 1),
        ("选A。", ["猫", "狗"], 0),
        ("选项B", ["猫", "狗"], 1),
        ("B、狗", ["猫", "狗"], 1),
        ("B。", ["猫", "狗"], 1),
        ("图中是一只狗。", ["猫", "狗"], 1),
        ("图中有猫和狗", ["猫", "狗"], None),
        ("1.5", ["1", "2"], None),
        ("It costs 1.5 euros", ["1", "1.5"], 1),
        ("There are 2.", ["1", "2"], 1),
        ("Either A or B", ["x", "y"], None),
        ("Both A and B.", ["x", "y"], None),
        ("A is correct", ["x", "y"], 0),
        ("A small dog", ["x", "y"], None),
        ("Answer: B because a cat is there", CHOICES, 1),
        ("The answer is A: the cat", ["x", "y"], 0),
        ("The answer is a small horse", ["x", "y"], None),
        ("**Answer:** B", ["x", "y"], 1),
        ("I think so", [*"stuvwxyz", "q"], None),
        ("Zoë", ["Zo", "Zoë"], 1),
        ("It is a black cat.", ["cat", "black cat"], 1),
        ("1.5", ["5", "2"], None),
        ("cat", ["cat", "Cat"], 0),
        ("CAT", ["cat", "Cat"], None),
        ("It is a cat.", ["cat", "Cat"], None),
        ("no", ["yes", "no"], 1),
        ("No, there is nothing.", ["yes", "no"], 1),
    ],
)
def test_choices_as_models_name_them(answer: str, choices: list[str], expected: int | None) -> None:
    assert read_choice(answer, choices) == expected


def test_choices_that_are_letters() -> None:
    assert read_choice("b", ["b", "a"]) == 0
    assert read_choice("B", ["b", "a"]) == 1


def test_retrieval() -> None:
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4], [0.5, 0.5, 0.5]])
    assert ranks(scores, [0, 1, 2]).tolist() == [0, 1, 2]  # equal scores: the right one counts as the last
    assert ranks(scores, [[1, 2], [1], [0, 1, 2]]).tolist() == [1, 1, 0]
    assert {depth: value.sum() for depth, value in recalls(np.array([0, 4, 5, 9, 10])).items()} == {1: 1, 5: 2, 10: 4}
    with pytest.raises(DataError, match="no right candidate"):
        ranks(scores, [[0], [], [1]])
    with pytest.raises(DataError, match="not a number"):
        ranks(np.array([[np.nan]]), [0])


def test_boxes() -> None:
    target = (0.1, 0.1, 0.5, 0.5)
    assert score_reply("it is here [[100,100,500,500]]", target) == (pytest.approx(1.0), True, True)
    overlap, is_right, _ = score_reply("[[100,100,500,300]]", target)
    assert (overlap, is_right) == (pytest.approx(0.5), True)
    assert score_reply("[[100,100,500,290]]", target).is_right is False
    assert score_reply("[[000,000,050,050]] or [[100,100,500,500]]", target).is_right is False  # the first counts
    assert score_reply("nowhere", target) == (0.0, False, False)
    assert score_reply("[[1,2,3]] then [[100,100,500,500]]", target).is_right  # the first that is a box


def test_perplexity_weighs_tokens() -> None:
    losses, tokens = [1.0, 3.0], [9, 1]
    assert mean_loss(losses, tokens).value == pytest.approx(1.2)
    assert perplexity(losses, tokens).value == pytest.approx(np.exp(1.2))
    assert not perplexity(losses, tokens).higher_is_better
