"""The evaluation of examples/lavis runs as it stands, on the fixture's checkpoint and local files."""

import os
import subprocess
import sys
from pathlib import Path

import evaluated_sets as sets

SCRIPT = sets.ROOT / "examples" / "lavis" / "evaluate.py"


def test_the_recipe_of_blip(tmp_path: Path) -> None:
    assert SCRIPT.name == "evaluate.py"
    cache = sets.fill(tmp_path / "cache")
    options = sets.tiny("blip_vqa", tmp_path / "out", *sets.sized("coco_vqa"))
    command = [sys.executable, str(SCRIPT), "--cfg-path", str(sets.EVAL / "vqav2_eval.yaml"), "--options", *options]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(sets.ROOT / "src"),
        "LAVISH_CACHE": str(cache),
        "LAVISH_OFFLINE": "1",
    }
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert lines[0].startswith("coco_vqa/val: vqa_accuracy 41.43 (")
    assert lines[1] == f"coco_vqa/val: {tmp_path / 'out' / 'report.html'}"
