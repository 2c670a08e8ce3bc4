"""Which sample stands where in a run: a function of (seed, position) alone, so that a run can go on anywhere.

A position counts the samples that the run takes, over all epochs and processes. What a data set draws at random for a
sample (crops, flips) is a function of its position too, in whatever process it is loaded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from lavish.common.errors import ConfigError, LavishError, did_you_mean

NUM_TARGETS = "num_targets"
"""Key of a batch: how many tokens its loss is a mean over."""
GROUPED_STEPS = 50
"""Optimizer steps whose samples are sorted by length together."""


class Order(Protocol):
    """From positions to indices of samples."""

    def index(self, position: int) -> int:
        """Give the index of the sample at a position."""
        ...


class ShuffledEpochs:
    """Endless epochs of `num_samples`, each shuffled by (seed, epoch)."""

    def __init__(self, num_samples: int, seed: int):
        self.num_samples, self.seed = num_samples, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def index(self, position: int) -> int:
        """Give the index of the sample at a position."""
        epoch, place = divmod(position, self.num_samples)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return int(self._order[place])

    def _shuffled(self, epoch: int) -> torch.Tensor:
        return torch.randperm(self.num_samples, generator=torch.Generator().manual_seed(self.seed + epoch))


class GroupedEpochs(ShuffledEpochs):
    """As `ShuffledEpochs`, with samples of like length in one batch: stretches of many steps are sorted by length, cut
    into batches, and the batches shuffled. A short last batch stays last."""

    def __init__(self, lengths: Sequence[int], seed: int, batch_size: int):
        super().__init__(len(lengths), seed)
        self.lengths, self.batch_size = torch.as_tensor(list(lengths)), batch_size

    def _shuffled(self, epoch: int) -> torch.Tensor:
        order = super()._shuffled(epoch)
        stretch = GROUPED_STEPS * self.batch_size
        ordered = torch.cat([part[self.lengths[part].argsort(stable=True)] for part in order.split(stretch)])
        batches = list(ordered.split(self.batch_size))
        last = batches.pop() if len(batches[-1]) < self.batch_size else ordered[:0]
        places = torch.randperm(len(batches), generator=torch.Generator().manual_seed(self.seed + epoch))
        return torch.cat([*(batches[place] for place in places), last])


class MixedSets:
    """Several data sets that follow one another as one: each forward pass takes all its samples from one of them.

    Which one is drawn by the ratios; each set has its own endless epochs. Source: LAVIS, `train_dataset_ratios`.
    """

    def __init__(self, sizes: Sequence[int], ratios: Sequence[float], seed: int, batch_size: int):
        self.seed, self.batch_size = seed, batch_size
        self.ratios = torch.tensor(ratios, dtype=torch.float64)
        self.starts = [sum(sizes[:at]) for at in range(len(sizes))]
        self.orders = [ShuffledEpochs(size, seed) for size in sizes]
        self._drawn: list[tuple[int, int]] = []  # of each pass: its set, and how many passes of that set came before
        self._counts = [0] * len(sizes)

    def index(self, position: int) -> int:
        """Give the index of the sample at a position."""
        number, place = divmod(position, self.batch_size)
        while len(self._drawn) <= number:
            self._draw()
        chosen, before = self._drawn[number]
        return self.starts[chosen] + self.orders[chosen].index(before * self.batch_size + place)

    def _draw(self) -> None:
        generator = torch.Generator().manual_seed(self.seed + len(self._drawn))
        for chosen in torch.multinomial(self.ratios, 1024, replacement=True, generator=generator).tolist():
            self._drawn.append((chosen, self._counts[chosen]))
            self._counts[chosen] += 1


def ratios_of(wanted: dict[str, float], names: Sequence[str]) -> list[float]:
    """Give the ratios in the order of the data sets.

    Raises:
        ConfigError: a set without a ratio, a ratio of no set, or one that is not above 0.
    """
    for name, ratio in wanted.items():
        if name not in names:
            hint = did_you_mean(name, names)
            raise ConfigError(f"run.train_dataset_ratios.{name}: the recipe has no such data set.{hint}")
        if not 0 < ratio < float("inf"):
            raise ConfigError(f"run.train_dataset_ratios.{name} is {ratio}; it must be above 0.")
    if absent := [name for name in names if name not in wanted]:
        raise ConfigError(f"run.train_dataset_ratios names every data set of the recipe, and {absent[0]!r} is absent.")
    return [wanted[name] for name in names]


class Passes(Sampler[list[tuple[int, int]]]):
    """The (position, index) pairs of each forward pass."""

    def __init__(self, order: Order, passes: Iterable[range]):
        self.order, self.passes = order, passes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for positions in self.passes:
            yield [(position, self.order.index(position)) for position in positions]


@dataclass(frozen=True)
class Failure:
    """An error of a sample or batch, as a value: what a worker of the loader raises ends up inside a traceback."""

    error: LavishError


class SeededSamples(Dataset):
    """Samples with their indices; what is drawn while one is loaded depends on its position.

    Args:
        dataset: of samples, with a `collater`.
        seed: of the run.
        prepare: makes more of a batch where it is loaded, as tensors of a chat model; None: nothing.
    """

    def __init__(self, dataset: Any, seed: int, prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None):
        self.dataset, self.seed, self.prepare = dataset, seed, prepare

    def __getitem__(self, place: tuple[int, int]) -> tuple[int, Any]:
        position, index = place
        with own_randomness(self.seed * 1_000_003 + position):
            try:
                return index, self.dataset[index]
            except LavishError as error:
                return index, Failure(error)

    def collate(self, samples: list[tuple[int, Any]]) -> tuple[list[int], dict[str, Any] | Failure]:
        """Give the indices of a batch, and the batch, or what is wrong with it."""
        indices = [index for index, _ in samples]
        failed = next((sample for _, sample in samples if isinstance(sample, Failure)), None)
        if failed is not None:
            return indices, failed
        try:
            batch = self.dataset.collater([sample for _, sample in samples])
            return indices, batch if self.prepare is None else self.prepare(batch)
        except LavishError as error:
            return indices, Failure(error)


@contextmanager
def own_randomness(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch's CPU, and of a GPU that is named; set them back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = device if device is not None and device.type == "cuda" else None
    gpu_state = None if gpu is None else torch.cuda.get_rng_state(gpu)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if gpu is not None:
        torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if gpu is not None and gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state, gpu)
