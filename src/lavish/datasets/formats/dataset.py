"""Data that people have as datasets: conversations for the chat families, phrases with boxes for grounding.

A sample of conversations has `messages`, `id` and `instance_id`; in a batch they are lists, and a chat processor makes
tensors of `messages` with `apply_chat_template(..., return_labels=True, padding_side="right")`.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from lavish.common.errors import DataError, shown
from lavish.common.media import open_image
from lavish.datasets.datasets.annotations import Fault
from lavish.datasets.datasets.base_dataset import BROKEN, MAX_WARNINGS, BaseDataset, this_reader
from lavish.datasets.formats.checking import problem_of
from lavish.datasets.formats.opening import Source, open_data
from lavish.datasets.formats.records import box_of, expression_of, media_of
from lavish.datasets.formats.samples import Pictures
from lavish.datasets.formats.tables import ParquetStream, ShardStream

logger = logging.getLogger(__name__)

PARTED = (ShardStream, ParquetStream)
"""Streams that are shared out in parts."""


class ConversationDataset(BaseDataset):
    """Rows of files in any format of `opening.FORMATS`; processors are those of the model, not of the dataset."""

    def __init__(
        self,
        vis_processor: Any = None,
        text_processor: Any = None,
        vis_root: str | Path | None = None,
        ann_paths: Sequence[str | Path] = (),
        format: str | None = None,
        prompt: str | None = None,
    ) -> None:
        """`ann_paths` are files or folders, `format` and `prompt` as in `open_data`.

        Raises:
            DataError: a file of no known form, or a stream (see `ConversationStream`).
        """
        super().__init__(vis_processor, text_processor, vis_root)
        self.opened = [open_data(path, format, images=vis_root, prompt=prompt) for path in ann_paths]
        for source in self.opened:
            if source.is_stream:
                raise DataError(f"{source.path}: is a stream; set build_info.streaming: true.")
        self.ends = list(itertools.accumulate(len(source) for source in self.opened))
        self._broken = torch.zeros(max(1, len(self)), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return self.ends[-1] if self.opened else 0

    def _row(self, index: int) -> tuple[Source, str, Any]:
        at = bisect.bisect_right(self.ends, index)
        rows: Any = self.opened[at].rows
        return self.opened[at], *rows[index - (self.ends[at - 1] if at else 0)]

    def where(self, index: int) -> str:
        """Say which row of which file a sample is."""
        return self._row(index % len(self))[1]

    def sample(self, index: int) -> dict[str, Any]:
        """Give one conversation.

        Raises:
            DataError: the row is wrong.
            MediaError: a picture cannot be read. Videos are read later, by the processor.
        """
        return {**with_pictures(self.unopened(index)), "instance_id": str(index)}

    def unopened(self, index: int) -> dict[str, Any]:
        """Give a conversation whose pictures are not opened, as lengths are measured on.

        Raises:
            DataError: the row is wrong.
        """
        source, where, row = self._row(index)
        return checked(source.sample(where, row))


class ConversationStream(IterableDataset):
    """Rows of tar shards or streamed tables; every process and worker takes rows of its own, once a pass."""

    def __init__(
        self,
        vis_processor: Any = None,
        text_processor: Any = None,
        vis_root: str | Path | None = None,
        ann_paths: Sequence[str | Path] = (),
        format: str | None = None,
        prompt: str | None = None,
    ) -> None:
        self.opened = [open_data(path, format, images=vis_root, prompt=prompt, streaming=True) for path in ann_paths]
        self.num_broken = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Give the samples in the order of the files; what is wrong is told, counted and passed over."""
        reader, readers = this_reader()
        for source in self.opened:
            for where, row in _share(source.rows, reader, readers):
                try:
                    yield self.sample((source, where, row))
                except BROKEN as error:
                    self.note_broken((source, where, row), error)

    def rows(self, reader: int, readers: int, seed: str) -> Iterator[tuple[Source, str, Any]]:
        """Give the rows of one reader for one pass: whole shards (of parquet groups of rows), where there are enough of
        them, else every so many rows. The seed decides the order of the shards, the same in all readers."""
        parts: list[tuple[Source, Any]] = []
        for source in self.opened:
            whole: Any = source.rows
            parts += [(source, part) for part in (whole.parts() if isinstance(whole, PARTED) else [whole])]
        random.Random(seed).shuffle(parts)
        if len(parts) >= readers:
            return self._rows(parts[reader::readers])
        return itertools.islice(self._rows(parts), reader, None, readers)

    def _rows(self, parts: Sequence[tuple[Source, Any]]) -> Iterator[tuple[Source, str, Any]]:
        for source, rows in parts:
            try:
                for where, row in rows:
                    yield source, where, row
            except DataError as error:  # a shard that is cut off
                self.note_broken((source, source.path, None), error)

    def sample(self, row: tuple[Source, str, Any]) -> dict[str, Any]:
        """Make the sample of a row.

        Raises:
            DataError, MediaError: the row is wrong.
        """
        source, where, content = row
        return {**with_pictures(checked(source.sample(where, content))), "instance_id": where}

    def note_broken(self, row: tuple[Source, str, Any], error: Exception) -> None:
        """Tell and count a row that no sample could be made of."""
        self.num_broken += 1
        if self.num_broken <= MAX_WARNINGS:
            logger.warning("%s: %s It is left out (%d broken so far).", row[1], error, self.num_broken)

    def collater(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Make a batch of lists."""
        return {key: [sample[key] for sample in samples] for key in samples[0]}


def with_pictures(sample: dict[str, Any]) -> dict[str, Any]:
    """Open the pictures of a conversation.

    Trap: left to the processor, one that cannot be read would end the run, whatever `max_broken` allows.

    Raises:
        MediaError: one cannot be read.
    """
    messages = [
        message if isinstance(message["content"], str) else {**message, "content": [*map(_opened, message["content"])]}
        for message in sample["messages"]
    ]
    return {**sample, "messages": messages}


def _opened(part: Any) -> Any:
    is_picture = isinstance(part, Mapping) and part.get("type") == "image" and "image" in part
    return {**part, "image": open_image(part["image"])} if is_picture else part


class ReferringDataset(BaseDataset):
    """RefCOCO in rows or as MDETR writes it: `image`, `text_input` (the phrase), `ref_id`, `instance_id`.

    Records have `bbox` or `box` and `width` and `height`, in pixels, by which the task `grounding` scores.
    """

    def __init__(
        self,
        vis_processor: Any = None,
        text_processor: Any = None,
        vis_root: str | Path | None = None,
        ann_paths: Sequence[str | Path] = (),
    ) -> None:
        super().__init__(vis_processor, text_processor, vis_root)
        self.pictures: list[Pictures] = []
        for path in ann_paths:
            source = open_data(path, images=vis_root)
            if source.format not in ("refcoco", "coco_refcoco"):
                raise DataError(f"{path}: holds {source.format}, no phrases with boxes.")
            records = [_referring(where, row) for where, row in source.rows]
            self.add_annotation(path, records)
            self.pictures += [source.convert.pictures] * len(records)
        self._add_instance_ids()

    def sample(self, index: int) -> dict[str, Any]:
        """Give one phrase with its picture."""
        record = self.annotation[index]
        (kind, source), *more = media_of(record, self.pictures[index]) or [("", None)]
        if kind != "image" or more:
            raise DataError(f"names {len(more) + bool(kind)} files; a phrase belongs to one picture.")
        return {
            "image": self.vis_processor(open_image(source, exif_rotation=False)),
            "text_input": self.text_processor(expression_of(record)),
            "ref_id": record.get("ref_id", record.get("id", index)),
            "instance_id": record["instance_id"],
        }


def _referring(where: str, row: Any) -> dict[str, Any]:
    """Give a row whose phrase and box are whole: a wrong one would be scored as a miss."""
    try:
        if isinstance(row, Fault) or not isinstance(row, dict):
            raise DataError(row if isinstance(row, Fault) else f"{shown(row)} where an object is expected.")
        expression_of(row)
        box_of(row)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return dict(row)


def checked(sample: dict[str, Any]) -> dict[str, Any]:
    """Give the sample back.

    Raises:
        DataError: speakers out of order, or nothing to learn.
    """
    problem = problem_of(sample)
    if problem is not None:
        raise DataError(problem)
    return {name: sample[name] for name in ("messages", "id")}


def _share(rows: Any, reader: int, readers: int) -> Iterator[tuple[str, Any]]:
    """Give the rows of one reader: whole shards where there are enough of them, else every so many rows."""
    parts = rows.parts() if isinstance(rows, PARTED) else []
    if len(parts) >= readers:
        return itertools.chain.from_iterable(parts[reader::readers])
    return itertools.islice(iter(rows), reader, None, readers)
