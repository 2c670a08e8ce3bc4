"""What a run would take, before it is started: what learns, memory by part, steps, and the time of a step by a probe.

The model is built and its data are opened; a few forward and backward passes are made, and nothing is written.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from lavish.common import config as configs
from lavish.common.config import Config
from lavish.common.registry import registry
from lavish.runners import recipe as recipes
from lavish.runners.parts import Part, parts_of
from lavish.runners.runner_base import RunnerBase

NUM_PROBES = 3
GPUS_GIB = {"T4": 16, "RTX 4090": 24, "A100 40": 40, "L40S": 48, "H100": 80, "H200": 141}
"""Memory of common GPUs."""
GPU_OVERHEAD_BYTES = int(0.9 * 2**30)
"""What CUDA's own context and its libraries take."""


@dataclass
class Plan:
    """What one run would take."""

    name: str
    device: str
    parts: dict[str, Part]
    num_steps: int
    num_samples: int
    """Of the whole run."""
    passes_per_step: int
    activation_bytes: int
    """What the backward pass of one forward pass keeps."""
    step_seconds: float
    """Measured, over `passes_per_step` passes of one process."""
    peak_bytes: int | None = None
    """Measured by CUDA in the probe, with gradients and without the optimizer; None on other devices."""
    notes: list[str] = field(default_factory=list)

    def total(self, kind: str) -> int:
        """Add up a field over the parts."""
        return sum(getattr(part, kind) for part in self.parts.values())

    @property
    def memory_bytes(self) -> int:
        """The estimated peak: weights, gradients, the optimizer's state and activations."""
        kept = ("weight_bytes", "gradient_bytes", "optimizer_bytes")
        return sum(self.total(kind) for kind in kept) + self.activation_bytes

    @property
    def fits(self) -> list[str]:
        """The GPUs that the run fits on."""
        needed = self.memory_bytes + GPU_OVERHEAD_BYTES
        return [name for name, gib in GPUS_GIB.items() if needed <= gib * 2**30]


def plan(config: Any, name: str = "run") -> Plan:
    """Build what one run needs, probe it, and give what it would take.

    Args:
        config: one run's merged config, as `recipe.check` gives it.
        name: of the run.

    Raises: as a run, before its first step.
    """
    with TemporaryDirectory() as folder:
        runner = _runner(_elsewhere(config, folder))
        seconds, activations, peak = _probe(runner)
        return Plan(
            name=name,
            device=str(runner.device),
            parts=parts_of(runner.model, runner.run.optimizer),
            num_steps=runner.num_steps,
            num_samples=runner.span(runner.num_steps - 1).stop,
            passes_per_step=len(runner.passes(0)),
            activation_bytes=activations,
            step_seconds=seconds * len(runner.passes(0)),
            peak_bytes=peak,
        )


def _elsewhere(config: Any, folder: str) -> Any:
    """Give the config with another output folder."""
    if not isinstance(config, Config):
        return configs.merge(config, {"run": {"output_dir": folder}})
    return Config({**config.to_dict(), "run": {**config.to_dict()["run"], "output_dir": folder}})


def _runner(config: Any) -> RunnerBase:
    run = recipes.run_config(config)
    recipes.seed_all(run.seed)
    task = recipes.setup_task(config)
    model, datasets = task.build_model(config), task.build_datasets(config)
    told = config if isinstance(config, Config) else run
    return registry.get_runner_class(run.runner)(told, task, model, datasets)


def _probe(runner: RunnerBase) -> tuple[float, int, int | None]:
    """Make a few passes; give the seconds of one, the bytes that its backward pass keeps, and CUDA's peak."""
    is_cuda = runner.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    runner.model.train()
    batches, best, kept = runner._batches(), float("inf"), 0
    for number in range(min(NUM_PROBES, runner.num_steps * len(runner.passes(0)))):
        _, samples = next(batches)
        started = time.perf_counter()
        with _Saved(runner.model) as saved:
            losses = runner._forward(runner.called, samples)
        kept = max(kept, saved.num_bytes)
        runner.engine.backward(losses["loss"])
        if is_cuda:
            torch.cuda.synchronize()
        runner.optimizer.zero_grad()
        seconds = time.perf_counter() - started
        best = seconds if number == 0 else min(best, seconds)
    return best, kept, torch.cuda.max_memory_allocated() if is_cuda else None


class _Saved:
    """Counts the bytes that autograd keeps for the backward pass, each storage once, and no weights."""

    def __init__(self, model: nn.Module):
        self.num_bytes = 0
        self._seen = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self._alive: list[torch.Tensor] = []  # an address is counted once only while it is taken
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self._seen:
            self._seen.add(address)
            self._alive.append(tensor.detach())
            self.num_bytes += tensor.untyped_storage().nbytes()
        return tensor

    def __enter__(self) -> _Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)
        self._alive.clear()
