"""Learning-rate schedules, by the names of LAVIS.

By default a schedule goes by optimizer steps: linear warm-up, then the fall over all steps that are left, whose last
one is at `min_lr`; each group's rate is multiplied by its `lr_scale`. `compat="lavis"` and `compat="mpp"` give the
numbers of the releases instead: the rate is a function of (epoch, step in it), a warm-up ends with epoch 0, the cosine
jumps once an epoch and never reaches `min_lr`, and LAVIS sets every group to one rate, whatever its `lr_scale`.

Source: salesforce/LAVIS, lavis/common/optims.py; Coobiw/MPP-LLaVA, lavis/common/optims.py (the step-wise cosine).
"""

import math
from typing import Any, ClassVar

from lavish.common.errors import ConfigError

LAVIS, MPP = "lavis", "mpp"


class LRScheduler:
    """Base of the schedules; a user's own one may be any class with this constructor and `step`.

    Args:
        optimizer: whose `param_groups` get the rates.
        max_epoch: epochs of the run.
        min_lr: where the rate ends.
        init_lr: the peak.
        decay_rate: what a step schedule multiplies with at each epoch.
        warmup_start_lr: the rate at step 0; below 0 it is the peak, and None: the first of `warmup_steps` equal rises.
        warmup_steps: optimizer steps of warm-up.
        steps_per_epoch: optimizer steps of one epoch.
        max_steps: optimizer steps of the run.
        compat: "", or the release whose numbers it gives: "lavis" or "mpp".

    Raises:
        ConfigError: a warm-up as long as the run.
    """

    counts_whole_run: ClassVar[bool] = False
    """True where `step` gets the step of the run, not of the epoch (with `compat` only)."""

    def __init__(
        self,
        optimizer: Any,
        max_epoch: int,
        min_lr: float,
        init_lr: float,
        decay_rate: float = 1.0,
        warmup_start_lr: float | None = -1,
        warmup_steps: int = 0,
        *,
        steps_per_epoch: int = 0,
        max_steps: int = 0,
        compat: str = "",
    ) -> None:
        self.optimizer, self.compat = optimizer, compat
        self.max_epoch, self.min_lr, self.init_lr, self.decay_rate = max_epoch, min_lr, init_lr, decay_rate
        self.warmup_steps, self.steps_per_epoch, self.max_steps = warmup_steps, steps_per_epoch, max_steps
        self.warmup_start_lr = warmup_start_lr
        if (not compat or self.counts_whole_run) and max_steps and 0 < max_steps <= warmup_steps:
            raise ConfigError(
                f"run.warmup_steps is {warmup_steps}, but the run has {max_steps} steps; make it smaller."
            )

    def step(self, cur_epoch: int, cur_step: int) -> None:
        """Set the rates of a step (from 0) of an epoch (from 0)."""
        lr = self.lr(cur_epoch, cur_step)
        for group in self.optimizer.param_groups:
            # A group of a plain torch optimizer has no lr_scale.
            group["lr"] = lr if self.compat == LAVIS else lr * group.get("lr_scale", 1.0)

    def lr(self, cur_epoch: int, cur_step: int) -> float:
        """Give the rate of a group whose `lr_scale` is 1."""
        if self.compat:
            return self._released_lr(cur_epoch, cur_step)
        step = cur_epoch * self.steps_per_epoch + cur_step
        if step < self.warmup_steps:
            return self._warmup_lr(step)
        return self._later_lr(step)

    def _warmup_lr(self, step: int) -> float:
        if self.warmup_start_lr is None:
            return self.init_lr * (step + 1) / self.warmup_steps
        start = self.init_lr if self.warmup_start_lr < 0 else self.warmup_start_lr
        return min(self.init_lr, start + (self.init_lr - start) * step / max(self.warmup_steps, 1))

    def _later_lr(self, step: int) -> float:
        """Give the rate of a step of the run after the warm-up."""
        done = (step - self.warmup_steps) / max(self.max_steps - 1 - self.warmup_steps, 1)
        floor = self.min_lr / self.init_lr
        return self.init_lr * (floor + (1 - floor) * self._share(min(done, 1.0)))

    def _share(self, done: float) -> float:
        """Give the share of the way from `min_lr` up to the peak after this share of the steps."""
        raise NotImplementedError(f"{type(self).__name__} does not say how the rate falls; override _share().")

    def _released_lr(self, cur_epoch: int, cur_step: int) -> float:
        is_warmup = cur_epoch == 0 and (self.compat == LAVIS or cur_step <= self.warmup_steps)
        if is_warmup:
            start = self.warmup_start_lr
            start = self.init_lr if start is None or start < 0 else start
            return min(self.init_lr, start + (self.init_lr - start) * cur_step / max(self.warmup_steps, 1))
        return self._epoch_lr(cur_epoch, cur_step)

    def _epoch_lr(self, cur_epoch: int, cur_step: int) -> float:
        """Give the release's rate after the warm-up."""
        raise NotImplementedError(f"No release has {type(self).__name__}; leave run.compat out.")


class LinearWarmupCosineLR(LRScheduler):
    """Fall along half a cosine, by steps; in the releases by epochs."""

    def _share(self, done: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * done))

    def _epoch_lr(self, cur_epoch: int, cur_step: int) -> float:
        wave = 1 + math.cos(math.pi * cur_epoch / self.max_epoch)
        return self.min_lr + (self.init_lr - self.min_lr) * 0.5 * wave


class LinearWarmupStepwiseCosineLR(LinearWarmupCosineLR):
    """Fall along half a cosine by steps, also in the release, whose last step is one short of `min_lr`."""

    counts_whole_run = True

    def _epoch_lr(self, cur_epoch: int, cur_step: int) -> float:
        done = (cur_step - self.warmup_steps) / (self.max_steps - self.warmup_steps)
        return self.min_lr + (self.init_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


class LinearWarmupLinearLR(LRScheduler):
    """Fall along a line, by steps; no release has it."""

    def _share(self, done: float) -> float:
        return 1 - done


class LinearWarmupStepLR(LRScheduler):
    """Multiply by `decay_rate` at each epoch."""

    def _later_lr(self, step: int) -> float:
        return self._epoch_lr(step // self.steps_per_epoch, 0)

    def _epoch_lr(self, cur_epoch: int, cur_step: int) -> float:
        return max(self.min_lr, self.init_lr * self.decay_rate**cur_epoch)


class ConstantLR(LRScheduler):
    """Stay at the peak."""

    def _later_lr(self, step: int) -> float:
        return self.init_lr

    def _epoch_lr(self, cur_epoch: int, cur_step: int) -> float:
        return self.init_lr
