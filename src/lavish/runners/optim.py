"""Optimizers of the runners, and which parameters they treat how.

By default matrices decay; norms, biases, embeddings and anything with fewer than two dimensions do not. A registered
model says itself (`get_optimizer_params`, as in LAVIS). Muon (Jordan et al. 2024; torch.optim.Muon) takes the matrices
inside the networks, AdamW the rest: embeddings, heads, convolutions and vectors.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from lavish.common.errors import ConfigError, did_you_mean
from lavish.common.registry import registry
from lavish.models.base_model import BaseModel
from lavish.runners.schedules import LAVIS, LRScheduler
from lavish.runners.schema import RunConfig

OPTIMIZERS = ("adamw", "muon")
VISION = r"(?:^|\.)(?:visual_encoder|vision_tower|vision_model|vision|visual)\."
VISION_LAYER = re.compile(VISION + r"(?:.*\.)?(?:blocks|layers|resblocks)\.(\d+)\.")
VISION_START = re.compile(VISION + r"(?:.*\.)?(?:cls_token|class_embedding|pos_embed|position_embedding|patch_embed)")


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


class _Described(Protocol):
    """What the group rules look at of a parameter."""

    requires_grad: bool

    @property
    def shape(self) -> Any: ...


def lavis_groups(named_parameters: Iterable[tuple[str, _Described]], weight_decay: float, lr_scale: float) -> list[Any]:
    """Sort parameters into two groups by LAVIS's rule, `BaseModel.get_optimizer_params`.

    Trap: it spares every parameter with `bias`, `ln` or `bn` somewhere in its name, as `subnet.weight` has.
    """
    decayed: list[Any] = []
    spared: list[Any] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            is_spared = len(parameter.shape) < 2 or any(part in name for part in ("bias", "ln", "bn"))
            (spared if is_spared else decayed).append(parameter)
    groups = [(decayed, weight_decay), (spared, 0.0)]
    return [{"params": params, "weight_decay": decay, "lr_scale": lr_scale} for params, decay in groups if params]


def layer_decay_groups(
    named_parameters: Iterable[tuple[str, _Described]], weight_decay: float, lr_scale: float, depth: int | None = None
) -> list[Any]:
    """Sort parameters by the depth of their vision layer, whose rate is `lr_scale` times that of the layer above.

    Source: LAVIS, blip2's `get_optimizer_params`: the tower's stem is layer 0, block i is i + 1, the rest of the tower
    `depth`, and layer k's factor `lr_scale ** (depth + 1 - k)`; 1 outside the tower.

    Args:
        depth: blocks of the tower; None: as many as the names show.
    """
    parameters = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if depth is None:
        depth = max(
            (int(match.group(1)) + 1 for name, _ in parameters if (match := VISION_LAYER.search(name))), default=0
        )
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in parameters:
        decay = 0.0 if len(parameter.shape) == 1 or name.endswith(".bias") else weight_decay
        layer = _vision_layer(name, depth)
        scale = 1.0 if layer is None else lr_scale ** (depth + 1 - layer)
        groups.setdefault((scale, decay), []).append(parameter)
    return [{"params": params, "weight_decay": decay, "lr_scale": scale} for (scale, decay), params in groups.items()]


def _vision_layer(name: str, depth: int) -> int | None:
    """Give the layer id of a tower's parameter; None for one that is of no tower."""
    if match := VISION_LAYER.search(name):
        return int(match.group(1)) + 1
    if VISION_START.search(name):
        return 0
    return depth if re.search(VISION, name) else None


