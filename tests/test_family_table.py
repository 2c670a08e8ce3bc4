"""docs/families.md says what the code can do."""

import importlib
import re
from pathlib import Path

import pytest
from script_module import load_script

from lavish.models import CAPABILITIES, FAMILIES, Family

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script():
    return load_script("write_family_table")


def test_the_page_is_current(script) -> None:
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run scripts/write_family_table.py"


def test_every_capability_is_a_method_and_said_of_some_family() -> None:
    from lavish.inference.sample_model import SampleModel
    from lavish.inference.vlm import VLM

    for name in CAPABILITIES:
        assert callable(getattr(VLM, name))
        assert callable(getattr(SampleModel, name))
        assert any(name in row.capabilities for row in FAMILIES)
    assert all(set(row.capabilities) <= set(CAPABILITIES) for row in FAMILIES)


def test_the_index_names_every_page_and_links_lead_somewhere() -> None:
    index = ROOT / "docs" / "index.md"
    links = re.findall(r"\]\(([^)#]+)\)", index.read_text(encoding="utf-8"))
    assert [link for link in links if not (index.parent / link).exists()] == []
    assert {page.name for page in index.parent.glob("*.md")} - {"index.md"} <= set(links)
    for readme in ("README.md", "README.zh-CN.md"):
        text = (ROOT / readme).read_text(encoding="utf-8")
        assert "(docs/index.md)" in text
        assert [row.name for row in FAMILIES if f"(docs/{row.name}.md)" not in text] == []


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_every_layout_of_a_family_can_be_written(row: Family) -> None:
    assert row.layouts[0] == "hf"
    for layout in row.layouts[1:]:
        assert callable(importlib.import_module(f"{row.package}.{layout}").plan_target)
