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


def test_the_folder_above_names_the_one_that_is_meant(tmp_path: Path) -> None:
    for name in ("b-model", "a-model", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "b-model" / "config.json").touch()
    with pytest.raises(UnknownLayout, match=r"its subfolder 'b-model' has a config\.json\. Give that: .*/b-model$"):
        layouts.detect(tmp_path)
    (tmp_path / "a-model" / "config.json").touch()
    with pytest.raises(UnknownLayout, match=r"'a-model' has a config\.json \(so have 1 others\)"):
        layouts.read_config_json(tmp_path)


def test_torch_is_not_needed_to_look(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    script = (
        "import sys; from lavish.checkpoints import hub, layouts;"
        f"print(layouts.detect(hub.resolve({str(tmp_path)!r})), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["hf", "False"]
