"""A full read: checksums as other tools give them, statistics as torch gives them, and what is wrong."""

import hashlib
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lavish.checkpoints import hf
from lavish.common.errors import UnknownLayout
from lavish.inference.checkup import CHUNK_NUMEL, Part, check

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
V2 = FIXTURES / "cogvlm2" / "open" / "checkpoint"


def with_weights(folder: Path, **changed: torch.Tensor) -> Path:
    shutil.copytree(V2, folder, ignore=shutil.ignore_patterns("model*"))
    weights = {name: value.clone() for name, value in hf.read(V2).items()} | changed
    save_file(weights, folder / "model.safetensors")
    return folder


def test_checksums_and_statistics() -> None:
    seen: list[tuple[str, int, int]] = []
    found = check(V2, progress=lambda *step: seen.append(step))
    assert (found.layout, found.family, found.problems, found.notes) == ("hf", "cogvlm", (), ())
    for file in found.files:
        assert file.sha256 == hashlib.sha256(file.file.read_bytes()).hexdigest()
        assert file.expected is None
    stored = hf.read(V2)
    parts = {part.name: part for part in found.parts}
    assert set(parts) == {"model.embed_tokens", "model.layers", "model.norm", "model.vision", "lm_head"}
    assert sum(part.num_tensors for part in parts.values()) == len(stored)
    assert sum(part.numel for part in parts.values()) == sum(value.numel() for value in stored.values())
    layers = torch.cat([value.flatten() for name, value in stored.items() if name.startswith("model.layers.")]).double()
    part = parts["model.layers"]
    assert part.mean == pytest.approx(float(layers.mean()))
    assert part.std == pytest.approx(float(layers.std(correction=0)))
    assert (part.minimum, part.maximum) == (float(layers.min()), float(layers.max()))
    assert seen[-1][1] == seen[-1][2]
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_numbers_come_in_pieces() -> None:
    values = torch.linspace(-1, 1, 1000)
    whole, pieces = Part("a", numel=1000), Part("a", numel=1000)
    whole.add(values)
    for piece in values.split(77):
        pieces.add(piece)
    assert (pieces.minimum, pieces.maximum) == (whole.minimum, whole.maximum)
    assert pieces.std == pytest.approx(whole.std)
    assert CHUNK_NUMEL * 8 < 50_000_000


def test_a_part_without_numbers() -> None:
    part = Part("a", numel=2)
    part.add(torch.tensor([float("nan"), float("-inf")]))
    assert (part.num_nan, part.num_inf, part.num_finite) == (1, 1, 0)
    assert math.isnan(part.mean)
    assert math.isnan(part.std)


def test_a_matrix_of_zeros_is_a_note(tmp_path: Path) -> None:
    shape = hf.read(V2)["lm_head.weight"].shape
    found = check(with_weights(tmp_path / "zeros", **{"lm_head.weight": torch.zeros(shape)}))
    assert found.problems == ()
    assert found.notes == ("'lm_head.weight' in model.safetensors is zero throughout.",)


def test_a_missing_tensor_is_a_problem(tmp_path: Path) -> None:
    folder = with_weights(tmp_path / "less")
    weights = {name: value.clone() for name, value in hf.read(V2).items() if name != "model.norm.weight"}
    save_file(weights, folder / "model.safetensors")
    found = check(folder)
    assert "1 tensor is missing, first model.norm.weight" in found.problems[0]
    assert len(found.files) == 1
    assert found.parts


def test_a_lora_in_files_of_its_own_is_read_too(tmp_path: Path) -> None:
    folder = tmp_path / "release"
    shutil.copytree(FIXTURES / "clip_qwen" / "open" / "checkpoint", folder)
    assert {part.name: part.num_tensors for part in check(folder).parts}["LoRA"] == 12
    weights = folder / "checkpoint-27000" / "adapter_model.bin"
    matrices = {name: value.clone() for name, value in hf.read(weights).items()}
    first = next(iter(matrices))
    matrices[first][0, 0] = float("nan")
    torch.save(matrices, weights)
    found = check(folder)
    assert found.problems == (f"{first!r} in adapter_model.bin holds 1 NaN and 0 infinities.",)
    assert "adapter_model.bin" in {file.file.name for file in found.files}


def test_a_file_of_the_hub_is_held_against_its_name(tmp_path: Path) -> None:
    """The hub's cache keeps a large file under its SHA-256."""
    root = tmp_path / "models--a--b"
    (root / "blobs").mkdir(parents=True)
    folder = with_weights(root / "snapshots" / "1")
    raw = (folder / "model.safetensors").read_bytes()
    right, wrong = root / "blobs" / hashlib.sha256(raw).hexdigest(), root / "blobs" / ("0" * 64)
    for blob in (right, wrong):
        blob.write_bytes(raw)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(blob)
        found = check(folder)
        assert found.files[0].expected == blob.name
        assert bool(found.problems) == (blob == wrong)
    assert "and the hub's is 000" in found.problems[0]


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UnknownLayout):
        check(tmp_path)
