"""Batches of held-out samples, as LAVIS's tasks and models expect a loader: `data_loader.dataset` is the data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset

from lavish.common.errors import LavishError
from lavish.runners.order import Failure


class HeldOutLoader:
    """Gives some samples of a data set in batches; what is wrong with one is raised as it is, also out of a worker.

    Args:
        dataset: a model that compares all pictures reads its `text` or `image` off `dataset`.
        batches: the indices of each batch.
        num_workers: loader processes.
        collate: makes a batch of samples; None: the data set's `collater`.
        pins: whether batches lie where a GPU fetches them from faster.
    """

    def __init__(
        self,
        dataset: Any,
        batches: Sequence[Sequence[int]],
        num_workers: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        *,
        pins: bool = False,
    ) -> None:
        self.dataset = dataset
        told = _Told(dataset, collate or dataset.collater)
        self._loader: DataLoader[Any] = DataLoader(
            told, batch_sampler=cast(Any, batches), num_workers=num_workers, collate_fn=told.collate, pin_memory=pins
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

    def __init__(self, dataset: Any, make: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.make = dataset, make

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
            return self.make(samples)
        except LavishError as error:
            return Failure(error)
