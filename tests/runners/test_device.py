"""Recipes of LAVIS name cuda; on another machine the error says what to type."""

from pathlib import Path

import pytest
import tiny_lavis
import torch

from lavish.cli import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="cuda is here")
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_device_that_is_not_here(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_lavis.write(tmp_path, tiny_lavis.caption_recipe(tmp_path, device="cuda"))
    assert main([command, "--cfg-path", str(path)]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "run.device: 'cuda' is not on this machine. Add `--options run.device=cpu` to the command" in told
    assert not (tmp_path / "out").exists()
