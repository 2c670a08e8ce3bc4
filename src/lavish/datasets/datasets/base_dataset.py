"""The base of the datasets: records of annotation files, processors, and how samples become a batch.

Names and signatures are those of LAVIS, so that a dataset of one's own runs with the import's first word replaced: it
overrides `__getitem__` there, or `sample` here and gets the care for broken samples. Source: salesforce/LAVIS,
lavis/datasets/datasets/base_dataset.py.

Trap: LAVIS drops a broken sample without a word, or takes a random other one. Here the next good one takes its place
(a batch keeps its size, so processes stay in step), a warning says which row and why, `num_broken` counts, and more
than the share `max_broken` ends the run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset as TorchConcatDataset
from torch.utils.data import Dataset, get_worker_info

from lavish.common import dist
from lavish.common.errors import DataError, MediaError
from lavish.common.media import open_image
from lavish.datasets.datasets.annotations import need, read_annotations
from lavish.processors.base_processor import BaseProcessor

logger = logging.getLogger(__name__)

MAX_WARNINGS = 20
"""Broken samples that each process tells one by one."""
BROKEN = (MediaError, DataError)
"""What makes a sample broken; anything else is a fault of code and goes through."""


class BaseDataset(Dataset):
    """Samples of annotation files; `annotation` holds the records, each with its running number as `instance_id`."""

    max_broken: float = 0.0
    """Share of broken samples that are replaced and reported; at 0 the first one raises. Builders set it."""

    def __init__(
        self,
        vis_processor: Any = None,
        text_processor: Any = None,
        vis_root: str | Path | None = None,
        ann_paths: Sequence[str | Path] = (),
    ) -> None:
        """`vis_root` is the folder of the visual data, `ann_paths` are read one after the other."""
        self.vis_root = None if vis_root is None else str(vis_root)
        self.annotation: list[dict[str, Any]] = []
        self.sources: list[tuple[str, int]] = []
        self.set_processors(vis_processor, text_processor)
        for path in ann_paths:
            self.add_annotation(path, read_annotations(path))
        self._add_instance_ids()

    def add_annotation(self, path: str | Path, records: Iterable[dict[str, Any]]) -> None:
        """Append the records of a file; messages name the file and the row."""
        before = len(self.annotation)
        self.annotation.extend(records)
        self.sources.append((str(path), len(self.annotation) - before))

    def set_processors(self, vis_processor: Any, text_processor: Any) -> None:
        """Replace the processors; None leaves pictures or texts as they are."""
        self.vis_processor = BaseProcessor() if vis_processor is None else vis_processor
        self.text_processor = BaseProcessor() if text_processor is None else text_processor

    def _add_instance_ids(self, key: str = "instance_id") -> None:
        for index, record in enumerate(self.annotation):
            record[key] = str(index)
        # Of all worker processes; shared before they start. A sample counts once, however often it is met.
        self._broken = torch.zeros(max(1, len(self.annotation)), dtype=torch.uint8).share_memory_()
        self._warned = 0

    def __len__(self) -> int:
        return len(self.annotation)

    # -- samples

    def sample(self, index: int) -> dict[str, Any]:
        """Give one sample; MediaError and DataError make it a broken one."""
        raise NotImplementedError(f"{type(self).__name__} does not say what a sample is; override sample(index).")

    def __getitem__(self, index: int) -> Any:
        """Give the sample, or the next good one in its place.

        Raises:
            DataError: it is broken, and no more are allowed to be.
        """
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"index {index} of a dataset with {count} samples")
        for step in range(count):
            at = (index + step) % count
            try:
                return self.sample(at)
            except BROKEN as error:
                self._note_broken(at, error)
        raise DataError(f"{self.where(index)}: none of the {count} samples can be read.")

    @property
    def num_broken(self) -> int:
        """The number of different samples that could not be read so far, in this process and its workers."""
        return int(self._broken.sum())

    def where(self, index: int) -> str:
        """Say which row of which file a sample is, from 1."""
        row = index % len(self) + 1
        for path, count in self.sources:
            if row <= count:
                return f"{path}, row {row + path.endswith(('.csv', '.tsv'))}"  # the head of a table is row 1
            row -= count
        return f"sample {index}"

    def _note_broken(self, index: int, error: Exception) -> None:
        self._broken[index % len(self._broken)] = 1
        found, allowed = self.num_broken, self.max_broken * len(self)
        if found > allowed:
            limit = f" {found} of {len(self)} samples are broken and {self.max_broken:.1%} may be (max_broken)."
            advice = "" if self.max_broken == 0 else limit
            raise DataError(f"{self.where(index)}: {error}{advice}") from error
        if self._warned < MAX_WARNINGS:
            self._warned += 1
            logger.warning(
                "%s: %s The next sample takes its place (%d broken so far).", self.where(index), error, found
            )

    # -- pieces of samples

    def picture(self, name: Any) -> Any:
        """Open a picture under `vis_root` and process it: without EXIF rotation, as LAVIS opens it."""
        return self.vis_processor(open_image(self.path(name), exif_rotation=False))

    def path(self, name: Any) -> Path:
        """Give the path of a file under `vis_root`."""
        if not isinstance(name, str) or not name:
            raise DataError(f"{name!r} where the name of a file is expected.")
        return Path(self.vis_root or "") / name

    def processed_text(self, record: Mapping[str, Any], name: str) -> Any:
        """Process a text of a record."""
        text = need(record, name)
        if not isinstance(text, str):
            raise DataError(f"the field {name!r} is {text!r}; a text is expected.")
        return self.text_processor(text)

    # -- batches

    def collater(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Make a batch: tensors stacked, all else as lists; samples that are None are left out.

        Raises:
            DataError: nothing is left, or samples differ in their keys or shapes.
        """
        kept = present(samples)
        return {key: stack(key, [need(sample, key) for sample in kept]) for key in kept[0]}


