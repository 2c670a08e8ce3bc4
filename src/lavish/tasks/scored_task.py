"""The built-in tasks' base: results with ids, references from the data set, and scores with intervals.

A subclass gives `valid_step` and `score`. Results of all processes are merged by id before anything is measured, and
the main process measures. What LAVIS writes is written too, into the folders that a runner registered as "result_dir"
and "output_dir": the results as JSON, `evaluate.txt` with a line of metrics, and for a split without ground truth the
file that its leaderboard takes. Source: salesforce/LAVIS, lavis/tasks/*.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from lavish.common import dist
from lavish.common.config import write_json
from lavish.common.errors import ConfigError, DataError
from lavish.common.registry import registry
from lavish.tasks.base_task import BaseTask
from lavish.tasks.metrics.measure import Measure
from lavish.tasks.results import first_of_each, merge_results


@dataclass
class Scores:
    """What a task measured on the results of one split."""

    measures: dict[str, Measure]
    """By name; where a measure has a row for each result it can be compared between runs."""
    agg_metrics: float
    """The one number that says how good the model is."""
    headline: str = ""
    """Of `measures`, the one whose values of single samples tell the worst cases."""
    references: list[Any] = field(default_factory=list)
    """What would have been right, one for each result."""
    groups: dict[str, Measure] = field(default_factory=dict)
    """The headline over parts of the results, such as types of answers."""
    values: dict[str, float] = field(default_factory=dict)
    """Metrics without an interval."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the numbers has to know."""

    def metrics(self) -> dict[str, float]:
        """Give all values by name, `agg_metrics` among them, as LAVIS's tasks do."""
        named = {name: measure.value for name, measure in {**self.measures, **self.groups}.items()}
        return {**named, **self.values, "agg_metrics": self.agg_metrics}


class ScoredTask(BaseTask):
    """Base of the tasks that give one result a sample, and score them."""

    result_id: ClassVar[str] = "instance_id"
    """The key of a result by which the results of several processes are merged."""
    result_file: ClassVar[str] = "{split}_epoch{epoch}"
    """Name of the file of results."""

    def __init__(self, run: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.run: Mapping[str, Any] = with_lavis_names(run or {})
        self.dataset: Any = None
        self.report_metric = self.option("report_metric", True)

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> BaseTask:
        """Build the task from the section `run` of a recipe."""
        return cls(cfg.run_cfg)

    def option(self, name: str, default: Any = None) -> Any:
        """Give a key of `run`, or the default where the recipe has none."""
        value = self.run.get(name)
        return default if value is None else value

    def before_evaluation(self, model: nn.Module, dataset: Any, **kwargs: Any) -> None:
        """Remember the data set, which holds the references."""
        self.dataset = dataset
        super().before_evaluation(model, dataset, **kwargs)

    def score(self, results: Sequence[Mapping[str, Any]], dataset: Any, split_name: str) -> Scores | None:
        """Score merged results; None where the split has no ground truth. Main process only."""
        raise NotImplementedError(f"{type(self).__name__} does not say how results are scored; override score().")

    def leaderboard(self, results: Sequence[Mapping[str, Any]]) -> Any:
        """Give the results as the server takes them that scores splits without ground truth."""
        return [dict(one) for one in results]

    def after_evaluation(
        self, val_result: Any = None, split_name: str = "", epoch: Any = None, **kwargs: Any
    ) -> dict[str, Any] | None:
        """Merge the results of all processes, write them, and give the metrics; None without ground truth."""
        results = self.merged(val_result or [])
        return dist.on_main(lambda: self.finish_split(results, split_name, epoch)[1])

    def merged(self, val_result: list[Any]) -> list[Any]:
        """Give the results of all processes, each once."""
        return self.unique(merge_results(val_result))

    def unique(self, results: list[Any]) -> list[Any]:
        """Give the first result of each id."""
        return first_of_each(results, self.result_id)

    def finish_split(
        self, results: list[Any], split_name: str, epoch: Any
    ) -> tuple[Scores | None, dict[str, Any] | None]:
        """Score merged results, write what LAVIS writes, and give scores and metrics; main process only."""
        folder = registered_folder("result_dir")
        if folder is not None:
            write_json(results, folder / f"{self.result_file.format(split=split_name, epoch=epoch)}.json")
        scores = self.score(results, self.dataset, split_name) if self.report_metric else None
        if scores is None:
            if folder is not None:
                write_json(self.leaderboard(results), leaderboard_file(folder, split_name))
            return None, None if self.report_metric else {"agg_metrics": 0.0}
        metrics = scores.metrics()
        output = registered_folder("output_dir")
        if output is not None:
            with (output / "evaluate.txt").open("a", encoding="utf-8") as file:
                file.write(json.dumps({split_name: metrics}) + "\n")
        return scores, metrics

    def annotation_path(self, split_name: str) -> str | None:
        """Give `run.annotation_file`: a path for all splits, or one a split."""
        given = self.option("annotation_file")
        return given.get(split_name) if isinstance(given, Mapping) else given


def with_lavis_names(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give the section `run` with MPP-LLaVA's `max_new_tokens` and `min_new_tokens` under LAVIS's names too."""
    others = {"max_len": "max_new_tokens", "min_len": "min_new_tokens"}
    said = {name: run.get(other) for name, other in others.items() if run.get(name) is None}
    made: Any = copy.copy(run)  # a section of a recipe stays one: LAVIS's models read its keys as attributes
    for name, value in said.items():
        if value is not None:
            made[name] = value
    return made


def leaderboard_file(result_dir: Path, split_name: str) -> Path:
    """Give where the results of a split without ground truth go: beside the folder of results, as LAVIS's."""
    return result_dir.with_name(f"{result_dir.name}_leaderboard_{split_name}.json")


def registered_folder(name: str) -> Path | None:
    """Give a folder that a runner registered; None without a runner."""
    try:
        return Path(registry.get_path(name))
    except ConfigError:
        return None


def method_of(model: nn.Module, name: str) -> Callable[..., Any]:
    """Give what a task asks of a registered model.

    Raises:
        ConfigError: the model cannot do that.
    """
    method = getattr(model, name, None)  # which models have which methods is what is asked here
    if method is None:
        raise ConfigError(
            f"{type(model).__name__} has no {name}(samples), which this task asks for. Take another run.task or "
            "model.arch; a model that chats is asked by any task with model.path."
        )
    return method


def ids_of(samples: Mapping[str, Any], *names: str) -> list[dict[str, Any]]:
    """Give the ids of each sample of a batch: `instance_id` and those named, as plain texts and numbers.

    Raises:
        DataError: the batch has none of them.
    """
    found = [name for name in (*names, "instance_id") if samples.get(name) is not None]
    if not found:
        have = ", ".join(map(str, samples)) or "nothing"
        raise DataError(f"The samples have no {' or '.join(names or ('instance_id',))}; they have {have}.")
    columns = {name: [plain(value) for value in samples[name]] for name in found}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def plain(value: Any) -> Any:
    """Give a number for a tensor of one."""
    return value.item() if hasattr(value, "item") else value  # tensors and numpy's numbers have it


def records_by_instance(dataset: Any) -> dict[str, Mapping[str, Any]]:
    """Give the annotation records of a data set by `instance_id`; none where it keeps no records."""
    records = getattr(dataset, "annotation", None)  # datasets of one's own may keep none
    if not isinstance(records, list):
        return {}
    return {str(one.get("instance_id", index)): one for index, one in enumerate(records) if isinstance(one, Mapping)}