class OptimizerGroup:
    """One or two torch optimizers that step together, with one state dict.

    torch.optim.Muon takes matrices only, so a Muon run needs an AdamW beside it.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]):
        self.optimizers = list(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers; a schedule sets their `lr`, by their `lr_scale`."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

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
    if run.optimizer == "muon":
        return _muon(model, run)
    groups = _groups(model, run)
    return OptimizerGroup([torch.optim.AdamW(_with_rates(groups, run), lr=run.init_lr, betas=(0.9, run.beta2))])


def _muon(model: nn.Module, run: RunConfig) -> OptimizerGroup:
    matrices, tables, vectors = (list(group.values()) for group in split_parameters(model))
    scale = run.muon_lr / run.init_lr
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        decayed = {"params": matrices, "weight_decay": run.weight_decay, "lr_scale": scale}
        optimizers.append(torch.optim.Muon([decayed], lr=run.muon_lr, momentum=0.95))
    plain = [{"params": group, "weight_decay": 0.0} for group in (tables, vectors) if group]
    if plain:
        optimizers.append(torch.optim.AdamW(_with_rates(plain, run), lr=run.init_lr, betas=(0.9, run.beta2)))
    return OptimizerGroup(optimizers)


def _groups(model: nn.Module, run: RunConfig) -> list[dict[str, Any]]:
    says_itself = isinstance(model, BaseModel) and (
        type(model).get_optimizer_params is not BaseModel.get_optimizer_params
    )
    named = list(model.named_parameters())
    if isinstance(model, BaseModel) and says_itself:
        groups = model.get_optimizer_params(run.weight_decay, run.lr_layer_decay)
    elif run.compat == LAVIS:
        groups = lavis_groups(named, run.weight_decay, run.lr_layer_decay)
    elif run.lr_layer_decay != 1:
        groups = layer_decay_groups(named, run.weight_decay, run.lr_layer_decay)
    elif isinstance(model, BaseModel):
        groups = model.get_optimizer_params(run.weight_decay)
    else:
        matrices, tables, vectors = (list(group.values()) for group in split_parameters(model))
        kinds = ((matrices, run.weight_decay), (tables, 0.0), (vectors, 0.0))
        groups = [{"params": params, "weight_decay": decay} for params, decay in kinds if params]
    if not any(group["params"] for group in groups):
        raise ConfigError(f"{type(model).__name__} has no trainable parameter: everything is frozen.")
    return groups


def _with_rates(groups: list[dict[str, Any]], run: RunConfig) -> list[dict[str, Any]]:
    return [{"lr_scale": 1.0, **group, "lr": run.init_lr * group.get("lr_scale", 1.0)} for group in groups]


def build_schedule(optimizer: Any, run: RunConfig, num_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Give what sets the rates of a step (from 0), and gives the rate of a group whose `lr_scale` is 1.

    Raises:
        ConfigError: unknown `run.lr_sched`, or a warm-up as long as the run.
    """
    kind = registry.get_lr_scheduler_class(run.lr_sched)
    settings: dict[str, Any] = {
        "max_epoch": max(1, -(-num_steps // steps_per_epoch)),
        "min_lr": run.min_lr,
        "init_lr": run.init_lr,
        "decay_rate": run.lr_decay_rate,
        "warmup_start_lr": run.warmup_lr,
        "warmup_steps": int(run.warmup_ratio * steps_per_epoch) if run.warmup_ratio else run.warmup_steps,
    }
    unit = 1  # of the schedule's clock, in optimizer steps
    if issubclass(kind, LRScheduler):
        settings |= {"steps_per_epoch": steps_per_epoch, "max_steps": num_steps, "compat": run.compat}
        unit = run.accum_grad_iters if run.compat else 1
        settings["max_steps"] = num_steps * unit
        counts_whole_run = kind.counts_whole_run and bool(run.compat)
    else:
        settings["warmup_start_lr"] = -1 if run.warmup_lr is None else run.warmup_lr
        counts_whole_run = False
    scheduler = kind(optimizer=optimizer, **settings)

    def set_rates(step: int) -> float:
        epoch, place = divmod(step, steps_per_epoch)
        # The releases set the rate at each forward pass, so the last one of a step counts.
        clock = (step if counts_whole_run else place) * unit + unit - 1
        scheduler.step(cur_epoch=epoch, cur_step=clock)
        if isinstance(scheduler, LRScheduler):
            return scheduler.lr(epoch, clock)
        return next(iter(optimizer.param_groups))["lr"]

    return set_rates
