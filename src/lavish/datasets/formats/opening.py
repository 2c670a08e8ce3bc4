"""Open data in any of the known forms: which form it is, its rows, and how a row becomes a sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavish.common.errors import ConfigError, DataError, did_you_mean, shown
from lavish.common.registry import registry
from lavish.datasets.datasets.annotations import (
    Fault,
    json_lines,
    local_path,
    read_annotations,
    read_json,
    read_text,
)
from lavish.datasets.formats import coco, folders, records, tables
from lavish.datasets.formats.samples import Options, Pictures, Sample

ROW_KINDS = tuple(records.KINDS)
FORMATS: dict[str, str] = {
    **{name: f"JSON, JSON lines, CSV or TSV: {kind.fields}" for name, kind in records.KINDS.items()},
    **{name: f"JSON: {what}" for name, (what, _, _) in coco.READERS.items()},
    **{name: f"folder: {what}" for name, (what, _) in folders.READERS.items()},
    "hf": "parquet, or a folder of `datasets`: columns as the rows above (extra `data`)",
    "webdataset": "tar shards (`{000..012}.tar`, a folder): `.jpg` or `.png` with `.json` as the rows above, or `.txt`",
}
"""Every format by name, in words."""


@dataclass(frozen=True)
class Source:
    """Data that were opened: rows that can be gone through again and again, and what makes samples of them."""

    path: str
    format: str
    rows: Iterable[tuple[str, Any]]
    """(where a row is, the row or its `Fault`); a sequence, unless the data are a stream."""
    convert: Converter
    """row -> sample, `id` included where the row has one."""

    @property
    def is_stream(self) -> bool:
        """True if the rows have no number: tar shards, streamed tables."""
        return not isinstance(self.rows, Sequence)

    def __len__(self) -> int:
        if not isinstance(self.rows, Sequence):
            raise TypeError(f"{self.path} is a stream and has no length.")
        return len(self.rows)

    def sample(self, where: str, row: Any) -> Sample:
        """Give the sample of a row; one without an id takes its place as one.

        Raises:
            DataError: the row is wrong; the message does not say which it is.
        """
        made = self.convert(row)
        given = made.pop("id", None)
        return {"id": where if given is None else str(given), **made}

    def samples(self) -> Iterator[tuple[str, Sample | DataError]]:
        """Give where each row is, and its sample or what is wrong with it."""
        for where, row in self.rows:
            try:
                yield where, self.sample(where, row)
            except DataError as error:
                yield where, error


def open_data(
    path: str | Path,
    format: str | None = None,
    *,
    images: str | Path | None = None,
    prompt: str | None = None,
    streaming: bool = False,
) -> Source:
    """Open a file, folder or range of shards.

    Args:
        path: what it is called; `shards/{000..012}.tar` is a range.
        format: a name of `FORMATS`; None: what the data look like.
        images: folder of the pictures; None: beside the file, or in a folder `images` there.
        prompt: what the user says where the data have no question; with `{question}` or `{expr}` around those of VQA
            and RefCOCO.
        streaming: go through parquet without a table in memory.

    Raises:
        ConfigError: an unknown format, or a path that can be none.
        DataError: nothing there, empty, damaged, not to be read, or of no known form; says which.
        MissingDependency: parquet without the package `datasets`.
    """
    try:
        source = _open(path, format, images, prompt, streaming)
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be opened ({error.strerror or error}).") from error
    if not source.is_stream and not len(source):
        raise DataError(f"{path}: holds no rows.")
    return source


def _open(
    path: str | Path, format: str | None, images: str | Path | None, prompt: str | None, streaming: bool
) -> Source:
    if format is not None and format not in FORMATS:
        raise ConfigError(
            f"format {shown(format)} is unknown.{did_you_mean(str(format), FORMATS)} Known: {', '.join(FORMATS)}."
        )
    options = Options(None if images is None else local_path(images, "images"), prompt)
    if options.images is not None and not options.images.is_dir():
        raise DataError(f"{options.images}: no such folder of pictures.")
    name, place = str(path), local_path(path, "path")
    if format == "webdataset" or (place.suffix == ".tar" and not place.is_dir()):
        return _shards(str(place), format, options)
    if place.is_dir():
        return _folder(place, format, options, streaming)
    if not place.is_file():
        raise DataError(f"{name}: no such file or folder.{_nearest(name, place)}")
    if format == "hf" or place.suffix == ".parquet":
        return _table(place, format, options, streaming)
    if place.suffix == ".p":
        raise DataError(f"{name}: a pickle is not read, it would run what it says; give rows: {FORMATS['refcoco']}.")
    return _file(place, format, options)


# -- what it is


def _nearest(name: str, place: Path) -> str:
    """Say what may have been meant by a name that is no file."""
    if name in registry.list_datasets():
        return f" {name!r} is a data set by name; `lavish data list` shows those, and what of them is here."
    return did_you_mean(place.name, (path.name for path in place.parent.glob("*")))


def _file(path: Path, format: str | None, options: Options) -> Source:
    text = read_text(path)
    if path.suffix == ".jsonl":
        rows: coco.Rows = [(f"{path.name}, row {at}", row) for at, row in json_lines(text)]
    elif path.suffix in (".csv", ".tsv"):
        rows = [(f"{path.name}, row {at}", _of_cells(row)) for at, row in enumerate(read_annotations(path), start=2)]
    else:
        loaded = read_json(path, text)
        if isinstance(loaded, Mapping) and (whole := format or coco.kind_of(loaded)) in coco.READERS:
            _, read, kind = coco.READERS[whole]
            pictures = Pictures.beside(path.parent, options, "train2014", "val2014", "train2017", "val2017", "test2015")
            return _of_records(path, whole, read(loaded, path), kind, pictures, options)
        rows = _listed(loaded, path)
    if not rows:
        raise DataError(f"{path}: holds no rows.")
    kind = _row_kind(path, format) or _kind_of_rows(rows, str(path))
    return _of_records(path, kind, rows, kind, Pictures.beside(path.parent, options), options)


def _of_cells(row: dict[str, str]) -> dict[str, Any]:
    """Read the cells of a table that hold a list or an object as JSON, and the size of a picture as numbers."""
    return {name: _cell(name, text) for name, text in row.items()}


def _cell(name: str, text: str) -> Any:
    if name in ("width", "height") and text.isdecimal() and len(text) < 10:
        return int(text)
    if text[:1] + text[-1:] not in ("[]", "{}"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _row_kind(path: Path | str, format: str | None, own: str | None = None) -> str | None:
    """Give the kind of rows that a format names; None where each row says, as in the format `own`.

    Raises:
        DataError: it names no rows.
    """
    if format is not None and format != own and format not in records.KINDS:
        raise DataError(f"{path}: is no {format}, which is {FORMATS[format]}.")
    return None if format == own else format


def _listed(loaded: Any, path: Path) -> coco.Rows:
    if isinstance(loaded, Mapping):
        if isinstance(loaded.get("data"), list):
            loaded = loaded["data"]
        elif loaded and all(isinstance(row, Mapping) for row in loaded.values()):
            return [(f"{path.name}, {key!r}", {"id": key, **row}) for key, row in loaded.items()]
    if not isinstance(loaded, list):
        raise DataError(f"{path}: holds {shown(loaded)}; a list of rows is expected. {_known()}")
    return [(f"{path.name}, row {at}", row) for at, row in enumerate(loaded, start=1)]


def _kind_of_rows(rows: Sequence[tuple[str, Any]], path: str) -> str:
    """Name the kind of the first row that has one: later rows that differ are told one by one."""
    for _, value in rows[:100]:
        row = records.as_row(value)
        if isinstance(row, Mapping) and (kind := records.kind_of(row)) is not None:
            return kind
    where, first = rows[0]
    if isinstance(first, Fault):
        raise DataError(f"{path}, {where.rpartition(', ')[2]}: {first}")
    found = ", ".join(map(str, first)) if isinstance(first, Mapping) else shown(first)
    raise DataError(f"{path}: its rows ({found}) are of no form that lavish knows. {_known()}")


def _known() -> str:
    return f"Known: {', '.join(FORMATS)}; name one with format= (--format)."


def _of_records(
    path: Path, format: str, rows: Iterable[tuple[str, Any]], kind: str, pictures: Pictures, options: Options
) -> Source:
    return Source(str(path), format, rows, Converter(kind, pictures, options))


@dataclass(frozen=True)
class Converter:
    """Make a sample of a row; a class, so that worker processes can get it."""

    kind: str | None
    """Of `records.KINDS`; None: each row says."""
    pictures: Pictures
    options: Options
    before: Callable[[Any], Any] | None = None
    """What makes a row of what the file has."""

    def __call__(self, row: Any) -> Sample:
        if isinstance(row, Fault):
            raise DataError(row)
        record = records.as_row(row if self.before is None else self.before(row))
        if not isinstance(record, Mapping):
            raise DataError(f"{shown(record)} where an object is expected.")
        kind = self.kind or records.kind_of(record)
        if kind is None:
            raise DataError(f"its fields ({', '.join(map(str, record))}) are of no form that lavish knows.")
        names = ("id", "question_id", "sample_id", "ref_id")
        given = next((record[name] for name in names if record.get(name) is not None), None)
        return {"id": given, **records.KINDS[kind].convert(record, self.pictures, self.options)}


def _folder(folder: Path, format: str | None, options: Options, streaming: bool) -> Source:
    kind = folders.kind_of(folder) if format is None or format in records.KINDS else format
    if kind == "hf":
        return _table(folder, format, options, streaming)
    if kind == "webdataset":
        return _shards(str(folder), format, options)
    if kind not in folders.READERS or format in records.KINDS:
        inside = folders.data_files(folder)
        shards = " Or say --format webdataset for its shards." if folders.shards_in(folder) else ""
        hint = f" Name a file in it: {', '.join(inside[:5])}.{shards}" if inside else f" {_known()}"
        raise DataError(f"{folder}: a folder of no form that lavish knows.{hint}")
    rows = folders.READERS[kind][1](folder)
    pictures = Pictures.beside(folder, options)
    if kind == "cogvlm_sft":
        return Source(str(folder), kind, rows, Converter(None, pictures, options, folders.labelled))
    if kind == "image_map":
        return Source(str(folder), kind, rows, Converter("vqa", pictures, options, _without_place))
    prompt = folders.CAPTCHA if options.prompt is None else options.prompt
    return Source(str(folder), kind, rows, Converter("captions", pictures, Options(options.images, prompt)))


def _without_place(row: dict[str, Any]) -> dict[str, Any]:
    """Take the picture's place out of a question of VLM-learning: every family has its own."""
    question = row.get("question")
    if not isinstance(question, str):
        return row
    if question.count(folders.PLACE) != 1:
        raise DataError(f"the question has {question.count(folders.PLACE)} of {folders.PLACE}; one picture is named.")
    return {**row, "question": question.replace(folders.PLACE, "").strip()}


def _table(path: Path, format: str | None, options: Options, streaming: bool) -> Source:
    kind = _row_kind(path, format, "hf")
    rows = tables.open_table(path, streaming=streaming)
    folder = path if path.is_dir() else path.parent
    return Source(str(path), "hf", rows, Converter(kind, Pictures.beside(folder, options), options))


def _shards(path: str, format: str | None, options: Options) -> Source:
    kind, pictures = _row_kind(path, format, "webdataset"), Pictures.beside(Path(path).parent, options)
    return Source(path, "webdataset", tables.open_shards(path), Converter(kind, pictures, options, tables.shard_record))
