"""The folder of a run: checkpoints that are whole or absent, a log that can be cut, a plot."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from lavish.common.errors import CheckpointError
from lavish.runners.run_folder import RunFolder

CPU = torch.device("cpu")


def test_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    folder, model = RunFolder(tmp_path), nn.Linear(2, 2)
    for step in (5, 10, 9_999, 10_000):
        folder.save(step, model, {"step": step})
    assert [step for step, _ in folder.checkpoints()] == [9_999, 10_000]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_10000", "checkpoint_9999"]


def test_load_latest_gives_weights_and_state(tmp_path: Path) -> None:
    folder, model = RunFolder(tmp_path), nn.Linear(2, 2)
    state = {"step": 3, "sums": {"loss": 1.25}, "random": torch.get_rng_state()}
    folder.save(3, model, state)
    other = nn.Linear(2, 2)
    loaded = folder.load_latest(other, CPU)
    assert loaded is not None
    assert (loaded["step"], loaded["sums"]) == (3, {"loss": 1.25})
    assert torch.equal(loaded["random"], state["random"])
    assert torch.equal(other.weight, model.weight)


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "new" / "run").load_latest(nn.Linear(2, 2), CPU) is None


def test_what_a_killed_process_was_writing_is_no_checkpoint(tmp_path: Path) -> None:
    folder, model = RunFolder(tmp_path), nn.Linear(2, 2)
    folder.save(1, model, {"step": 1})
    (tmp_path / "checkpoint_2.partial").mkdir()
    (tmp_path / "checkpoint_2.partial" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "log.partial").write_text("half")
    (tmp_path / "checkpoint_7").mkdir()  # half deleted by hand
    (tmp_path / "checkpoint_7" / "state.pt").write_bytes(b"rest")
    (tmp_path / "checkpoint_9").write_text("a file")
    (tmp_path / "checkpoint_best").mkdir()
    folder = RunFolder(tmp_path)
    assert [step for step, _ in folder.checkpoints()] == [1]
    assert not list(tmp_path.glob("*.partial"))
    state = folder.load_latest(model, CPU)
    assert state is not None
    assert state["step"] == 1


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    folder, model = RunFolder(tmp_path), nn.Linear(2, 2)
    folder.save(4, model, {"step": 4, "try": 1})
    folder.save(4, model, {"step": 4, "try": 2})
    state = folder.load_latest(model, CPU)
    assert state is not None
    assert state["try"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_4"]


@pytest.mark.parametrize("other", [nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 2))])
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, other: nn.Module) -> None:
    folder = RunFolder(tmp_path)
    folder.save(6, nn.Linear(2, 2), {"step": 6})
    with pytest.raises(CheckpointError, match=r"checkpoint_6: this checkpoint is of another model .*run\.output_dir"):
        folder.load_latest(other, CPU)


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_a_damaged_checkpoint_is_told_by_name(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path)
    path = folder.save(6, nn.Linear(2, 2), {"step": 6}) / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"checkpoint_6: this checkpoint cannot be read .*the checkpoint before"):
        folder.load_latest(nn.Linear(2, 2), CPU)


def test_the_log_is_cut_where_a_resumed_run_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (2, 4, 6):
        folder.log({"step": step, "loss": 1 / step})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert [line["step"] for line in folder.read_log()] == [2, 4, 6]
    folder.cut_log(4)
    assert folder.read_log() == [{"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.25}]
    assert (tmp_path / "log.jsonl").read_text().endswith("}\n")


def test_the_plot_has_every_loss(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = RunFolder(tmp_path)
    assert folder.plot() is None
    for step in (2, 4):
        folder.log({"step": step, "lr_scale": 1.0, "loss": 1 / step, "loss_box": 0.1, "right_box": 0.5})
    path = folder.plot()
    assert path == tmp_path / "loss.png"
    with Image.open(path) as picture:
        assert picture.size == (1080, 600)
