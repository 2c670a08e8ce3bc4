"""Timing of several things in one process, in turns, and the bounds of the machine measured beside them.

Every speed of these benchmarks is a ratio: the contenders run one after the other, round by round, so that a busy
machine slows all of them alike; the ratio is taken inside each round and reported with its spread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lavish.nn.linear import Linear


@dataclass(frozen=True)
class Spread:
    """The median of some values, with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f} .. {self.high:.2f}]"


_clock = time.perf_counter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all scripts share."""
    parser.add_argument("--threads", type=int, help="default: torch's own choice, the cores")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the time of the main thread only, for a machine that others keep busy; implies --threads 1",
    )


def set_up(options: argparse.Namespace) -> None:
    """Follow the shared options, and say what this runs on."""
    global _clock
    if options.clock == "cpu":
        _clock = time.thread_time
        torch.set_num_threads(1)
    elif options.threads:
        torch.set_num_threads(options.threads)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""  # Windows has none
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} of {os.cpu_count()} CPU cores, {device}{load}, "
        f"{options.clock} time"
    )


def now() -> float:
    """The clock that was asked for, in seconds."""
    return _clock()


def alternate(contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Run the contenders in turns, `rounds` times, after untimed rounds.

    A contender that times itself gives its seconds as a float (a decoding speed without the prompt); the time of any
    other is the time of its call, the device's work included.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(warmup + rounds):
        for name, contender in contenders.items():
            spent = timed(contender)
            if index >= warmup:
                seconds[name].append(spent)
    return seconds


def timed(contender: Callable[[], object]) -> float:
    """Give the seconds of one call, or what it says itself."""
    synchronize()
    started = now()
    said = contender()
    synchronize()
    spent = now() - started
    return said if isinstance(said, float) else spent


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(seconds: Mapping[str, Sequence[float]], slower: str, faster: str) -> Spread:
    """Say how many times as long `slower` took as `faster`, round by round."""
    return Spread.of([one / other for one, other in zip(seconds[slower], seconds[faster], strict=True)])


def read_memory(device: torch.device, megabytes: int) -> tuple[Callable[[], object], int]:
    """Give something that reads so many megabytes once, and how many bytes that is: the bound of decoding."""
    source = torch.ones(megabytes * 2**20 // 4, dtype=torch.float32, device=device)
    return source.sum, source.nbytes


def multiply(dtype: torch.dtype, device: torch.device, size: int) -> tuple[Callable[[], object], float]:
    """Give a square product of matrices, the fastest way we know, and its operations: the bound of a prefill."""
    states = torch.randn(size, size, device=device).to(dtype)
    layer = Linear(size, size, bias=False, device=device, dtype=dtype)
    return torch.inference_mode()(lambda: layer(states)), 2.0 * size**3


def verdict(name: str, value: float, goal: float, unit: str = "x", is_lower_better: bool = False) -> str:
    """Say in one line whether a goal is met."""
    is_met = value <= goal if is_lower_better else value >= goal
    sign = "<=" if is_lower_better else ">="
    return f"{name}: {value:.2f} {unit}, goal {sign} {goal:g} {unit}: {'met' if is_met else 'MISSED'}"
