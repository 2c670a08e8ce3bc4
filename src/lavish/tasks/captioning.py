"""Captions of pictures, scored as COCO's are. Source: salesforce/LAVIS, lavis/tasks/captioning.py.

Trap: LAVIS passes options that `blip_caption` does not take and fails. Here a recipe's options are passed where it
names them, and no others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lavish.common.errors import DataError, MissingDependency
from lavish.datasets.datasets.annotations import read_json
from lavish.tasks.metrics.captions import bleu, cider, rouge_l
from lavish.tasks.metrics.measure import mean_of
from lavish.tasks.metrics.meteor import find_jar, meteor
from lavish.tasks.metrics.ptb import tokenize
from lavish.tasks.scored_task import ScoredTask, Scores, ids_of, method_of, records_by_instance

GENERATION = ("use_nucleus_sampling", "num_beams", "top_p", "temperature", "repetition_penalty", "length_penalty")


class CaptionTask(ScoredTask):
    """`captioning`: `agg_metrics` is CIDEr + Bleu_4, as fractions; `exact_match` is in percent."""

    result_id = "image_id"

    def valid_step(self, model: nn.Module, samples: dict[str, Any]) -> list[Any]:
        """Caption each picture: `caption`, `image_id`."""
        options = {name: self.run.get(name) for name in GENERATION} | {
            "max_length": self.run.get("max_len"),
            "min_length": self.run.get("min_len"),
        }
        if self.option("prompt") is not None:
            samples = {**samples, "prompt": self.option("prompt")}
        given = {name: value for name, value in options.items() if value is not None}
        captions = method_of(model, "generate")(samples, **given)
        return [
            {"image_id": number(ids.pop("image_id", ids.get("instance_id"))), "caption": caption, **ids}
            for caption, ids in zip(captions, ids_of(samples, "image_id"), strict=True)
        ]

    def score(self, results: Sequence[Mapping[str, Any]], dataset: Any, split_name: str) -> Scores | None:
        """Score captions against those of `run.annotation_file`, else of the data set."""
        references = self.references(results, dataset, split_name)
        if references is None:
            return None
        captions = [one["caption"] for one in results]
        scores = score_captions(captions, references)
        exact = [float(tokenize(one) in map(tokenize, refs)) for one, refs in zip(captions, references, strict=True)]
        scores.measures["exact_match"] = mean_of(exact, 100)
        return scores

    def references(self, results: Sequence[Mapping[str, Any]], dataset: Any, split_name: str) -> list[list[str]] | None:
        """Give the references of each result; None where there are none.

        Raises:
            DataError: some pictures have references and others have none.
        """
        path = self.annotation_path(split_name)
        if path is not None:
            by_id = read_coco_captions(Path(path))
            found = [by_id.get(one["image_id"], []) for one in results]
        else:
            records = records_by_instance(dataset)
            by_id = defaultdict(list)
            for one in results:
                by_id[one["image_id"]] += texts(records.get(str(one.get("instance_id")), {}).get("caption"))
            found = [by_id[one["image_id"]] for one in results]
        absent = [one["image_id"] for one, refs in zip(results, found, strict=True) if not refs]
        if len(absent) == len(results) and path is None:
            return None
        if absent:
            where = path or "the data set's annotations"
            count = f"{len(absent)} of {len(results)} pictures"
            raise DataError(f"{count} have no reference in {where}, first {absent[0]!r}.")
        return found

    def leaderboard(self, results: Sequence[Mapping[str, Any]]) -> Any:
        """Give COCO's form of results, which nocaps takes too."""
        return [{"image_id": one["image_id"], "caption": one["caption"]} for one in results]


def score_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Score one caption a picture; METEOR where Java and its program are on the machine."""
    words = [tokenize(text) for text in captions]
    refs = [[tokenize(text) for text in texts_of] for texts_of in references]
    measures = {**bleu(words, refs), "ROUGE_L": rouge_l(words, refs), "CIDEr": cider(words, refs)}
    scores = Scores(
        measures=measures,
        agg_metrics=measures["CIDEr"].value + measures["Bleu_4"].value,
        headline="CIDEr" if len(captions) > 1 else "ROUGE_L",
        references=[list(texts_of) for texts_of in references],
    )
    try:
        scores.values["METEOR"] = meteor(words, refs, find_jar()).score
    except MissingDependency as error:
        scores.notes.append(f"METEOR is not computed: {error}")
    return scores


def read_coco_captions(path: Path) -> dict[Any, list[str]]:
    """Read ground truth in COCO's form: `annotations` with `image_id` and `caption`.

    Raises:
        DataError: absent, damaged, or of another form.
    """
    loaded = read_json(path)
    rows = loaded.get("annotations") if isinstance(loaded, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"{path}: no captions in COCO's form, {{'annotations': [{{'image_id': .., 'caption': ..}}]}}.")
    found: dict[Any, list[str]] = defaultdict(list)
    for at, row in enumerate(rows, 1):
        if not isinstance(row, dict) or "image_id" not in row or "caption" not in row:
            raise DataError(f"{path}: annotation {at} has no image_id and caption.")
        found[number(row["image_id"])] += texts(row["caption"])
    return found


def texts(value: Any) -> list[Any]:
    """Give one text or a list of them as a list."""
    return [value] if isinstance(value, str) else list(value or [])


def number(image_id: Any) -> Any:
    """Give the number that a text of digits is, so that '000123' and 123 are one picture; other ids as they are."""
    return int(image_id) if isinstance(image_id, str) and image_id.isdecimal() else image_id
