"""The folder of a run: checkpoints that are whole or absent, a log that can be cut, a plot."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from lavish.common.errors import CheckpointError, ConfigError
from lavish.runners.engines import Engine
from lavish.runners.optim import OptimizerGroup
from lavish.runners.run_folder import RunFolder
from lavish.runners.schema import RunConfig

CPU = torch.device("cpu")
ENGINE = Engine(RunConfig(), CPU)


def save(folder: RunFolder, step: int, model: nn.Module, state: dict) -> Path:
    optimizer = OptimizerGroup([torch.optim.SGD(model.parameters(), lr=0.1)])
    return folder.save(step, lambda place: ENGINE.save(place, model, optimizer), state)


def load(folder: RunFolder, model: nn.Module) -> dict | None:
    return folder.load_latest(lambda place, state: ENGINE.load(place, model, None, state), CPU)


def test_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    folder, model = RunFolder(tmp_path), nn.Linear(2, 2)
    for step in (5, 10, 9_999, 10_000):
        save(folder, step, model, {"step": step})
    assert [step for step, _ in folder.checkpoints()] == [9_999, 10_000]
    assert sorted(path.name for path in tmp_path.glob("c*")) == ["checkpoint_10000", "checkpoint_9999"]


def test_load_latest_gives_weights_and_state(tmp_path: Path) -> None:
    folder, model = RunFolder(tmp_path), nn.Linear(2, 2)
    state = {"step": 3, "sums": {"loss": 1.25}, "random": torch.get_rng_state()}
    save(folder, 3, model, state)
    other = nn.Linear(2, 2)
    loaded = load(folder, other)
    assert loaded is not None
    assert (loaded["step"], loaded["sums"]) == (3, {"loss": 1.25})
    assert torch.equal(loaded["random"], state["random"])
    assert torch.equal(other.weight, model.weight)


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert load(RunFolder(tmp_path / "new" / "run"), nn.Linear(2, 2)) is None


def test_what_a_killed_process_was_writing_is_no_checkpoint(tmp_path: Path) -> None:
    folder, model = RunFolder(tmp_path), nn.Linear(2, 2)
    save(folder, 1, model, {"step": 1})
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
    state = load(folder, model)
    assert state is not None
    assert state["step"] == 1


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    folder, model = RunFolder(tmp_path), nn.Linear(2, 2)
    save(folder, 4, model, {"step": 4, "try": 1})
    save(folder, 4, model, {"step": 4, "try": 2})
    state = load(folder, model)
    assert state is not None
    assert state["try"] == 2
    assert [path.name for path in tmp_path.glob("c*")] == ["checkpoint_4"]


@pytest.mark.parametrize("other", [nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 2))])
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, other: nn.Module) -> None:
    folder = RunFolder(tmp_path)
    save(folder, 6, nn.Linear(2, 2), {"step": 6})
    with pytest.raises(CheckpointError, match=r"checkpoint_6: this checkpoint is of another model .*run\.output_dir"):
        load(folder, other)


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_a_damaged_checkpoint_is_told_by_name(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path)
    path = save(folder, 6, nn.Linear(2, 2), {"step": 6}) / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"checkpoint_6: this checkpoint cannot be read .*the checkpoint before"):
        load(folder, nn.Linear(2, 2))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, model = RunFolder(tmp_path), nn.Linear(2, 2)
    save(folder, 3, model, {"step": 3})
    path = save(folder, 6, nn.Linear(2, 2), {"step": 6}) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    other = nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING, "lavish"):
        state = load(folder, other)
    assert state is not None
    assert state["step"] == 3
    assert torch.equal(other.weight, model.weight)
    assert "checkpoint_6: this checkpoint cannot be read" in caplog.text
    assert "It goes on from checkpoint_3." in caplog.text


def test_frozen_weights_stay_out_of_checkpoints(tmp_path: Path) -> None:
    folder, model = RunFolder(tmp_path), nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.BatchNorm1d(2))
    path = save(folder, 1, model, {"step": 1})
    held = load_file(path / "model.safetensors")
    assert sorted(held) == ["1.bias", "1.num_batches_tracked", "1.running_mean", "1.running_var", "1.weight"]
    other = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.BatchNorm1d(2))
    assert load(folder, other) is not None


def test_a_second_run_is_kept_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.locked(), pytest.raises(ConfigError, match=rf"another run is training here \(process {os.getpid()}\)"):
        RunFolder(tmp_path)
    RunFolder(tmp_path)


FILL = """
import resource, signal, sys
from pathlib import Path
import torch
from torch import nn
from lavish.common.errors import CheckpointError, ConfigError
sys.path.insert(0, {here!r})
from test_run_folder import RunFolder, save
folder = RunFolder({path!r})
save(folder, 1, nn.Linear(2, 2), {{"step": 1}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for size, state in ((500, {{}}), (2, {{"big": torch.zeros(100_000)}})):
    try:
        save(folder, 2, nn.Linear(size, size), {{"step": 2, **state}})
    except CheckpointError as error:
        print(error)
"""


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk: weights first, then the state, are cut off."""
    code = FILL.format(here=str(Path(__file__).parent), path=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.count("checkpoint 2 could not be written: no room") == 2, done.stderr
    assert [path.name for path in tmp_path.glob("c*")] == ["checkpoint_1"]


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
