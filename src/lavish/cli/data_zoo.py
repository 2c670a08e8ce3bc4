"""`lavish data list` and `lavish data fetch`: the data sets that lavish knows by name, and their annotations."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lavish.cli import options
from lavish.cli.terminal import console, human_bytes, say


def list_names(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plugins: options.Plugins = None,
) -> None:
    """List the data sets that recipes and load_dataset know by name, and what of them is on this machine.

    [bold]lavish data fetch NAME[/bold] fetches the annotations. Pictures and videos go where the last column says.
    """
    _plug_in(plugins)
    rows = [_row(name, kind) for name, kind in _names()]
    if as_json:
        import json

        print(json.dumps(rows, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for title in ("name", "type", "splits", "annotations", "pictures or videos"):
        table.add_column(title, overflow="fold")
    for row in rows:
        here, all_files = row["annotations_here"], row["annotations"]
        files = f"{here} of {all_files} here" if all_files else "none needed"
        style = "green" if here == all_files else "yellow" if row["is_fetched"] else "dim"
        seen = Text(str(row["visual_data"] or "beside the file"), "green" if row["visual_data_here"] else "dim")
        words = f"{files}{'' if row['is_fetched'] or not all_files else ', yours'}"
        table.add_row(
            Text(row["name"], "bold cyan"), row["type"], ", ".join(row["splits"]) or "yours", Text(words, style), seen
        )
    console().print(table)


def fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of [bold]lavish data list[/bold].")],
    kind: Annotated[
        str, typer.Option("--type", metavar="TYPE", help="Another default config of the data set.")
    ] = "default",
    plugins: options.Plugins = None,
) -> int:
    """Fetch the annotations of data sets, for machines that later have no network.

    They go where training looks for them: LAVISH_CACHE, else ~/.cache/lavish. Pictures, videos and features are not
    fetched; the last line of each says where they go.
    """
    _plug_in(plugins)
    from lavish.common.registry import registry

    builders = {}
    for name in names:  # all names before the first download
        cls = registry.get_builder_class(name)
        builders[name] = cls(cls.default_config_path(kind))
        builders[name].check()
    for name, builder in builders.items():
        for file in builder.fetch_annotations():
            console().print(f"{file}  ({human_bytes(file.stat().st_size)})", markup=False, soft_wrap=True)
        root = builder.visual_root()
        if root is not None:
            state = "are here" if root.exists() else "go here; its card says where they come from"
            say(f"{name}: its {builder.data_type} {state}: {root}")
    return 0


def _plug_in(plugins: list[str] | None) -> None:
    from lavish.common.plugins import load_plugins

    load_plugins(plugins or ())


def _names() -> list[tuple[str, str]]:
    from lavish.datasets.builders import dataset_zoo

    return [(name, kind) for name, kinds in dataset_zoo.items() for kind in kinds]


def _row(name: str, kind: str) -> dict[str, Any]:
    from lavish.common.registry import registry

    cls = registry.get_builder_class(name)
    builder = cls(cls.default_config_path(kind))
    files = {file.path: file.url for file in builder.annotation_files()}
    root = builder.visual_root()
    return {
        "name": name,
        "type": kind,
        "splits": builder.splits(),
        "annotations": len(files),
        "annotations_here": sum(path.is_file() for path in files),
        "is_fetched": bool(files) and all(url is not None for url in files.values()),
        "visual_data": None if root is None else str(root),
        "visual_data_here": root is not None and root.exists(),
    }
