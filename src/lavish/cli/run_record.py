"""The file beside an output that says what run writes it: `answers.jsonl.run.json`.

It holds the model and the options, so that a run is not gone on with by another set, and it is locked for as long as a
process writes the output, so that no two do. The lock is the system's own: it ends with the process, however that ends.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lavish.common.errors import DataError

SUFFIX = ".run.json"
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_LOCKED_BYTE = 2**30
"""Windows locks bytes against reading too: one far behind the text, which others may then still read."""


class RunRecord:
    """The record of one output; `take` before the output is touched, `release` at the end."""

    def __init__(self, output: Path):
        self.output, self.path = output, output.with_name(output.name + SUFFIX)
        self.is_locked = False
        self._handle: int | None = None

    def take(self) -> None:
        """Lock the output for this process.

        Raises:
            DataError: another process writes it (says which), or the folder cannot be written.
        """
        while True:
            try:
                handle = os.open(self.path, _FLAGS, 0o666)
            except OSError as error:
                raise DataError(f"{self.output}: cannot be written ({error.strerror or error}).") from error
            try:
                self.is_locked = _lock(handle)
            except BlockingIOError as error:
                os.close(handle)
                raise DataError(
                    f"{self.output}: {self._holder()} is writing it. Wait for its end, or give another --output."
                ) from error
            if os.path.exists(self.path) and os.path.samestat(os.fstat(handle), os.stat(self.path)):
                self._handle = handle
                return
            os.close(handle)  # removed by its last holder between the opening and the locking: a new one is made

    def read(self) -> dict[str, Any] | None:
        """Give the settings of the run that began the output; None where nothing is recorded.

        Raises:
            DataError: the file is no record.
        """
        text = self.path.read_bytes()
        try:
            settings = json.loads(text)["settings"] if text.strip() else None
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise DataError(f"{self.path}: no record of a run of `lavish predict`; remove it to go on.") from error
        if settings is not None and not isinstance(settings, dict):
            raise DataError(f"{self.path}: no record of a run of `lavish predict`; remove it to go on.")
        return settings

    def is_damaged(self) -> bool:
        """Tell whether `read` would raise."""
        try:
            self.read()
        except DataError:
            return True
        return False

    def write(self, settings: Mapping[str, Any] | None) -> None:
        """Record the run and this process.

        Raises:
            DataError: the file cannot be written.
        """
        if self._handle is None:
            raise RuntimeError("the record was not taken")
        started = datetime.now().isoformat(sep=" ", timespec="seconds")
        held = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        record = json.dumps({"settings": settings, "process": held}, indent=2) + "\n"
        try:
            os.lseek(self._handle, 0, os.SEEK_SET)
            os.ftruncate(self._handle, os.write(self._handle, record.encode("ascii")))
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror or error}).") from error

    def release(self, *, remove: bool = False) -> None:
        """Let others write the output; `remove` takes the record away, as is done where nothing was recorded."""
        if self._handle is None:
            return
        remove = remove or os.fstat(self._handle).st_size == 0
        if remove and os.name != "nt":  # Windows removes no open file; there an empty record stays
            self.path.unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = None

    def _holder(self) -> str:
        try:
            held = json.loads(self.path.read_bytes())["process"]
            return f"process {held['pid']} on {held['host']}, started {held['started']},"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"


def difference(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Name the first setting that differs and both values; empty where none does."""
    for name in dict.fromkeys([*asked, *recorded]):
        if recorded.get(name) != asked.get(name):
            return f"{name} is {_value(recorded.get(name))} in it, and {_value(asked.get(name))} was asked"
    return ""


def _value(value: Any) -> str:
    return "the default" if value is None else json.dumps(value, ensure_ascii=False)


def _lock(handle: int) -> bool:
    """Lock an open file; False where its file system has no locks.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise BlockingIOError(*error.args) from error
    return True
