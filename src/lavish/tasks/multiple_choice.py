"""Questions with choices: which one does the model take, as on A-OKVQA, ScienceQA and MMBench.

A model that chats is shown the choices as A., B. ... and its choice is read out of its reply; BLIP ranks them. A reply
that names none, or several, counts as wrong and never as a guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from lavish.common.errors import DataError
from lavish.tasks.metrics.measure import Measure, mean_of
from lavish.tasks.scored_task import ScoredTask, Scores, ids_of, method_of


class Choice(NamedTuple):
    """What a model took."""

    index: int | None
    """None where its reply names no choice."""
    said: str
    """Its reply; of choices that were ranked the words of the best one."""


class MultipleChoiceTask(ScoredTask):
    """`multiple_choice`: accuracy in percent, and by `category` where the samples have one.

    Samples have `image`, `text_input`, `choices`, and `correct_choice_idx`, None where the split hides it.
    """

    result_id = "question_id"
    result_file = "{split}_multiple_choice_result"

    def valid_step(self, model: nn.Module, samples: dict[str, Any]) -> list[Any]:
        """Choose for each question: `answer` is what was said, `choice` the letter that it names.

        Raises:
            DataError: samples without choices.
        """
        if samples.get("choices") is None or any(one is None for one in samples["choices"]):
            raise DataError("The samples have no choices; a task for questions without them is `vqa`.")
        count = len(samples["choices"])
        right = samples.get("correct_choice_idx") or [None] * count
        kinds = samples.get("category") or [None] * count
        chosen = choose_among(model, samples)
        rows = zip(ids_of(samples, "question_id"), chosen, samples["choices"], right, kinds, strict=True)
        return [
            {
                **ids,
                "answer": choice.said,
                "choice": None if choice.index is None else ascii_uppercase[choice.index],
                "right_choice": None if place is None else ascii_uppercase[int(place)],
                "choices": list(texts),
                **({} if kind is None else {"category": str(kind)}),
            }
            for ids, choice, texts, place, kind in rows
        ]

    def score(self, results: Sequence[Mapping[str, Any]], dataset: Any, split_name: str) -> Scores | None:
        """Give the share of right choices, of replies that name one, and what guessing would give.

        Raises:
            DataError: some questions have a right choice and others have none.
        """
        absent = [one[self.result_id] for one in results if one["right_choice"] is None]
        if len(absent) == len(results):
            return None
        if absent:
            raise DataError(f"{len(absent)} of {len(results)} questions have no right choice, first {absent[0]!r}.")
        hits = [float(one["choice"] == one["right_choice"]) for one in results]
        measures = {
            "accuracy": mean_of(hits, 100),
            "readable": mean_of([float(one["choice"] is not None) for one in results], 100),
        }
        right = [ascii_uppercase.index(one["right_choice"]) for one in results]
        return Scores(
            measures,
            measures["accuracy"].value,
            "accuracy",
            [f"{ascii_uppercase[at]}. {one['choices'][at]}" for one, at in zip(results, right, strict=True)],
            groups=by_category(results, hits),
            values={"chance": 100 * float(np.mean([1 / len(one["choices"]) for one in results]))},
        )

    def leaderboard(self, results: Sequence[Mapping[str, Any]]) -> Any:
        """Give the letter of each question; empty where the reply names none."""
        return [{"question_id": one["question_id"], "prediction": one["choice"] or ""} for one in results]


def choose_among(model: nn.Module, samples: Mapping[str, Any]) -> list[Choice]:
    """Let a model choose: one that chats is asked, one that ranks answers ranks each question's own choices."""
    choose = getattr(model, "choose", None)  # chat models read a letter out of their reply
    if choose is not None:
        return [Choice(*one) for one in choose(samples, samples["choices"])]
    chosen = []
    for at, choices in enumerate(samples["choices"]):
        row = {name: samples[name][at : at + 1] for name in ("image", "text_input")}
        options = {"answer_list": list(choices), "num_ans_candidates": len(choices)}
        (said,) = method_of(model, "predict_answers")(row, inference_method="rank", **options)
        chosen.append(Choice(list(choices).index(said), said))
    return chosen


def by_category(results: Sequence[Mapping[str, Any]], hits: Sequence[float]) -> dict[str, Measure]:
    """Give the accuracy of each category, where the questions have one."""
    found: dict[str, list[float]] = {}
    for one, hit in zip(results, hits, strict=True):
        if "category" in one:
            found.setdefault(one["category"], []).append(hit)
    return {name: mean_of(values, 100) for name, values in sorted(found.items())}
