"""SIGKILL at random moments, also while a checkpoint is written: the last weights are those of an unbroken run."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from test_lavis_recipe import lines, same, toy
from toy_task import config, runner, weights

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]
NUM_KILLS = 20


def killed_until_done(train, seconds: float, folder: Path) -> tuple[int, int]:
    """Run `train` in processes that are killed after random times, then to the end; give how many kills hit it, and how
    many of them left something half written."""
    draw, hits, halves = random.Random(7), 0, 0
    for _ in range(NUM_KILLS):
        child = os.fork()
        if child == 0:
            try:
                train()
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, seconds / 4))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        hits += os.WIFSIGNALED(status)
        halves += any(folder.glob("*.partial"))
    train()
    return hits, halves


def test_kills_change_no_bit(tmp_path: Path) -> None:
    keys = {"max_iters": 60, "save_freq": 1, "log_freq": 7}
    started = time.perf_counter()
    runner(config(tmp_path / "straight", **keys), noise=0.5, depth=60).train()
    seconds = time.perf_counter() - started
    broken = tmp_path / "broken"
    hits, halves = killed_until_done(
        lambda: runner(config(broken, **keys), noise=0.5, depth=60).train(), seconds, broken
    )
    assert hits >= 5
    assert halves >= 1, "no kill came while something was being written"
    assert weights(broken) == weights(tmp_path / "straight")
    assert lines(broken / "log.jsonl") == lines(tmp_path / "straight" / "log.jsonl")


def test_kills_of_a_lavis_run_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With validation, its best checkpoint, an average of the weights and a frozen part."""
    from test_lavis_recipe import SwapTask

    monkeypatch.setattr(SwapTask, "scores", [float(-((epoch - 5) ** 2)) for epoch in range(8)])
    keys = {"max_epoch": 8, "ema_decay": 0.9, "valid_splits": ["val"], "save_freq": 1}
    started = time.perf_counter()
    toy(tmp_path / "straight", **keys).train()
    seconds = time.perf_counter() - started
    broken = tmp_path / "broken"
    killed_until_done(lambda: toy(broken, **keys).train(), seconds, broken)
    for name in ("checkpoint_best.pth", "checkpoint_last.pth"):
        assert same(broken, tmp_path / "straight", name)
    assert torch.load(broken / "checkpoint_best.pth", weights_only=True)["epoch"] == 5
    assert lines(broken / "validations.jsonl") == lines(tmp_path / "straight" / "validations.jsonl")
    assert lines(broken / "log.jsonl") == lines(tmp_path / "straight" / "log.jsonl")