class ConcatDataset(TorchConcatDataset):
    """Several training sets after each other; they share the first one's collater."""

    def __init__(self, datasets: Iterable[Dataset]) -> None:
        super().__init__(datasets)

    @property
    def num_broken(self) -> int:
        """The number of broken samples of all parts that count them."""
        return sum(part.num_broken for part in self.datasets if isinstance(part, BaseDataset))

    def collater(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Make a batch of the keys that all samples have.

        Raises:
            DataError: no sample, or no key that all have.
        """
        kept = present(samples)
        shared = [key for key in kept[0] if all(key in sample for sample in kept)]
        if not shared:
            raise DataError("The datasets that are trained together have no key in common in their samples.")
        first: Any = self.datasets[0]
        return first.collater([{key: sample[key] for key in shared} for sample in kept])


def this_reader() -> tuple[int, int]:
    """Give which reader of a stream this is, and how many there are: every worker of every process is one."""
    worker = get_worker_info()
    num_workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
    return dist.rank() * num_workers + worker_id, dist.world_size() * num_workers


def present(samples: Sequence[Any]) -> list[Any]:
    """Give the samples that are not None.

    Raises:
        DataError: all are.
    """
    kept = [sample for sample in samples if sample is not None]
    if not kept:
        raise DataError(f"None of the {len(samples)} samples of a batch could be read; look at the warnings above.")
    return kept


def stack(key: str, values: list[Any]) -> Any:
    """Stack tensors, give anything else as it is.

    Raises:
        DataError: tensors of different shapes.
    """
    if not isinstance(values[0], torch.Tensor):
        return values
    shapes = {tuple(value.shape) for value in values}
    if len(shapes) > 1:
        raise DataError(
            f"The samples of a batch have {key!r} of different shapes, {' and '.join(map(str, sorted(shapes)))}: name "
            "a processor that brings them to one size."
        )
    return torch.stack(values)
