"""`lavish inspect`: what a model is, before any of its weights is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavish.cli import options
from lavish.cli.terminal import console, human_bytes, human_count, plain, say

if TYPE_CHECKING:
    from lavish.cli.inspection import Inspection

SHOWN_PROBLEMS = 8
INCOMPLETE = 1


def command(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A model's folder, or a name or hub id of [bold]lavish zoo[/bold].")
    ],
    tree: Annotated[bool, typer.Option("--tree", help="Print the tree of modules with shapes and counts.")] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the config, such as num_hidden_layers=2."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    piece: options.Pieces = None,
) -> int:
    """Show what a model is: family, sizes, parts, dtypes, the memory it needs, tensors that are missing or too many.

    Only the config and the headers of the files are read, so that 39 GB take less than a second; nothing is downloaded.
    The exit status is 1 when the checkpoint is not complete.
    """
    overrides: dict[str, Any] = {}
    if changes:
        from omegaconf import OmegaConf

        from lavish.common.config import parse_overrides

        overrides = OmegaConf.to_container(parse_overrides(changes), resolve=True)  # pyright: ignore
    from lavish.cli.inspection import look
    from lavish.cli.loading import read_pieces

    pieces = read_pieces(piece)
    if tree:
        _print_tree(path, overrides, pieces, as_json)
        return 0
    seen = look(path, overrides, pieces)
    if as_json:
        import json

        print(json.dumps(seen.as_dict(), indent=2, default=str))
    else:
        _print(seen)
    return INCOMPLETE if seen.has_weights and seen.has_problems else 0


def _print_tree(path: str, overrides: dict[str, Any], pieces: dict[str, str], as_json: bool) -> None:
    from pathlib import Path

    from lavish.cli.inspection import find, is_without_config
    from lavish.cli.module_tree import draw_tree, read_tree

    if path.strip() and is_without_config(Path(path).expanduser(), pieces):
        from lavish.inference.outline import outline

        network, where = outline(path, overrides, pieces).network, path
    else:
        from lavish.inference.build import build

        _, where, folder = find(path)
        network = build(path if folder is None else folder, device="meta", **overrides)
    root = read_tree(network)
    if as_json:
        import json

        print(json.dumps(root.as_dict(), indent=2))
        return
    console().print(draw_tree(root))
    say(f"{human_count(root.num_parameters)} parameters; config: {where}", style="dim")


def _print(seen: Inspection) -> None:
    shown = console()
    shown.print(_heading(seen))
    shown.print()
    if seen.facts:
        shown.print(_facts_table(seen))
        shown.print()
    if seen.sizes is not None:
        shown.print(_config_table(seen))
        shown.print()
    shown.print(_parts_table(seen))
    if seen.memory:
        shown.print()
        shown.print(_memory_table(seen))
    from lavish.cli.inspection import FORMULA

    if seen.sizes is not None:
        shown.print(FORMULA, style="dim", markup=False)
    for note in seen.notes:
        shown.print(f"\n{plain(note)}", style="yellow", markup=False)
    if seen.has_weights:
        shown.print()
        _print_check(seen)
    for command_line in seen.commands:
        shown.print(plain(command_line), style="cyan", markup=False, soft_wrap=True)


def _heading(seen: Inspection) -> Any:
    from rich.text import Text

    heading = Text(plain(seen.path), style="bold")
    release = f"{seen.family} {seen.version}" if seen.version > 1 else plain(seen.family)
    where = "not on this machine" if seen.layout is None else f"layout {seen.layout}"
    heading.append(f"\n{release}", style="cyan")
    heading.append(f" · {human_count(seen.num_parameters)} parameters · {human_bytes(seen.num_bytes)} · {where}")
    if seen.has_weights:
        heading.append(f" · {seen.files} weight file{'s' if seen.files != 1 else ''}")
    return heading


def _grid(*columns: tuple[str, str]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for name, side in columns:
        table.add_column(name, justify="right" if side == "right" else "left", no_wrap=True)
    return table


def _facts_table(seen: Inspection) -> Any:
    from rich.text import Text

    table = _grid((f"layout {seen.layout}", "left"), ("", "left"))
    table.columns[1].no_wrap = False
    for name, value in seen.facts.items():
        table.add_row(Text(name), Text(plain(value)))
    return table


def _config_table(seen: Inspection) -> Any:
    sizes, vision = seen.sizes, seen.sizes.vision
    table = _grid(("config", "left"), ("decoder", "right"), ("vision tower", "right"))
    rows = [
        ("layers", sizes.num_hidden_layers, vision["num_hidden_layers"]),
        ("hidden size", sizes.hidden_size, vision["hidden_size"]),
        ("intermediate size", sizes.intermediate_size, vision["intermediate_size"]),
        ("heads", sizes.num_attention_heads, vision["num_heads"]),
        ("key/value heads", sizes.num_key_value_heads, vision["num_heads"]),
        ("vocabulary", sizes.vocab_size, ""),
        ("context, tokens", sizes.max_position_embeddings, ""),
        ("image, pixels", "", f"{vision['image_size']} x {vision['image_size']}"),
        ("an image: tokens, patches", sizes.num_image_tokens, sizes.num_patches),
    ]
    for name, decoder, tower in rows:
        table.add_row(name, *(f"{value:,}" if isinstance(value, int) else value for value in (decoder, tower)))
    return table


def _parts_table(seen: Inspection) -> Any:
    columns = [(name, "right") for name in ("tensors", "parameters", "bytes", "share")]
    table = _grid(("part", "left"), *columns)
    for part in seen.parts:
        share = part.num_bytes / max(seen.num_bytes, 1)
        counts = (f"{part.num_tensors:,}", human_count(part.num_parameters), human_bytes(part.num_bytes))
        table.add_row(part.name, *counts, f"{share:.1%}", style="red" if part.name == "unexpected" else None)
    table.add_section()
    total = sum(part.num_tensors for part in seen.parts)
    table.add_row("all", f"{total:,}", human_count(seen.num_parameters), human_bytes(seen.num_bytes), "", style="bold")
    for dtype, count in seen.dtypes.items():
        table.add_row(f"in {dtype}", "", "", human_bytes(count), f"{count / max(seen.num_bytes, 1):.1%}", style="dim")
    return table


def _memory_table(seen: Inspection) -> Any:
    table = _grid(("memory, estimated", "left"), ("total", "right"), ("of which", "left"))
    table.columns[2].no_wrap = False
    for row in seen.memory:
        terms = ", ".join(f"{name} {human_bytes(count)}" for name, count in row.terms.items())
        table.add_row(row.what, human_bytes(row.total), terms)
    return table


def _print_check(seen: Inspection) -> None:
    shown = console()
    if seen.is_complete:
        shown.print("complete: every tensor that the config asks for is there, and no other", style="green")
        return
    if seen.is_part:
        shown.print("no network can be made of this alone; tensors are listed as the files name them", style="yellow")
    if seen.absent_files:
        absent = plain(", ".join(seen.absent_files))
        shown.print(f"{len(seen.absent_files)} weight files are not here: {absent}", style="red", markup=False)
    problems = {"missing": seen.missing, "unexpected": seen.unexpected, "of another shape": seen.misshaped}
    for title, names in problems.items():
        if names:
            shown.print(f"{len(names)} tensors {title}:", style="bold red")
            for name in names[:SHOWN_PROBLEMS]:
                shown.print(f"  {plain(name)}", markup=False, soft_wrap=True)
            if len(names) > SHOWN_PROBLEMS:
                shown.print(f"  and {len(names) - SHOWN_PROBLEMS} more (--json lists all)", style="dim")
