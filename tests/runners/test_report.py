"""report.html of a run holds all that is said of it, in one file."""

from pathlib import Path

import pytest
import tiny_lavis

from lavish.runners.parts import Part
from lavish.runners.recipe import open_recipe, train
from lavish.runners.report import write_report
from lavish.runners.run_folder import RunFolder


def test_a_run_leaves_its_report(tmp_path: Path) -> None:
    recipe = tiny_lavis.caption_recipe(tmp_path, max_epoch=1, sample_generations=2)
    (out,) = train(open_recipe(tiny_lavis.write(tmp_path, recipe))).values()
    page = (out / "report.html").read_text()
    for part in ("loss_lm", "CIDEr", "text_decoder", "num_samples", "task: captioning", "git_revision", "What it says"):
        assert part in page
    assert page.count("data:image/jpeg;base64,") == page.count(" square | a square that is ") == 2
    assert "http" not in page.replace("https://storage", "")
    pytest.importorskip("matplotlib")
    assert "data:image/png;base64," in page


def test_texts_are_no_markup(tmp_path: Path) -> None:
    page = write_report(RunFolder(tmp_path), {"<b>": Part(trained=3)}, {"steps": 2}, "x: <script>").read_text()
    assert "<script>" not in page
    assert "<b>" not in page
