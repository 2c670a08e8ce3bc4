"""Optimizers and learning-rate schedules of the runners.

AdamW groups follow one rule: matrices decay; norms, biases, embeddings and anything with fewer than two dimensions do
not. Muon (Jordan et al. 2024; torch.optim.Muon) takes the matrices inside the networks, AdamW the rest: embeddings,
heads, convolutions and vectors.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from lavish.common.errors import ConfigError, did_you_mean
from lavish.runners.schema import RunConfig

OPTIMIZERS = ("adamw", "muon")

_FALLS: dict[str, Callable[[float], float]] = {
    "linear_warmup_cosine_lr": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear_warmup_linear_lr": lambda done: 1 - done,
    "constant_lr": lambda done: 1.0,
}
"""Schedule -> the share of the peak after this share of the steps that follow the warm-up."""


class ParameterGroups(NamedTuple):
    """The trainable parameters of a module, name -> parameter, each in exactly one group."""

    matrices: dict[str, nn.Parameter]
    tables: dict[str, nn.Parameter]
    """Embeddings, heads and convolutions."""
    vectors: dict[str, nn.Parameter]
    """Biases, norms, and single rows."""


def split_parameters(model: nn.Module) -> ParameterGroups:
    """Sort the trainable parameters by what the optimizers do with them; a tied one counts once, where it stands first.

    Raises:
        ConfigError: nothing is trainable.
    """
    groups = ParameterGroups({}, {}, {})
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            full_name = f"{module_name}.{name}" if module_name else name
            if parameter.ndim < 2 or min(parameter.shape) == 1:
                groups.vectors[full_name] = parameter
            elif parameter.ndim == 2 and not _is_embedding_or_head(module, module_name):
                groups.matrices[full_name] = parameter
            else:
                groups.tables[full_name] = parameter
    if not seen:
        raise ConfigError(f"{type(model).__name__} has no trainable parameter: everything is frozen.")
    return groups


def _is_embedding_or_head(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Embedding) or name.rsplit(".", 1)[-1] == "lm_head" or ".heads." in f".{name}."


class OptimizerGroup:
    """One or two torch optimizers that step together, with one state dict.

    torch.optim.Muon takes matrices only, so a Muon run needs an AdamW beside it.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]):
        self.optimizers = list(optimizers)
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def set_lr_scale(self, scale: float) -> None:
        """Set every group's learning rate to `scale` times its peak."""
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * scale

    def step(self) -> None:
        """Update the parameters."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Give the state of all optimizers."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: the state is of other optimizers, or of other parameters.
        """
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def build_optimizer(model: nn.Module, run: RunConfig) -> OptimizerGroup:
    """Build the optimizer that the recipe names.

    Raises:
        ConfigError: `run.optimizer` is neither `adamw` nor `muon`, or nothing is trainable.
    """
    if run.optimizer not in OPTIMIZERS:
        hint = did_you_mean(run.optimizer, OPTIMIZERS)
        raise ConfigError(f"run.optimizer is {run.optimizer!r}; the choices are {', '.join(OPTIMIZERS)}.{hint}")
    matrices, tables, vectors = (list(group.values()) for group in split_parameters(model))
    decayed = {"params": matrices, "weight_decay": run.weight_decay}
    plain = [{"params": tables, "weight_decay": 0.0}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = []
    if run.optimizer == "muon" and matrices:
        optimizers.append(torch.optim.Muon(lr=run.muon_lr, momentum=0.95, **decayed))
    groups = plain if run.optimizer == "muon" else [decayed, *plain]
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=run.init_lr, betas=(0.9, run.beta2)))
    return OptimizerGroup(optimizers)


def lr_schedule(run: RunConfig, num_steps: int) -> Callable[[int], float]:
    """Give the function step (0-based) -> share of the peak learning rate.

    Warm-up is linear over `warmup_steps`, and its last step is the first at the peak; the last step of the run is at
    `min_lr / init_lr`, except with `constant_lr`.

    Raises:
        ConfigError: unknown `run.lr_sched`, or a warm-up as long as the run.
    """
    if run.lr_sched not in _FALLS:
        hint = did_you_mean(run.lr_sched, _FALLS)
        raise ConfigError(f"run.lr_sched is {run.lr_sched!r}; the choices are {', '.join(_FALLS)}.{hint}")
    if run.warmup_steps >= num_steps and run.warmup_steps > 0:
        raise ConfigError(
            f"run.warmup_steps is {run.warmup_steps}, but the run has {num_steps} steps; make it smaller."
        )
    fall, floor = _FALLS[run.lr_sched], run.min_lr / run.init_lr

    def scale(step: int) -> float:
        if step < run.warmup_steps:
            return (step + 1) / run.warmup_steps
        done = (step - run.warmup_steps) / max(num_steps - 1 - run.warmup_steps, 1)
        return floor + (1 - floor) * fall(min(done, 1.0))

    return scale
