"""`--offline`: nothing is fetched, and what is absent is told with the place where it goes."""

from pathlib import Path

import pytest

from lavish.cli import main

RECIPE = """
model: {arch: blip_caption, model_type: base_coco}
datasets: {coco_caption: {}}
run: {task: captioning, runner: runner_base, max_epoch: 1, init_lr: 1.0e-5, batch_size_train: 1, train_splits: [train],
  output_dir: %s}
"""


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_what_to_put_where(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("LAVISH_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "")  # so that what the command sets is taken back
    monkeypatch.setenv("LAVISH_CACHE", str(tmp_path / "cache"))
    recipe = RECIPE % (tmp_path / "out")
    if command == "evaluate":
        recipe = recipe.replace("train_splits: [train]", "test_splits: [test], evaluate: true")
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert main([command, "--cfg-path", str(tmp_path / "recipe.yaml"), "--offline"]) == 2
    printed = capsys.readouterr().err
    assert "LAVISH_OFFLINE is set. Fetch https://" in printed
    assert f"{tmp_path}/cache/coco/annotations/coco_karpathy_" in printed
    assert not (tmp_path / "out").exists()
