"""Annotation files: JSON, JSON lines, CSV and TSV as lists of records; what is wrong is told with file and row.

Source of the rules: salesforce/LAVIS, lavis/datasets/datasets/base_dataset.py. A JSON object is a table whose keys
become `sample_id`. torch is not imported.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lavish.common.errors import ConfigError, DataError, check_path, did_you_mean, shown

MAX_CELL_CHARS = 50_000_000
"""Of a table: a picture in base64 is a cell too, and Python's own limit is 131,072."""


class Fault(str):
    """What is wrong with a row, in the place of the row: the others can still be read."""


def local_path(path: str | Path, what: str) -> Path:
    """Give a path that a person named, with `~` as the home folder. `what` is its name in messages.

    Raises:
        ConfigError: it can be no path, or the home folder is nobody's.
    """
    check_path(path, what)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{what}={shown(str(path))}: no such home folder is known; write it out.") from error


def read_annotations(path: str | Path) -> list[dict[str, Any]]:
    """Give the records of one file, by its suffix; any other suffix is read as JSON.

    Raises:
        DataError: the file is absent, empty, damaged, or holds something else than records; says which row.
    """
    path = Path(path)
    records = _records(path, read_text(path))
    if not records:
        raise DataError(f"{path}: holds no rows.")
    return records


def _records(path: Path, text: str) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [_record(row, path, at) for at, row in json_lines(text)]
    if path.suffix in (".csv", ".tsv"):
        return _table(text, path)
    loaded = read_json(path, text)
    if isinstance(loaded, Mapping):
        return [
            {"sample_id": key, **value} if isinstance(value, dict) else {"sample_id": key, "data": value}
            for key, value in loaded.items()
        ]
    if not isinstance(loaded, list):
        raise DataError(f"{path}: holds {shown(loaded)}; annotations are a list of objects.")
    return [_record(row, path, at) for at, row in enumerate(loaded, start=1)]


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        DataError: absent, empty, or no UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read as text ({error}); save it as UTF-8.") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty.")
    return text


def read_json(path: str | Path, text: str | None = None) -> Any:
    """Give what a JSON file holds.

    Raises:
        DataError: absent, empty, or no JSON; says the line.
    """
    path = Path(path)
    try:
        return json.loads(read_text(path) if text is None else text)
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits is a plain ValueError
        raise DataError(f"{path}: no JSON: {error}.") from error


def json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """Give the number of each line that is not blank, from 1, and the JSON value on it, or a `Fault`."""
    # Trap: str.splitlines also cuts at U+2028, U+0085 and form feeds, which stand inside of texts.
    for at, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield at, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield at, Fault(f"no JSON ({error}); one object a line is expected.")


def need(record: Mapping[str, Any], name: str) -> Any:
    """Give a field of a record.

    Raises:
        DataError: there is none; says what there is.
    """
    if name not in record:
        fields = ", ".join(map(str, record)) or "nothing"
        raise DataError(f"the field {name!r} is missing.{did_you_mean(name, map(str, record))} There is {fields}.")
    return record[name]


def _record(row: Any, path: Path, at: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        told = row if isinstance(row, Fault) else f"{shown(row)} where an object is expected."
        raise DataError(f"{path}, row {at}: {told}")
    return row


def _table(text: str, path: Path) -> list[dict[str, Any]]:
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True
    )
    rows: list[dict[str, Any]] = []
    usual = csv.field_size_limit(MAX_CELL_CHARS)
    try:
        head = list(reader.fieldnames or ())
        if len(set(head)) < len(head):
            raise DataError(f"{path}, row 1: two columns have one name; the head is {', '.join(head)}.")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}, row {len(rows) + 2}: has another number of columns than the head, {', '.join(head)}."
                )
            rows.append(dict(row))
    except csv.Error as error:
        raise DataError(f"{path}, row {len(rows) + 2}: {error}.") from error
    finally:
        csv.field_size_limit(usual)
    return rows
