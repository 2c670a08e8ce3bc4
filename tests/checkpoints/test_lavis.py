"""LAVIS `.pth` files: flat, wrapped, saved by a run; the weights come out and nothing else is run or read."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lavish.checkpoints import lavis
from lavish.common.errors import CheckpointError, UnknownLayout, UnsafeCheckpoint


class Intruder:
    """Stands for any class that a pickle may name."""


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3), "ids": torch.arange(5)}


def equal(read, expected: dict[str, torch.Tensor]) -> bool:
    return list(read) == list(expected) and all(torch.equal(read[name], value) for name, value in expected.items())


def test_a_flat_file(tmp_path: Path, weights) -> None:
    torch.save(weights, tmp_path / "eva_vit_g.pth")
    assert equal(lavis.read(tmp_path / "eva_vit_g.pth"), weights)


def test_a_wrapped_file(tmp_path: Path, weights) -> None:
    torch.save({"model": weights}, tmp_path / "x.pth")
    assert equal(lavis.read(str(tmp_path / "x.pth")), weights)


def test_what_a_run_saves(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    saved = {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": {"run": {"task": "captioning", "lr": 1e-5, "splits": ["train"]}},
        "scaler": None,
        "epoch": 3,
    }
    torch.save(saved, tmp_path / "checkpoint_best.pth")
    assert equal(lavis.read(tmp_path / "checkpoint_best.pth"), net.state_dict())


def test_a_tensor_named_model_is_flat(tmp_path: Path, weights) -> None:
    torch.save({"model": torch.ones(2), **weights}, tmp_path / "x.pth")
    assert "model" in lavis.read(tmp_path / "x.pth")


def test_tied_tensors_share_their_bytes(tmp_path: Path) -> None:
    table = torch.randn(6, 2)
    torch.save({"model": {"embed": table, "head": table}}, tmp_path / "x.pth")
    read = lavis.read(tmp_path / "x.pth")
    assert read.info("embed").offset == read.info("head").offset


def test_the_one_file_of_a_folder(tmp_path: Path, weights) -> None:
    with pytest.raises(UnknownLayout, match=r"without a \.pth file; found nothing"):
        lavis.read(tmp_path)
    torch.save(weights, tmp_path / "x.pth")
    (tmp_path / "med_config.json").write_text("{}")
    assert equal(lavis.read(tmp_path), weights)
    torch.save(weights, tmp_path / "y.pth")
    with pytest.raises(UnknownLayout, match=r"2 \.pth files, x\.pth, y\.pth; name one"):
        lavis.read(tmp_path)
    for name in ("checkpoint_0", "checkpoint_last", "checkpoint_best"):  # a training run's, the best one last
        torch.save({"model": {**weights, name: torch.zeros(1)}}, tmp_path / f"{name}.pth")
        if name != "checkpoint_0":
            assert name in lavis.read(tmp_path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UnknownLayout, match="no such file or folder"):
        lavis.read(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list"),
        ({}, "holds no tensors"),
        ({"model": {}}, "no tensors under 'model'"),
        ({"model": {"a": 3}}, "holds a int under 'model.a'"),
        ({"a": {"b": torch.ones(2)}}, "holds a dict under 'a'"),
        ({"optimizer": {"state": {}}, "epoch": 3}, "training run's file .optimizer, epoch. without"),
    ],
)
def test_what_holds_no_weights(tmp_path: Path, content, message: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        lavis.read(tmp_path / "x.pth")


def test_a_class_beside_the_weights_is_refused(tmp_path: Path, weights) -> None:
    torch.save({"model": weights, "config": Intruder()}, tmp_path / "x.pth")
    with pytest.raises(UnsafeCheckpoint, match="Intruder"):
        lavis.read(tmp_path / "x.pth")


def test_a_cut_file(tmp_path: Path, weights) -> None:
    torch.save(weights, tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="not a torch zip file"):
        lavis.read(tmp_path / "x.pth")


def test_a_link_out_of_its_folder(tmp_path: Path, weights) -> None:
    torch.save(weights, tmp_path / "elsewhere.pth")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "x.pth").symlink_to(tmp_path / "elsewhere.pth")
    with pytest.raises(UnsafeCheckpoint, match="outside of the folder"):
        lavis.read(folder)
    assert equal(lavis.read(folder / "x.pth"), weights)  # who names the file means it
