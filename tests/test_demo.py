"""`make demo` end to end: the answers about the bundled picture are right, and the drawing is there."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lavish.common import grounding

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "src" / "lavish" / "pocket"
SQUARE = grounding.Box(411, 27, 866, 482)  # the blue square, as drawn


@pytest.mark.parametrize("path", sorted((POCKET / "pictures").glob("*.png")), ids=lambda path: path.stem)
def test_bundled_pictures_are_small_squares(path: Path) -> None:
    with Image.open(path) as picture:
        assert picture.size == (448, 448)
    assert path.stat().st_size < 100_000


def test_demo_answers_and_draws(tmp_path: Path) -> None:
    code = "import demo, sys, pathlib; demo.OUTPUT = pathlib.Path(sys.argv[1]); sys.exit(demo.main())"
    drawing = tmp_path / "demo" / "grounding.png"
    command = [sys.executable, "-c", code, str(drawing)]
    answer = subprocess.run(command, cwd=ROOT / "scripts", capture_output=True, text=True, encoding="utf-8")
    assert answer.returncode == 0, answer.stderr
    colour, number, box = (line.removeprefix("A: ") for line in answer.stdout.splitlines() if line.startswith("A: "))
    assert "green" in colour
    assert "5724" in number
    (found,) = grounding.parse(box)
    assert grounding.iou(found.boxes[0], SQUARE) >= 0.5
    with Image.open(drawing) as picture:
        assert picture.size == (448, 448)
    assert ".venv/bin/lavish chat" in answer.stdout
