"""What a run would take, before it is started: what learns, memory by part, steps, and the time of a step by a probe.

The model is built and its data are opened; a few forward and backward passes are made, and nothing is written. The
memory of a pass is measured, by CUDA's allocator or by following each tensor that is made; to it come the optimizer's
states, which a run has from its first step on.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lavish.common import config as configs
from lavish.common.config import Config
from lavish.common.registry import registry
from lavish.runners import recipe as recipes
from lavish.runners.feature_folder import FeatureFolder, told
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
    pass_bytes: int = 0
    """Measured: the most that a pass held beside the weights, gradients and what was soon dropped included."""
    update_bytes: int = 0
    """What the optimizer makes and drops in its step."""
    save_bytes: int = 0
    """Copies of the weights that are made to write them, when gradients are dropped."""
    average_bytes: int = 0
    """The mean of the weights, where one is kept."""
    notes: list[str] = field(default_factory=list)

    def total(self, kind: str) -> int:
        """Add up a field over the parts."""
        return sum(getattr(part, kind) for part in self.parts.values())

    @property
    def memory_bytes(self) -> int:
        """The estimated peak: weights and optimizer states, and beside them a pass, a step, or what is written."""
        stays = self.total("weight_bytes") + self.total("optimizer_bytes") + self.average_bytes
        return stays + max(self.pass_bytes, self.total("gradient_bytes") + self.update_bytes, self.save_bytes)

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
        probe = _probe(runner)
        return Plan(
            name=name,
            device=str(runner.device),
            parts=parts_of(runner.model, runner.run.optimizer),
            num_steps=runner.num_steps,
            num_samples=runner.span(runner.num_steps - 1).stop,
            passes_per_step=len(runner.passes(0)),
            activation_bytes=probe.kept_bytes,
            step_seconds=probe.seconds * len(runner.passes(0)),
            pass_bytes=probe.pass_bytes,
            update_bytes=_update_bytes(runner),
            save_bytes=_save_bytes(runner),
            average_bytes=_learns(runner.model) if runner.average is not None else 0,
            notes=_notes(runner),
        )


def _elsewhere(config: Any, folder: str) -> Any:
    """Give the config with another output folder."""
    if not isinstance(config, Config):
        return configs.merge(config, {"run": {"output_dir": folder}})
    content = config.to_dict()
    if content["model"].get("feature_cache") is not None:  # what the probe keeps there goes with the folder
        content["model"] |= {"feature_cache": str(Path(folder) / "features")}
    return Config({**content, "run": {**content["run"], "output_dir": folder}})


def _notes(runner: RunnerBase) -> list[str]:
    features = getattr(runner.model, "features", None)  # chat models have it, and with a folder for them an object
    if not isinstance(features, FeatureFolder):
        return []
    splits = {*runner.run.train_splits, *runner.run.valid_splits}
    datasets = [one for by_split in runner.datasets.values() for name, one in by_split.items() if name in splits]
    return [told(features.entry_bytes, datasets)]


def _runner(config: Any) -> RunnerBase:
    run = recipes.run_config(config)
    recipes.seed_all(run.seed)
    task = recipes.setup_task(config)
    model, datasets = task.build_model(config), task.build_datasets(config)
    told = config if isinstance(config, Config) else run
    return registry.get_runner_class(run.runner)(told, task, model, datasets)


@dataclass
class _Probe:
    """What a few passes took."""

    seconds: float = 0.0
    """Of one."""
    kept_bytes: int = 0
    """For the backward pass."""
    pass_bytes: int = 0
    """At the peak, beside the weights."""


def _probe(runner: RunnerBase) -> _Probe:
    """Make three passes: what one keeps, how long one takes, and the peak of one."""
    probe = _Probe()
    runner.model.train()
    batches = [samples for _, samples in islice(runner._batches(), NUM_PROBES)]
    with _Saved(runner.model) as saved:
        losses = runner.maker.forward(runner.called, batches[0])
    probe.kept_bytes = saved.num_bytes
    runner.engine.backward(losses["loss"])
    del losses
    runner.optimizer.zero_grad()
    started = time.perf_counter()
    _pass(runner, batches[1 % len(batches)])
    probe.seconds = time.perf_counter() - started
    if len(runner.passes(0)) == 1:  # else the gradients of the first pass of a step lie there during the next one
        runner.optimizer.zero_grad()
    probe.pass_bytes = _peak_of_pass(runner, batches[-1])
    runner.optimizer.zero_grad()
    return probe


def _pass(runner: RunnerBase, samples: dict[str, Any]) -> None:
    losses = runner.maker.forward(runner.called, samples)
    runner.engine.backward(losses["loss"])
    if runner.device.type == "cuda":
        torch.cuda.synchronize()


def _peak_of_pass(runner: RunnerBase, samples: dict[str, Any]) -> int:
    """Make a pass, and give the most that it held beside the weights."""
    gradients = [weight.grad for weight in runner.model.parameters() if weight.grad is not None]
    if runner.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        _pass(runner, samples)
        weights = sum(part.weight_bytes for part in parts_of(runner.model, runner.run.optimizer).values())
        return torch.cuda.max_memory_allocated() - weights
    held = [*runner.model.parameters(), *runner.model.buffers(), *gradients]
    with _Made(held) as made:
        _pass(runner, samples)
    return sum(gradient.nbytes for gradient in gradients) + made.most_bytes


def _learns(model: nn.Module) -> int:
    return sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)


def _update_bytes(runner: RunnerBase) -> int:
    """Give what torch's AdamW makes in a step: a root of each second moment, of all weights at once on CUDA."""
    sizes = [weight.nbytes for weight in runner.model.parameters() if weight.requires_grad]
    return sum(sizes) if runner.device.type == "cuda" else 2 * max(sizes)


def _save_bytes(runner: RunnerBase) -> int:
    """Give what writing LAVIS's files takes on the device: the weights for the file, and those that a mean replaces."""
    if runner.config is None:
        return 0
    copies = (runner.device.type == "cpu") + (runner.average is not None)
    return copies * _learns(runner.model)


class _Made(TorchDispatchMode):
    """Follows the tensors that are made, each storage once, until they are dropped.

    Args:
        held: those that were there before.
    """

    def __init__(self, held: Iterable[torch.Tensor]):
        super().__init__()
        self.now_bytes, self.most_bytes = 0, 0
        self._known = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, num_bytes = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.now_bytes += num_bytes
        self.most_bytes = max(self.most_bytes, self.now_bytes)
        weakref.finalize(storage, self._forget, address, num_bytes)

    def _forget(self, address: int, num_bytes: int) -> None:
        self._known.discard(address)
        self.now_bytes -= num_bytes


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
