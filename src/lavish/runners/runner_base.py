"""The plain training loop: one process, one device, exact resume. `RunnerBase` counts epochs; `runner_iter.py` counts steps.

What a step computes belongs to the task; what the data is, to the dataset. Sample order is a function of (seed, epoch) alone, so a run
that was killed continues with the samples that it would have seen.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lavish.common.errors import ConfigError
from lavish.runners.optim import build_optimizer, lr_schedule
from lavish.runners.run_folder import RunFolder
from lavish.runners.schema import RunConfig
from lavish.tasks.base_task import BaseTask

Progress = Callable[[int, int, dict[str, float]], None]


class _FixedOrder(torch.utils.data.Sampler):
    """Indices of samples `first`, `first + 1` ... of an endless stream of shuffled epochs."""

    def __init__(self, num_samples: int, seed: int, first: int, count: int):
        self.num_samples, self.seed, self.first, self.count = num_samples, seed, first, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for position in range(self.first, self.first + self.count):
            if position // self.num_samples != epoch:
                epoch = position // self.num_samples
                order = torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(self.seed + epoch))
            yield int(order[position % self.num_samples])


def pick_device(name: str) -> torch.device:
    """Turn `run.device` into a torch device; `auto` takes cuda, then mps, then cpu."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


class RunnerBase:
    """Train `model` on `datasets["train"]` with the task's step.

    Args of the constructor: the typed run config; the task (`train_step(model, samples) -> {"loss": tensor, ...}`); the module to train;
    datasets by split; `progress(step, num_steps, losses)` is called after each step.
    """

    def __init__(
        self,
        run: RunConfig,
        task: BaseTask,
        model: nn.Module,
        datasets: dict[str, Dataset],
        progress: Progress | None = None,
    ):
        if "train" not in datasets:
            raise ConfigError(f"The recipe's datasets give the splits {sorted(datasets)}, but training needs 'train'.")
        self.run, self.task, self.dataset = run, task, datasets["train"]
        self.device = pick_device(run.device)
        if run.num_threads:
            torch.set_num_threads(run.num_threads)
        self.model = model.to(self.device)
        self.folder = RunFolder(run.output_dir)
        self.optimizer = build_optimizer(self.model, run)
        self.progress = progress
        self.step = 0
        self.seconds = 0.0
        self.cpu_seconds = 0.0

    @property
    def samples_per_step(self) -> int:
        return self.run.batch_size_train * self.run.accum_grad_iters

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.dataset) / self.samples_per_step)  # type: ignore[arg-type]

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.run.max_epoch * self.steps_per_epoch

    @property
    def save_every(self) -> int:
        """Steps between two checkpoints."""
        return self.run.save_freq * self.steps_per_epoch

    def train(self) -> None:
        """Run to the end, from the newest checkpoint of the folder if there is one."""
        sums = self._resume()
        schedule = lr_schedule(self.run, self.num_steps)
        step_module = torch.compile(self.model) if self.run.compile else self.model
        batches = self._batches()
        started, cpu_started = time.perf_counter(), time.process_time()
        while self.step < self.num_steps:
            self.optimizer.set_lr_scale(schedule(self.step))
            losses = self._train_step(step_module, batches)
            self.step += 1
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value
            if self.progress:
                self.progress(self.step, self.num_steps, losses)
            last = self.step == self.num_steps
            if self.step % self.run.log_freq == 0 or last:
                num_logged = (self.step - 1) % self.run.log_freq + 1
                means = {name: value / num_logged for name, value in sums.items()}
                self.folder.log({"step": self.step, "lr_scale": schedule(self.step - 1), **means})
                sums = {}
            if self.step % self.save_every == 0 or last:
                now, cpu_now = time.perf_counter(), time.process_time()
                self.seconds += now - started
                self.cpu_seconds += cpu_now - cpu_started
                started, cpu_started = now, cpu_now
                self._save(sums)
        self.folder.plot()

    def _train_step(self, model: nn.Module, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.run.amp else nullcontext()
        sums: dict[str, float] = {}
        for _ in range(self.run.accum_grad_iters):
            samples = {key: self._to_device(value) for key, value in next(batches).items()}
            with autocast:
                losses = self.task.train_step(model, samples)
            (losses["loss"] / self.run.accum_grad_iters).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / self.run.accum_grad_iters
        if self.run.max_grad_norm > 0:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.run.max_grad_norm)
            sums["grad_norm"] = float(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums

    def _to_device(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    def _batches(self) -> Iterator[dict[str, Any]]:
        num_done = self.step * self.samples_per_step
        count = (self.num_steps - self.step) * self.samples_per_step
        order = _FixedOrder(len(self.dataset), self.run.seed, num_done, count)  # type: ignore[arg-type]
        loader = DataLoader(
            self.dataset,
            batch_size=self.run.batch_size_train,
            sampler=order,
            num_workers=self.run.num_workers,
            collate_fn=self.dataset.collater,  # type: ignore[attr-defined]
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)

    def _resume(self) -> dict[str, float]:
        """Restore the newest checkpoint; give the sums of the losses since the last line of the log."""
        state = self.folder.load_latest(self.model, self.device)
        if state is None:
            self.folder.read_log(before_step=0)
            return {}
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.cpu_seconds = state["step"], state["seconds"], state["cpu_seconds"]
        torch.set_rng_state(state["torch_rng_state"].cpu())
        if self.device.type == "cuda" and "cuda_rng_state" in state:
            torch.cuda.set_rng_state(state["cuda_rng_state"].cpu())
        self.folder.read_log(before_step=self.step)
        return state["log_sums"]

    def _save(self, sums: dict[str, float]) -> None:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "num_samples": self.step * self.samples_per_step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "log_sums": sums,
            "torch_rng_state": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_rng_state"] = torch.cuda.get_rng_state()
        self.folder.save(self.step, self.model, state)
