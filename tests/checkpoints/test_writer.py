"""Writing the Hugging Face layout: readable by others, all or nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lavish.checkpoints import hf
from lavish.checkpoints.writer import save_sharded
from lavish.common.errors import CheckpointError

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.arange(5).to(torch.bfloat16),
    "flag": torch.tensor(True),
    "turned": torch.arange(6, dtype=torch.float64).reshape(2, 3).t(),
    "empty": torch.zeros(0, 2),
    "f8": torch.ones(3).to(torch.float8_e4m3fn),
}


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view(-1).view(torch.uint8)

    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(raw(left), raw(right))


def test_one_file_as_the_library_reads_it(tmp_path: Path) -> None:
    assert save_sharded(TENSORS, tmp_path / "new" / "folder") == [tmp_path / "new" / "folder" / "model.safetensors"]
    with safe_open(tmp_path / "new" / "folder" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(TENSORS)
        assert all(equal(file.get_tensor(name), value) for name, value in TENSORS.items())


def test_shards_and_index(tmp_path: Path) -> None:
    written = save_sharded(TENSORS, tmp_path, max_shard_bytes=40)
    assert [file.name for file in written][-2:] == ["model-00003-of-00003.safetensors", "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in TENSORS.values())
    assert set(index["weight_map"]) == set(TENSORS)
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / shard, "pt") as file:
            assert equal(file.get_tensor(name), TENSORS[name])
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in written)


def test_a_checkpoint_is_rewritten_in_place_and_stale_files_go(tmp_path: Path) -> None:
    save_sharded(TENSORS, tmp_path, max_shard_bytes=40)
    save_sharded(hf.read(tmp_path), tmp_path)  # from the very files that it replaces
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert all(equal(hf.read(tmp_path)[name], value) for name, value in TENSORS.items())
    save_sharded(hf.read(tmp_path), tmp_path, max_shard_bytes=60)
    assert not (tmp_path / "model.safetensors").exists()
    assert all(equal(hf.read(tmp_path)[name], value) for name, value in TENSORS.items())


def test_a_failure_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save_sharded(TENSORS, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    for wrong in ({}, {"a": torch.ones(1), "b": torch.ones(1, dtype=torch.complex128)}):
        with pytest.raises(CheckpointError):
            save_sharded(wrong, tmp_path)
    with pytest.raises(NotImplementedError):  # meta tensors have no bytes: torch's own words
        save_sharded({"a": torch.ones(1), "b": torch.ones(1, device="meta")}, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_killed_while_writing_the_old_checkpoint_stands(tmp_path: Path) -> None:
    old = {f"t{i}": torch.full((1000,), float(i)) for i in range(8)}
    save_sharded(old, tmp_path, max_shard_bytes=8000)
    script = (
        "import sys, torch\n"
        "from lavish.checkpoints.writer import save_sharded\n"
        "new = {f't{i}': torch.full((4_000_000,), -1.0) for i in range(8)}\n"
        "print('ready', flush=True)\n"
        "save_sharded(new, sys.argv[1], max_shard_bytes=32_000_000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as writing:
        assert writing.stdout is not None
        assert writing.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob(".*.tmp"))) < 2 and time.monotonic() < deadline and writing.poll() is None:
            time.sleep(0.0005)
        os.kill(writing.pid, signal.SIGKILL)
    tensors = hf.read(tmp_path)
    assert all(torch.equal(tensors[name], value) for name, value in old.items())
