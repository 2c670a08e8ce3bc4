"""The loop: exact resume after SIGKILL, epochs and steps, accumulation, what is logged."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerance import BIGGER_BATCH
from toy_task import Numbers, ToyTask, config, runner, weights

from lavish.common.errors import CheckpointError, ConfigError, TrainingError
from lavish.runners import RunnerBase, RunnerIter

PROGRAM = str(Path(__file__).with_name("toy_task.py"))


def run_program(folder: Path, num_steps: int, kill_at: int = 0) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, PROGRAM, str(folder), str(num_steps), str(kill_at)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """Killed within a log window, within an epoch and between checkpoints; noise comes from torch's generator."""
    straight = runner(config(tmp_path / "straight"), noise=0.5)
    straight.train()
    killed = run_program(tmp_path / "killed", 7, kill_at=5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(path.name for path in (tmp_path / "killed").glob("checkpoint_*")) == ["checkpoint_2", "checkpoint_4"]
    resumed = run_program(tmp_path / "killed", 7)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout) == {"step": 7, "samples": 28}
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("killed", "straight")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["step"] for line in logs[0].splitlines()] == [3, 6, 7]


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    runner(config(tmp_path)).train()
    before = weights(tmp_path)
    again = runner(config(tmp_path))
    again.train()
    assert again.step == 7
    assert again.dataset.seen == []  # type: ignore[attr-defined]
    assert weights(tmp_path) == before


def test_the_log_has_means_over_its_window(tmp_path: Path) -> None:
    toy, losses = runner(config(tmp_path)), []
    toy.progress = lambda step, num_steps, values: losses.append((step, num_steps, values))
    toy.train()
    assert [(step, num_steps) for step, num_steps, _ in losses] == [(step, 7) for step in range(1, 8)]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for line, window in zip(lines, ((1, 2, 3), (4, 5, 6), (7,)), strict=True):
        for name in ("loss", "loss_first", "right_sign", "grad_norm"):
            mean = sum(losses[step - 1][2][name] for step in window) / len(window)
            assert line[name] == pytest.approx(mean, rel=1e-12)
    assert [line["lr_scale"] for line in lines][:1] == [1.0]
    assert lines[-1]["lr_scale"] == 0.0


