"""What every task offers to the runners: model and data that a recipe names, one training step, evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig
from torch import nn


class TrainingData(Protocol):
    """What a runner trains on: a map-style dataset that also knows how its samples become a batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def collater(self, samples: list[Any], /) -> dict[str, Any]:
        """Stack samples into one batch; the tensors among its values are moved to the device."""
        ...


class BaseTask:
    """Base of the tasks.

    A subclass gives `setup_task`, `build_model`, `build_datasets`, and what it does differently.
    """

    @classmethod
    def setup_task(cls, config: DictConfig) -> "BaseTask":
        """Build the task from a merged recipe; wrong settings raise here, before anything heavy starts."""
        return cls()

    def check_training(self) -> None:
        """Check what only training needs of the recipe; nothing, unless a task knows more. Builds nothing heavy."""

    def build_model(self) -> nn.Module:
        """Build the module to train."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its model is built; override build_model().")

    def build_datasets(self) -> dict[str, TrainingData]:
        """Build the datasets by split."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it trains on; override build_datasets().")

    def train_step(self, model: nn.Module, samples: dict[str, Any]) -> dict[str, Any]:
        """Compute the losses of one batch; `loss` is the one that is minimised, the others are logged."""
        return model(samples)

    def finish(self, model: nn.Module, folder: Path) -> None:
        """Write what a finished run leaves besides its checkpoints; nothing, unless a task has more to give."""

    def evaluation(
        self, vlm: Any, folder: Path, batch_size: int, progress: Callable[[int, int], None]
    ) -> dict[str, Any]:
        """Score a loaded model, write its answers into `folder` and give the summary; `progress(done, total)`."""
        raise NotImplementedError(f"{type(self).__name__} cannot score a model; use a task that can, such as 'scenes'.")
