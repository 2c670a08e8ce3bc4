"""`lavish evaluate` of LAVIS's recipes on the command line: its spellings, tables, comparison and errors."""

from pathlib import Path

import evaluated_sets as sets
import pytest

from lavish.cli import main

RECIPE = str(sets.EVAL / "vqav2_eval.yaml")


@pytest.fixture(autouse=True)
def _local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVISH_CACHE", str(sets.fill(tmp_path / "cache")))
    monkeypatch.setenv("LAVISH_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "160")


def options(output: Path, *more: str) -> list[str]:
    return sets.tiny("blip_vqa", output, *sets.sized("coco_vqa", *more))


def test_spellings_of_lavis_and_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--cfg-path", RECIPE, "--options", *options(tmp_path / "a")]) == 0
    shown = capsys.readouterr()
    rows = [line.split() for line in shown.out.splitlines()]
    assert ["coco_vqa/val:", "7", "samples"] in rows
    assert ["vqa_accuracy", "41.43", "12.86", "to", "71.43", "7"] in rows
    assert str(tmp_path / "a" / "report.html") in shown.out
    assert "evaluate: 7 of 7" in shown.err
    assert main(["evaluate", RECIPE, *options(tmp_path / "a")]) == 0  # all are answered
    assert main(["evaluate", RECIPE, "--set", "run.inference_method=generate", *options(tmp_path / "b")]) == 0
    capsys.readouterr()

    assert main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    shown = capsys.readouterr()
    assert "paired over the same samples" in shown.out
    row = next(line.split() for line in shown.out.splitlines() if line.startswith("vqa_accuracy"))
    assert row[1] == "41.43"
    assert row[-1] == "7"
    assert "samples that change most" in shown.out
    assert f"B: {tmp_path / 'b'}" in shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "none", "none"], "none is no folder of a finished evaluation"),
        ([RECIPE, "--compare", "a", "b"], "--compare takes the folders of two evaluations"),
        ([], "No recipe was given"),
        ([RECIPE, "run.tsk=vqa"], "Did you mean 'task'"),
    ],
)
def test_wrong_calls(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_another_recipe_in_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", RECIPE, *options(tmp_path / "a")]) == 0
    assert main(["evaluate", RECIPE, *options(tmp_path / "a", "run.num_beams=1")]) == 2
    assert "run.num_beams: 3 -> 1" in capsys.readouterr().err
    assert main(["evaluate", RECIPE, "--force", *options(tmp_path / "a", "run.num_beams=1")]) == 0


def test_ctrl_c_says_what_happens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lavish.runners.evaluation.evaluate", interrupted)
    assert main(["evaluate", RECIPE, *options(tmp_path / "a")]) == 130
    assert "The same command goes on" in capsys.readouterr().err
