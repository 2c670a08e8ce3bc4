"""Write the tables of docs/datasets.md, read off the code; a test checks that they are current."""

from __future__ import annotations

import re
from pathlib import Path

from lavish.common.config import PACKAGE
from lavish.common.registry import registry
from lavish.datasets.builders import dataset_zoo
from lavish.datasets.formats.opening import FORMATS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "datasets.md"
CARDS = PACKAGE / "datasets" / "cards"


def card(name: str) -> dict[str, str]:
    """Give the lines of a card by their first word, and its title."""
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    lines = dict(re.findall(r"^- ([^:]+): (.*)$", text, re.MULTILINE))
    return {name: value.rstrip(".") for name, value in lines.items()} | {"title": re.findall(r"^# (.*) \(", text)[0]}


def fetched(name: str) -> str:
    """Say whether the annotations of a dataset are fetched, and whether they are compared with an md5."""
    if card(name)["Home"].startswith("lavish itself"):
        return "drawn"
    files = registry.get_builder_class(name)().annotation_files()
    if not any(file.url for file in files):
        return "yours"
    return "fetched, md5" if all(file.md5 for file in files) else "fetched"


def zoo_rows() -> list[list[str]]:
    """Give the rows of the zoo: what its configs and cards say."""
    rows = []
    for name, types in dataset_zoo.items():
        builder = registry.get_builder_class(name)()
        said, path = card(name), (CARDS / f"{name}.md").relative_to(ROOT)
        splits = ", ".join(builder.splits()) or "yours"
        others = ", ".join(f"`{kind}`" for kind in types if kind != "default") or "-"
        rows.append(
            [f"[`{name}`](../{path})", said["title"], builder.data_type, splits, others, fetched(name), said["Task"]]
        )
    return rows


def tables() -> dict[str, str]:
    """Give the tables by name."""
    zoo = [["name", "what", "data", "splits", "more types", "annotations", "task"], ["---"] * 7, *zoo_rows()]
    formats = [["format", "what it looks like"], ["---"] * 2]
    formats += [[f"`{name}`", words[0].upper() + words[1:]] for name, words in FORMATS.items()]
    return {
        name: "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        for name, rows in (("zoo", zoo), ("formats", formats))
    }


def page() -> str:
    """Give the page with its tables as they should be."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables().items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda found, table=table: found[1] + table + found[2], text)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
