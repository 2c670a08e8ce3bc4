"""What an evaluation gave for a split, and what metrics.json and statistics.json say of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lavish.runners.evaluation_rows import Row, keys_of
from lavish.tasks.base_task import BaseTask
from lavish.tasks.metrics.measure import Measure
from lavish.tasks.scored_task import ScoredTask, Scores

METRICS_FILE, STATISTICS_FILE, MODEL_FILE = "metrics.json", "statistics.json", "model.json"
RESULT_FOLDER = "result"


@dataclass
class SplitResult:
    """What an evaluation gave for one split of one data set."""

    dataset: str
    split: str
    num_samples: int
    rows: list[Row]
    metrics: dict[str, float] | None
    """None where the split has no ground truth."""
    scores: Scores | None = None
    """With intervals; None of a task of one's own that gives metrics alone."""
    leaderboard: str = ""
    """Where the file for the leaderboard is, in the run's folder; of a split without ground truth."""

    @property
    def name(self) -> str:
        """`<data set>/<split>`."""
        return f"{self.dataset}/{self.split}"


def summary_of(result: SplitResult, task: BaseTask) -> dict[str, Any]:
    """Give what metrics.json says of a split."""
    summary: dict[str, Any] = {
        "num_samples": result.num_samples,
        "higher_is_better": task.higher_is_better,
    }
    if result.metrics is not None and (result.scores or not isinstance(task, ScoredTask)):
        summary["agg_metrics"] = result.metrics.get("agg_metrics")
    if result.scores is None:
        is_scored = bool(result.metrics) and not isinstance(task, ScoredTask)
        summary["metrics"] = {name: {"value": value} for name, value in (result.metrics or {}).items() if is_scored}
        summary["notes"] = [] if is_scored else [f"Not scored; {result.leaderboard} is the file for its leaderboard."]
        return summary
    scores = result.scores
    summary["headline"] = scores.headline
    summary["metrics"] = {name: value_of(measure) for name, measure in scores.measures.items()}
    summary["metrics"] |= {name: {"value": value} for name, value in scores.values.items()}
    summary["groups"] = {name: value_of(measure) for name, measure in scores.groups.items()}
    summary["notes"] = [*scores.notes, *note_on_spread(scores)]
    return summary


def note_on_spread(scores: Scores) -> list[str]:
    """Say what an interval without width does not say: where all samples score alike the bootstrap sees no spread."""
    measure = scores.measures.get(scores.headline)
    if measure is None or np.ptp(measure.per_sample) > 0:
        return []
    count = len(measure.stats)
    return [
        f"All {count:,} samples have the same {scores.headline}, so the bootstrap's interval has no width; up to "
        f"{min(100, 300 / count):.3g} % of samples may still score otherwise (rule of three)."
    ]


def value_of(measure: Measure) -> dict[str, Any]:
    """Give a value with its interval and the number of samples."""
    return {"value": measure.value, "interval": list(measure.interval()), "num_samples": len(measure.stats)}


def statistics_of(result: SplitResult) -> dict[str, Any]:
    """Give what a comparison needs of a split: the statistics of each sample."""
    assert result.scores is not None  # asked of the caller
    measures = {
        name: {
            "formula": measure.formula,
            "scale": measure.scale,
            "higher_is_better": measure.higher_is_better,
            "stats": measure.stats.tolist(),
        }
        for name, measure in result.scores.measures.items()
    }
    return {"samples": [sorted(index for *_, index in keys_of(row)) for row in result.rows], "measures": measures}
