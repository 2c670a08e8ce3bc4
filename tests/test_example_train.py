"""examples/lavis/train.py, the lines of LAVIS's own script, trains a tiny BLIP."""

import subprocess
import sys
from pathlib import Path

import tiny_lavis
import torch

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "lavis" / "train.py"


def test_the_script_trains(tmp_path: Path) -> None:
    """ "train.py" is called as LAVIS's."""
    path = tiny_lavis.write(tmp_path, tiny_lavis.caption_recipe(tmp_path))
    command = [sys.executable, str(EXAMPLE), "--cfg-path", str(path), "--options", "run.max_epoch=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"3 steps; checkpoints and log.txt are in {tmp_path / 'out'}" in done.stdout
    assert "model" in torch.load(tmp_path / "out" / "checkpoint_best.pth", weights_only=True)
