"""Annotation files: JSON, JSON lines, CSV and TSV as lists of records; what is wrong is told with file and row.

Source of the rules: salesforce/LAVIS, lavis/datasets/datasets/base_dataset.py. A JSON object is a table whose keys
become `sample_id`. torch is not imported.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavish.common.errors import DataError, did_you_mean, shown

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")


def read_annotations(path: str | Path) -> list[dict[str, Any]]:
    """Give the records of one file, by its suffix; any other suffix is read as JSON.

    Raises:
        DataError: the file is absent, empty, damaged, or holds something else than records; says which row.
    """
    path = Path(path)
    text = read_text(path)
    if path.suffix == ".jsonl":
        return [_record(row, path, at) for at, row in json_lines(text, path)]
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
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}.") from error
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
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: no JSON: {error}.") from error


def json_lines(text: str, path: Path) -> list[tuple[int, Any]]:
    """Give the number of each line that is not blank, from 1, and the JSON value on it.

    Raises:
        DataError: a line that is no JSON.
    """
    values = []
    for at, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                values.append((at, json.loads(line)))
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{path}, row {at}: no JSON ({error}); one object a line is expected.") from error
    return values


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
        raise DataError(f"{path}, row {at}: {shown(row)} where an object is expected.")
    return row


def _table(text: str, path: Path) -> list[dict[str, Any]]:
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True
    )
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}, row {reader.line_num}: has another number of columns than the head, "
                    f"{', '.join(reader.fieldnames or ())}."
                )
            rows.append(dict(row))
    except csv.Error as error:
        raise DataError(f"{path}, row {reader.reader.line_num}: {error}.") from error
    return rows
