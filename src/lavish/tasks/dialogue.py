"""Losses on held-out data: `dialogue`, and of instruction data `image_text_pretrain`.

Source: salesforce/LAVIS, lavis/tasks/dialogue.py. Traps there: the mean of each process's own batches is reported, and
the best checkpoint is taken for the highest loss. Here losses are those of single samples, merged over all processes,
and lower is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lavish.common.errors import DataError
from lavish.tasks.captioning import score_captions
from lavish.tasks.metrics.language import perplexity
from lavish.tasks.metrics.measure import mean_of
from lavish.tasks.metrics.vqa import is_one_of
from lavish.tasks.scored_task import ScoredTask, Scores, method_of, plain

IGNORE = (-1, -100)
"""Labels that are not learnt: of the AVSD recipe, and of all others."""


class LossTask(ScoredTask):
    """`agg_metrics` is the mean loss over samples; `perplexity` weighs their label tokens, where a batch has labels."""

    higher_is_better = False

    def valid_step(self, model: nn.Module, samples: dict[str, Any]) -> list[Any]:
        """Give the loss of each sample; of the whole batch where it cannot be taken apart."""
        results = []
        for row in rows_of(samples):
            output = model(row)
            result: dict[str, Any] = {
                name: float(value) for name, value in output.items() if "loss" in name and value is not None
            }
            ids = row.get(self.inst_id_key)
            result[self.inst_id_key] = None if ids is None else ",".join(str(plain(one)) for one in ids)
            result["num_samples"] = num_samples(row)
            labels = row.get("labels")
            if isinstance(labels, torch.Tensor):
                result["num_tokens"] = int(torch.isin(labels, labels.new_tensor(IGNORE), invert=True).sum())
            elif "num_tokens" in output:  # of a model that makes the labels itself
                result["num_tokens"] = output["num_tokens"]
            results.append(result)
        return results

    def answer_step(self, model: nn.Module, samples: dict[str, Any]) -> list[Any]:
        """Let the model write, in place of the answers that the samples have."""
        return method_of(model, "generate")(samples, **self.generation())

    def generation(self) -> dict[str, Any]:
        """Give the recipe's options of generation as the model's `generate` calls them."""
        limit = self.option("max_len", self.option("max_new_tokens"))
        return {} if limit is None else {"max_new_tokens": limit}

    def unique(self, results: list[Any]) -> list[Any]:
        """Give the first result of each id; all of those without one."""
        seen: set[Any] = set()
        kept = []
        for one in results:
            name = one[self.inst_id_key]
            if name is None or name not in seen:
                kept.append(one)
                seen.add(name)
        return kept

    def score(self, results: Sequence[Mapping[str, Any]], dataset: Any, split_name: str) -> Scores | None:
        """Give the mean loss, and the perplexity of the language model's part."""
        spread = [one for one in results for _ in range(one["num_samples"])]
        measures = {"loss": mean_of([one["loss"] for one in spread], higher_is_better=False)}
        if all("num_tokens" in one for one in results) and any(one["num_tokens"] for one in results):
            losses = [one.get("lm_loss", one["loss"]) for one in results]
            measures["perplexity"] = perplexity(losses, [one["num_tokens"] for one in results])
        return Scores(measures, measures["loss"].value, "loss", [None] * len(results))


class DialogueTask(LossTask):
    """`dialogue`: losses of dialogues about videos; where the recipe says `evaluate: true`, answers too.

    LAVIS reads the options of generation and never answers. Answers are scored as captions are, against the one true
    answer of the record; `exact_match` is the share, in percent, that are it.
    """

    def valid_step(self, model: nn.Module, samples: dict[str, Any]) -> list[Any]:
        """Give the loss of each sample, and its `answer`."""
        results = super().valid_step(model, samples)
        if not self.option("evaluate", False) or len(results) != num_samples(samples):
            return results
        answers = self.answer_step(model, samples)
        return [{**result, "answer": answer} for result, answer in zip(results, answers, strict=True)]

    def generation(self) -> dict[str, Any]:
        """Give the recipe's options of generation as the model's `generate` calls them."""
        names = {"num_beams": "num_beams", "max_len": "max_length", "min_len": "min_length"}
        return {name: self.run.get(key) for key, name in names.items() if self.run.get(key) is not None}

    def score(self, results: Sequence[Mapping[str, Any]], dataset: Any, split_name: str) -> Scores | None:
        """Add the metrics of captions, where there are answers and the records hold the true ones."""
        scores = super().score(results, dataset, split_name)
        records = getattr(dataset, "annotation", [])  # data sets of one's own may keep none
        if scores is None or len(records) != len(results) or not all("answer" in one for one in results):
            return scores
        by_id = {str(record.get(self.inst_id_key)): record.get("answer") for record in records}
        true = [by_id.get(str(one[self.inst_id_key]), records[at].get("answer")) for at, one in enumerate(results)]
        if not all(isinstance(text, str) for text in true):
            return scores
        answers = [one["answer"] for one in results]
        answered = score_captions(answers, [[text] for text in true])
        right = [is_one_of(answer, [text]) for answer, text in zip(answers, true, strict=True)]
        scores.measures |= {"exact_match": mean_of(right, 100), **answered.measures}
        scores.values, scores.notes, scores.references = answered.values, answered.notes, true
        return scores


def rows_of(samples: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Take a batch apart into batches of one; what does not have one entry a sample leaves it whole."""
    if "conversations" in samples:  # whose pictures are all in one tensor, any number for each
        return [dict(samples)]
    lengths = {len(value) for value in samples.values() if isinstance(value, list) or _has_rows(value)}
    if len(lengths) != 1:
        return [dict(samples)]
    return [
        {
            name: value[at : at + 1] if isinstance(value, list) or _has_rows(value) else value
            for name, value in samples.items()
        }
        for at in range(lengths.pop())
    ]


def num_samples(samples: Mapping[str, Any]) -> int:
    """Give how many samples a batch holds: the length of its lists, else of its tensors.

    Raises:
        DataError: it has neither.
    """
    for value in (*(one for one in samples.values() if isinstance(one, list)), *filter(_has_rows, samples.values())):
        return len(value)
    raise DataError(f"A batch holds lists or tensors; this one has {', '.join(map(str, samples)) or 'nothing'}.")


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0
