"""Runs whose task makes the steps itself: `train_epoch`, `train_iters` or `_train_inner_loop` overridden, LAVIS's way.

The runner then gives a loader, the optimizer and the schedule, and takes over at the end of each epoch: log,
checkpoint, validation. A killed run goes on from the last epoch that ended. Source: salesforce/LAVIS,
lavis/runners/runner_base.py and runner_iter.py (train_epoch, train_iters).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lavish.common import dist
from lavish.common.errors import ConfigError
from lavish.runners.schema import RunConfig
from lavish.tasks.base_task import BaseTask

LOOPS = ("train_epoch", "train_iters", "_train_inner_loop")


def own_loop(task: BaseTask, *, counts_epochs: bool) -> str | None:
    """Give the name of the loop that a task overrides; None where the runner makes the steps."""
    unused = "train_iters" if counts_epochs else "train_epoch"
    kept = {name: getattr(BaseTask, name) for name in LOOPS}
    changed = (name for name, own in kept.items() if getattr(type(task), name, own) is not own)
    return next((name for name in changed if name != unused), None)


def check(task: BaseTask, loop: str, run: RunConfig) -> None:
    """Refuse what only the runner's own steps do.

    Raises:
        ConfigError: says which key.
    """
    if dist.world_size() > 1 and not run.batch_per_process:
        raise ConfigError(
            f"{type(task).__name__} overrides {loop}, and a loop of its own makes all passes of a step in each "
            "process. Set run.batch_per_process=true, or override train_step alone."
        )
    asked = {"max_grad_norm": run.max_grad_norm, "ema_decay": run.ema_decay, "compile": run.compile}
    for name, value in asked.items():
        if value:
            raise ConfigError(
                f"run.{name} is {value}, and {type(task).__name__} overrides {loop}, so the runner makes no steps that "
                f"it could be part of. Set run.{name}={'false' if value is True else 0}, or override train_step alone."
            )


class EpochBatches:
    """The batches of one epoch, as LAVIS's loops take them: with a length, and by `next`."""

    def __init__(self, dataset: Any, batches: Iterator[tuple[Any, dict[str, Any]]], count: int) -> None:
        self.dataset, self._batches, self._count = dataset, batches, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> EpochBatches:
        return self

    def __next__(self) -> dict[str, Any]:
        return next(self._batches)[1]


class Rates:
    """The schedule of a run, called before each forward pass as LAVIS's schedulers are."""

    def __init__(
        self, set_rates: Callable[[int], float], steps_per_epoch: int, num_steps: int, passes_per_step: int
    ) -> None:
        self.set_rates, self.steps_per_epoch, self.num_steps = set_rates, steps_per_epoch, num_steps
        self.passes_per_step = passes_per_step
        self.lr = 0.0

    def step(self, cur_epoch: int, cur_step: int) -> None:
        """Set the rates of a forward pass: epoch, and pass in it, both from 0."""
        step = cur_epoch * self.steps_per_epoch + cur_step // self.passes_per_step
        self.lr = self.set_rates(min(step, self.num_steps - 1))
