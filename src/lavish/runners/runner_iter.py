"""The training loop that counts optimizer steps instead of epochs, for endless or very large data."""

from lavish.runners.runner_base import RunnerBase


class RunnerIter(RunnerBase):
    """Train for `run.max_iters` optimizer steps, with a checkpoint every `run.save_freq` steps."""

    @property
    def num_steps(self) -> int:
        return self.run.max_iters

    @property
    def save_every(self) -> int:
        return self.run.save_freq