def test_the_plot_is_drawn_at_the_end(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runner(config(tmp_path)).train()
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_steps_go_on_into_the_next_epoch(tmp_path: Path) -> None:
    toy = runner(config(tmp_path, max_iters=5))
    toy.train()
    seen = toy.dataset.seen  # type: ignore[attr-defined]
    assert len(seen) == 20
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert toy.num_samples == 20


def test_epochs_take_every_sample_once(tmp_path: Path) -> None:
    toy = runner(config(tmp_path, max_epoch=2, save_freq=1), epochs=True)
    toy.train()
    seen = toy.dataset.seen  # type: ignore[attr-defined]
    assert toy.task.batch_sizes == [4, 4, 2, 4, 4, 2]  # type: ignore[attr-defined]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert (toy.num_steps, toy.num_samples) == (6, 20)
    assert [step for step, _ in toy.folder.checkpoints()] == [3, 6]


def test_epochs_and_accumulation_leave_a_partial_step(tmp_path: Path) -> None:
    toy = runner(config(tmp_path, max_epoch=1, batch_size_train=3, accum_grad_iters=2, warmup_steps=0), epochs=True)
    toy.train()
    assert toy.task.batch_sizes == [3, 3, 3, 1]  # type: ignore[attr-defined]
    assert toy.num_steps == 2


def test_an_interrupted_epoch_goes_on(tmp_path: Path) -> None:
    runner(config(tmp_path / "straight", max_epoch=3, save_freq=1), epochs=True, noise=0.5).train()
    broken = runner(config(tmp_path / "broken", max_epoch=3, save_freq=1), epochs=True, noise=0.5)

    def interrupt(step: int, *_: object) -> None:
        if step == 5:
            raise KeyboardInterrupt

    broken.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    torch.manual_seed(99)  # whatever happened in between
    runner(config(tmp_path / "broken", max_epoch=3, save_freq=1), epochs=True, noise=0.5).train()
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")


def test_a_long_epoch_has_states_to_go_on_from(tmp_path: Path) -> None:
    """5 steps of an epoch; a state every 2 of them, and at its end."""
    changes = {"max_epoch": 1, "batch_size_train": 2, "save_freq": 1, "warmup_steps": 0}
    runner(config(tmp_path / "straight", **changes), epochs=True, noise=0.5).train()
    broken, kept = runner(config(tmp_path / "broken", save_steps=2, **changes), epochs=True, noise=0.5), []

    def interrupt(step: int, *_: object) -> None:
        if step == 4:
            kept.extend(path.name for path in (tmp_path / "broken").glob("checkpoint_*"))
            raise KeyboardInterrupt

    broken.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert kept == ["checkpoint_2"]
    going_on = runner(config(tmp_path / "broken", save_steps=2, **changes), epochs=True, noise=0.5)
    going_on.train()
    assert len(going_on.dataset.seen) == 6  # type: ignore[attr-defined]
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")


def test_float16_scales_the_loss_and_skips_steps_that_overflow(tmp_path: Path) -> None:
    """The scale begins at 65536 and halves at each overflow; a resumed run goes on with what it was."""
    changes = {"amp": True, "amp_dtype": "float16", "init_lr": 1e-3, "muon_lr": 1e-3}
    toy, scales = runner(config(tmp_path / "all", **changes)), []
    toy.progress = lambda *_: scales.append(toy.maker.scaler.get_scale())
    with torch.no_grad():
        dict(toy.model.named_parameters())["lm_head.weight"].mul_(5)  # gradients of 65536 times the loss overflow
    before = {name: weight.clone() for name, weight in toy.model.named_parameters()}
    toy.train()
    assert scales[0] == 32768.0
    assert scales[-1] <= 32768.0
    assert all(torch.isfinite(weight).all() for weight in toy.model.parameters())
    assert any(not torch.equal(before[name], weight) for name, weight in toy.model.named_parameters())
    again = runner(config(tmp_path / "all", max_iters=8, **changes))
    again.train()
    assert again.maker.scaler.get_scale() <= scales[-1]


@pytest.mark.parametrize("epochs", [False, True])
def test_accumulation_equals_a_bigger_batch(tmp_path: Path, epochs: bool) -> None:
    big = runner(config(tmp_path / "big", batch_size_train=6, max_epoch=2), epochs=epochs)
    small = runner(config(tmp_path / "small", batch_size_train=2, accum_grad_iters=3, max_epoch=2), epochs=epochs)
    big.train()
    small.train()
    assert big.dataset.seen == small.dataset.seen  # type: ignore[attr-defined]
    for name, parameter in big.model.named_parameters():
        torch.testing.assert_close(dict(small.model.named_parameters())[name], parameter, **BIGGER_BATCH)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    toy, norms = runner(config(tmp_path, max_grad_norm=1e-3, optimizer="adamw")), []
    toy.progress = lambda step, num_steps, values: norms.append(values["grad_norm"])
    toy.train()
    assert min(norms) > 1e-3  # what is logged is the norm before clipping


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_that_diverges_stops_and_keeps_its_checkpoints(tmp_path: Path, value: float) -> None:
    """At step 4 one sample is no number; the checkpoint of step 2 stays, and no weight has become NaN."""
    toy = runner(config(tmp_path))
    before = {}

    def spoil(step: int, *_: object) -> None:
        if step == 3:
            before.update({name: weight.clone() for name, weight in toy.model.named_parameters()})
            toy.dataset.points.fill_(value)  # type: ignore[attr-defined]

    toy.progress = spoil
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) at step 4 of 7: .*Lower the learning rate"):
        toy.train()
    assert all(torch.equal(weight, before[name]) for name, weight in toy.model.named_parameters())
    assert [path.name for path in tmp_path.glob("checkpoint_*")] == ["checkpoint_2"]


def test_order_depends_on_the_seed(tmp_path: Path) -> None:
    orders = []
    for seed in (1, 1, 2):
        toy = runner(config(tmp_path / str(len(orders)), seed=seed, max_iters=3))
        toy.train()
        orders.append(toy.dataset.seen)  # type: ignore[attr-defined]
    assert orders[0] == orders[1] != orders[2]


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    runner(config(tmp_path)).train()
    with pytest.raises(CheckpointError, match=r"another optimizer .*the recipe's is 'adamw'"):
        runner(config(tmp_path, optimizer="adamw")).train()


def test_what_cannot_be_trained_is_said_before_it_starts(tmp_path: Path) -> None:
    task = ToyTask()
    with pytest.raises(ConfigError, match=r"splits \['val'\], but training needs 'train'"):
        RunnerIter(config(tmp_path), task, task.build_model(), {"val": Numbers()})
    with pytest.raises(ConfigError, match="has no samples"):
        RunnerBase(config(tmp_path), task, task.build_model(), {"train": Numbers(0)})
    with pytest.raises(ConfigError, match="No device 'abacus'"):
        runner(config(tmp_path, device="abacus"))


def test_loader_processes_give_the_same_run(tmp_path: Path) -> None:
    runner(config(tmp_path / "here", max_iters=3), noise=0.5).train()
    runner(config(tmp_path / "there", max_iters=3, num_workers=1), noise=0.5).train()
    assert weights(tmp_path / "here") == weights(tmp_path / "there")
