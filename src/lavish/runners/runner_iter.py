"""The training loop that counts optimizer steps instead of epochs, for endless or very large data."""

from lavish.runners.order import MixedSets, Order, ratios_of
from lavish.runners.runner_base import RunnerBase


class RunnerIter(RunnerBase):
    """Train for `run.max_iters` optimizer steps, with a checkpoint every `run.save_freq` steps.

    All steps are of one size: one that is not filled by an epoch's last samples goes on into the next epoch. What a
    LAVIS recipe does after an epoch is done every `run.iters_per_inner_epoch` steps. With `run.train_dataset_ratios`
    each forward pass takes its samples from one data set, drawn by the ratios.
    """

    counts_epochs = False

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an inner epoch."""
        if self.run.iters_per_inner_epoch:
            return self.run.iters_per_inner_epoch
        return self.run.max_iters if self.stream is not None else super().steps_per_epoch

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.run.max_iters

    @property
    def save_every(self) -> int:
        """Steps between two checkpoints."""
        return self.steps_per_epoch if self.config is not None else self.run.save_freq

    def span(self, step: int) -> range:
        """Say which positions of the stream of shuffled epochs step `step` (from 0) trains on."""
        return range(step * self.samples_per_step, (step + 1) * self.samples_per_step)

    def order(self) -> Order:
        """Say which sample stands at which position."""
        if self.run.train_dataset_ratios is None:
            return super().order()
        sizes = [len(part) for part in self.parts.values()]
        ratios = ratios_of(self.run.train_dataset_ratios, list(self.parts))
        return MixedSets(sizes, ratios, self.run.seed, self.run.batch_size_train)
