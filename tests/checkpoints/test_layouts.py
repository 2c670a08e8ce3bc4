"""Telling layouts apart by what a folder holds."""

import subprocess
import sys
from pathlib import Path

import pytest

from lavish.checkpoints import layouts
from lavish.common.errors import UnknownLayout


@pytest.mark.parametrize(
    "names",
    [
        ["config.json"],
        ["model.safetensors"],
        ["model.safetensors.index.json"],
        ["pytorch_model.bin"],
        ["config.json", "x.py"],
    ],
)
def test_the_hugging_face_layout(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert layouts.detect(tmp_path) == "hf"


def test_a_weight_file_alone(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    assert layouts.detect(tmp_path / "x.safetensors") == "hf"


def test_what_is_no_layout_is_described(tmp_path: Path) -> None:
    with pytest.raises(UnknownLayout, match=r"found nothing\. It reads a folder with config\.json"):
        layouts.detect(tmp_path)
    for number in range(12):
        (tmp_path / f"part{number:02}.dat").touch()
    with pytest.raises(UnknownLayout, match=r"found part00\.dat, .* and 4 more"):
        layouts.detect(tmp_path)
    with pytest.raises(UnknownLayout, match="a file of no layout"):
        layouts.detect(tmp_path / "part00.dat")
    with pytest.raises(UnknownLayout, match="no such file or folder"):
        layouts.detect(tmp_path / "absent")


def test_torch_is_not_needed_to_look(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    script = (
        "import sys; from lavish.checkpoints import hub, layouts;"
        f"print(layouts.detect(hub.resolve({str(tmp_path)!r})), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["hf", "False"]
