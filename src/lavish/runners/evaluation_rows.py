"""`results.jsonl` of an evaluation: one line a sample, written as it is answered, so that a killed run goes on.

While a run goes on each process appends to a file of its own; at its end the main one puts all together, in the order
of the data set. A line: {"dataset", "split", "index", "result", ...}, where `index` is the sample's place in its data
set and `result` what the task gave; or "indices" and "results" where a task gives more or fewer results than samples.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lavish.common.errors import ConfigError, DataError

try:
    import fcntl
except ImportError:  # Windows has none; there nothing keeps two runs out of one folder
    fcntl = None

logger = logging.getLogger(__name__)

RESULTS_FILE, LOCK_FILE = "results.jsonl", ".lock"
PART = "results.part-*.jsonl"
NO_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)
"""What file systems without locks answer; there nothing keeps two runs out of one folder."""
LINE_ENDS = {ord(mark): json.dumps(mark)[1:-1] for mark in "\x85\u2028\u2029"}
"""Marks that end a line for some readers and not in JSON lines: escaped, as JSON can."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HALVES = "backslashreplace"
"""How half a character, as annotations may hold it, is written: as JSON escapes it."""
Row = dict[str, Any]
Key = tuple[str, str, int]


class Rows:
    """Reads and writes the results in a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / RESULTS_FILE

    def read(self) -> list[Row]:
        """Give the rows that are there, whole or from a run that was killed; each sample once.

        Raises:
            DataError: a damaged line that is not the torn end of a file.
        """
        taken: set[Key] = set()
        kept = []
        for path in (self.path, *sorted(self.folder.glob(PART))):
            for row in _lines(path):
                keys = keys_of(row)
                if not taken & keys:
                    kept.append(row)
                    taken |= keys
        return kept

    def part(self, rank: int) -> Path:
        """Give the file that a process appends to: a new one, so that the torn end of an old one stays the end."""
        return self.folder / f"results.part-{rank:05d}-{secrets.token_hex(4)}.jsonl"

    def write(self, rows: Sequence[Row]) -> None:
        """Write all rows, whole or not at all, and remove the parts."""
        partial = self.path.with_name(f"{RESULTS_FILE}.partial")
        with partial.open("w", encoding="utf-8", errors=HALVES) as file:
            file.writelines(line_of(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)
        for part in self.folder.glob(PART):
            part.unlink()

    def clear(self) -> None:
        """Forget everything."""
        for path in (self.path, *self.folder.glob(PART)):
            path.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder; the system takes the lock from a process that ends, however it ends.

        Raises:
            ConfigError: another run is in, or the folder cannot be made or written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / LOCK_FILE).open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: this folder cannot be written ({error.strerror or error}); set another run.output_dir."
            ) from error
        with lock as file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"{self.folder}: another run is writing here. Wait for it, or set another run.output_dir."
                ) from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            yield


@contextmanager
def in_room(folder: Path) -> Iterator[None]:
    """Say in words that a disk is full.

    Raises:
        DataError: it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(folder).free / 2**20
        raise DataError(
            f"{folder}: no room left ({free:,.1f} MiB are free). What is answered stays; make room, and the same "
            "command goes on from there."
        ) from error


def rows_of(dataset: str, split: str, indices: Sequence[int], results: Sequence[Any]) -> list[Row]:
    """Give the rows of one batch."""
    where = {"dataset": dataset, "split": split}
    if len(results) != len(indices):
        return [{**where, "indices": list(indices), "results": list(results)}]
    return [{**where, "index": index, "result": result} for index, result in zip(indices, results, strict=True)]


def results_of(rows: Sequence[Row]) -> list[Any]:
    """Give the results of rows, in their order."""
    return [result for row in rows for result in (row["results"] if "results" in row else [row["result"]])]


def keys_of(row: Row) -> set[Key]:
    """Say which samples a row answers."""
    indices = row["indices"] if "indices" in row else [row["index"]]
    return {(row["dataset"], row["split"], index) for index in indices}


def line_of(row: Row) -> str:
    """Give a row as a line of JSON.

    Raises:
        DataError: a result that is no plain value.
    """
    try:
        return json.dumps(row, ensure_ascii=False).translate(LINE_ENDS) + "\n"
    except TypeError as error:
        raise DataError(f"A task's results are plain values (texts, numbers, lists, dicts); {error}.") from error


def _lines(path: Path) -> Iterator[Row]:
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            keys_of(row)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # no line break behind it: the process was killed while it wrote
                logger.warning("%s ends in a torn line; that sample is asked again.", path)
                return
            raise DataError(f"{path}, row {number}: damaged ({error}); delete the file to start anew.") from error
        yield row
