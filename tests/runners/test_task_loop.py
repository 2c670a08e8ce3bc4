"""Tasks of LAVIS that make the steps of an epoch themselves, and callers of its loops."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_lavis_recipe import Points, Swap, SwapTask, lines, same, toy
from torch import nn

from lavish.common.errors import ConfigError, DataError
from lavish.runners.held_out import HeldOutLoader
from lavish.runners.schedules import ConstantLR
from lavish.tasks.base_task import BaseTask


class Wrapped(SwapTask):
    """Does something before each epoch, as tasks written for LAVIS do."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[int] = []

    def train_epoch(self, epoch: int, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, str]:
        self.epochs.append(epoch)
        return super().train_epoch(epoch, model, *args, **kwargs)

    def train_iters(self, epoch: int, *args: Any, **kwargs: Any) -> dict[str, str]:
        self.epochs.append(epoch)
        return super().train_iters(epoch, *args, **kwargs)


def wrapped(folder: Path, **keys: Any) -> Any:
    runner = toy(folder, **keys)
    runner.task = Wrapped()
    return runner


@pytest.mark.parametrize("iters", [False, True])
def test_a_task_that_overrides_the_loop_gives_the_same_weights(tmp_path: Path, iters: bool) -> None:
    """Three epochs of five samples, two a pass, two passes a step: also the short last step is the same."""
    keys = {"iters": iters, "accum_grad_iters": 2, "max_iters": 6, "iters_per_inner_epoch": 2}
    toy(tmp_path / "runner", **keys).train()
    by_task = wrapped(tmp_path / "task", **keys)
    by_task.train()
    assert by_task.task.epochs == [0, 1, 2]
    if iters:  # a runner's step may be short where an epoch ends, and LAVIS's loop gives all passes one weight
        assert same(tmp_path / "task", tmp_path / "runner")
    steps = [line["step"] for line in lines(tmp_path / "task" / "log.jsonl")]
    assert steps == [2, 4, 6]


def test_it_goes_on_from_the_last_epoch(tmp_path: Path) -> None:
    wrapped(tmp_path / "straight").train()
    broken = wrapped(tmp_path / "broken")
    original = broken.task.train_step

    def step(model: nn.Module, samples: dict[str, Any]) -> Any:
        if samples["epoch"] == 2 and samples["iters"] == 1:
            raise KeyboardInterrupt
        return original(model, samples)

    broken.task.train_step = step
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    again = wrapped(tmp_path / "broken")
    again.train()
    assert again.task.epochs == [2]
    assert same(tmp_path / "broken", tmp_path / "straight")


def test_what_only_the_runner_does_is_refused(tmp_path: Path) -> None:
    for key, value in (("max_grad_norm", 1.0), ("ema_decay", 0.9)):
        with pytest.raises(ConfigError, match=rf"run\.{key} is .*Wrapped overrides train_epoch.*run\.{key}=0"):
            wrapped(tmp_path, **{key: value}).train()


def test_the_loops_are_called_as_those_of_lavis() -> None:
    """By a script of one's own: a loader, an optimizer, a schedule. Two passes a step, and the last one by itself."""
    torch.manual_seed(7)
    model, points = Swap().eval(), Points(5)
    optimizer = torch.optim.SGD(model.layer.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(points, batch_size=2, collate_fn=points.collater)  # type: ignore[arg-type]
    schedule = ConstantLR(optimizer, init_lr=0.1, max_epoch=1, min_lr=0)
    steps: list[dict[str, Any]] = []
    task = BaseTask()
    original = task.train_step

    def step(model: nn.Module, samples: dict[str, Any]) -> Any:
        steps.append({name: samples[name] for name in ("epoch", "iters", "num_iters_per_epoch")})
        return original(model, samples)

    task.train_step = step  # type: ignore[method-assign]
    told = task.train_epoch(
        epoch=3, model=model, data_loader=loader, optimizer=optimizer, lr_scheduler=schedule, accum_grad_iters=2
    )
    assert steps == [{"epoch": 3, "iters": at, "num_iters_per_epoch": 3} for at in range(3)]
    assert set(told) == {"lr", "loss", "loss_part"}
    assert float(told["loss_part"]) == pytest.approx(float(told["loss"]) / 2, rel=1e-5)
    more = task.train_iters(0, 6, 2, model, iter(loader), optimizer, schedule)
    assert steps[3:] == [{"epoch": 3, "iters": at, "num_iters_per_epoch": 2} for at in range(2)]
    assert float(more["loss"]) != float(told["loss"])


def test_samples_know_the_moment_as_lavis_s_models_ask(tmp_path: Path) -> None:
    """Momentum models of LAVIS rise by samples["epoch"] and samples["iters"]."""
    runner, seen = toy(tmp_path, accum_grad_iters=2, max_epoch=2), []
    original = runner.task.train_step

    def step(model: nn.Module, samples: dict[str, Any]) -> Any:
        seen.append((samples["epoch"], samples["iters"], samples["num_iters_per_epoch"]))
        return original(model, samples)

    runner.task.train_step = step  # type: ignore[method-assign]
    runner.train()
    assert seen == [(epoch, at, 4) for epoch in (0, 1) for at in (0, 1, 2)]


# -- held-out samples


class Texts(Points):
    """Has what a retrieval model of LAVIS reads off the loader's data set."""

    text = ("a", "b", "c")

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 4:
            raise DataError("row 5 is no picture.")
        return super().__getitem__(index)


def test_a_task_sees_the_data_set_behind_the_loader(tmp_path: Path) -> None:
    runner, found = toy(tmp_path), []

    def evaluation(model: nn.Module, data_loader: Any, cuda_enabled: bool | None = None) -> list[Any]:
        found.extend(data_loader.dataset.text)
        return [{"instance_id": name} for samples in data_loader for name in samples["instance_id"]]

    runner.datasets["points"]["val"] = Texts(3)
    runner.task.evaluation = evaluation  # type: ignore[method-assign]
    runner.task.after_evaluation = lambda **given: {"agg_metrics": len(given["val_result"])}  # type: ignore
    assert runner.eval_epoch("val", 0) == {"agg_metrics": 3}
    assert found == ["a", "b", "c"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_held_out_sample_is_told_in_one_line(num_workers: int) -> None:
    loader = HeldOutLoader(Texts(5), [[0, 1], [2, 3], [4]], num_workers)
    assert len(loader) == 3
    with pytest.raises(DataError, match=r"^row 5 is no picture\.$"):
        list(loader)
