"""Pictures with texts as an endless stream of tar shards: LAION.

Source: salesforce/LAVIS, lavis/datasets/datasets/laion_dataset.py, which needs the package webdataset; here the shards
are read by `tar_shards`. Every process and worker takes shards of its own; a damaged shard or sample is told, counted
and passed over.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset

from lavish.common.errors import DataError
from lavish.common.media import open_image
from lavish.datasets.datasets.base_dataset import BROKEN, MAX_WARNINGS, BaseDataset, this_reader
from lavish.datasets.datasets.shuffle_buffer import drawn
from lavish.datasets.datasets.tar_shards import PICTURES, expand, read_shard
from lavish.processors.base_processor import BaseProcessor

logger = logging.getLogger(__name__)

SHUFFLED = 1000
"""Samples among which one is drawn."""


class LaionDataset(IterableDataset):
    """Samples `image`, `text_input` without an end; the text is of `<name>.json` (`caption`) or `<name>.txt`."""

    def __init__(
        self,
        vis_processor: Any = None,
        text_processor: Any = None,
        location: str | Sequence[str] = (),
        shuffled: int = SHUFFLED,
        seed: int = 0,
        is_endless: bool = True,
    ) -> None:
        """`location` are paths of shards, which may hold a range `{00000..01743}`.

        Raises:
            DataError: none.
        """
        self.vis_processor = BaseProcessor() if vis_processor is None else vis_processor
        self.text_processor = BaseProcessor() if text_processor is None else text_processor
        locations = [location] if isinstance(location, str) else location
        self.shards = [shard for one in locations for shard in expand(one)]
        if not self.shards:
            raise DataError("LaionDataset needs a location: a path of tar shards, such as laion/{00000..01743}.tar.")
        self.shuffled, self.seed, self.is_endless = shuffled, seed, is_endless
        self.num_broken = 0

    @property
    def inner_dataset(self) -> LaionDataset:
        """LAVIS's name for the stream."""
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Give samples in an order that the seed decides, another one each pass."""
        reader, readers = this_reader()
        epoch, given = 0, 0
        while True:
            draw = random.Random(f"{self.seed}-{epoch}")
            order = draw.sample(self.shards, len(self.shards))
            before = given
            # With fewer shards than readers all read all, each in an order of its own.
            own = order[reader::readers] if len(order) >= readers else draw.sample(order, len(order))
            for sample in drawn(self._samples(own), self.shuffled, random.Random(f"{self.seed}-{epoch}-{reader}")):
                given += 1
                yield sample
            if not self.is_endless:
                return
            if given == before:
                raise DataError(f"None of the {len(own)} shards has a sample that can be read, first {own[0]}.")
            epoch += 1

    def rows(self, reader: int, readers: int, seed: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Give the rows of one reader for one pass, for a runner that draws and resumes by itself: whole shards, where
        there are enough of them, else every so many rows."""
        order = random.Random(seed).sample(self.shards, len(self.shards))
        if len(order) >= readers:
            return self._rows(order[reader::readers])
        return itertools.islice(self._rows(order), reader, None, readers)

    def _rows(self, shards: Sequence[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
        for shard in shards:
            try:
                for record in read_shard(shard):
                    yield f"{shard}, sample {record['__key__'].decode('utf-8', 'replace')!r}", record
            except DataError as error:
                self._note_broken(shard, error)

    def sample(self, row: tuple[str, dict[str, bytes]]) -> dict[str, Any]:
        """Make the sample of a row.

        Raises:
            DataError, MediaError: it has no picture or text that can be read.
        """
        return self._sample(row[1])

    def note_broken(self, row: tuple[str, dict[str, bytes]], error: Exception) -> None:
        """Tell and count a row that no sample could be made of."""
        self._note_broken(row[0], error)

    def _samples(self, shards: Sequence[str]) -> Iterator[dict[str, Any]]:
        for where, record in self._rows(shards):
            try:
                yield self._sample(record)
            except BROKEN as error:
                self._note_broken(where, error)

    def _note_broken(self, where: str, error: Exception) -> None:
        self.num_broken += 1
        if self.num_broken <= MAX_WARNINGS:
            logger.warning("%s: %s It is left out (%d broken so far).", where, error, self.num_broken)

    def _sample(self, record: dict[str, bytes]) -> dict[str, Any]:
        picture = next((record[suffix] for suffix in PICTURES if suffix in record), None)
        if picture is None:
            raise DataError(f"has no picture ({', '.join(PICTURES)}); it has {', '.join(list(record)[1:])}.")
        image = open_image(io.BytesIO(picture), exif_rotation=False)
        return {"image": self.vis_processor(image), "text_input": self.text_processor(_caption(record))}

    def collater(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Make a batch: tensors stacked, texts as a list."""
        return BaseDataset.collater(self, samples)  # type: ignore[arg-type]


def _caption(record: dict[str, bytes]) -> str:
    try:
        if "json" in record:
            caption = json.loads(record["json"]).get("caption")
        else:
            caption = record["txt"].decode("utf-8") if "txt" in record else None
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"its text cannot be read ({error}).") from error
    if not isinstance(caption, str):
        raise DataError("has no caption, in .json or .txt.")
    return caption
