"""docs/datasets.md says what the code can do."""

import importlib
import re
from pathlib import Path

import pytest
from script_module import load_script

from lavish.common.config import PACKAGE
from lavish.common.registry import BUILT_IN, registry
from lavish.datasets.builders import dataset_zoo

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script():
    return load_script("write_dataset_tables")


def test_the_page_is_current(script) -> None:
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run scripts/write_dataset_tables.py"
    assert all(f"<!-- {name} -->\n| " in script.page() for name in script.tables())
    assert [row[0].split("`")[1] for row in script.zoo_rows()] == dataset_zoo.get_names()


def test_cards(script) -> None:
    names = {path.stem for path in (PACKAGE / "datasets" / "cards").glob("*.md")}
    assert names == set(BUILT_IN["builder"])
    for name in names:
        said = script.card(name)
        assert {"Home", "Licence", "Samples", "Task", "title"} <= set(said)
        assert re.sub(r"[`.]", "", said["Task"]) in registry.list_tasks()


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set of one's own, as it stands on the page."""
    from PIL import Image

    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Birds" in block)
    recipe = next(block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "birds:" in block)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "train.jsonl").write_text('{"file": "a.png", "species": "Robin"}')
    recipe = recipe.replace("/data/birds/images", str(tmp_path)).replace("/data/birds", str(tmp_path))
    (tmp_path / "birds.yaml").write_text(recipe)
    (tmp_path / "own_birds.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry._kinds["builder"], "entries", dict(registry._kinds["builder"].entries))
    importlib.import_module("own_birds")
    from lavish.datasets.builders import load_dataset

    assert load_dataset("birds")["train"][0]["text_input"] == "Robin"
