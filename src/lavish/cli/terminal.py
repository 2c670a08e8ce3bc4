"""What every command prints with: consoles, numbers for people, progress on stderr. Nothing heavy is imported."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich import progress
    from rich.console import Console

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All control characters but tab and newline."""
_UNPRINTABLE = re.compile(rf"{CONTROL.pattern}|[\ud800-\udfff]")
WIDTH_OF_FILES = 150
"""Columns of a table that goes into a file or pipe, where no terminal says how many there are."""


def console(*, stderr: bool = False) -> Console:
    """Give a console on stdout (results) or stderr (everything else), as wide as its terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else WIDTH_OF_FILES
    return Console(file=stream, width=width, highlight=False, soft_wrap=False)


def plain(text: str) -> str:
    """Give text that steers no terminal: what strangers named (files, tensors) may hold control characters.

    They are written as `\\x1b`, and halves of characters as `\\udc80`.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(message: str, style: str | None = None) -> None:
    """Print a line for the person on stderr."""
    console(stderr=True).print(plain(message), style=style, markup=False, soft_wrap=True)


def say_error(message: str) -> None:
    """Print what went wrong on stderr, as plain text: markup in a message is no markup."""
    from rich.text import Text

    console(stderr=True).print(Text.assemble(("error: ", "bold red"), plain(message)), soft_wrap=True)


@contextmanager
def working(message: str) -> Iterator[None]:
    """Show on a terminal that something goes on, for as long as the block runs; elsewhere nothing."""
    shown = console(stderr=True)
    if not shown.is_terminal:
        yield
        return
    with shown.status(message, spinner="dots", spinner_style="cyan"):
        yield


def human_bytes(count: float) -> str:
    """Give bytes in decimal units, as disks and GPUs are sold: 39.0 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size * 0.9995:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{count:.0f} B"


def human_count(count: float) -> str:
    """Give a number of parameters: 19.50 B, 6.43 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size * 0.9995:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"


def human_seconds(seconds: float) -> str:
    """Give a time: 0.8 s, 3:05, 1:02:03."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def progress_bar(*between: str, left: str = "") -> progress.Progress | None:
    """Give a bar on stderr for tasks with these columns of text between count and time, or None without a terminal.

    Columns are in rich's markup; `left` is that of the time left, which is rich's own estimate where it is empty.
    """
    from rich import progress

    shown = console(stderr=True)
    if not shown.is_terminal:
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}", style="bold"),
        progress.BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
        progress.MofNCompleteColumn(),
        *(progress.TextColumn(column) for column in between),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left", style="dim"),
        progress.TextColumn(left) if left else progress.TimeRemainingColumn(compact=True),
        console=shown,
        expand=True,
    )


class Progress:
    """How far a run is, with the time that is left: a bar on a terminal, elsewhere a line every ten seconds."""

    HEARTBEAT_S = 10.0

    def __init__(self, total: int, done: int = 0, title: str = "predict"):
        self.total, self.done, self.failed, self._first = total, done, 0, done
        self._started_s = self._spoken_s = time.monotonic()
        self._title = title
        self._bar = progress_bar("[dim]{task.fields[speed]}", "[red]{task.fields[failed]}")
        if self._bar:
            self._task = self._bar.add_task(title, total=total, completed=done, speed="", failed="")

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_s

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int, failed: int = 0) -> None:
        """Note that `count` more are done, `failed` of them with an error."""
        self.done += count
        self.failed += failed
        rate = (self.done - self._first) / max(self.elapsed_s, 1e-9)
        if self._bar:
            failures = f"{self.failed} failed" if self.failed else ""
            self._bar.update(self._task, completed=self.done, speed=f"{rate:.1f}/s", failed=failures)
        elif time.monotonic() - self._spoken_s >= self.HEARTBEAT_S or self.done == self.total:
            self._spoken_s = time.monotonic()
            left = human_seconds((self.total - self.done) / rate) if rate else "?"
            failures = f", {self.failed} failed" if self.failed else ""
            say(f"{self._title}: {self.done} of {self.total}{failures}, {rate:.1f}/s, {left} left")
