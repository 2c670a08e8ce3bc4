"""The training loop that counts optimizer steps instead of epochs, for endless or very large data."""

from lavish.runners.runner_base import RunnerBase


class RunnerIter(RunnerBase):
    """Train for `run.max_iters` optimizer steps, with a checkpoint every `run.save_freq` steps.

    All steps are of one size: one that is not filled by an epoch's last samples goes on into the next epoch.
    """

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.run.max_iters

    @property
    def save_every(self) -> int:
        """Steps between two checkpoints."""
        return self.run.save_freq

    def span(self, step: int) -> range:
        """Say which positions of the stream of shuffled epochs step `step` (from 0) trains on."""
        return range(step * self.samples_per_step, (step + 1) * self.samples_per_step)
