"""MindSpore reads what lavish wrote. It needs an environment of its own, which LAVISH_MINDSPORE_PYTHON names:

python -m venv ms && ms/bin/pip install mindspore
LAVISH_MINDSPORE_PYTHON=ms/bin/python pytest -m mindspore
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from lavish.checkpoints import mindspore
from lavish.checkpoints.mindspore import Layout
from lavish.checkpoints.mindspore_format import TYPE_NAMES, MindSporeFormat, encode_strategy
from lavish.checkpoints.output import Output, data_of

PYTHON = os.environ.get("LAVISH_MINDSPORE_PYTHON", "")
pytestmark = [
    pytest.mark.mindspore,
    pytest.mark.skipif(not PYTHON, reason="LAVISH_MINDSPORE_PYTHON names no Python that has MindSpore"),
]
READ = """
import json, sys
import mindspore
found = {}
for name, value in mindspore.load_checkpoint(sys.argv[1], crc_check=True).items():
    found[name] = [list(value.shape), str(value.dtype), bytes(value.get_bytes()).hex()]
print("found", json.dumps(found))
"""
MERGE = """
import sys
import mindspore
mindspore.transform_checkpoints(sys.argv[1], sys.argv[2], "merged", sys.argv[3], None)
"""


def run(program: str, *arguments: str | Path) -> str:
    done = subprocess.run([PYTHON, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def write(file: Path, tensors: dict[str, torch.Tensor], layout: MindSporeFormat) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    outputs = [
        Output(name, tuple(value.shape), str(value.dtype).removeprefix("torch."), lambda value=value: value)
        for name, value in tensors.items()
    ]
    with file.open("wb") as handle:
        for piece in layout.begin(outputs):
            handle.write(piece)
        for output in outputs:
            for piece in layout.tensor(output, data_of(output.make()), handle.tell()):
                handle.write(piece)
        for piece in layout.end(handle.tell()):
            handle.write(piece)


def test_every_dtype_scalars_slices_and_the_crc(tmp_path: Path) -> None:
    raw = torch.arange(1, 97, dtype=torch.uint8)
    tensors = {}
    for dtype in TYPE_NAMES:
        values = (raw % 2).bool() if dtype == "bool" else raw.view(getattr(torch, dtype))
        tensors[f"a.{dtype}"] = values.view(2, -1)
        tensors[f"scalar.{dtype}"] = values[0].clone()
    write(tmp_path / "x.ckpt", tensors, MindSporeFormat(has_crc=True, slice_bytes=32))
    line = next(line for line in run(READ, tmp_path / "x.ckpt").splitlines() if line.startswith("found "))
    found = json.loads(line.removeprefix("found "))
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        shape, dtype, content = found[name]
        assert shape == list(value.shape)
        assert dtype.lower() == name.partition(".")[2]
        assert bytes.fromhex(content) == bytes(data_of(value))


def test_a_flipped_bit_is_refused_by_mindspore_too(tmp_path: Path) -> None:
    write(tmp_path / "x.ckpt", {"a": torch.randn(5, 7)}, MindSporeFormat(has_crc=True))
    content = bytearray((tmp_path / "x.ckpt").read_bytes())
    content[60] ^= 1
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(AssertionError, match="crc check is failed"):
        run(READ, tmp_path / "x.ckpt")


def test_ranks_and_their_strategy(tmp_path: Path) -> None:
    whole = {"a": torch.randn(6, 8), "b": torch.randn(4, 8), "c": torch.randn(5)}
    layouts = {"a": Layout((2,), (0, -1)), "b": Layout((2,), (-1, 0)), "c": Layout((2,), (-1,))}
    for rank in range(2):
        part = {"a": whole["a"][3 * rank : 3 * rank + 3], "b": whole["b"][:, 4 * rank : 4 * rank + 4].contiguous()}
        write(tmp_path / "run" / f"rank_{rank}" / f"x{rank}.ckpt", {**part, "c": whole["c"]}, MindSporeFormat())
    (tmp_path / "s.ckpt").write_bytes(encode_strategy(layouts))
    run(MERGE, tmp_path / "run", tmp_path / "out", tmp_path / "s.ckpt")
    merged = mindspore.read(next((tmp_path / "out").rglob("*.ckpt")))
    assert all(torch.equal(merged[name], value) for name, value in whole.items())
