"""DDP and FSDP2 on two gloo processes: the losses of one process, real shares, checkpoints that any engine reads."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_distributed import run_on_two
from toy_task import config, runner

from lavish.common.errors import ConfigError, MissingDependency
from lavish.runners import RunnerBase
from lavish.runners.deepspeed_engine import read_settings
from lavish.runners.engines import FSDP2Engine, build_engine

CHANGES = {"optimizer": "adamw", "batch_size_train": 2, "accum_grad_iters": 2, "log_freq": 1, "save_freq": 5}
DEPTH = 3


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def alone(folder: Path, num_steps: int, **changes) -> None:
    runner(config(folder, max_iters=num_steps, **{**CHANGES, **changes}), depth=DEPTH).train()


def shared(folder: Path, num_steps: int, **changes) -> list[dict]:
    return run_on_two(folder, num_steps, noise=0.0, depth=DEPTH, **{**CHANGES, **changes})


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Twenty losses of one process."""
    folder = tmp_path_factory.mktemp("alone")
    alone(folder, 20, lr_sched="constant_lr")
    return losses(folder)


needs_deepspeed = pytest.mark.skipif(not find_spec("deepspeed"), reason="needs deepspeed")


def zero(stage: int) -> dict:
    """ZeRO of a stage; 3 shares out even the small weights of the toy."""
    settings = {"stage": stage, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
    return {"engine": "deepspeed", "deepspeed_config": {"zero_optimization": settings}}


def whole_bytes(folder: Path) -> int:
    whole = runner(config(folder / "size", **CHANGES), depth=DEPTH)
    return sum(parameter.numel() * parameter.element_size() for parameter in whole.model.parameters())


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_have_the_losses_of_one(tmp_path: Path, straight: list[float], engine: str) -> None:
    told = shared(tmp_path, 20, engine=engine, lr_sched="constant_lr")
    assert losses(tmp_path) == pytest.approx(straight, rel=1e-5)
    assert len(straight) == 20
    num_bytes = whole_bytes(tmp_path)
    for kind, times in (("weights", 1), ("optimizer", 2)):
        own = [process["own_bytes"][kind] for process in told]
        if engine == "fsdp2":
            assert sum(own) == times * num_bytes, f"{kind}: each element is in one process"
            assert max(own) < 0.75 * times * num_bytes
        else:
            assert own == [times * num_bytes] * 2


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_has_the_losses_of_one(tmp_path: Path, straight: list[float], stage: int) -> None:
    told = shared(tmp_path, 20, lr_sched="constant_lr", **zero(stage))
    assert losses(tmp_path) == pytest.approx(straight, rel=1e-5)
    num_bytes = whole_bytes(tmp_path)
    for process in told:
        own = process["own_bytes"]
        assert own["optimizer"] == pytest.approx(num_bytes, rel=0.05), "half of two states a weight, filled up"
        assert own["weights"] == (pytest.approx(num_bytes / 2, rel=0.05) if stage == 3 else num_bytes)


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_checkpoints_of_deepspeed_go_on_elsewhere(tmp_path: Path, straight: list[float], stage: int) -> None:
    """One process -> ZeRO -> ZeRO -> DDP -> one process; the losses stay those of the unbroken run."""
    constant = {"lr_sched": "constant_lr"}
    alone(tmp_path, 5, **constant)
    shared(tmp_path, 9, **zero(stage), **constant)
    shared(tmp_path, 12, **zero(stage), **constant)
    shared(tmp_path, 15, engine="ddp", **constant)
    alone(tmp_path, 20, **constant)
    assert losses(tmp_path) == pytest.approx(straight, rel=1e-5)


def test_a_checkpoint_of_one_engine_goes_on_in_another(tmp_path: Path, straight: list[float]) -> None:
    """One process -> FSDP2 -> one process -> DDP, five steps each; the losses stay those of the unbroken run."""
    constant = {"lr_sched": "constant_lr"}
    alone(tmp_path, 5, **constant)
    shared(tmp_path, 10, engine="fsdp2", **constant)
    assert (tmp_path / "checkpoint_10" / "shards").is_dir()
    alone(tmp_path, 15, **constant)
    assert (tmp_path / "checkpoint_15" / "model.safetensors").is_file()
    shared(tmp_path, 20, engine="ddp", **constant)
    assert losses(tmp_path) == pytest.approx(straight, rel=1e-5)


def test_damaged_shares_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared(tmp_path, 10, engine="fsdp2")
    for path in (tmp_path / "checkpoint_10" / "shards").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    alone(tmp_path, 11)
    assert "checkpoint_10" in caplog.text
    assert "It goes on from checkpoint_5." in caplog.text


def test_more_processes_keep_the_samples_of_a_step(tmp_path: Path) -> None:
    """With batches of each process's own: two processes with one pass each go on from one process with two."""
    alone(tmp_path, 5, batch_per_process=True)
    with pytest.raises(ConfigError, match=r"made with 4 samples a step, and now .* are 2 .*accum_grad_iters=2"):
        alone(tmp_path, 6, batch_per_process=True, accum_grad_iters=1)
    first, second = shared(tmp_path, 6, batch_per_process=True, accum_grad_iters=1)
    assert len(first["seen"]) == len(second["seen"]) == 2


def test_one_process_has_nothing_to_share_with(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shares weights among processes, and there is one; start it with python -m"):
        alone(tmp_path, 1, engine="fsdp2")


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_deepspeed_that_is_absent_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MissingDependency, match=r"pip install 'lavish\[deepspeed\]'.*fsdp2"):
        build_engine(config(tmp_path, engine="deepspeed"), torch.device("cpu"))


def test_deepspeed_settings(tmp_path: Path) -> None:
    path = tmp_path / "zero3.json"
    path.write_text('{"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}')
    run = config(tmp_path, deepspeed_config=str(path), batch_size_train=3, max_grad_norm=0.5)
    settings = read_settings(run)
    assert settings["zero_optimization"] == {"stage": 3}
    assert (settings["train_micro_batch_size_per_gpu"], settings["gradient_clipping"]) == (3, 0.5)
    assert "train_batch_size" not in settings
    path.write_text('{"optimizer": {"type": "Adam"}}')
    with pytest.raises(ConfigError, match="optimizer follows from the recipe"):
        read_settings(run)
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_settings(run)


def test_the_runner_of_mpp_is_a_name() -> None:
    from lavish.common.registry import registry

    assert issubclass(registry.get_runner_class("deepspeed_runner"), RunnerBase)


def test_muon_needs_whole_matrices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs them whole; use ddp"):
        FSDP2Engine(config(tmp_path), torch.device("cpu")).prepare(torch.nn.Linear(2, 2))
