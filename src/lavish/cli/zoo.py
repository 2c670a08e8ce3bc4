"""`lavish zoo`: the released models that lavish knows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lavish.cli.terminal import console, human_bytes, human_count
from lavish.models import FAMILIES, ZOO, ZooEntry

BUNDLED = "comes with lavish"


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the models that lavish knows: where they are, their licence and size, and what they are good at.

    A name of the list works wherever a command takes a model; [bold]lavish inspect NAME[/bold] shows its layout without
    a download.
    """
    order = [family.name for family in FAMILIES]
    # The bundled one first, then family by family.
    entries = sorted(ZOO, key=lambda entry: (entry.hub_id is not None, order.index(entry.family)))
    if as_json:
        import json

        print(json.dumps([asdict(entry) for entry in entries], indent=2, ensure_ascii=False))
        return
    _print_table(entries)


def _print_table(entries: list[ZooEntry]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False, leading=1)
    table.add_column("model", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("good at, licence")
    family = None
    for entry in entries:
        if entry.hub_id is not None and entry.family != family:
            family = entry.family
            table.add_section()
            table.add_row(Text(family, "bold"), "", "")
        name = Text.assemble((entry.name, "bold cyan"), "\n", (entry.hub_id or BUNDLED, "dim"))
        size = Text.assemble(human_bytes(entry.num_bytes), "\n", (human_count(entry.num_parameters), "dim"))
        size.append(f"\n{entry.image_size} px", "dim")
        words = Text.assemble(entry.good_at, "\n", (entry.licence, "dim"))
        table.add_row(name, size, words)
    shown = console()
    shown.print(table)
    shown.print(
        "\nlavish chat NAME talks with it, lavish predict NAME asks it about pictures (what has an id is downloaded), "
        "lavish inspect NAME looks inside.",
        style="dim",
    )
