"""LAVIS's checkpoint files, `checkpoint_<best|epoch|last>.pth`: {"model", "optimizer", "config", "scaler", "epoch"}.

Scripts written for LAVIS read them: `torch.load(path)["model"]`. They hold tensors and plain values alone, so that
`weights_only=True` reads them too, and under "lavish" what a run needs to go on exactly.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lavish.checkpoints.loading import rearrange
from lavish.checkpoints.rules import Drop, reverse
from lavish.common.errors import CheckpointError
from lavish.models.base_model import BaseModel
from lavish.runners.engines import Engine, Mismatch, trained
from lavish.runners.optim import OptimizerGroup

NETWORK = "network."
"""Beginning of the names of a registered model's network."""


def gather(model: nn.Module, engine: Engine) -> dict[str, torch.Tensor]:
    """Give the trained weights, tied ones under each of their names, and the buffers, whole, on the CPU, by the names
    that the release's files have; all processes of a run call it."""
    names = {id(tensor): name for name, tensor in trained(model).items()}
    whole = {name: engine.full(tensor).cpu().clone() for name, tensor in trained(model).items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and name not in whole:
            whole[name] = whole[names[id(parameter)]]
    return released(model, whole)


def released(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the weights of a registered model by the names of its release."""
    rules = model.release_rules if isinstance(model, BaseModel) else None
    if rules is None:
        return tensors
    return rearrange({name.removeprefix(NETWORK): tensor for name, tensor in tensors.items()}, reverse(rules))


def native(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give weights by the names that the model itself has, each tied one once."""
    rules = model.release_rules if isinstance(model, BaseModel) else None
    if rules is None:
        found = tensors
    else:
        kept = [rule for rule in rules if not isinstance(rule, Drop)]
        found = {NETWORK + name: tensor for name, tensor in rearrange(tensors, kept).items()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {
        name for name, _ in model.named_parameters()
    }
    return {name: tensor for name, tensor in found.items() if name not in tied}


def write(
    path: Path,
    tensors: dict[str, torch.Tensor],
    optimizer: dict[str, Any] | None,
    config: dict[str, Any],
    progress: dict[str, int],
    state: dict[str, Any],
) -> None:
    """Write a file whole or not at all.

    Args:
        optimizer: state of the optimizer; None where the processes of a run share it.
        progress: "epoch" or "iters".
        state: what a run needs to go on.
    """
    partial = path.with_suffix(".partial")
    held = {"model": tensors, "optimizer": optimizer, "config": config, "scaler": None, **progress, "lavish": state}
    torch.save(held, partial)
    partial.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Read a file, without running anything of it.

    Raises:
        CheckpointError: absent, damaged, or it holds more than tensors and plain values.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint.") from error
    except (OSError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read, or holds more than tensors and plain values: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(held, dict) or not isinstance(held.get("model"), dict):
        raise CheckpointError(f"{path}: holds no 'model'; give a checkpoint_*.pth of a run.")
    return held


def load_weights(path: Path, model: nn.Module, engine: Engine) -> None:
    """Take over the weights of a file.

    Raises:
        CheckpointError: damaged, or of another model.
    """
    _fill(path, model, engine, read(path)["model"])


def resume(path: Path, model: nn.Module, optimizer: OptimizerGroup, engine: Engine) -> dict[str, Any]:
    """Take over weights and optimizer of a file, and give the state of the run.

    Raises:
        CheckpointError: damaged, of another model or optimizer, or a file that no run of lavish wrote.
    """
    held = read(path)
    if "lavish" not in held or held["optimizer"] is None:
        raise CheckpointError(
            f"{path}: holds weights, but nothing of lavish to go on from exactly. To start from the weights set "
            "model.finetuned to it; to go on give the folder checkpoint_<step> of the run."
        )
    _fill(path, model, engine, held["model"])
    try:
        engine.load_optimizer(model, optimizer, held["optimizer"])
    except Mismatch as error:
        raise CheckpointError(f"{path}: is of another {error.what} than the recipe's: {error}") from error
    return held["lavish"]


def _fill(path: Path, model: nn.Module, engine: Engine, tensors: dict[str, torch.Tensor]) -> None:
    try:
        engine.fill(model, native(model, tensors))
    except Mismatch as error:
        raise CheckpointError(f"{path}: is of another model than the recipe's: {error}") from error
