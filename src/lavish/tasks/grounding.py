"""Referring expressions: where is the thing that a phrase names. Right from an overlap of 0.5, as on RefCOCO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from lavish.common.boxes import Box
from lavish.common.errors import ConfigError, DataError, shown
from lavish.tasks.metrics.boxes import score_reply
from lavish.tasks.metrics.measure import mean_of
from lavish.tasks.scored_task import ScoredTask, Scores, ids_of, records_by_instance


class GroundingTask(ScoredTask):
    """`grounding`: accuracy in percent at an overlap of 0.5, `accuracy@0.5`; a reply without a box counts as wrong.

    Samples have `image` and `text_input`, the phrase. Records have the target as `bbox` (COCO: x, y, width, height) or
    `box` (corners), in pixels, with `width` and `height` of the picture.
    """

    def valid_step(self, model: nn.Module, samples: dict[str, Any]) -> list[Any]:
        """Ask for the box of each phrase: the reply is `answer`.

        Raises:
            ConfigError: the model names no boxes.
        """
        locate = getattr(model, "locate", None)  # only models that chat have it
        if locate is None:
            raise ConfigError(f"{type(model).__name__} names no boxes; evaluate a grounding model with model.path.")
        limit = self.option("max_len")
        replies = locate(samples) if limit is None else locate(samples, max_len=limit)
        return [{**ids, "answer": reply} for reply, ids in zip(replies, ids_of(samples, "ref_id"), strict=True)]

    def score(self, results: Sequence[Mapping[str, Any]], dataset: Any, split_name: str) -> Scores | None:
        """Compare the first box of each reply with the target."""
        records = records_by_instance(dataset)
        targets = [target_of(records.get(str(one["instance_id"]), {}), one["instance_id"]) for one in results]
        found = [score_reply(one["answer"], target) for one, target in zip(results, targets, strict=True)]
        measures = {
            "accuracy@0.5": mean_of([float(one.is_right) for one in found], 100),
            "mean_iou": mean_of([one.overlap for one in found]),
            "readable": mean_of([float(one.is_readable) for one in found], 100),
        }
        references = [f"[[{Box(*(round(1000 * value) for value in target))}]]" for target in targets]
        return Scores(measures, measures["accuracy@0.5"].value, "mean_iou", references)


def target_of(record: Mapping[str, Any], name: Any) -> tuple[float, ...]:
    """Give a record's target box as fractions 0..1.

    Raises:
        DataError: no box, or no size of the picture.
    """
    box, corners = record.get("bbox"), record.get("box")
    given = corners if corners is not None else box
    try:
        values = np.asarray(given, dtype=float)
        size = np.asarray([record["width"], record["height"]], dtype=float)
    except (KeyError, TypeError, ValueError) as error:
        have = shown(dict(record))
        raise DataError(f"Sample {name!r}: needs bbox or box, width and height; it has {have}.") from error
    if values.shape != (4,) or not (size > 0).all():
        raise DataError(f"Sample {name!r}: bbox or box is {shown(given)} and the size {size.tolist()}.")
    ends = values[2:] if corners is not None else values[:2] + values[2:]
    return tuple(float(value) for value in (*(values[:2] / size), *(ends / size)))
