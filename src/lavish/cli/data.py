"""Look at data before training: what is wrong with them, row by row, and what a model will see of them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavish.cli.data_zoo import fetch, list_names
from lavish.cli.terminal import console, human_count, plain, progress_bar, say
from lavish.common.errors import ConfigError

if TYPE_CHECKING:
    from lavish.datasets.formats.checking import Report
    from lavish.datasets.formats.opening import Source
    from lavish.datasets.formats.page import Shown

FOUND_PROBLEMS = 1
SHOWN_PROBLEMS = 20

File = Annotated[
    str, typer.Argument(metavar="FILE", help="File, folder, or tar shards such as 'shards/{000..012}.tar'.")
]
Format = Annotated[
    str | None, typer.Option("--format", metavar="NAME", help="What it is; default: what it looks like.")
]
Images = Annotated[
    str | None,
    typer.Option(
        "--images", metavar="FOLDER", help="Folder of the pictures; default: that of the file, or images in it."
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt", metavar="TEXT", help="What the user says about captions; {question}, {expr} where the data ask."
    ),
]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", metavar="FOLDER", help="The model's tokenizer, where it is apart.")
]
Pieces = Annotated[
    list[str] | None, typer.Option("--piece", metavar="NAME=PATH", help="A part of a model that comes in pieces.")
]
Config = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", help="JSON or YAML: fields that no file of the model has."),
]


def check(
    file: File,
    format: Format = None,
    images: Images = None,
    prompt: Prompt = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Also encode every row for this model; needs no weights."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=1, metavar="N", help="Most tokens of a row, with --model.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not open pictures; they only have to be there.")] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Look at so many rows.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all problems.")] = False,
    tokenizer: Tokenizer = None,
    piece: Pieces = None,
    config: Config = None,
) -> int:
    """Say what is wrong with data, row by row, before anything is trained on them.

    The format is found out. Told are pictures that are missing or damaged, places for pictures that do not pair up with
    them, speakers out of order, answers that are empty; with --model also what that model refuses and labels that are
    all masked. The exit status is 1 if a row has a problem.
    """
    if max_length is not None and model is None:
        raise ConfigError("--max-length counts the tokens of a model; give --model too.")
    from lavish.datasets.formats.checking import check_data
    from lavish.datasets.formats.opening import open_data

    source = open_data(file, format, images=images, prompt=prompt, streaming=True)
    processor = None if model is None else _processor(model, tokenizer, piece, config)
    bar = progress_bar()
    options: dict[str, Any] = {"processor": processor, "max_length": max_length, "quick": quick, "max_rows": limit}
    if bar is None:
        report = check_data(source, **options)
    else:
        total = None if source.is_stream else min(len(source), limit or len(source))
        with bar:
            task = bar.add_task("check", total=total)
            report = check_data(source, **options, progress=lambda count: bar.update(task, completed=count))
    if as_json:
        _print_json(source, report)
    else:
        _print(source, report, has_tokens=processor is not None)
    return 0 if report.is_good else FOUND_PROBLEMS


def show(
    file: File,
    count: Annotated[int, typer.Option("-n", "--count", min=1, metavar="N", help="How many rows.")] = 5,
    start: Annotated[int, typer.Option("--start", min=1, metavar="N", help="The first row, from 1.")] = 1,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Whose prompt and labels; default: the bundled model's."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The page.")] = Path("data.html"),
    in_terminal: Annotated[
        bool, typer.Option("--print", help="Print the tokens here instead, learnt ones green.")
    ] = False,
    format: Format = None,
    images: Images = None,
    prompt: Prompt = None,
    tokenizer: Tokenizer = None,
    piece: Pieces = None,
    config: Config = None,
) -> int:
    """Write a page that shows rows as a model gets them: pictures, messages, and every token, learnt or masked.

    The page is one HTML file with everything in it. Of the model only the small files are read, no weights.
    """
    from lavish.datasets.datasets.annotations import local_path
    from lavish.datasets.formats.opening import open_data

    target = local_path(out, "--out")
    source = open_data(file, format, images=images, prompt=prompt, streaming=True)
    processor = _processor(model, tokenizer, piece, config)
    from lavish.datasets.formats.page import look_at, write_page

    rows = [
        look_at(where, sample, processor) for where, sample in islice(source.samples(), start - 1, start - 1 + count)
    ]
    if not rows:
        raise ConfigError(f"--start {start}: {file} has no such row.")
    status = FOUND_PROBLEMS if any(row.problem for row in rows) else 0
    if in_terminal:
        _print_rows(rows)
        return status
    facts = [("data", str(file)), ("format", source.format), ("prompt of", model or "the bundled model")]
    if not source.is_stream:
        facts.append(("rows", f"{len(source):,}"))
    write_page(target, rows, title=f"Training data: {Path(file).name}", facts=facts)
    say(f"{out}: {len(rows)} rows; open it in a browser.")
    return status


def convert(
    file: File,
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The file to write.")],
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave rows out that are wrong, and say which.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    format: Format = None,
    images: Images = None,
    prompt: Prompt = None,
) -> int:
    """Write data of any form as JSON lines of messages, the one form that every tool reads.

    Pictures that are files stay where they are; those inside the data are written to a folder beside OUT. Without
    --skip-bad the first wrong row ends it, and nothing is written.
    """
    if out.suffix != ".jsonl":
        raise ConfigError(f"{out}: the file to write is JSON lines; call it {out.with_suffix('.jsonl').name}.")
    from lavish.datasets.datasets.annotations import local_path
    from lavish.datasets.formats.opening import open_data
    from lavish.datasets.formats.writing import write_data

    target = local_path(out, "OUT.jsonl")
    source = open_data(file, format, images=images, prompt=prompt, streaming=True)
    bar = progress_bar()
    options: dict[str, Any] = {"skip_bad": skip_bad, "overwrite": overwrite}
    if bar is None:
        count, bad = write_data(source, target, **options)
    else:
        with bar:
            task = bar.add_task("convert", total=None if source.is_stream else len(source))
            count, bad = write_data(source, target, **options, progress=lambda done: bar.update(task, completed=done))
    for where, problem in bad[:SHOWN_PROBLEMS]:
        say(f"{where}: {problem}", style="yellow")
    left_out = f", {len(bad):,} were left out" if bad else ""
    say(f"{out}: {count:,} rows{left_out}.")
    return 0


subcommands = {"check": check, "show": show, "convert": convert, "list": list_names, "fetch": fetch}


def _processor(model: str | None, tokenizer: str | None, pieces: list[str] | None, config: str | None) -> Any:
    from lavish.cli.loading import read_pieces, resolve_model
    from lavish.cli.terminal import working

    path, entry = resolve_model(model)
    with working("Loading the processor"):
        from lavish.inference.processor_alone import load_processor

        apart = entry.tokenizer if tokenizer is None and entry is not None else tokenizer
        return load_processor(path, tokenizer=apart, config=config, pieces=read_pieces(pieces))


def _print_rows(rows: list[Shown]) -> None:
    """Print the tokens of rows: learnt green, masked dim, a picture's slots blue; a bar where one ends."""
    from rich.text import Text

    styles = {"learnt": "green", "given": "dim", "slots": "blue"}
    shown = console()
    for row in rows:
        counts = f"{row.num_tokens:,} tokens, {row.count('learnt'):,} learnt, {row.count('slots'):,} slots of pictures"
        shown.print(Text.assemble((plain(row.where), "bold"), f"  {counts}" if row.pieces else ""))
        if row.problem is not None:
            shown.print(Text(plain(row.problem), "red"), soft_wrap=True)
        text = Text()
        for piece in row.pieces:
            words = f"[picture: {len(piece.ids):,} slots]" if piece.kind == "slots" else plain(piece.text)
            text.append(words.replace("\n", "↵\n"), styles[piece.kind] + (" bold" if piece.is_special else ""))
            text.append("|", "bright_black")
        shown.print(text, soft_wrap=True)


