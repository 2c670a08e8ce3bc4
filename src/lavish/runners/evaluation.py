"""Evaluate a model as a LAVIS recipe says: `lavish evaluate --cfg-path FILE --options run.batch_size_eval=8 ...`.

The splits of `run.test_splits` (else `run.valid_splits`) of every data set are cut into batches, which the processes of
torchrun share; each sample is asked once, at any number of processes, and answers that are in the folder already are
not asked again. What a run leaves in `run.output_dir`:

    config.yaml       the merged recipe; another one is refused in the same folder
    results.jsonl     a line a sample: what was asked, answered, and would have been right, and its score
    metrics.json      the metrics with confidence intervals, and a record of what was measured with what
    inputs.json       marks of data and weights: answers of other ones are refused;  model.json: how it was asked
    statistics.json   what `lavish evaluate --compare` needs
    report.html       pictures, questions, answers, the worst cases
    result/           the results in LAVIS's form;  result_leaderboard_<split>.json: of one without ground truth

Source of the recipe's meaning: salesforce/LAVIS, evaluate.py and lavis/runners/runner_base.py.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import transformers
from omegaconf import OmegaConf
from torch import nn

from lavish import __version__
from lavish.common import dist
from lavish.common.config import Config, write_json
from lavish.common.errors import ConfigError, DataError, MediaError, PromptError
from lavish.common.registry import registry
from lavish.datasets.datasets.annotations import need, read_json
from lavish.datasets.datasets.base_dataset import present
from lavish.inference.load import load
from lavish.inference.sample_model import SampleModel
from lavish.processors.base_processor import BaseProcessor
from lavish.runners.device import device_of
from lavish.runners.evaluation_inputs import check_inputs, inputs_of
from lavish.runners.evaluation_recipe import (
    begin_folder,
    chat_section,
    check,
    config_sha256,
    evaluated_only,
    is_loaded,
    open_evaluation,
    splits_of,
)
from lavish.runners.evaluation_report import write_report
from lavish.runners.evaluation_rows import HALVES, Row, Rows, in_room, keys_of, line_of, results_of, rows_of
from lavish.runners.evaluation_samples import picture_of, question_of
from lavish.runners.evaluation_summary import (
    METRICS_FILE,
    MODEL_FILE,
    RESULT_FOLDER,
    STATISTICS_FILE,
    SplitResult,
    statistics_of,
    summary_of,
)
from lavish.runners.held_out import HeldOutLoader
from lavish.runners.schema import RunConfig
from lavish.tasks.base_task import BaseTask, to_device
from lavish.tasks.chat_model import OF_OTHERS, ChatModel
from lavish.tasks.metrics.measure import CONFIDENCE, NUM_RESAMPLES, SEED
from lavish.tasks.scored_task import ScoredTask, leaderboard_file

__all__ = ["METRICS_FILE", "Evaluation", "SplitResult", "check", "evaluate", "open_evaluation"]


logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass
class Evaluation:
    """What a run gave, in the main process; others have no splits."""

    folder: Path
    task: BaseTask
    splits: list[SplitResult] = field(default_factory=list)


def evaluate(cfg: Config, *, force: bool = False, progress: Progress | None = None) -> Evaluation:
    """Run the evaluation that a recipe describes, or what of it is not answered yet.

    Args:
        cfg: the merged recipe.
        force: forget what another recipe left in the folder, instead of refusing.
        progress: called with (samples done, samples of all), in the main process.

    Raises:
        ConfigError: the recipe is wrong, another one was evaluated in the folder, or another run is in it.
        DataError: the disk is full, or as the data sets.
        CheckpointError: as the model.
    """
    run, task = check(cfg)
    device = start_processes(run)
    evaluation = Evaluation(Path(run.output_dir), task)
    rows = Rows(evaluation.folder)
    with ExitStack() as stack:
        dist.on_main(lambda: stack.enter_context(rows.locked()))
        stack.enter_context(in_room(evaluation.folder))
        dist.on_main(lambda: begin_folder(cfg, rows, force=force))
        started = time.perf_counter()
        job = Job(cfg, run, task, device, rows, progress)
        dist.on_main(lambda: check_inputs(inputs_of(cfg, job.datasets), rows, force=force))
        job.answer()
        dist.wait_for_all()
        job.finish(evaluation, started)
    return evaluation


def start_processes(run: RunConfig) -> torch.device:
    """Join the processes of torchrun, and give the device of this one."""
    if run.num_threads:
        torch.set_num_threads(run.num_threads)
    device = device_of(run)
    dist.start(device.type)
    return device


class Job:
    """One evaluation: its data sets, the model once it is needed, and what was answered."""

    def __init__(
        self, cfg: Config, run: RunConfig, task: BaseTask, device: torch.device, rows: Rows, progress: Progress | None
    ) -> None:
        self.cfg, self.run, self.task, self.device, self.rows = cfg, run, task, device, rows
        self.progress = progress if dist.is_main() else None
        self._model: nn.Module | None = None
        self.datasets = self._build_datasets()
        self.whole: dict[str, list[Any]] = {}
        """Results of tasks with an evaluation of their own, of this process, by split."""

    def _build_datasets(self) -> list[tuple[str, str, Any]]:
        built = self.task.build_datasets(evaluated_only(self.cfg, splits_of(self.run)))
        found = []
        for name, splits in built.items():
            for split in splits_of(self.run):
                if split not in splits:
                    known = ", ".join(splits) or "none"
                    raise ConfigError(f"datasets.{name} has no split {split!r} (run.test_splits). Its splits: {known}.")
                if not isinstance(splits[split], Sized):
                    raise ConfigError(
                        f"datasets.{name}: the split {split!r} is a stream, and samples are asked by their number; "
                        "set build_info.streaming: false."
                    )
                if not len(splits[split]):
                    raise DataError(f"datasets.{name}: the split {split!r} has no samples.")
                found.append((str(name), split, splits[split]))
        if self.is_chat:
            for _, _, dataset in found:
                if hasattr(dataset, "set_processors"):  # of LAVIS's base; others give pictures as they are
                    dataset.set_processors(BaseProcessor(), BaseProcessor())
        return found

    @property
    def is_chat(self) -> bool:
        """Whether the model is one of `lavish.load`, which takes pictures as they are."""
        return is_loaded(self.cfg.model_cfg)

    @property
    def model(self) -> nn.Module:
        """The model, loaded when it is first asked for: a run whose answers are all there needs none."""
        if self._model is None:
            made = self._load() if self.is_chat else self.task.build_model(self.cfg).to(self.device)
            self._model = made.eval()
            if dist.is_main():
                write_json(model_record(self._model), self.rows.folder / MODEL_FILE)
        return self._model

    def _load(self) -> nn.Module:
        given = vars(chat_section(self.cfg)).copy()
        path, asks, pieces = given.pop("path"), given.pop("ask"), given.pop("pieces")
        vlm = load(path, device=str(self.device), **{key: value for key, value in given.items() if value}, **pieces)
        if isinstance(vlm, SampleModel):
            return vlm.samples
        if dist.is_main() and (unused := [name for name in OF_OTHERS if self.cfg.run_cfg.get(name) is not None]):
            logger.warning(
                "A model that chats answers greedily, as model.ask says: run.%s of the recipe do not apply.",
                ", run.".join(unused),
            )
        return ChatModel(vlm, asks)

    # -- answers

    def answer(self) -> None:
        """Answer what is not answered yet of every split."""
        own_evaluation = type(self.task).evaluation is not BaseTask.evaluation
        answered = {key for row in self.rows.read() for key in keys_of(row)}
        dist.wait_for_all()  # all have read before the first one writes
        plans = [
            (name, split, dataset, self._batches(name, split, len(dataset), set() if own_evaluation else answered))
            for name, split, dataset in self.datasets
        ]
        total = sum(len(dataset) for _, _, dataset in self.datasets)
        self._done, self._total = total - sum(sum(map(len, every)) for *_, every in plans), total
        self._tell(0)
        for name, split, dataset, every in plans:
            mine = (
                every[dist.rank() :: dist.world_size()]
                if self.run.use_dist_eval_sampler or not own_evaluation
                else every
            )
            if own_evaluation:
                self.task.before_evaluation(model=self.model, dataset=dataset)
                loader = self._loader(dataset, mine)
                self.whole[f"{name}/{split}"] = self.task.evaluation(self.model, loader)
            elif every:
                self.task.before_evaluation(model=self.model, dataset=dataset)
                self._ask(name, split, dataset, mine)

    def _batches(self, name: str, split: str, count: int, answered: set[Any]) -> list[list[int]]:
        """Cut a split into batches, the same ones at any number of processes, and leave out what is answered."""
        size = self.run.batch_size_eval
        cut = [range(start, min(start + size, count)) for start in range(0, count, size)]
        left = [[index for index in batch if (name, split, index) not in answered] for batch in cut]
        return [batch for batch in left if batch]

    def _loader(self, dataset: Any, batches: Sequence[list[int]]) -> HeldOutLoader:
        collate = as_lists if self.is_chat else None
        pins = self.device.type == "cuda" and not self.is_chat
        return HeldOutLoader(dataset, batches, self.run.num_workers, collate, pins=pins)

    @torch.no_grad()
    def _ask(self, name: str, split: str, dataset: Any, batches: list[list[int]]) -> None:
        path = self.rows.part(dist.rank())
        with path.open("a", encoding="utf-8", errors=HALVES) as file:
            for indices, samples in zip(batches, self._loader(dataset, batches), strict=True):
                torch.manual_seed(self.run.seed * 1_000_003 + indices[0])  # drawn answers too are those of one process
                results = self._step(f"{name}/{split}", indices, samples)
                file.write("".join(map(line_of, rows_of(name, split, indices, results))))
                file.flush()
                self._tell(len(indices) * dist.world_size())

    def _step(self, name: str, indices: Sequence[int], samples: Any) -> list[Any]:
        """Answer one batch; what is wrong with it is told with its place in the data."""
        try:
            return self.task.valid_step(model=self.model, samples=to_device(samples, self.device))
        except (DataError, MediaError, PromptError) as error:
            where = f"sample {indices[0]}" if len(indices) == 1 else f"samples {indices[0]} to {indices[-1]}"
            raise type(error)(f"{name}, {where}: {error}") from error

    def _tell(self, count: int) -> None:
        self._done = min(self._done + count, self._total)
        if self.progress:
            self.progress(self._done, self._total)

    # -- scores

    def finish(self, evaluation: Evaluation, started: float) -> None:
        """Put the results of all processes together, score them and write what a run leaves."""
        folder = evaluation.folder
        registry.register_path("output_dir", folder, replace=True)
        several = len({name for name, *_ in self.datasets}) > 1
        merged = dist.on_main(self.rows.read)
        by_split: dict[str, list[Row]] = {}
        for row in merged:
            by_split.setdefault(f"{row['dataset']}/{row['split']}", []).append(row)
        for name, split, dataset in self.datasets:
            found = sorted(by_split.get(f"{name}/{split}", []), key=_place)
            place = folder / RESULT_FOLDER / name if several else folder / RESULT_FOLDER  # splits have one name in all
            registry.register_path("result_dir", place, replace=True)
            result = self._score(SplitResult(name, split, len(dataset), found, None), dataset)
            result.leaderboard = str(leaderboard_file(place, split).relative_to(folder))
            if dist.is_main():
                evaluation.splits.append(result)
        dist.on_main(lambda: self._write(evaluation, started))

    def _score(self, result: SplitResult, dataset: Any) -> SplitResult:
        """Give the metrics of one split, by all processes together."""
        task = self.task
        is_whole = result.name in self.whole
        if not is_whole:
            self._check_complete(result, len(dataset))
        results = self.whole[result.name] if is_whole else results_of(result.rows)
        if isinstance(task, ScoredTask) and type(task).after_evaluation is ScoredTask.after_evaluation:
            task.dataset = dataset
            dist.on_main(lambda: self._measure(task, result, results, dataset))
        else:
            if not is_whole and not dist.is_main() and _are_dicts(results):
                results = []  # the main process has all, and a task that merges them takes each once
            result.metrics = task.after_evaluation(val_result=results, split_name=result.split, epoch="best")
        return result

    def _measure(self, task: ScoredTask, result: SplitResult, results: list[Any], dataset: Any) -> None:
        kept = results if result.name in self.whole else task.unique(results)
        result.scores, result.metrics = task.finish_split(kept, result.split, "best")
        if result.scores and len(kept) < len(results):
            result.scores.notes.append(
                f"{len(results) - len(kept)} of {len(results)} results are not scored: their {task.result_id} is that "
                "of an earlier one."
            )
        taken = {id(one) for one in kept}
        self._note_scores(result, dataset, [row for row in result.rows if id(row.get("result")) in taken])

    def _check_complete(self, result: SplitResult, count: int) -> None:
        """Check that every sample of a split has one row.

        Raises:
            DataError: some have none.
        """
        answered = {index for row in result.rows for *_, index in keys_of(row)}
        absent = sorted(set(range(count)) - answered)
        beyond = sorted(answered - set(range(count)))
        if absent or beyond:
            raise DataError(
                f"{self.rows.folder}: {result.name} has {count} samples; {len(absent)} have no result"
                f"{f', first sample {absent[0]}' if absent else ''}, and {len(beyond)} results are of no sample. Run "
                "the same command again; with another data set than before, set another run.output_dir."
            )

    def _note_scores(self, result: SplitResult, dataset: Any, scored: list[Row]) -> None:
        """Put the question beside each answer, and reference and score beside each that was scored."""
        scores = result.scores
        for row in result.rows:
            question = question_of(dataset, row)
            if question is not None:
                row["question"] = question
        measure = scores.measures.get(scores.headline) if scores else None
        if scores is None or measure is None or len(measure.stats) != len(scored):
            return
        for row, reference, value in zip(scored, scores.references, measure.per_sample, strict=True):
            row |= {"reference": reference, "score": float(value)}

    def _write(self, evaluation: Evaluation, started: float) -> None:
        folder = evaluation.folder
        rows = [row for result in evaluation.splits for row in result.rows]
        self.rows.write(rows)
        summary = {
            "splits": {result.name: summary_of(result, self.task) for result in evaluation.splits},
            "record": self._record(started),
        }
        statistics = {result.name: statistics_of(result) for result in evaluation.splits if result.scores}
        (folder / STATISTICS_FILE).write_text(json.dumps(statistics), encoding="utf-8")
        write_report(folder, summary, [(result, self._pictures(result)) for result in evaluation.splits])
        write_json(summary, folder / METRICS_FILE)  # last: a folder with it is complete

    def _record(self, started: float) -> dict[str, Any]:
        section: Any = OmegaConf.to_container(self.cfg.model_cfg, resolve=True)
        record = {
            "config_sha256": config_sha256(self.cfg.get_config()),
            "task": self.run.task,
            "model": section,
            "device": str(self.device),
            "processes": dist.world_size(),
            "wall_seconds": round(time.perf_counter() - started, 1),
            "seed": self.run.seed,
            "intervals": {"method": "bootstrap", "confidence": CONFIDENCE, "resamples": NUM_RESAMPLES, "seed": SEED},
            "versions": {
                "lavish": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "numpy": np.__version__,
                "pillow": PIL.__version__,
                "python": platform.python_version(),
            },
        }
        path = self.rows.folder / MODEL_FILE
        return record | (read_json(path) if path.is_file() else {})  # it is there, whichever run asked the model

    def _pictures(self, result: SplitResult) -> Callable[[Row], Any]:
        """Give the function that opens the picture of a row, as it is in its file."""
        dataset = next(data for name, split, data in self.datasets if (name, split) == (result.dataset, result.split))

        has_pictures = self.cfg.datasets_cfg[result.dataset].get("data_type") == "images"
        return lambda row: picture_of(dataset, row) if has_pictures else None


def model_record(model: nn.Module) -> dict[str, Any]:
    """Give what the record of a run says of its model: dtype, and how a chat model is asked."""
    record: dict[str, Any] = {}
    if (first := next(model.parameters(), None)) is not None:
        record["dtype"] = str(first.dtype).removeprefix("torch.")
    if isinstance(model, ChatModel):
        record["asked"] = {name: asdict(ask) for name, ask in model.asks.items()}
    return record


def as_lists(samples: Sequence[Any]) -> dict[str, list[Any]]:
    """Make a batch of lists: pictures stay pictures, each of its own size."""
    kept = present(samples)
    return {key: [need(sample, key) for sample in kept] for key in kept[0]}


def _place(row: Row) -> int:
    return min(index for *_, index in keys_of(row))


def _are_dicts(results: Sequence[Any]) -> bool:
    return all(isinstance(result, Mapping) for result in results)
