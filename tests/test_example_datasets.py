"""The script of the tutorial's fourth usage runs as it stands, on small local files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lavish.datasets.builders import dataset_zoo

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "lavis" / "datasets.py"


def run(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = {"LAVISH_CACHE": str(cache), "LAVISH_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=120)


def test_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "datasets")
    import zoo_files

    zoo_files.coco_caption(tmp_path / "cache")
    answer = run(tmp_path / "cache", "coco_caption", "--pictures", str(zoo_files.pictures(tmp_path / "pictures")))
    assert answer.returncode == 0, answer.stderr
    names, splits, annotation, sample = answer.stdout.splitlines()
    assert names.startswith(f"{len(dataset_zoo)} names: aok_vqa, avsd_dialogue, ")
    assert splits == "splits: {'train': 3, 'val': 2, 'test': 1}"
    assert all(f"'{key}'" in annotation for key in ("caption", "image", "image_id", "instance_id"))
    assert "<PIL.Image.Image image mode=RGB size=20x16" in sample


def test_offline_it_says_what_to_put_where(tmp_path: Path) -> None:
    answer = run(tmp_path / "cache", "coco_vqa")
    assert "LAVISH_OFFLINE is set. Fetch https://" in answer.stderr
