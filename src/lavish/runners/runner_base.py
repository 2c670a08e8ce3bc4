"""The plain training loop with exact resume. `RunnerBase` counts epochs, `RunnerIter` steps.

One process on one device is the default. Under torchrun the forward passes of a step (`accum_grad_iters` of them) are
shared out among the processes and their gradients added up, so that the result is that of one process up to rounding.

What a step computes belongs to the task; what the data is, to the dataset. Sample order is a function of (seed, epoch)
alone, and the random states are part of a checkpoint, so a run that was killed continues as if it had not been.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lavish.checkpoints.placement import resolve_device
from lavish.common import dist
from lavish.common.errors import CheckpointError, ConfigError, TrainingError
from lavish.runners.optim import build_optimizer, build_schedule
from lavish.runners.run_folder import RunFolder
from lavish.runners.schema import RunConfig
from lavish.tasks.base_task import BaseTask, TrainingData, read_losses

Progress = Callable[[int, int, dict[str, float]], None]


def micro_batches(span: range, batch_size: int) -> list[range]:
    """Cut the samples of one optimizer step into those of its forward passes; the last one may be smaller."""
    return [span[start : start + batch_size] for start in range(0, len(span), batch_size)]


class _ShuffledEpochs(Sampler[list[int]]):
    """Sample indices of each forward pass: positions in an endless stream of epochs, each shuffled by (seed, epoch)."""

    def __init__(self, num_samples: int, seed: int, passes: Iterable[range]):
        self.num_samples, self.seed, self.passes = num_samples, seed, passes

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for positions in self.passes:
            indices = []
            for position in positions:
                if position // self.num_samples != epoch:
                    epoch = position // self.num_samples
                    generator = torch.Generator().manual_seed(self.seed + epoch)
                    order = torch.randperm(self.num_samples, generator=generator)
                indices.append(int(order[position % self.num_samples]))
            yield indices


class RunnerBase:
    """Train a module on `datasets["train"]` with the task's step, in epochs that take every sample once.

    Args:
        run: the typed run config.
        task: gives the step, `train_step(model, samples) -> {"loss": tensor, ...}`.
        model: the module to train.
        datasets: by split.
        progress: called after each step with (steps done, steps of the run, losses of the step).

    Raises:
        ConfigError: no training data, nothing trainable, or no such device.
    """

    def __init__(
        self,
        run: RunConfig,
        task: BaseTask,
        model: nn.Module,
        datasets: dict[str, TrainingData],
        progress: Progress | None = None,
    ):
        if "train" not in datasets:
            raise ConfigError(f"The recipe's datasets give the splits {sorted(datasets)}, but training needs 'train'.")
        if not len(datasets["train"]):
            raise ConfigError("The split 'train' of the recipe's datasets has no samples.")
        if run.accum_grad_iters % dist.world_size():
            raise ConfigError(
                f"{dist.world_size()} processes share the {run.accum_grad_iters} forward passes of a step. Set "
                "run.accum_grad_iters to a multiple of the processes; run.batch_size_train is the samples of one pass."
            )
        self.run, self.task, self.dataset = run, task, datasets["train"]
        self.device = resolve_device(run.device)
        dist.start(self.device.type)
        if run.num_threads:
            torch.set_num_threads(run.num_threads)
        self.model = model.to(self.device)
        self.folder = RunFolder(run.output_dir)
        self.optimizer = build_optimizer(self.model, run)
        self.progress = progress
        self.step = 0
        self.seconds = 0.0
        """Wall time up to the newest checkpoint, over all processes of the run."""
        self.cpu_seconds = 0.0
        """CPU time of the training processes up to the newest checkpoint; loader processes are not in it."""

    # -- how many, and which samples

    @property
    def samples_per_step(self) -> int:
        """Samples of a full optimizer step."""
        return self.run.batch_size_train * self.run.accum_grad_iters

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
        """Steps between two checkpoints."""
        return self.run.save_freq * self.steps_per_epoch

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

        A process for which a short last step has no pass left takes the first one along, with no share in the result.
        """
        span = self.span(step)
        parts = micro_batches(span, self.run.batch_size_train)
        own = [(part, len(part) / len(span)) for part in parts[dist.rank() :: dist.world_size()]]
        return own or [(parts[0], 0.0)]

    # -- the loop

    def train(self) -> None:
        """Run to the end, from the newest checkpoint of the folder if there is one.

        Raises:
            ConfigError: a schedule that does not fit the run.
            CheckpointError: the newest checkpoint is damaged, or of another model or optimizer.
        """
        set_rates = build_schedule(self.optimizer, self.run, self.num_steps, self.steps_per_epoch)
        state = self.folder.load_latest(self.model, self.device)
        dist.wait_for_all()  # before the first of them writes
        sums = self._resume(state)
        step_module = cast(nn.Module, torch.compile(self.model)) if self.run.compile else self.model
        batches = self._batches()
        if state is not None:  # not earlier: making the loader draws from torch's generator
            self._restore_random_states(state)
        started, cpu_started = time.perf_counter(), time.process_time()
        while self.step < self.num_steps:
            lr = set_rates(self.step)
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
            if self.step % self.save_every == 0 or is_last:
                now, cpu_now = time.perf_counter(), time.process_time()
                self.seconds += now - started
                self.cpu_seconds += dist.total(cpu_now - cpu_started)
                started, cpu_started = now, cpu_now
                if dist.is_main():
                    self._save(sums)
                dist.wait_for_all()
        if dist.is_main():
            self.folder.plot()

    def _train_step(self, model: nn.Module, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
        """Make one optimizer step; give the losses as means over its samples."""
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.run.amp else nullcontext()
        sums: dict[str, float] = {}
        if dist.world_size() > 1:  # noise of its own for each process, the same after a resume
            torch.manual_seed((self.run.seed * 1_000_003 + self.step) * dist.world_size() + dist.rank())
        for _, share in self.passes(self.step):
            samples = {key: self._to_device(value) for key, value in next(batches).items()}
            with autocast:
                losses = read_losses(self.task.train_step(model, samples))
            (losses["loss"] * share).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) * share
        self._add_up(sums)
        if self.run.max_grad_norm > 0:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.run.max_grad_norm)
            sums["grad_norm"] = float(norm)
        self._check_finite(sums)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums

    def _check_finite(self, losses: dict[str, float]) -> None:
        """Stop a run whose loss or gradients are no numbers any more, before weights or checkpoints take them over."""
        for name in ("loss", "grad_norm"):
            value = losses.get(name, 0.0)
            if not math.isfinite(value):
                raise TrainingError(
                    f"{self.folder.path}: {name} is {value} at step {self.step + 1} of {self.num_steps}: the run "
                    "diverged. The last checkpoint before it is kept. Lower the learning rate, set run.max_grad_norm, "
                    "or set run.amp=false, and start with another run.output_dir."
                )

    def _add_up(self, sums: dict[str, float]) -> None:
        """Add up gradients and losses over the processes of the run."""
        if dist.world_size() == 1:
            return
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in trained]
        losses = torch.tensor(list(sums.values()), device=self.device)
        dist.add_up([*gradients, losses])
        sums.update(zip(sums, losses.tolist(), strict=True))

    def _to_device(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    def _batches(self) -> Iterator[dict[str, Any]]:
        passes = (part for step in range(self.step, self.num_steps) for part, _ in self.passes(step))
        loader = DataLoader(
            cast(Dataset[Any], self.dataset),
            batch_sampler=_ShuffledEpochs(len(self.dataset), self.run.seed, passes),
            num_workers=self.run.num_workers,
            collate_fn=self.dataset.collater,
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)

    # -- log, checkpoints, resume

    def _log(self, sums: dict[str, float], lr: float) -> None:
        num_steps = (self.step - 1) % self.run.log_freq + 1
        means = {name: value / num_steps for name, value in sums.items()}
        self.folder.log({"step": self.step, "lr": lr, "lr_scale": lr / self.run.init_lr, **means})

    def _resume(self, state: dict[str, Any] | None) -> dict[str, float]:
        """Take over a checkpoint's state; give the sums of the losses since the last line of the log."""
        if dist.is_main():
            self.folder.cut_log(state["step"] if state else 0)
        if state is None:
            return {}
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.folder.path}: its newest checkpoint is of another optimizer than the recipe's "
                f"{self.run.optimizer!r} ({error}). Use another run.output_dir, or delete the folder to start anew."
            ) from error
        self.step, self.seconds, self.cpu_seconds = state["step"], state["seconds"], state["cpu_seconds"]
        return state["log_sums"]

    def _restore_random_states(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch_rng_state"].cpu())
        if self.device.type == "cuda" and "cuda_rng_state" in state:
            torch.cuda.set_rng_state(state["cuda_rng_state"].cpu())

    def _save(self, sums: dict[str, float]) -> None:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "log_sums": sums,
            "torch_rng_state": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_rng_state"] = torch.cuda.get_rng_state()
        self.folder.save(self.step, self.model, state)
