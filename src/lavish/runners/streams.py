"""Training on streams: data that have no length and no numbers, such as tar shards, read by `runner_iter`.

Every reader, one for each loader process of each training process, goes through rows of its own, pass after pass, and
draws them from a buffer that is kept full. What it draws is a function of (seed, reader, pass, how many were drawn), so
a checkpoint holds two numbers a reader. A run that goes on reads the rows of its pass again up to there, without making
samples of them: no picture is opened, but every byte of those rows is read once more.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lavish.common import dist
from lavish.common.errors import ConfigError, DataError, LavishError
from lavish.datasets.datasets.shuffle_buffer import drawn
from lavish.runners.order import Failure, own_randomness
from lavish.runners.schema import RunConfig

Place = tuple[int, int]
"""Of a reader: its pass, and how many rows it has drawn in it."""


@runtime_checkable
class RowStream(Protocol):
    """What a stream has to have: rows that cost little, and what makes a sample of one."""

    def rows(self, reader: int, readers: int, seed: str) -> Iterable[Any]:
        """Give the rows of one reader for one pass; those of all readers together are each row once. The seed decides
        the order of the shards, the same in all readers."""
        ...

    def sample(self, row: Any) -> Any:
        """Make a sample; DataError and MediaError leave it out."""
        ...

    def note_broken(self, row: Any, error: Exception) -> None:
        """Tell and count a row that no sample could be made of."""
        ...

    def collater(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Make a batch."""
        ...


def check(parts: Mapping[str, Any], run: RunConfig, *, counts_epochs: bool) -> None:
    """Refuse what cannot be done with a stream.

    Raises:
        ConfigError: an epoch count, other sets beside it, or a class that does not say its rows.
    """
    name = next((name for name, part in parts.items() if isinstance(part, IterableDataset)), None)
    if name is None:
        return
    stream = parts[name]
    if counts_epochs:
        raise ConfigError(
            f"datasets.{name} is a stream, so nobody knows how long an epoch is, and runner_base counts them. Set "
            "run.runner=runner_iter, run.max_iters to the steps of the run, and run.iters_per_inner_epoch to those "
            "between two validations."
        )
    if len(parts) > 1:
        raise ConfigError(f"datasets.{name} is a stream, which is trained on alone; leave {_others(parts, name)} out.")
    for key in ("group_by_length", "train_dataset_ratios"):
        if getattr(run, key):
            raise ConfigError(f"run.{key} needs data that have a length, and datasets.{name} is a stream.")
    if not isinstance(stream, RowStream):
        raise ConfigError(
            f"datasets.{name} is a stream of the class {type(stream).__name__}, which cannot be gone on with exactly: "
            "give it rows(reader, readers, seed), sample(row) and note_broken(row, error), as ConversationStream has."
        )


def _others(parts: Mapping[str, Any], name: str) -> str:
    return ", ".join(f"datasets.{other}" for other in parts if other != name)


