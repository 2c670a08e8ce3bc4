"""A run shared out among processes: that it is shared at all, and that it gives what one process gives."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tolerance import BIGGER_BATCH
from toy_task import config, runner
from warm import run_together

from lavish.common import dist
from lavish.common.errors import ConfigError
from lavish.runners.device import device_of
from lavish.runners.schema import RunConfig

PROGRAM = str(Path(__file__).with_name("toy_task.py"))


def run_on_two(folder: Path, num_steps: int, **changes) -> list[dict]:
    """Run the toy on two processes; give what each of them trained on."""
    done = run_together(2, PROGRAM, folder, num_steps, 0, json.dumps(changes))
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return sorted(told, key=lambda line: line["rank"])


def newest_weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max(folder.glob("checkpoint_*"), key=lambda path: int(path.name.split("_")[1]))
    return load_file(newest / "model.safetensors")


@pytest.mark.parametrize("epochs", [False, True])
def test_two_processes_give_what_one_gives(tmp_path: Path, epochs: bool) -> None:
    """Also where the last step of an epoch of 10 samples has a pass for one of the two processes only."""
    changes = {"batch_size_train": 3, "accum_grad_iters": 2, "max_epoch": 2, "save_freq": 1}
    alone = runner(config(tmp_path / "alone", max_iters=4, **changes), epochs=epochs)
    alone.train()
    first, second = run_on_two(tmp_path / "two", 4, noise=0.0, epochs=epochs, **changes)
    own = [set(first["seen"]), set(second["seen"])]
    assert all(own), "a process trained on nothing"
    expected, shared = newest_weights(tmp_path / "alone"), newest_weights(tmp_path / "two")
    for name, tensor in expected.items():
        torch.testing.assert_close(shared[name], tensor, msg=name, **BIGGER_BATCH)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("alone", "two")]
    assert len(logs[0]) == len(logs[1])  # one process writes
    for ours, theirs in zip(*logs, strict=True):
        assert json.loads(theirs)["loss"] == pytest.approx(json.loads(ours)["loss"], rel=1e-5)


def test_processes_take_different_samples(tmp_path: Path) -> None:
    first, second = run_on_two(tmp_path, 1, batch_size_train=5, accum_grad_iters=2, warmup_steps=0)
    assert sorted(first["seen"] + second["seen"]) == list(range(10))


def test_a_shared_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """With noise: each process has its own, and the same one after a resume."""
    changes = {"batch_size_train": 2, "accum_grad_iters": 2, "lr_sched": "constant_lr"}
    run_on_two(tmp_path / "straight", 6, **changes)
    run_on_two(tmp_path / "paused", 4, **changes)
    run_on_two(tmp_path / "paused", 6, **changes)
    straight, paused = newest_weights(tmp_path / "straight"), newest_weights(tmp_path / "paused")
    assert all(torch.equal(straight[name], paused[name]) for name in straight)


def test_processes_make_equally_many_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the three passes of the last step one process has two; the other takes one along, which counts for nothing."""
    toy = runner(config(tmp_path, batch_size_train=2, accum_grad_iters=4), epochs=True, num_samples=14)
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        shares.append([share for _, share in toy.passes(1)])
    assert shares == [[1 / 3, 1 / 3], [1 / 3, 0.0]]


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    current = []
    monkeypatch.setattr("lavish.runners.device.resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of(RunConfig(device="cuda")) == torch.device("cuda:3")
    assert device_of(RunConfig(device="cuda:1")) == torch.device("cuda:1")
    assert device_of(RunConfig(device="cpu")) == torch.device("cpu")
    assert current == [torch.device("cuda:3"), torch.device("cuda:1")]


def test_passes_must_divide_among_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes share the 1 forward passes"):
        runner(config(tmp_path, accum_grad_iters=1))


def test_half_an_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"):
        dist.start("cpu")
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'many'"):
        dist.world_size()
