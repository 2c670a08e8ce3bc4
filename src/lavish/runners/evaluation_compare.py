"""Two evaluations of the same samples beside each other, with paired differences."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lavish.common.errors import ConfigError, DataError
from lavish.runners.evaluation_report import ANSWERS
from lavish.runners.evaluation_rows import Row, Rows
from lavish.runners.evaluation_summary import METRICS_FILE, STATISTICS_FILE
from lavish.tasks.metrics.measure import Difference, Measure, compare


@dataclass(frozen=True)
class Compared:
    """One metric of one split in both runs."""

    split: str
    metric: str
    first: float
    second: float
    difference: Difference
    num_samples: int
    num_better: int
    """Samples that are better in the second run, by this metric alone."""
    num_worse: int
    higher_is_better: bool


def compare_runs(first: str | Path, second: str | Path) -> list[Compared]:
    """Compare two folders of evaluations, metric by metric, over the splits that both have.

    Raises:
        ConfigError: a folder is none of a finished evaluation, or the two have no split in common.
        DataError: the runs are of other samples.
    """
    left, right = _read(Path(first)), _read(Path(second))
    shared = [name for name in left if name in right]
    if not shared:
        raise ConfigError(
            f"{first} has {', '.join(left) or 'no split with metrics'} and {second} has "
            f"{', '.join(right) or 'no split with metrics'}: there is no split in common."
        )
    found = []
    for name in shared:
        if left[name]["samples"] != right[name]["samples"]:
            counts = f"{len(left[name]['samples'])} and {len(right[name]['samples'])} results"
            raise DataError(
                f"{name}: {first} and {second} are of other samples ({counts}); a paired comparison needs the same."
            )
        for metric in left[name]["measures"]:
            if metric in right[name]["measures"]:
                found.append(_compare(name, metric, *(_measure(side[name], metric) for side in (left, right))))
    return found


@dataclass(frozen=True)
class Change:
    """One sample that the two runs answer differently well."""

    split: str
    index: int
    question: str
    answers: tuple[str, str]
    scores: tuple[float, float]


def largest_changes(first: str | Path, second: str | Path, most: int = 8) -> list[Change]:
    """Give the samples whose score changes most from the first run to the second, the largest change first."""
    left, right = ({_place(row): row for row in Rows(Path(side)).read() if "score" in row} for side in (first, second))
    found = [
        Change(
            split=f"{place[0]}/{place[1]}",
            index=place[2],
            question=str(row.get("question", "")),
            answers=(_answer(row), _answer(right[place])),
            scores=(row["score"], right[place]["score"]),
        )
        for place, row in left.items()
        if place in right and row["score"] != right[place]["score"]
    ]
    return sorted(found, key=lambda one: (-abs(one.scores[1] - one.scores[0]), one.split, one.index))[:most]


def _place(row: Row) -> tuple[str, str, int]:
    return row["dataset"], row["split"], row["index"]


def _answer(row: Row) -> str:
    """Give what was answered, in one line."""
    result = row["result"]
    given = next((result[name] for name in ANSWERS if name in result), result) if isinstance(result, dict) else result
    text = str(given).encode("utf-8", "replace").decode("utf-8")  # half a character cannot be printed
    return " ".join(text.split())


def _compare(split: str, metric: str, first: Measure, second: Measure) -> Compared:
    gain = second.per_sample - first.per_sample
    sign = 1 if first.higher_is_better else -1
    return Compared(
        split=split,
        metric=metric,
        first=first.value,
        second=second.value,
        difference=compare(first, second),
        num_samples=len(first.stats),
        num_better=int((sign * gain > 0).sum()),
        num_worse=int((sign * gain < 0).sum()),
        higher_is_better=first.higher_is_better,
    )


def _measure(split: dict[str, Any], metric: str) -> Measure:
    fields = dict(split["measures"][metric])
    stats = np.asarray(fields.pop("stats"), dtype=np.float64)
    return Measure(stats, **fields)


def _read(folder: Path) -> dict[str, Any]:
    if not (folder / METRICS_FILE).is_file() or not (folder / STATISTICS_FILE).is_file():
        raise ConfigError(
            f"{folder} is no folder of a finished evaluation: it has no {METRICS_FILE} with {STATISTICS_FILE}. Name "
            "the run.output_dir of two evaluations by `lavish evaluate`."
        )
    try:
        return json.loads((folder / STATISTICS_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{folder / STATISTICS_FILE} is damaged ({error}); evaluate again, which asks nothing anew."
        ) from error
