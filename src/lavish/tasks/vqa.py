"""Questions about pictures: VQA, OK-VQA, GQA, A-OKVQA and read text. Source: salesforce/LAVIS, lavis/tasks/vqa.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from lavish.common.errors import DataError, shown
from lavish.datasets.datasets.annotations import read_json
from lavish.tasks.metrics import vqa
from lavish.tasks.metrics.measure import Measure, mean_of
from lavish.tasks.metrics.text_match import anls
from lavish.tasks.multiple_choice import choose_among
from lavish.tasks.scored_task import ScoredTask, Scores, ids_of, method_of, records_by_instance

OPTIONS = ("num_beams", "max_len", "min_len", "num_ans_candidates", "inference_method", "prompt")


class VQATask(ScoredTask):
    """`vqa`: the official VQA accuracy in percent, over all and by type of answer."""

    result_id = "question_id"
    result_file = "{split}_vqa_result"
    measure_name: ClassVar[str] = "vqa_accuracy"
    reference_fields: ClassVar[tuple[str, ...]] = ("answer",)
    """Where a record or sample has the answers."""

    def __init__(self, run: Mapping[str, Any] | None = None) -> None:
        super().__init__(run)
        self.answer_list: list[str] | None = None
        self.inference_method: str = self.option("inference_method", "rank")

    def build_datasets(self, cfg: Any) -> dict[str, Any]:
        """Build the datasets, and take over the list of answers that one of them brings."""
        datasets = super().build_datasets(cfg)
        for splits in datasets.values():
            for dataset in splits.values():
                self.answer_list = getattr(dataset, "answer_list", None) or self.answer_list  # training sets have none
        return datasets

    def before_evaluation(self, model: nn.Module, dataset: Any, **kwargs: Any) -> None:
        """Take the list of answers of this data set, where it has one."""
        self.answer_list = getattr(dataset, "answer_list", None) or self.answer_list
        super().before_evaluation(model, dataset, **kwargs)

    def valid_step(self, model: nn.Module, samples: dict[str, Any]) -> list[Any]:
        """Answer each question: `question_id`, `answer`, and `reference` where the samples bring it."""
        answers = self.predict(model, samples)
        references = next((samples[name] for name in self.reference_fields if samples.get(name) is not None), None)
        results = []
        for at, (answer, ids) in enumerate(zip(answers, ids_of(samples, "question_id"), strict=True)):
            result = {**ids, "answer": answer}
            if references is not None and references[at] is not None:
                result["reference"] = references[at]
            results.append(result)
        return results

    def predict(self, model: nn.Module, samples: dict[str, Any]) -> list[str]:
        """Ask the model, with the options of the recipe."""
        given = {name: self.run.get(name) for name in OPTIONS if self.run.get(name) is not None}
        answer = method_of(model, "predict_answers")
        return answer(samples, **{**given, "answer_list": self.answer_list, "inference_method": self.inference_method})

    def score(self, results: Sequence[Mapping[str, Any]], dataset: Any, split_name: str) -> Scores | None:
        """Score answers against `run.annotation_file`, else COCO's annotations of the data set, else its records."""
        official = self.official(dataset, split_name)
        references = self.references(results, dataset, official)
        if references is None:
            return None
        values = [self.score_one(one["answer"], refs) for one, refs in zip(results, references, strict=True)]
        measure = mean_of(values, 100)
        scores = Scores({self.measure_name: measure}, measure.value, self.measure_name, references)
        scores.groups = by_type(results, values, official)
        scores.notes += self.notes_on(references)
        return scores

    def notes_on(self, references: list[list[str]]) -> list[str]:
        """Say where the official score does not apply: it needs several annotators a question."""
        if type(self).score_one is not VQATask.score_one:
            return []  # a task with a score of its own
        few = sum(not vqa.has_annotators(refs) for refs in references)
        if not few:
            return []
        count = "All" if few == len(references) else f"{few} of {len(references)}"
        return [
            f"{count} questions have fewer than {vqa.ENOUGH_ANNOTATORS + 1} answers; there any one of them is right."
        ]

    def score_one(self, answer: str, references: list[str]) -> float:
        """Score one answer, 0..1."""
        return vqa.accuracy(answer, references) if vqa.has_annotators(references) else vqa.is_one_of(answer, references)

    def references(
        self, results: Sequence[Mapping[str, Any]], dataset: Any, official: Mapping[Any, Mapping[str, Any]]
    ) -> list[list[str]] | None:
        """Give the right answers of each result; None where the split hides them.

        Raises:
            DataError: some questions have answers and others have none.
        """
        records = records_by_instance(dataset)
        found = []
        for one in results:
            record = official.get(one.get("question_id"), records.get(str(one.get("instance_id")), {}))
            fields = [record.get(name) for name in (*self.reference_fields, "answers")]
            given = next((value for value in (*fields, one.get("reference")) if value is not None), None)
            found.append(answers_of(given, one.get(self.result_id)))
        absent = [one.get(self.result_id) for one, refs in zip(results, found, strict=True) if not refs]
        if len(absent) == len(results):
            return None
        if absent:
            raise DataError(f"{len(absent)} of {len(results)} questions have no right answer, first {absent[0]!r}.")
        return found

    def official(self, dataset: Any, split_name: str) -> dict[Any, Mapping[str, Any]]:
        """Read the annotations in COCO's form, by question; none where there is no such file."""
        # Only VQA sets have such files; those of LAVIS spell it so.
        path = self.annotation_path(split_name) or getattr(dataset, "coco_fmt_anno_file", None)
        return {} if path is None else read_vqa_annotations(Path(path))

    def leaderboard(self, results: Sequence[Mapping[str, Any]]) -> Any:
        """Give the form that the VQA server takes."""
        return [{"question_id": one["question_id"], "answer": one["answer"]} for one in results]


