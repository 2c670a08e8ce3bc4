"""The READMEs and docs: marked blocks run as they stand, both languages say the same, links lead somewhere.

`<!-- run: pocket -->` marks a block that needs the bundled weights. A block runs in a folder that looks like the
repository's root, so that what it writes lands elsewhere; a command that reads from the terminal gets a question and
`stop`.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import pytest
from warm import run

import lavish

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh-CN.md")
PAGES = (*READMES, *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")))
BLOCK = re.compile(
    r"(?:^<!-- run(?P<needs>: \w+)? -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
MARK = re.compile(r"^<!-- run.*", re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a README; `line` is where it starts."""

    readme: str
    line: int
    language: str
    code: str
    is_run: bool
    needs: str

    def __str__(self) -> str:
        return f"{self.readme}:{self.line}"


def blocks(readme: str) -> list[Block]:
    text = (ROOT / readme).read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        needs = (match["needs"] or "").removeprefix(": ")
        found.append(Block(readme, line, match["language"], match["code"], match[0].startswith("<!--"), needs))
    return found


def commands(block: Block) -> str:
    """Give a block's code without its comments, which are written in the README's language."""
    return re.sub(r"\s+# .*$", "", block.code, flags=re.MULTILINE)


def runnable() -> list:
    """Give the blocks to run; the Chinese README has those of the English one, as a test below sees to."""
    pages = [page for page in PAGES if page != READMES[1]]
    return [pytest.param(block, id=str(block)) for page in pages for block in blocks(page) if block.is_run]


@pytest.mark.parametrize("block", runnable())
def test_marked_blocks_run(block: Block, tmp_path: Path) -> None:
    for name in ("src", "benchmarks", "projects"):
        (tmp_path / name).symlink_to(ROOT / name)
    if block.language == "python":
        answer = run("-c", block.code, cwd=tmp_path)
    else:
        answer = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.code],
            cwd=tmp_path,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
            input="What color is the star?\nstop\n",
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
        )
    assert answer.returncode == 0, f"{block}:\n{answer.stdout}\n{answer.stderr}"
    assert answer.stdout or list(tmp_path.glob("*.png")), "it neither printed nor drew anything"


def test_both_languages_have_the_same_blocks() -> None:
    english, chinese = (blocks(readme) for readme in READMES)
    assert [(block.language, commands(block), block.is_run, block.needs) for block in english] == [
        (block.language, commands(block), block.is_run, block.needs) for block in chinese
    ]


def test_both_languages_have_the_same_sections_and_tables() -> None:
    shapes = []
    for readme in READMES:
        lines = (ROOT / readme).read_text(encoding="utf-8").splitlines()
        shapes.append(
            [line.split(" ")[0] if line[0] == "#" else line.count("|") for line in lines if line[:1] in ("#", "|")]
        )
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("readme", READMES)
def test_every_option_of_load_is_named(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    options = [name for name, value in signature(lavish.load).parameters.items() if value.kind is value.KEYWORD_ONLY]
    assert [name for name in options if f"`{name}=" not in text] == []


@pytest.mark.parametrize("readme", PAGES)
def test_every_mark_belongs_to_a_block(readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert len(MARK.findall(text)) == sum(block.is_run for block in blocks(readme))


@pytest.mark.parametrize("path", [*PAGES, "CHANGELOG.md"])
def test_links_lead_to_files(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if not (ROOT / path).parent.joinpath(link).exists()]
    assert not missing
