"""Runners: the life cycle of a training run (steps, schedule, checkpoints, resume, plot). They know no model family."""

from lavish.runners.runner_base import RunnerBase
from lavish.runners.runner_iter import RunnerIter

__all__ = ["RunnerBase", "RunnerIter"]