class GQATask(VQATask):
    """`gqa`: exact match in percent, after the VQA rules where the answer was written and not chosen."""

    measure_name = "acc"

    def score_one(self, answer: str, references: list[str]) -> float:
        """Score one answer against the one right answer; what is in no list of answers was written."""
        is_chosen = self.inference_method != "generate" and answer in (self.answer_list or ())
        return vqa.gqa_accuracy(answer, references[0], is_generated=not is_chosen)

    def leaderboard(self, results: Sequence[Mapping[str, Any]]) -> Any:
        """Give the form that the GQA server takes."""
        return [{"questionId": str(one["question_id"]), "prediction": one["answer"]} for one in results]


class AOKVQATask(VQATask):
    """`aok_vqa`: direct answers in percent (`agg_metrics`), and multiple choice where the samples have choices."""

    measure_name = "acc"
    reference_fields = ("direct_answers",)

    def valid_step(self, model: nn.Module, samples: dict[str, Any]) -> list[Any]:
        """Answer each question directly, `answer`, and by its choices, `choice`."""
        results = super().valid_step(model, samples)
        for name in ("choices", "correct_choice_idx"):
            if samples.get(name) is None:
                return results
        chosen = choose_among(model, samples)
        rows = zip(results, chosen, samples["choices"], samples["correct_choice_idx"], strict=True)
        for result, choice, texts, right in rows:
            result["choice"] = None if choice.index is None else texts[choice.index]
            result["right_choice"] = None if right is None else int(right)
        return results

    def score(self, results: Sequence[Mapping[str, Any]], dataset: Any, split_name: str) -> Scores | None:
        """Score direct answers, and choices where every result has the right one."""
        scores = super().score(results, dataset, split_name)
        records = records_by_instance(dataset)
        hits = []
        for one in results:
            choices = records.get(str(one.get("instance_id")), {}).get("choices")
            if choices is None or one.get("right_choice") is None:
                return scores
            hits.append(float(one["choice"] == choices[one["right_choice"]]))
        if scores is not None:
            scores.measures["multiple_choice_acc"] = mean_of(hits, 100)
        return scores

    def score_one(self, answer: str, references: list[str]) -> float:
        """Score one direct answer."""
        return vqa.direct_answer_accuracy(answer, references)

    def leaderboard(self, results: Sequence[Mapping[str, Any]]) -> Any:
        """Give the form that the A-OKVQA server takes."""
        return {
            str(one["question_id"]): {"direct_answer": one["answer"], "multiple_choice": one.get("choice") or ""}
            for one in results
        }


class OCRVQATask(VQATask):
    """`ocr_vqa`: read text, ANLS (0..1), and the share of answers that are exactly right."""

    measure_name = "ANLS"

    def score(self, results: Sequence[Mapping[str, Any]], dataset: Any, split_name: str) -> Scores | None:
        """Score answers by their distance in letters from the nearest right one."""
        references = self.references(results, dataset, self.official(dataset, split_name))
        if references is None:
            return None
        pairs = [(one["answer"], refs) for one, refs in zip(results, references, strict=True)]
        measure = mean_of([anls(answer, refs) for answer, refs in pairs])
        exact = mean_of(np.array([anls(answer, refs, threshold=1.0) for answer, refs in pairs]))
        return Scores({"ANLS": measure, "exact_match": exact}, measure.value, "ANLS", references)


def answers_of(given: Any, name: Any) -> list[str]:
    """Give the right answers of a record: a text or number, a list of them, or of objects with `answer`.

    Raises:
        DataError: something else.
    """
    rows = given if isinstance(given, list | tuple) else [] if given is None else [given]
    found = [row.get("answer") if isinstance(row, Mapping) else row for row in rows]
    if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in found):
        raise DataError(f"Question {name!r}: the right answer is {shown(given)}; a text or a list of them is expected.")
    return [str(one) for one in found]


def read_vqa_annotations(path: Path) -> dict[Any, Mapping[str, Any]]:
    """Read annotations in the form of VQA v2 by question: `answers`, `answer_type`, `question_type`.

    Raises:
        DataError: absent, damaged, or of another form.
    """
    loaded = read_json(path)
    rows = loaded.get("annotations") if isinstance(loaded, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "question_id" in row for row in rows):
        raise DataError(f"{path}: no annotations in the form of VQA v2, {{'annotations': [{{'question_id': ..}}]}}.")
    return {row["question_id"]: row for row in rows}


def by_type(
    results: Sequence[Mapping[str, Any]], values: Sequence[float], official: Mapping[Any, Mapping[str, Any]]
) -> dict[str, Measure]:
    """Give the scores by the type of the right answer, where the annotations tell it."""
    found = defaultdict(list)
    for one, value in zip(results, values, strict=True):
        kind = official.get(one.get("question_id"), {}).get("answer_type")
        if kind is not None:
            found[str(kind)].append(value)
    return {kind: mean_of(of_kind, 100) for kind, of_kind in sorted(found.items())}
