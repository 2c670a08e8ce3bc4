"""`lavish convert`: a checkpoint in another layout, dtype or number of files; or a full read of one."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavish.cli import options
from lavish.cli.terminal import console, human_bytes, human_seconds, plain, say
from lavish.common.errors import ConfigError, shown

if TYPE_CHECKING:
    from lavish.inference.checkup import Checkup
    from lavish.inference.convert import Report

WRONG = 1
SHARD_SIZE = "5GB"
SHOWN_NAMES = 4
HEARTBEAT_S = 10.0
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def command(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Folder, file or hub id of a model, in any layout that lavish reads.")
    ],
    destination: Annotated[
        str | None,
        typer.Argument(metavar="DST", show_default=False, help="Folder to write, or .ckpt (mindspore), .pth (lavis)."),
    ] = None,
    to: Annotated[
        str, typer.Option("--to", metavar="LAYOUT", help="hf, sat, lavis, mindspore, vlm_learning, or peft: its LoRA.")
    ] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="NAME", show_default=False, help="bf16, fp16 or fp32; default: as stored."),
    ] = None,
    model_parallel: Annotated[
        int, typer.Option("--model-parallel", min=1, metavar="N", help="Ranks to cut it for, of sat and mindspore.")
    ] = 1,
    shard_size: Annotated[
        str, typer.Option("--shard-size", metavar="SIZE", help="Most bytes of a file of hf, such as 5GB or 500MB.")
    ] = SHARD_SIZE,
    merge_lora: Annotated[bool, typer.Option("--merge-lora", help="Add its LoRA to the weights.")] = False,
    clamp: Annotated[
        bool, typer.Option("--clamp", help="Write the largest value in the place of one that --dtype cannot hold.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read DST back and compare it with SRC bit by bit.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing: read all of SRC, with checksums, NaN and statistics.")
    ] = False,
    tokenizer: options.Tokenizer = None,
    base: options.Base = None,
    config: options.Config = None,
    piece: options.Pieces = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> int:
    """Write a model in another layout: Hugging Face, SAT, LAVIS, MindSpore, or its LoRA as a PEFT adapter.

    Weights stream from file to file, so that memory holds a few tensors whatever the size of the model. DST appears
    when it is whole; a run that was stopped goes on where it ended when the same command is given again. Nothing is
    overwritten, and no code of a checkpoint is run.

    [bold]lavish convert --check SRC[/bold] reads everything and writes nothing; its exit status is 1 when something is
    wrong.
    """
    from lavish.cli.loading import read_pieces, resolve_model

    pieces = read_pieces(piece)
    max_shard_bytes = read_size(shard_size)
    path, entry = resolve_model(source)
    if path is None:
        from lavish.inference.load import POCKET

        path = str(POCKET)
    if check:
        if destination is not None:
            raise ConfigError(f"--check reads {source} alone and writes nothing; leave out {shown(destination)}.")
        writing = {"--to": to != "hf", "--dtype": dtype, "--model-parallel": model_parallel != 1, "--clamp": clamp}
        writing |= {"--merge-lora": merge_lora, "--verify": verify, "--tokenizer": tokenizer}
        writing["--shard-size"] = max_shard_bytes != read_size(SHARD_SIZE)
        if ignored := [name for name, is_given in writing.items() if is_given]:
            raise ConfigError(f"--check reads and writes nothing, so it takes no {', '.join(ignored)}.")
        return _check(path, base, config, pieces, as_json)
    if destination is None:
        raise ConfigError("Where to? Give a destination: lavish convert SRC DST; or --check to read SRC alone.")
    if tokenizer is None and entry is not None and to == "hf":
        tokenizer = entry.tokenizer
    asked = {"dtype": dtype, "model_parallel": model_parallel, "max_shard_bytes": max_shard_bytes, "clamp": clamp}
    asked |= {"merge_lora": merge_lora, "verify": verify, "tokenizer": tokenizer, "base": base, "config": config}
    report = _convert(path, destination, to, {**asked, "pieces": pieces})
    if as_json:
        _print_json(_as_dict(report))
    else:
        _print_report(report)
    return 0


def _convert(path: str, destination: str, to: str, asked: dict[str, Any]) -> Report:
    from lavish.inference.convert import convert

    try:
        with ByteProgress() as progress:
            return convert(path, destination, to, progress=progress.advance, **asked)
    except KeyboardInterrupt:
        say("Stopped; nothing is at DST. The same command goes on from here.", style="yellow")
        raise


def read_size(text: str) -> int:
    """Read a number of bytes: 5GB, 500 MB, 2GiB, 1000000.

    Raises:
        ConfigError: none, or less than a byte.
    """
    found = _SIZE.fullmatch(text)
    unit = found[2].upper() if found else None
    if found is None or unit not in UNITS:
        raise ConfigError(f"--shard-size {shown(text)}: write a number and a unit, such as 5GB, 500MB or 2GiB.")
    size = int(float(found[1]) * UNITS[unit])
    if size < 1:
        raise ConfigError(f"--shard-size {shown(text)} is less than a byte.")
    return size


def _check(path: str, base: str | None, config: str | None, pieces: dict[str, str], as_json: bool) -> int:
    from lavish.inference.checkup import check

    with ByteProgress() as progress:
        found = check(path, base=base, config=config, pieces=pieces, progress=progress.advance)
    if as_json:
        _print_json(found.as_dict())
    else:
        _print_checkup(found)
    return WRONG if found.problems else 0


def _print_json(value: dict[str, Any]) -> None:
    import json

    print(json.dumps(value, indent=2, default=str))


def _as_dict(report: Report) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(report)


def _print_report(report: Report) -> None:
    """Say on stderr what is where, and what is not as it was."""
    speed = human_bytes(max(report.num_bytes - report.resumed_bytes, 0) / max(report.seconds, 1e-9))
    num_files = f"{len(report.files)} file{'s' if len(report.files) != 1 else ''}"
    console().print(plain(str(report.destination)), markup=False, soft_wrap=True)
    say(
        f"{report.family}, {report.layout} to {report.to}: {report.num_tensors} tensors, "
        f"{human_bytes(report.num_bytes)} in {num_files}, {human_seconds(report.seconds)} ({speed}/s)"
        f"{'; read back, equal bit by bit' if report.is_verified else ''}"
    )
    if report.resumed_bytes:
        say(f"{human_bytes(report.resumed_bytes)} of it were written by a run that was stopped.", style="dim")
    for title, rows in (("Not written", report.dropped), ("Made, the source has none", report.made)):
        by_reason: dict[str, list[str]] = {}
        for name, why in rows:
            by_reason.setdefault(why, []).append(name)
        for why, names in by_reason.items():
            more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
            say(f"{title}: {', '.join(names[:SHOWN_NAMES])}{more}: {why}.", style="dim")
    for name, count in report.clamped.items():
        say(f"Clamped: {count} values of {name}", style="yellow")
    for note in report.notes:
        say(note, style="yellow")


def _print_checkup(found: Checkup) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown_on = console()
    heading = " · ".join(word for word in (str(found.path), found.family, f"layout {found.layout}") if word)
    shown_on.print(plain(heading if found.family else str(found.path)), style="bold", markup=False, soft_wrap=True)
    for file in found.files:
        mark = {None: "", file.sha256: "  as on the hub"}.get(file.expected, "  NOT as on the hub")
        line = f"{file.sha256}  {human_bytes(file.num_bytes):>9}  {file.file.name}{mark}"
        shown_on.print(plain(line), markup=False, soft_wrap=True)
    if found.parts:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
        table.add_column("part", no_wrap=True)
        for name in ("tensors", "numbers", "dtype", "mean", "std", "min", "max", "NaN", "inf"):
            table.add_column(name, justify="right", no_wrap=True)
        for part in found.parts:
            numbers = [part.mean, part.std, part.minimum, part.maximum]
            table.add_row(
                plain(part.name),
                str(part.num_tensors),
                f"{part.numel:,}",
                ", ".join(sorted(part.dtypes)),
                *(f"{value:.3g}" for value in numbers),
                str(part.num_nan),
                str(part.num_inf),
            )
        shown_on.print()
        shown_on.print(table)
    for note in found.notes:
        say(note, style="yellow")
    for problem in found.problems:
        say(f"wrong: {problem}", style="red")
    if not found.problems:
        say("Nothing is wrong.", style="green")


class ByteProgress:
    """How far the bytes are, on stderr: a bar with speed and time left on a terminal, elsewhere a line every ten
    seconds."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._first: dict[str, tuple[int, float]] = {}
        self._spoken_s = time.monotonic()

    def __enter__(self) -> ByteProgress:
        stderr = console(stderr=True)
        if stderr.is_terminal:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", style="bold"),
                progress.BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(compact=True),
                console=stderr,
                expand=True,
            )
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, phase: str, done: int, total: int) -> None:
        """Take what `convert` and `check` tell."""
        now_s = time.monotonic()
        first, began_s = self._first.setdefault(phase, (done, now_s))
        if self._bar is not None:
            if phase not in self._tasks:
                self._tasks[phase] = self._bar.add_task(phase, total=total, completed=done)
            self._bar.update(self._tasks[phase], completed=done, total=total)
        elif now_s - self._spoken_s >= HEARTBEAT_S:
            self._spoken_s = now_s
            rate = (done - first) / max(now_s - began_s, 1e-9)
            left = f", {human_seconds((total - done) / rate)} left" if rate else ""
            say(f"{phase}: {human_bytes(done)} of {human_bytes(total)}, {human_bytes(rate)}/s{left}")
