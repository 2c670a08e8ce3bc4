"""Caption metrics against what pycocoevalcap and its Java programs give (tests/fixtures/metrics/make_expected.py)."""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lavish.common.errors import DataError, MissingDependency
from lavish.tasks.metrics import meteor
from lavish.tasks.metrics.captions import bleu, cider, common_subsequence, rouge_l
from lavish.tasks.metrics.ptb import tokenize

FIXTURE = Path(__file__).parents[2] / "fixtures" / "metrics" / "captions.json"


@cache
def recorded() -> dict[str, Any]:
    return json.loads(FIXTURE.read_text(encoding="utf-8"))


def words() -> tuple[list[list[str]], list[list[list[str]]]]:
    pictures = recorded()["pictures"]
    return (
        [tokenize(one["prediction"]) for one in pictures],
        [[tokenize(text) for text in one["references"]] for one in pictures],
    )


@pytest.mark.parametrize("case", recorded()["tokens"], ids=lambda case: case["text"][:30])
def test_words_are_those_of_the_java_program(case: dict[str, Any]) -> None:
    assert tokenize(case["text"]) == case["words"]


def test_doctest_of_tokenize() -> None:
    assert tokenize("A man's dog can't run.") == ["a", "man", "'s", "dog", "ca", "n't", "run"]
    assert tokenize("") == [] == tokenize("... ?")
    assert tokenize("The dog’s toy — red") == ["the", "dog", "'s", "toy", "red"]


@pytest.mark.parametrize("name", ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"])
def test_scores_are_those_of_pycocoevalcap(name: str) -> None:
    predictions, references = words()
    found = {**bleu(predictions, references), "ROUGE_L": rouge_l(predictions, references)}
    found["CIDEr"] = cider(predictions, references)
    expected = recorded()["expected"][name]
    assert found[name].value == pytest.approx(expected["score"], rel=1e-9, abs=1e-12)
    assert found[name].per_sample == pytest.approx(expected["scores"], rel=1e-9, abs=1e-12)


def test_hand_computed() -> None:
    """One picture: 3 of 4 words and 1 of 3 pairs are right, the reference has 4 words, so there is no penalty."""
    values = bleu([["a", "dog", "sits", "here"]], [[["a", "dog", "runs", "here"]]])
    assert values["Bleu_1"].value == pytest.approx(3 / 4, rel=1e-6)
    assert values["Bleu_2"].value == pytest.approx((3 / 4 * 1 / 3) ** 0.5, rel=1e-6)
    assert values["Bleu_3"].value < 1e-4  # no three words in a row: nothing but the released scorer's 1e-15
    # The best recall (2 of 2) and the best precision (2 of 3) come from the same reference here.
    found = rouge_l([["a", "big", "dog"]], [[["a", "dog"], ["cat"]]]).value
    assert found == pytest.approx((1 + 1.44) * (2 / 3) / (1 + 1.44 * 2 / 3))
    assert common_subsequence(list("abcbdab"), list("bdcaba")) == 4
    assert cider([["a", "dog"]], [[["a", "dog"]]]).value == 0.0  # every n-gram is in all of one picture
    two = cider([["a", "b"], ["c", "d"]], [[["a", "b"]], [["c", "d"]]])
    assert two.value == pytest.approx(10 * 2 / 4)  # alike in words and pairs; there are no longer n-grams


def test_brevity_penalty_takes_the_closest_reference() -> None:
    short = bleu([["a", "b"]], [[["a", "b", "c"], ["a", "b", "c", "d", "e", "f"]]])["Bleu_1"].value
    assert short == pytest.approx(np.exp(1 - 3 / 2), rel=1e-6)
    tie = bleu([["a", "b", "c"]], [[["a", "b"], ["a", "b", "c", "d"]]])["Bleu_1"].value
    assert tie == pytest.approx(1.0, rel=1e-6)  # of lengths equally close the shorter one counts


def test_nothing_to_measure() -> None:
    with pytest.raises(DataError, match="nothing to measure"):
        rouge_l([], [])


def test_meteor_is_that_of_pycocoevalcap() -> None:
    try:
        jar = meteor.find_jar()
    except MissingDependency as error:
        pytest.skip(str(error))
    found = meteor.meteor(*words(), jar)
    expected = recorded()["expected"]["METEOR"]
    assert found.score == pytest.approx(expected["score"], abs=1e-12)
    assert found.scores == pytest.approx(expected["scores"], abs=1e-12)


JAVA = """#!{python}
import sys
with open("{log}", "w", encoding="utf-8") as log:
    print(*sys.argv[1:], file=log)
    for line in sys.stdin:
        log.write(line)
        log.flush()
        if line.startswith("SCORE"):
            print("counts", line.count("|||"), flush=True)
        else:
            print(0.25, 0.75, 0.4, sep="\\n", flush=True)
"""


def test_meteor_asks_its_program_as_pycocoevalcap_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A program that writes down what it is asked, in the place of Java: references first, no mark of the protocol in a
    text, then all counts at once, and the last number is that of the set."""
    java, log = tmp_path / "java", tmp_path / "log"
    java.write_text(JAVA.format(python=sys.executable, log=log))
    java.chmod(0o755)
    (tmp_path / meteor.JAR).touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(meteor.ENVIRONMENT, str(tmp_path / meteor.JAR))
    found = meteor.meteor([["a", "|||", "dog"], ["\ud83d"]], [[["one"], ["two"]], [["three"]]], meteor.find_jar())
    assert found == (0.4, [0.25, 0.75])
    asked = log.read_text(encoding="utf-8").splitlines()
    assert asked[0].startswith("-jar -Xmx2G meteor-1.5.jar - - -stdio -l en -norm")
    assert asked[1:] == [
        "SCORE ||| one ||| two ||| a  dog",
        "SCORE ||| three ||| ?",
        "EVAL ||| counts 3 ||| counts 2",
    ]


def test_meteor_says_what_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match="install a Java runtime"):
        meteor.find_jar()
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 0\n")
    java.chmod(0o755)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv(meteor.ENVIRONMENT, str(tmp_path / "absent.jar"))
    with pytest.raises(MissingDependency, match=r"absent\.jar.*pip install --no-deps pycocoevalcap"):
        meteor.find_jar()
    (tmp_path / "there.jar").touch()
    with pytest.raises(MissingDependency, match="without an answer"):
        meteor.meteor([["a"]], [[["a"]]], tmp_path / "there.jar")
