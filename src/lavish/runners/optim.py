"""Optimizers and learning-rate schedules of the runners.

AdamW groups follow one rule: matrices decay; norms, biases, embeddings and anything with fewer than two dimensions do not. Muon (Jordan et
al. 2024; torch.optim.Muon) takes the matrices inside the networks, AdamW the rest: embeddings, heads, convolutions and vectors.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from lavish.common.errors import ConfigError, did_you_mean
from lavish.runners.schema import RunConfig


def _is_embedding_or_head(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Embedding) or name.rsplit(".", 1)[-1] in ("lm_head",) or ".heads." in f".{name}."


def split_parameters(
    model: nn.Module,
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Sort the trainable parameters into (hidden matrices, embeddings and heads and convolutions, vectors), each name -> parameter."""
    matrices: dict[str, nn.Parameter] = {}
    tables: dict[str, nn.Parameter] = {}
    vectors: dict[str, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}" if module_name else name
            if not parameter.requires_grad:
                continue
            if parameter.ndim < 2 or min(parameter.shape) == 1:
                vectors[full_name] = parameter
            elif parameter.ndim == 2 and not _is_embedding_or_head(module, module_name):
                matrices[full_name] = parameter
            else:
                tables[full_name] = parameter
    return matrices, tables, vectors


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
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict) -> None:
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def build_optimizer(model: nn.Module, run: RunConfig) -> OptimizerGroup:
    """Build the optimizer that the recipe names.

    Raises:
        ConfigError: `run.optimizer` is neither `adamw` nor `muon`.
    """
    matrices, tables, vectors = split_parameters(model)
    plain = [
        {"params": list(tables.values()), "weight_decay": 0.0},
        {"params": list(vectors.values()), "weight_decay": 0.0},
    ]
    if run.optimizer == "adamw":
        groups = [{"params": list(matrices.values()), "weight_decay": run.weight_decay}, *plain]
        return OptimizerGroup([_adamw(groups, run)])
    if run.optimizer == "muon":
        muon = torch.optim.Muon(list(matrices.values()), lr=run.muon_lr, weight_decay=run.weight_decay, momentum=0.95)
        return OptimizerGroup([muon, _adamw(plain, run)])
    raise ConfigError(
        f"run.optimizer is {run.optimizer!r}; the choices are 'adamw' and 'muon'.{did_you_mean(run.optimizer, ['adamw', 'muon'])}"
    )


def _adamw(groups: list[dict], run: RunConfig) -> torch.optim.AdamW:
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=run.init_lr, betas=(0.9, run.beta2))


def lr_schedule(run: RunConfig, num_steps: int) -> Callable[[int], float]:
    """Give the function step (0-based) -> share of the peak learning rate.

    Warm-up is linear over `warmup_steps`; the last step runs at `min_lr / init_lr`.

    Raises:
        ConfigError: unknown `run.lr_sched`, or a warm-up that is longer than the run.
    """
    shapes: dict[str, Callable[[float], float]] = {
        "linear_warmup_cosine_lr": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
        "linear_warmup_linear_lr": lambda done: 1 - done,
        "constant_lr": lambda done: 1.0,
    }
    if run.lr_sched not in shapes:
        raise ConfigError(
            f"run.lr_sched is {run.lr_sched!r}; the choices are {', '.join(shapes)}.{did_you_mean(run.lr_sched, shapes)}"
        )
    if run.warmup_steps >= num_steps and run.warmup_steps > 0:
        raise ConfigError(
            f"run.warmup_steps is {run.warmup_steps}, but the run has {num_steps} steps; make it smaller."
        )
    shape, floor = shapes[run.lr_sched], run.min_lr / run.init_lr

    def scale(step: int) -> float:
        if step < run.warmup_steps:
            return (step + 1) / run.warmup_steps
        done = (step - run.warmup_steps) / max(num_steps - 1 - run.warmup_steps, 1)
        return floor + (1 - floor) * shape(min(done, 1.0))

    return scale