def _print_json(source: Source, report: Report) -> None:
    import json
    from dataclasses import asdict

    said = asdict(report)
    said["problems"] = [{"where": where, "problem": problem} for where, problem in report.problems]
    said["longest"] = {"tokens": report.longest[0], "where": report.longest[1]}
    text = json.dumps({"file": source.path, **said}, indent=2, ensure_ascii=False)
    print(text.encode("utf-8", "backslashreplace").decode())  # names of files need not be UTF-8


def _print(source: Source, report: Report, *, has_tokens: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    shown = console()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    facts = [
        ("format", report.format),
        ("rows", f"{report.num_rows:,}"),
        ("pictures", f"{report.num_images:,}" + (f", {report.num_videos:,} videos" if report.num_videos else "")),
        ("answers", f"{report.num_answers:,} of {report.num_characters:,} characters"),
    ]
    good = report.num_rows - report.num_bad
    if has_tokens and good > 0:
        tokens = f"{human_count(report.num_tokens)}, {human_count(report.num_labels)} of them learnt"
        facts += [("tokens", tokens), ("longest", f"{report.longest[0]:,} tokens, {report.longest[1]}")]
    for name, value in facts:
        table.add_row(name, Text(plain(value)))
    shown.print(Text(plain(source.path), "bold"))
    shown.print(table)
    for note in report.notes:
        shown.print(Text.assemble(("note: ", "yellow"), plain(note)), soft_wrap=True)
    for where, problem in report.problems[:SHOWN_PROBLEMS]:
        shown.print(Text.assemble((f"{plain(where)}: ", "bold red"), plain(problem)), soft_wrap=True)
    more = report.num_bad - min(len(report.problems), SHOWN_PROBLEMS)
    if more > 0:
        shown.print(f"... and {more:,} more; --json prints them.", style="dim")
    if report.is_good:
        shown.print(Text("No problem found.", "green"))
    else:
        shown.print(Text(f"{report.num_bad:,} of {max(report.num_rows, 1):,} rows have a problem.", "bold red"))
