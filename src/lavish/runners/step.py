"""One optimizer step: its forward and backward passes, the losses over all processes, and the update of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lavish.common import config as configs
from lavish.common import dist
from lavish.common.errors import TrainingError
from lavish.runners.engines import Engine
from lavish.runners.optim import OptimizerGroup
from lavish.runners.order import NUM_TARGETS
from lavish.runners.schema import RunConfig
from lavish.tasks.base_task import BaseTask, read_losses, to_device

Batch = tuple[Sequence[int | str], dict[str, Any]]
"""What names the samples (indices, or places in a stream), and the batch."""

BAD_BATCH_FILE = "bad_batch.json"
ID_KEYS = ("instance_id", "image_id", "question_id", "sample_id", "id")


class Place(NamedTuple):
    """Where a run is, as errors tell it."""

    folder: Path
    step: int
    """Of the run, from 1."""
    num_steps: int


class StepMaker:
    """Makes the optimizer steps of a run.

    Args:
        run: of the recipe.
        task: gives the losses of a batch.
        model: the module as it was built.
        called: what the engine made of it.
        engine: exchanges gradients.
        optimizer: of the weights that learn.

    Raises:
        ConfigError: float16 on an engine that shares weights.
    """

    def __init__(
        self,
        run: RunConfig,
        task: BaseTask,
        model: nn.Module,
        called: nn.Module,
        engine: Engine,
        optimizer: OptimizerGroup,
    ) -> None:
        self.run, self.task, self.model, self.called = run, task, model, called
        self.engine, self.optimizer = engine, optimizer
        self.scaler = engine.scaler(is_half=self._computes_in_float16())

    def make(
        self, module: nn.Module, seen: Sequence[Batch], by_samples: Sequence[float], place: Place
    ) -> dict[str, float]:
        """Make one step; give the losses as means over its samples, in all processes alike.

        Args:
            module: what is called: the engine's module, or that compiled.
            seen: the batch of each pass of this process.
            by_samples: the share of each pass in the samples of the step; 0 for one that is only taken along.
            place: for errors.

        Raises:
            TrainingError: the loss or its gradients are no numbers any more, or memory does not suffice.
        """
        sums: dict[str, float] = {}
        shares = self._shares(by_samples, [samples for _, samples in seen])
        with _memory_advice(self.run):
            for number, ((_, samples), share) in enumerate(zip(seen, shares, strict=True)):
                with self.engine.accumulate(self.called, is_last=number == len(seen) - 1):
                    losses = self.forward(module, samples)
                    self.engine.backward(self.scaler.scale(losses["loss"] * (share * self.engine.loss_scale)))
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) * share
            self._add_up(sums)
            self._update(sums, seen, place)
        return sums

    def _shares(self, by_samples: Sequence[float], batches: Sequence[dict[str, Any]]) -> list[float]:
        """Give the share of each pass in the loss of the step: by tokens where its loss is a mean over tokens.

        So the loss is that of one pass over all samples of the step, however long their answers are.
        """
        if any(NUM_TARGETS not in samples for samples in batches):
            return list(by_samples)
        counts = [samples[NUM_TARGETS] if share else 0 for samples, share in zip(batches, by_samples, strict=True)]
        total = dist.total(float(sum(counts)))
        return [count / max(total, 1.0) for count in counts]

    def _update(self, losses: dict[str, float], seen: Sequence[Batch], place: Place) -> None:
        """Clip the gradients and take the optimizer's step; with a loss scale, skip one whose gradients overflowed."""
        is_scaled = self.scaler.is_enabled()
        if is_scaled:
            for optimizer in self.optimizer.optimizers:
                self.scaler.unscale_(optimizer)
        if self.run.max_grad_norm > 0:
            norm = self.engine.clip(self.model, self.run.max_grad_norm)
            if norm is not None and (math.isfinite(norm) or not is_scaled):
                losses["grad_norm"] = norm
        self.check_finite(losses, seen, place)
        if is_scaled:
            for optimizer in self.optimizer.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def _computes_in_float16(self) -> bool:
        stored = getattr(self.model, "stored_dtype", None)  # chat models compute in the dtype of what is frozen
        return stored is torch.float16 or (self.run.amp and self.run.amp_dtype == "float16")

    def forward(self, module: nn.Module, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Compute the losses of a batch, in the dtype of the run."""
        dtype = getattr(torch, self.run.amp_dtype)
        with torch.autocast(self.engine.device.type, dtype) if self.run.amp else nullcontext():
            return read_losses(self.task.train_step(module, to_device(samples, self.engine.device)))

    def check_finite(self, losses: Mapping[str, float], seen: Sequence[Batch], place: Place) -> None:
        """Stop a run whose loss or gradients are no numbers any more, before weights or checkpoints take them over.

        Raises:
            TrainingError: they are not.
        """
        for name in ("loss", "grad_norm"):
            value = losses.get(name, 0.0)
            if not math.isfinite(value):
                gathered = [batch for part in dist.gather([_ids(*batch) for batch in seen]) for batch in part]
                path = place.folder / BAD_BATCH_FILE
                if dist.is_main():
                    configs.write_json({"step": place.step, name: str(value), "passes": gathered}, path)
                raise TrainingError(
                    f"{place.folder}: {name} is {value} at step {place.step} of {place.num_steps}: the run "
                    "diverged. The last checkpoint before it is kept. Lower the learning rate, set run.max_grad_norm, "
                    f"or set run.amp=false, and start with another run.output_dir. Its samples: {path}."
                )

    def _add_up(self, sums: dict[str, float]) -> None:
        """Add up the losses over the processes of the run."""
        if dist.world_size() > 1:
            losses = torch.tensor(list(sums.values()), device=self.engine.device)
            dist.add_up([losses])
            sums.update(zip(sums, losses.tolist(), strict=True))


def _ids(indices: Sequence[int | str], samples: dict[str, Any]) -> dict[str, Any]:
    """Give what names the samples of a batch: their indices, and the ids that they carry."""
    found: dict[str, Any] = {"index": list(indices)}
    for key in ID_KEYS:
        if key in samples:
            value = samples[key]
            found[key] = value.tolist() if isinstance(value, torch.Tensor) else [str(one) for one in value]
    return found


@contextmanager
def _memory_advice(run: RunConfig) -> Iterator[None]:
    """Say which key takes less memory where there is too little.

    Raises:
        TrainingError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; on CPU it is a plain one
        is_memory = isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)
        if not is_memory:
            raise
        knobs = [
            f"run.batch_size_train={max(run.batch_size_train // 2, 1)} with "
            f"run.accum_grad_iters={run.accum_grad_iters * 2} (the same step)"
            if run.batch_size_train > 1
            else "",
            "" if run.activation_checkpointing else "run.activation_checkpointing=true",
            "" if run.amp else "run.amp=true",
            "" if run.engine == "fsdp2" else "run.engine=fsdp2 with several processes",
        ]
        raise TrainingError(
            f"Out of memory with run.batch_size_train={run.batch_size_train}: {str(error).splitlines()[0]} Turn, in "
            f"this order: {'; '.join(knob for knob in knobs if knob)}."
        ) from error
