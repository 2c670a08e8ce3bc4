"""Classes of pictures with texts. Source: salesforce/LAVIS, lavis/tasks/multimodal_classification.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lavish.common.errors import DataError
from lavish.tasks.metrics.measure import mean_of
from lavish.tasks.scored_task import ScoredTask, Scores, ids_of, method_of


class MultimodalClassificationTask(ScoredTask):
    """`multimodal_classification`: accuracy as a fraction, `acc`."""

    def valid_step(self, model: nn.Module, samples: dict[str, Any]) -> list[Any]:
        """Take the likeliest class: `prediction`, `target`, by `instance_id`.

        The model's `predict(samples)` gives `predictions`, (batch, classes), and `targets`, (batch,).

        Raises:
            DataError: another number of predictions than of samples.
        """
        outputs = method_of(model, "predict")(samples)
        predictions = torch.as_tensor(outputs["predictions"]).argmax(1).tolist()
        targets = torch.as_tensor(outputs["targets"]).tolist()
        ids = ids_of(samples, self.inst_id_key)
        if not len(predictions) == len(targets) == len(ids):
            raise DataError(f"{len(predictions)} predictions and {len(targets)} targets for {len(ids)} samples.")
        rows = zip(ids, predictions, targets, strict=True)
        return [{**one, "prediction": prediction, "target": target} for one, prediction, target in rows]

    def score(self, results: Sequence[Mapping[str, Any]], dataset: Any, split_name: str) -> Scores | None:
        """Give the share of samples whose likeliest class is the right one; None where targets are hidden (-1).

        Raises:
            DataError: some are, and others are not.
        """
        hidden = [one[self.result_id] for one in results if one["target"] == -1]
        if len(hidden) == len(results):
            return None
        if hidden:
            raise DataError(f"{len(hidden)} of {len(results)} samples have no right class, first {hidden[0]!r}.")
        measure = mean_of([float(one["prediction"] == one["target"]) for one in results])
        return Scores({"acc": measure}, measure.value, "acc", [one["target"] for one in results])
