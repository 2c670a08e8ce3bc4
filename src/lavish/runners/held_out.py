"""Batches of held-out samples, as LAVIS's tasks and models expect a loader: `data_loader.dataset` is the data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from lavish.common.errors import LavishError
from lavish.runners.order import Failure


class HeldOutLoader:
    """Gives some samples of a data set in batches; what is wrong with one is raised as it is, also out of a worker.

    Args:
        dataset: with a `collater`; a model that compares all pictures reads its `text` or `image` off `dataset`.
        indices: of the samples to give.
        batch_size: of the batches; the last one may be smaller.
        num_workers: loader processes.
    """

    def __init__(self, dataset: Any, indices: Sequence[int], batch_size: int, num_workers: int = 0) -> None:
        self.dataset, self.indices, self.batch_size = dataset, list(indices), batch_size
        batches = [self.indices[start : start + batch_size] for start in range(0, len(self.indices), batch_size)]
        told = _Told(dataset)
        self._loader: DataLoader[Any] = DataLoader(
            told, batch_sampler=batches, num_workers=num_workers, collate_fn=told.collate
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            if isinstance(batch, Failure):
                raise batch.error
            yield batch


class _Told(Dataset):
    """Samples, or what is wrong with them as a value."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except LavishError as error:
            return Failure(error)

    def collate(self, samples: list[Any]) -> Any:
        failed = next((sample for sample in samples if isinstance(sample, Failure)), None)
        if failed is not None:
            return failed
        try:
            return self.dataset.collater(samples)
        except LavishError as error:
            return Failure(error)