class StreamBatches(IterableDataset):
    """The endless batches of the readers of one process.

    Args:
        stream: of rows.
        run: its seed, batch size and buffer.
        prepare: makes more of a batch, as of `SeededSamples`.
        state: of a checkpoint, by `StreamState.of`; where to begin.
    """

    def __init__(self, stream: RowStream, run: RunConfig, prepare: Callable[[Any], Any] | None, state: StreamState):
        self.stream, self.run, self.prepare = stream, run, prepare
        self.first, self.places = state.first, dict(state.places)

    def __iter__(self) -> Iterator[tuple[int, Place, list[str], Any]]:
        """Give (worker, its place after the batch, names of the samples, the batch or what is wrong with it)."""
        info = get_worker_info()
        num_workers, worker = (info.num_workers, info.id) if info else (1, 0)
        # The loader asks worker 0 first, and the batch that is due may be another one's.
        worker = (worker + self.first) % num_workers
        reader, readers = dist.rank() * num_workers + worker, dist.world_size() * num_workers
        names: list[str] = []
        samples: list[Any] = []
        try:
            for place, sample in self._samples(reader, readers, self.places.get(worker, (0, 0))):
                names.append(f"reader {reader}, pass {place[0]}, row {place[1]}")
                samples.append(sample)
                if len(samples) == self.run.batch_size_train:
                    yield worker, place, names, self._batch(samples)
                    names, samples = [], []
        except LavishError as error:
            yield worker, (0, 0), names, Failure(error)

    def _samples(self, reader: int, readers: int, place: Place) -> Iterator[tuple[Place, Any]]:
        number, done = place
        while True:
            given = 0
            seed = f"{self.run.seed}-{number}"
            draw = random.Random(f"{seed}-{reader}")
            rows = drawn(self.stream.rows(reader, readers, seed), self.run.shuffle_buffer, draw)
            for at, row in enumerate(rows, start=1):
                if at <= done:
                    given += 1
                    continue
                with own_randomness(seed_of(f"{seed}-{reader}-{at}")):
                    try:
                        sample = self.stream.sample(row)
                    except LavishError as error:
                        self.stream.note_broken(row, error)
                        continue
                given += 1
                yield (number, at), sample
            if not given:
                raise DataError(
                    f"Reader {reader} of {readers} found no sample in a whole pass. Take fewer run.num_workers or "
                    "processes than there are shards or rows, and look at the warnings above."
                )
            number, done = number + 1, 0

    def _batch(self, samples: list[Any]) -> Any:
        try:
            batch = self.stream.collater(samples)
            return batch if self.prepare is None else self.prepare(batch)
        except LavishError as error:
            return Failure(error)


class StreamState:
    """Where the readers of one process are."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = max(num_workers, 1)
        self.first = 0
        """The worker whose batch is due."""
        self.places: dict[int, Place] = {}

    def took(self, worker: int, place: Place) -> None:
        """Note a batch that was trained on."""
        self.places[worker] = place
        self.first = (worker + 1) % self.num_workers

    def saved(self) -> dict[str, Any]:
        """Give what a checkpoint holds, of all processes; all of them call it."""
        own = {"first": self.first, "places": [list(self.places.get(at, (0, 0))) for at in range(self.num_workers)]}
        return {"num_workers": self.num_workers, "processes": dist.gather(own)}

    def load(self, state: Mapping[str, Any] | None, folder: object) -> None:
        """Go on from a checkpoint.

        Raises:
            ConfigError: it was made by another number of readers, which share the rows otherwise.
        """
        if state is None:
            raise ConfigError(f"{folder}: its checkpoint is not of a stream; start in another run.output_dir.")
        before = (len(state["processes"]), state["num_workers"])
        now = (dist.world_size(), self.num_workers)
        if before != now:
            raise ConfigError(
                f"{folder}: its checkpoint was made by {before[0]} processes with run.num_workers {before[1]}, and now "
                f"they are {now[0]} with {now[1]}. The readers of a stream share its rows, so go on with as many as "
                "before, or start in another run.output_dir."
            )
        own = state["processes"][dist.rank()]
        self.first = own["first"]
        self.places = {at: (place[0], place[1]) for at, place in enumerate(own["places"])}


def batches_of(
    stream: RowStream, run: RunConfig, prepare: Callable[[Any], Any] | None, state: StreamState, *, pins: bool
) -> Iterator[tuple[list[str], Any]]:
    """Give the names of samples and the batches, endlessly, and note in `state` how far they are.

    Raises:
        LavishError: what is wrong with a batch.
    """
    loader = DataLoader(
        StreamBatches(stream, run, prepare, state),
        batch_size=None,
        num_workers=run.num_workers,
        collate_fn=_as_it_is,
        pin_memory=pins,
        generator=torch.Generator().manual_seed(run.seed),
    )
    for worker, place, names, batch in loader:
        if isinstance(batch, Failure):
            raise batch.error
        state.took(worker, tuple(place))
        yield names, batch


def _as_it_is(value: Any) -> Any:
    return value


def seed_of(text: str) -> int:
    """Give a number for a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")
