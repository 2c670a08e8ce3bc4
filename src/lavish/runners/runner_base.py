"""The training loop with exact resume. `RunnerBase` counts epochs, `RunnerIter` steps.

One process on one device is the default. Under torchrun the forward passes of a step are shared out among the
processes, or each makes its own (`run.batch_per_process`, as in LAVIS); what exchanges gradients is an engine's
(`engines.py`).

What a step computes belongs to the task; what the data is, to the dataset. Sample order is a function of (seed, epoch)
alone, and the random states are part of a checkpoint, so a run that was killed continues as if it had not been.

Source of names and order: salesforce/LAVIS, lavis/runners/runner_base.py. Unlike there, leftover forward passes of an
epoch make a step of their own, what is logged is the model's own loss, the best checkpoint follows the task's direction
and may have any sign, and all of it runs without CUDA.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lavish.common import dist
from lavish.common.errors import ConfigError
from lavish.common.registry import registry
from lavish.datasets.datasets.base_dataset import ConcatDataset
from lavish.runners import generations, pth, streams, task_loop
from lavish.runners.average import WeightAverage
from lavish.runners.board import Board
from lavish.runners.device import device_of
from lavish.runners.engines import build_engine, checkpoint_activations
from lavish.runners.held_out import HeldOutLoader
from lavish.runners.optim import build_optimizer, build_schedule
from lavish.runners.order import (
    Failure,
    GroupedEpochs,
    Order,
    Passes,
    SeededSamples,
    ShuffledEpochs,
    own_randomness,
)
from lavish.runners.run_folder import RunFolder, read_checkpoint
from lavish.runners.schema import RunConfig, lavis_run_config
from lavish.runners.step import Batch, Place, StepMaker
from lavish.runners.streams import StreamState
from lavish.tasks.base_task import BaseTask, TrainingData

Progress = Callable[[int, int, dict[str, float]], None]

RESULT_DIR = "result"


def micro_batches(span: range, batch_size: int) -> list[range]:
    """Cut the samples of one optimizer step into those of its forward passes; the last one may be smaller."""
    return [span[start : start + batch_size] for start in range(0, len(span), batch_size)]


class RunnerBase:
    """Train a module on the training splits with the task's step, in epochs that take every sample once.

    Args:
        cfg: the merged `Config` of a LAVIS recipe, or the typed run config.
        task: gives the step, `train_step(model, samples)`, and scores the other splits.
        model: the module to train.
        datasets: by name and split, as `task.build_datasets` gives them, or by split.
        job_id: a folder below run.output_dir for this run; LAVIS's scripts give the time. Without it a killed run goes
            on in run.output_dir.
        progress: called after each step with (steps done, steps of the run, losses of the step).

    Raises:
        ConfigError: no training data, nothing trainable, no such device, or another run in the folder.
    """

    counts_epochs = True

    def __init__(
        self,
        cfg: Any,
        task: BaseTask,
        model: nn.Module,
        datasets: Mapping[str, Any],
        job_id: str | None = None,
        progress: Progress | None = None,
    ):
        self.config = None if isinstance(cfg, RunConfig) else cfg
        self.run = self.typed(cfg, type(task))
        run = self.run
        self.task, self.datasets, self.progress = task, by_name(datasets), progress
        generations.check(run, validates=self.config is not None)
        self.parts = self._training_sets()
        streams.check(self.parts, run, counts_epochs=self.counts_epochs)
        self.dataset: TrainingData = self._joined()
        self.stream = StreamState(run.num_workers) if isinstance(self.dataset, IterableDataset) else None
        """Where the readers of a stream are; None with data that have a length."""
        _check_processes(run)
        self.device = device_of(run)
        dist.start(self.device.type)
        if run.num_threads:
            torch.set_num_threads(run.num_threads)
        path = Path(run.output_dir) if job_id is None else Path(run.output_dir) / str(job_id)
        self.folder = RunFolder(path)
        if self.config is not None:
            registry.register_path("output_dir", path, replace=True)
            registry.register_path("result_dir", path / RESULT_DIR, replace=True)
        self.model = model
        self.engine = build_engine(run, self.device)
        if run.activation_checkpointing:
            checkpoint_activations(model)
        self.called, self.optimizer = self.engine.start(model, lambda module: build_optimizer(module, run))
        self.maker = StepMaker(run, task, model, self.called, self.engine, self.optimizer)
        self.average = WeightAverage(self.model, run.ema_decay) if run.ema_decay else None
        self.board: Board | None = None
        self.step, self.lr = 0, 0.0
        self.seconds = 0.0
        """Wall time up to the newest checkpoint, over all processes of the run."""
        self.cpu_seconds = 0.0
        """CPU time of the training processes up to the newest checkpoint; loader processes are not in it."""

    @property
    def memory_bytes(self) -> int:
        """The most memory so far: of the GPU, else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident_bytes()

    def typed(self, cfg: Any, task_class: type) -> RunConfig:
        """Give the typed run config."""
        return cfg if isinstance(cfg, RunConfig) else lavis_run_config(cfg, task_class)

    # -- how many, and which samples

    def _training_sets(self) -> dict[str, TrainingData]:
        """Give the training data by data set."""
        found = {
            (name if len(self.run.train_splits) == 1 else f"{name}.{split}"): splits[split]
            for name, splits in self.datasets.items()
            for split in self.run.train_splits
            if split in splits
        }
        splits = sorted({split for one in self.datasets.values() for split in one})
        wanted = " and ".join(map(repr, self.run.train_splits))
        if not found and not self.run.evaluate:
            raise ConfigError(f"The recipe's datasets give the splits {splits}, but training needs {wanted}.")
        for name, dataset in found.items():
            if isinstance(dataset, IterableDataset):
                continue
            if not len(dataset):
                raise ConfigError(f"The split {wanted} of datasets.{name} has no samples.")
        return found

    def _joined(self) -> TrainingData:
        parts = list(self.parts.values())
        return parts[0] if len(parts) == 1 else cast(TrainingData, ConcatDataset(cast(Any, parts)))

    @property
    def samples_per_step(self) -> int:
        """Samples of a full optimizer step, over all processes."""
        own = self.run.batch_size_train * self.run.accum_grad_iters
        return own * dist.world_size() if self.run.batch_per_process else own

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last one takes what is left."""
        return math.ceil(len(self.dataset) / self.samples_per_step)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.run.max_epoch * self.steps_per_epoch

    @property
    def save_every(self) -> int:
        """Steps between two checkpoints; a run of a LAVIS recipe makes one each epoch, and `.pth` files besides."""
        return self.steps_per_epoch if self.config is not None else self.run.save_freq * self.steps_per_epoch

    def _saves_now(self) -> bool:
        every = self.run.save_steps
        return self.step % self.save_every == 0 or (every > 0 and self.step % every == 0)

    @property
    def num_samples(self) -> int:
        """Samples trained on so far, repetitions included."""
        return self.span(self.step - 1).stop if self.step else 0

    def span(self, step: int) -> range:
        """Say which positions of the stream of shuffled epochs step `step` (from 0) trains on."""
        epoch, place = divmod(step, self.steps_per_epoch)
        first, end = epoch * len(self.dataset) + place * self.samples_per_step, (epoch + 1) * len(self.dataset)
        return range(first, min(first + self.samples_per_step, end))

    def passes(self, step: int) -> list[tuple[range, float]]:
        """Give the positions of each forward pass of this process in step `step`, and their share of its samples.

        A process for which a short last step has fewer passes takes the first one along, with no share in the result:
        where weights are shared out, processes compute in step.
        """
        span = self.span(step)
        parts = micro_batches(span, self.run.batch_size_train)
        own = [(part, len(part) / len(span)) for part in parts[dist.rank() :: dist.world_size()]]
        most = math.ceil(len(parts) / dist.world_size())
        return own + [(parts[0], 0.0)] * (most - len(own))

    def order(self) -> Order:
        """Say which sample stands at which position."""
        if self.run.train_dataset_ratios is not None:
            raise ConfigError("run.train_dataset_ratios is of run.runner runner_iter; epochs take every sample once.")
        if not self.run.group_by_length:
            return ShuffledEpochs(len(self.dataset), self.run.seed)
        return GroupedEpochs(self._lengths(), self.run.seed, self.samples_per_step)

    def _lengths(self) -> list[int]:
        lengths: list[int] = []
        measure = getattr(self.model, "sample_length", None)  # chat models have it
        for name, part in self.parts.items():
            if hasattr(part, "lengths"):  # only some data sets know lengths before they make a sample
                lengths += list(cast(Any, part).lengths)
            elif measure is not None:
                sample = getattr(part, "unopened", part.__getitem__)  # conversations of files have it: no picture
                lengths += [measure(sample(index)) for index in range(len(part))]
            else:
                raise ConfigError(f"run.group_by_length: datasets.{name} does not tell the lengths of its samples.")
        return lengths

    # -- the loop

    def train(self) -> None:
        """Run to the end, from the newest checkpoint of the folder if there is one.

        Raises:
            ConfigError: a schedule that does not fit the run.
            CheckpointError: every checkpoint is damaged, or the newest is of another model or optimizer.
            TrainingError: the loss or its gradients are no numbers any more, or memory does not suffice.
        """
        with ExitStack() as stack:
            if dist.is_main():
                stack.enter_context(self.folder.locked())
            dist.wait_for_all()
            if self.run.evaluate:
                self.evaluate(cur_epoch="eval")
                return
            self._train()

    def _train(self) -> None:
        loop = task_loop.own_loop(self.task, counts_epochs=self.counts_epochs)
        if loop is not None:
            task_loop.check(self.task, loop, self.run)
        set_rates = build_schedule(self.optimizer, self.run, self.num_steps, self.steps_per_epoch)
        state = self._load()
        dist.wait_for_all()  # before the first of them writes
        sums = self._resume(state)
        self.board = Board(self.folder.path, self.step) if dist.is_main() else None
        self.task.before_training(model=self.model, dataset=self.datasets)
        if state is not None:
            self._restore_random_states(state)
            self._after_epoch()  # a validation that the run was killed in
        else:
            self._show_answers(epoch="before")
        self.model.train()
        if loop is None:
            self._make_steps(set_rates, sums)
        else:
            self._train_by_task(set_rates)
        self._finish()

    def _make_steps(self, set_rates: Callable[[int], float], sums: dict[str, float]) -> None:
        step_module = cast(nn.Module, torch.compile(self.called)) if self.run.compile else self.called
        batches = self._batches()
        started, cpu_started = time.perf_counter(), time.process_time()
        while self.step < self.num_steps:
            self.lr = lr = set_rates(self.step)
            losses = self._train_step(step_module, batches)
            self.step += 1
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value
            if self.progress and dist.is_main():
                self.progress(self.step, self.num_steps, losses)
            is_last = self.step == self.num_steps
            if self.step % self.run.log_freq == 0 or is_last:
                if dist.is_main():
                    self._log(sums, lr)
                sums = {}
            if self._saves_now() or is_last:
                now, cpu_now = time.perf_counter(), time.process_time()
                self.seconds += now - started
                self.cpu_seconds += dist.total(cpu_now - cpu_started)
                started, cpu_started = now, cpu_now
                self._save(sums)
            self._after_epoch()

    def _train_by_task(self, set_rates: Callable[[int], float]) -> None:
        """Let the task make the steps of each epoch (`task_loop.py`)."""
        rates = task_loop.Rates(set_rates, self.steps_per_epoch, self.num_steps, self.run.accum_grad_iters)
        started, cpu_started = time.perf_counter(), time.process_time()
        while self.step < self.num_steps:
            told = self._epoch_by_task(rates)
            self.lr = rates.lr
            share = 1 / dist.world_size()
            losses = {str(name): dist.total(float(value)) * share for name, value in told.items() if name != "lr"}
            self.maker.check_finite(losses, [], self._place())
            if self.progress and dist.is_main():
                self.progress(self.step, self.num_steps, losses)
            if dist.is_main():
                self._write_log(losses, self.lr)
            now, cpu_now = time.perf_counter(), time.process_time()
            self.seconds += now - started
            self.cpu_seconds += dist.total(cpu_now - cpu_started)
            started, cpu_started = now, cpu_now
            self._save({})
            self._after_epoch()

    def _epoch_by_task(self, rates: task_loop.Rates) -> Mapping[str, Any]:
        epoch = self.step // self.steps_per_epoch
        steps = range(self.step, min((epoch + 1) * self.steps_per_epoch, self.num_steps))
        count = sum(len(self.passes(step)) for step in steps)
        one = self.optimizer.optimizers[0] if len(self.optimizer.optimizers) == 1 else self.optimizer
        given = {
            "model": self.called,
            "data_loader": task_loop.EpochBatches(self.dataset, self._batches(steps), count),
            "optimizer": one,
            "lr_scheduler": rates,
            "scaler": self.maker.scaler if self.run.amp or self.maker.scaler.is_enabled() else None,
            "cuda_enabled": self.device.type == "cuda",
            "log_freq": self.run.log_freq,
            "accum_grad_iters": self.run.accum_grad_iters,
        }
        if self.counts_epochs:
            told = self.task.train_epoch(epoch, **given)
        else:
            told = self.task.train_iters(epoch, start_iters=epoch * count, iters_per_inner_epoch=count, **given)
        if not isinstance(told, Mapping):
            raise ConfigError(f"{type(self.task).__name__} gave {told!r} of an epoch; a dict of means is expected.")
        self.step = steps.stop
        return told

    def _train_step(self, module: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        """Make one optimizer step; give the losses as means over its samples."""
        if dist.world_size() > 1:  # noise of its own for each process, the same after a resume
            torch.manual_seed((self.run.seed * 1_000_003 + self.step) * dist.world_size() + dist.rank())
        passes = self.passes(self.step)
        seen = [next(batches) for _ in passes]
        seen = [(indices, self._with_moment(samples, number)) for number, (indices, samples) in enumerate(seen)]
        losses = self.maker.make(module, seen, [share for _, share in passes], self._place())
        if self.average is not None:
            self.average.update()
        return losses

    def _place(self) -> Place:
        return Place(self.folder.path, self.step + 1, self.num_steps)

    def _with_moment(self, samples: Any, number: int) -> Any:
        """Give a batch of a LAVIS recipe with what LAVIS's models read of the moment: momentum models rise by it."""
        if self.config is None or not isinstance(samples, dict):
            return samples
        epoch, place = divmod(self.step, self.steps_per_epoch)
        passes = self.run.accum_grad_iters
        count = self.steps_per_epoch * passes
        return {**samples, "epoch": epoch, "num_iters_per_epoch": count, "iters": place * passes + number}

    def _batches(self, steps: range | None = None) -> Iterator[Batch]:
        prepare = getattr(self.model, "collator", None)  # chat models have it
        is_cuda = self.device.type == "cuda"
        if self.stream is not None:
            stream = cast(streams.RowStream, self.dataset)
            return streams.batches_of(stream, self.run, prepare, self.stream, pins=is_cuda)
        samples = SeededSamples(self.dataset, self.run.seed, prepare)
        steps = range(self.step, self.num_steps) if steps is None else steps
        passes = (part for step in steps for part, _ in self.passes(step))
        loader = DataLoader(
            cast(Dataset[Any], samples),
            batch_sampler=cast(Any, Passes(self.order(), passes)),
            num_workers=self.run.num_workers,
            collate_fn=samples.collate,
            pin_memory=is_cuda,
            generator=torch.Generator().manual_seed(self.run.seed),  # a loader draws, and not of the noise of training
        )
        return map(_unwrapped, iter(loader))

    # -- after an epoch: validation and LAVIS's files

    @property
    def epoch(self) -> int:
        """The number of the epoch that the newest step was in, from 0."""
        return max(self.step - 1, 0) // self.steps_per_epoch

    @property
    def split_names(self) -> list[str]:
        """The splits that are scored during training."""
        return list(self.run.valid_splits)

    def _after_epoch(self) -> None:
        """Score and write what is due where an epoch ends, if it has not been done."""
        if self.config is None or self.step == 0 or self.step % self.steps_per_epoch:
            return
        is_last = self.step == self.num_steps
        done = {(line["step"], line["split"]) for line in self.folder.read_validations()}
        if dist.world_size() > 1:
            done = dist.on_main(lambda: done)
        if self.run.valid_splits and ((self.epoch + 1) % self.run.val_freq == 0 or is_last):
            for split in self.split_names:
                if (self.step, split) not in done:
                    self._validate(split)
        if not self.run.valid_splits or self.epoch % self.run.save_freq == 0:
            self._write_pth(str(self.epoch))
        if is_last and self.run.save_last:
            self._write_pth("last")
        self._write_lavis_log()
        self.model.train()

    def _validate(self, split: str) -> None:
        with self._averaged():
            metrics = self.eval_epoch(split, self.epoch)
            if split == self.deciding_split:
                self._show_answers(self.epoch)
        aggregate = None if metrics is None else metrics.get("agg_metrics")
        line = {"step": self.step, "epoch": self.epoch, "split": split, "agg_metrics": aggregate, "metrics": metrics}
        is_best = dist.on_main(lambda: self._is_best(split, aggregate))
        if is_best:
            self._write_pth("best")
        if dist.is_main():
            self.folder.log_validation(line)
            if self.board is not None:
                self.board.write(self.step, metrics or {}, split)
        dist.wait_for_all()

    @property
    def deciding_split(self) -> str:
        """The validation split that picks the best checkpoint."""
        return "val" if "val" in self.run.valid_splits else self.run.valid_splits[0]

    def _show_answers(self, epoch: Any) -> None:
        """Write what the model answers to the first held-out samples (`run.sample_generations`)."""
        if not self.run.sample_generations:
            return
        dataset = self._split(self.deciding_split)

        def answer() -> list[dict[str, Any]]:
            return generations.answer(self.task, self.model, dataset, self.run, self.device)

        # Processes that share weights compute in step: all of them answer, and the main one writes.
        rows = answer() if self.engine.shares_weights else dist.on_main(answer)
        self.engine.settle(self.model)
        if dist.is_main():
            where = {"step": self.step, "epoch": epoch, "split": self.deciding_split}
            generations.write(self.folder, dataset, rows, where)
            if self.board is not None:
                self.board.write_text(self.step, self.deciding_split, generations.as_markdown(rows))

    def _is_best(self, split: str, aggregate: float | None) -> bool:
        if split != self.deciding_split or aggregate is None:
            return False
        before = [line["agg_metrics"] for line in self.folder.read_validations() if line["split"] == split]
        before = [value for value in before if value is not None]
        if not before:
            return True
        return aggregate > max(before) if self.task.higher_is_better else aggregate < min(before)

    def eval_epoch(self, split_name: str, cur_epoch: Any) -> dict[str, Any] | None:
        """Score a split with the model as it is; each sample in one process, and the metrics equal in all.

        Raises:
            ConfigError: no data set has the split.
        """
        dataset = self._split(split_name)
        indices = range(len(dataset))
        # Processes that share weights compute in step, so each of them scores every sample; results are merged by id.
        is_shared_out = self.run.use_dist_eval_sampler and not self.engine.shares_weights
        own = indices[dist.rank() :: dist.world_size()] if is_shared_out else indices
        loader = HeldOutLoader(dataset, micro_batches(own, self.run.batch_size_eval), self.run.num_workers)
        was_training = self.model.training
        self.model.eval()
        with own_randomness(self.run.seed, self.device), torch.no_grad():
            self.task.before_evaluation(model=self.model, dataset=dataset)
            results = self.task.evaluation(self.model, loader)
            metrics = self.task.after_evaluation(val_result=results, split_name=split_name, epoch=cur_epoch)
        self.engine.settle(self.model)
        self.model.train(was_training)
        return metrics

    def _split(self, name: str) -> Any:
        found = {dataset: splits[name] for dataset, splits in self.datasets.items() if name in splits}
        if len(found) == 1:
            ((dataset, split),) = found.items()
            if isinstance(split, IterableDataset):
                raise ConfigError(
                    f"datasets.{dataset} gives {name!r} as a stream; what is scored needs a length: files."
                )
            return split
        has = sorted({split for splits in self.datasets.values() for split in splits})
        why = f"{' and '.join(found)} have one each" if found else f"the splits are {', '.join(has)}"
        raise ConfigError(f"One data set of the recipe gives the split {name!r} that is to be scored; {why}.")

    def evaluate(self, cur_epoch: Any = "best", skip_reload: bool = False) -> dict[str, dict[str, Any]]:
        """Score `run.test_splits`; with `cur_epoch` "best" with the best weights, if there are any."""
        if cur_epoch == "best" and not skip_reload and (best := self.folder.path / "checkpoint_best.pth").is_file():
            pth.load_weights(best, self.model, self.engine)
        scores = {}
        for split in self.run.test_splits:
            metrics = self.eval_epoch(split, cur_epoch)
            scores[split] = metrics or {}
            if dist.is_main():
                aggregate = scores[split].get("agg_metrics")
                line = {"step": self.step, "epoch": cur_epoch, "split": split, "agg_metrics": aggregate}
                self.folder.log_validation({**line, "metrics": metrics})
        return scores

    def _finish(self) -> None:
        """Leave the averaged weights in the model, score the test splits, draw the losses."""
        if self.average is not None:
            self.average.put_in()
        if self.config is not None and self.run.test_splits:
            done = {line["split"] for line in self.folder.read_validations() if line["epoch"] == "best"}
            if not dist.on_main(lambda: done.issuperset(self.run.test_splits)):
                with self.engine.kept(self.model):
                    self.evaluate(cur_epoch="best" if self.run.valid_splits else self.epoch)
            if dist.is_main():
                self._write_lavis_log()
        if self.board is not None:
            self.board.close()
        if dist.is_main():
            self.folder.plot()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Score with the averaged weights, where they are kept."""
        if self.average is None:
            yield
            return
        with self.average.in_place():
            yield

    def _write_pth(self, name: str) -> None:
        """Write LAVIS's `checkpoint_<name>.pth`; all processes call it."""
        path = self.folder.path / f"checkpoint_{name}.pth"
        with self._averaged() if name in ("best", "last") else nullcontext():
            tensors = pth.gather(self.model, self.engine)
        stream_state = self._stream_state()
        if dist.is_main():
            unit = {"epoch": self.epoch} if self.counts_epochs else {"iters": self.step}
            state = self._state({}) | stream_state
            optimizer = None if self.engine.shares_weights else self.optimizer.state_dict()
            config = self.config.to_dict() if self.config is not None else vars(self.run)
            with self.folder.room_for(path.name, path.with_suffix(".partial")):
                pth.write(path, tensors, optimizer, config, unit, state)
        dist.wait_for_all()

    def _write_lavis_log(self) -> None:
        """Write `log.txt` as LAVIS has it: the config, then a JSON line for each epoch and each score."""
        if self.config is None or not dist.is_main():
            return
        ends: dict[int, dict[str, Any]] = {}
        for line in self.folder.read_log():
            epoch = (line["step"] - 1) // self.steps_per_epoch
            named = {f"train_{name}": value for name, value in line.items() if "loss" in name or name == "lr"}
            ends[epoch] = {"epoch": epoch, **named}
        lines: list[Any] = [self.config.to_dict(), *(ends[epoch] for epoch in sorted(ends))]
        for scored in self.folder.read_validations():
            metrics = {f"{scored['split']}_{key}": value for key, value in (scored["metrics"] or {}).items()}
            lines.append({"epoch": scored["epoch"], **metrics})
        self.folder.write_lines("log.txt", lines)

    # -- log, checkpoints, resume

    def _log(self, sums: dict[str, float], lr: float) -> None:
        num_steps = (self.step - 1) % self.run.log_freq + 1
        self._write_log({name: value / num_steps for name, value in sums.items()}, lr)

    def _write_log(self, means: dict[str, float], lr: float) -> None:
        line = {"step": self.step, "lr": lr, "lr_scale": lr / self.run.init_lr, **means}
        self.folder.log(line)
        if self.board is not None:
            self.board.write(self.step, line)

    def _load(self) -> dict[str, Any] | None:
        """Take over the newest checkpoint of the folder, else the one that the recipe names; give its state."""

        def read(folder: Path, state: dict[str, Any]) -> None:
            self.engine.load(folder, self.model, self.optimizer, state)

        state = self.folder.load_latest(read, self.device)
        if state is not None or not self.run.resume_ckpt_path:
            return state
        path = Path(self.run.resume_ckpt_path)
        if path.is_dir():
            return read_checkpoint(path, read, self.device)
        return pth.resume(path, self.model, self.optimizer, self.engine)

    def _resume(self, state: dict[str, Any] | None) -> dict[str, float]:
        """Take over a checkpoint's state; give the sums of the losses since the last line of the log."""
        if dist.is_main():
            self.folder.cut_log(state["step"] if state else 0)
        if state is None:
            if self.average is not None:
                self.average.start()
            return {}
        saved = state.get("samples_per_step", self.samples_per_step)  # absent from checkpoints of version 0.1
        if saved != self.samples_per_step:
            raise ConfigError(
                f"{self.folder.path}: its checkpoint was made with {saved} samples a step, and now they are "
                f"{self.samples_per_step} (batch_size_train {self.run.batch_size_train} x accum_grad_iters "
                f"{self.run.accum_grad_iters}{f' x {dist.world_size()} processes' * self.run.batch_per_process}). "
                f"Set run.accum_grad_iters={self._passes_for(saved)} to go on, or start in another run.output_dir."
            )
        if self.stream is not None:
            self.stream.load(state.get("stream"), self.folder.path)
        self.step, self.seconds, self.cpu_seconds = state["step"], state["seconds"], state["cpu_seconds"]
        if self.maker.scaler.is_enabled() and "scaler" in state:  # a run that was begun in another dtype has none
            self.maker.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load(state.get("average"), self.engine)
        return state["log_sums"]

    def _passes_for(self, samples_per_step: int) -> str:
        processes = dist.world_size() if self.run.batch_per_process else 1
        own = self.run.batch_size_train * processes
        return str(samples_per_step // own) if samples_per_step % own == 0 else f"{samples_per_step}/{own}"

    def _restore_random_states(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch_rng_state"].cpu())
        if self.device.type == "cuda" and "cuda_rng_state" in state:
            torch.cuda.set_rng_state(state["cuda_rng_state"].cpu(), self.device)

    def _state(self, sums: dict[str, float]) -> dict[str, Any]:
        state: dict[str, Any] = {
            "step": self.step,
            "samples_per_step": self.samples_per_step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "log_sums": sums,
            "torch_rng_state": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_rng_state"] = torch.cuda.get_rng_state(self.device)
        if self.maker.scaler.is_enabled():
            state["scaler"] = self.maker.scaler.state_dict()
        return state

    def _stream_state(self) -> dict[str, Any]:
        """Say where the readers of a stream are; all processes call it."""
        return {} if self.stream is None else {"stream": self.stream.saved()}

    def _save(self, sums: dict[str, float]) -> None:
        state = self._state(sums) | self._stream_state()
        if self.average is not None:
            state["average"] = self.average.state(self.engine)
        self.folder.save(self.step, lambda folder: self.engine.save(folder, self.model, self.optimizer), state)
        dist.wait_for_all()


def peak_resident_bytes() -> int:
    """Give the most memory that this process has had so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _unwrapped(batch: tuple[list[int], dict[str, Any] | Failure]) -> Batch:
    indices, samples = batch
    if isinstance(samples, Failure):
        raise samples.error
    return indices, samples


def by_name(datasets: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Give datasets by name and split; those that are given by split alone are one data set."""
    if all(isinstance(splits, Mapping) for splits in datasets.values()):
        return {str(name): dict(splits) for name, splits in datasets.items()}
    return {"data": dict(datasets)}


def _check_processes(run: RunConfig) -> None:
    if not run.batch_per_process and run.accum_grad_iters % dist.world_size():
        raise ConfigError(
            f"{dist.world_size()} processes share the {run.accum_grad_iters} forward passes of a step. Set "
            "run.accum_grad_iters to a multiple of the processes; run.batch_size_train is the samples of one pass. Or "
            "set run.batch_per_process=true: each makes as many passes."
        )
    if run.distributed is False and dist.world_size() > 1:
        raise ConfigError(f"run.distributed is false, and torchrun started {dist.world_size()} processes.")
    if run.distributed and dist.world_size() > 1 and run.world_size not in (None, 1, dist.world_size()):
        raise ConfigError(f"run.world_size is {run.world_size}, and torchrun started {dist.world_size()} processes.")
