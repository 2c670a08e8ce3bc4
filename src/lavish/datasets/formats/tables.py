"""Tables and shards: Hugging Face datasets (parquet, or a folder of `save_to_disk`) and webdataset tar files.

The package `datasets` (extra `data`) is imported on use; tar shards need nothing. Pictures stay encoded until a
processor opens them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from lavish.common.errors import DataError, MissingDependency
from lavish.datasets.datasets.annotations import Fault
from lavish.datasets.datasets.tar_shards import PICTURES, TEXTS, expand, read_shard

_FAULTS = (OSError, ValueError, TypeError, LookupError, NotImplementedError)
"""What pyarrow's errors refine, and what comes of text that is no UTF-8."""
ROWS_AT_ONCE = 256
"""Rows of a parquet file in memory."""


class TableRows(Sequence[tuple[str, Any]]):
    """Rows of a Hugging Face dataset, by number; a picture is `{"bytes", "path"}`, a row that is damaged a `Fault`."""

    def __init__(self, table: Any, name: str) -> None:
        self.table, self.name = table, name

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> tuple[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, Any]]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        try:
            row = self.table[index]
        except _FAULTS as error:
            row = Fault(f"cannot be read ({error}).")
        return f"{self.name}, row {index % len(self) + 1}", row


class TableStream:
    """The same rows one after the other, without the table in memory."""

    def __init__(self, table: Any, name: str) -> None:
        self.table, self.name = table, name

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        rows, at = iter(self.table), 0
        while True:
            at += 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except _FAULTS as error:  # the stream ends with it
                raise DataError(f"{self.name}: cannot be read from row {at} on ({error}).") from error
            yield f"{self.name}, row {at}", row


class ParquetStream:
    """Rows of parquet files without a table in memory, one group of rows after the other.

    Trap: a streamed data set of the package `datasets` shares itself out among the workers of a torch loader, behind
    the back of whoever has shared it out already; so the files are read as they are.

    Args:
        groups: (file, number of a group of rows, rows of the file before it).
        name: of the data.
    """

    def __init__(self, groups: Sequence[tuple[str, int, int]], name: str) -> None:
        self.groups, self.name = list(groups), name

    def parts(self) -> list[ParquetStream]:
        """Give the same rows in parts."""
        return [ParquetStream([group], self.name) for group in self.groups]

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        from pyarrow.parquet import ParquetFile  # pyright: ignore[reportMissingImports] - comes with the extra

        for file, group, before in self.groups:
            place, at = Path(file).name, before
            try:
                for batch in ParquetFile(file).iter_batches(ROWS_AT_ONCE, row_groups=[group]):
                    for row in batch.to_pylist():
                        at += 1
                        yield f"{place}, row {at}", row
            except _FAULTS as error:
                raise DataError(f"{place}: cannot be read from row {at + 1} on ({error}).") from error


class ShardStream:
    """Samples of tar shards as rows: the JSON of a sample with its pictures, or its text as the caption."""

    def __init__(self, shards: Sequence[str]) -> None:
        self.shards = list(shards)

    def parts(self) -> list[ShardStream]:
        """Give the same rows in parts: the shards."""
        return [ShardStream([shard]) for shard in self.shards]

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for shard in self.shards:
            for sample in read_shard(shard):
                key = sample.pop("__key__").decode("utf-8", "replace")
                yield f"{Path(shard).name}, sample {key!r}", {"__key__": key, "__files__": sample}


def shard_record(row: dict[str, Any]) -> dict[str, Any]:
    """Give the record of one sample of a shard: pictures as bytes under `image` or `images`.

    Raises:
        DataError: no text, or one that is no JSON.
    """
    files: dict[str, bytes] = row["__files__"]
    record: dict[str, Any] = {"id": row["__key__"]}
    text = next((suffix for suffix in TEXTS if suffix in files), None)
    if text is None:
        raise DataError(f"has no text ({', '.join(TEXTS)}); it has {', '.join(files)}.")
    try:
        said = files[text].decode("utf-8")
        loaded = json.loads(said) if text == "json" else {"caption": said.strip()}
    except (ValueError, RecursionError) as error:
        raise DataError(f"its .{text} cannot be read: {error}.") from error
    if not isinstance(loaded, dict):
        raise DataError(f"its .json holds {type(loaded).__name__}; an object is expected.")
    pictures = [content for suffix, content in files.items() if suffix.rpartition(".")[2] in PICTURES]
    record |= {name: value for name, value in loaded.items() if name not in ("image", "images") or not pictures}
    if pictures:
        record["image"] = pictures[0] if len(pictures) == 1 else pictures
    return record


def open_shards(path: str) -> ShardStream:
    """Open `a.tar`, `{000..012}.tar`, or a folder of shards.

    Raises:
        DataError: none of them is here.
    """
    place = Path(path)
    shards = sorted(map(str, place.glob("*.tar"))) if place.is_dir() else expand(path)
    if not shards:
        raise DataError(f"{path}: the folder holds no shard (.tar).")
    absent = [shard for shard in shards if not Path(shard).is_file()]
    if absent:
        raise DataError(f"{absent[0]}: no such shard ({len(absent)} of {len(shards)} are missing).")
    return ShardStream(shards)


def open_table(path: Path, *, streaming: bool = False) -> TableRows | TableStream | ParquetStream:
    """Open a parquet file, a folder of them, or a folder that `save_to_disk` wrote.

    Raises:
        MissingDependency: the package `datasets` is not installed.
        DataError: nothing that it can read, or several splits and none called train.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports] - an extra

        # A folder called datasets, of whoever runs this, is no such package.
        import datasets.features  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependency(
            f"{path}: Hugging Face data sets need the package datasets; pip install 'lavish[data]'."
        ) from error
    datasets.disable_progress_bars()
    is_saved = path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file())
    files = sorted(map(str, path.glob("*.parquet"))) if path.is_dir() else [str(path)]
    try:
        if streaming and not is_saved:
            return ParquetStream(_groups(files), path.name)
        if is_saved:
            table = datasets.load_from_disk(str(path))
        else:
            table = datasets.load_dataset("parquet", data_files=files, split="train")
    except (*_FAULTS, datasets.exceptions.DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).rstrip(".")
        raise DataError(f"{path}: the package datasets cannot read it: {reason}.") from error
    if isinstance(table, dict):
        if "train" not in table and len(table) > 1:
            raise DataError(f"{path}: holds the splits {', '.join(table)}; name the folder of one.")
        table = table["train"] if "train" in table else next(iter(table.values()))
    table = undecoded(table)
    if streaming:
        return TableStream(table, path.name)
    return TableRows(table, path.name)


def _groups(files: Sequence[str]) -> list[tuple[str, int, int]]:
    from pyarrow.parquet import ParquetFile  # pyright: ignore[reportMissingImports] - comes with the extra

    found = []
    for file in files:
        described, before = ParquetFile(file).metadata, 0
        for group in range(described.num_row_groups):
            found.append((file, group, before))
            before += described.row_group(group).num_rows
    return found


def undecoded(table: Any) -> Any:
    """Keep pictures as they are encoded: they are opened by lavish's own limits, once."""
    import datasets  # pyright: ignore[reportMissingImports] - an extra

    def plain(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, datasets.List):
            return datasets.List(plain(feature.feature))
        return feature

    for name, feature in dict(table.features or {}).items():
        changed = plain(feature)
        if changed is not feature:
            table = table.cast_column(name, changed)
    return table
