"""A network without weights: any layout that lavish knows by name or folder, with fields of its config replaced."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import lavish.models as table
from lavish.checkpoints import hub
from lavish.checkpoints.layouts import read_config_json
from lavish.checkpoints.placement import resolve_device, resolve_dtype
from lavish.common.errors import ConfigError, check_path, did_you_mean, shown
from lavish.inference.load import POCKET, read_fields


def build(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "meta",
    seed: int = 0,
    **config_overrides: Any,
) -> PreTrainedModel:
    """Make a network from its config alone: on "meta" without memory, elsewhere with random weights.

    Args:
        name_or_path: a released model by name (`lavish.models.model_zoo`), a folder with a config.json, or a hub id.
        dtype: "auto" is the config's, else bfloat16 (all released layouts).
        device: "meta" (default), "auto", "cpu", "cuda", ...
        seed: of the random weights; the same seed gives the same weights, and the global random state is left alone.
        config_overrides: fields to replace, such as `num_hidden_layers=2, vision_config={"num_hidden_layers": 2}`.

    Raises:
        ConfigError: no such name or field (the nearest is suggested), or fields that contradict each other.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ConfigError(f"seed must be a whole number from 0 to 2**64 - 1, not {shown(seed)}.")
    fields, where = read_layout(name_or_path)
    overrides = _without_dots(config_overrides)
    if "model" in fields and "architectures" not in fields:  # a model of LAVIS
        family = table.family_of_layout(fields, where)
        made = family.outline(None, fields, overrides or None)[0]
        config, model_class = made.config, type(made)
    else:
        family = table.family(fields.pop("family")) if "family" in fields else table.detect_family(fields, where)
        config, model_class = family.read_config(fields, where, **overrides), family.model_class
    target = torch.device("meta") if device == "meta" else resolve_device(device)
    weight_dtype = resolve_dtype(dtype, _dtype_of(fields), target)
    previous = torch.get_default_dtype()
    cuda_devices = [target] if target.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda_devices):
        torch.manual_seed(seed)
        try:
            torch.set_default_dtype(weight_dtype)
            with target:
                network = model_class(config)
        finally:
            torch.set_default_dtype(previous)
    return network.to(weight_dtype).eval()


def read_layout(name_or_path: str | Path) -> tuple[dict[str, Any], str]:
    """Give the config fields of a released model by name, or of a folder or hub id, and where they stand.

    Raises:
        ConfigError: neither a name, a path nor a hub id.
    """
    check_path(name_or_path, "name_or_path")
    entry = table.model_zoo.get(str(name_or_path))
    is_here = os.path.exists(name_or_path)
    if entry is not None and not is_here:
        if entry.hub_id is None:
            return read_config_json(POCKET), str(POCKET / "config.json")
        path = Path(str(files("lavish") / "configs" / "models" / f"{entry.name}.yaml"))
        return read_fields(path), str(path)
    if not is_here and "/" not in str(name_or_path):
        names = list(table.model_zoo)
        raise ConfigError(
            f"No model {str(name_or_path)!r}: neither a name nor a folder.{did_you_mean(str(name_or_path), names)} "
            f"Names: {', '.join(names)}."
        )
    folder = hub.resolve(name_or_path)
    return read_config_json(folder), str(folder / "config.json")


def _without_dots(overrides: dict[str, Any]) -> dict[str, Any]:
    """Turn "vision_config.num_hidden_layers" (as the command line has it) into a nested dict."""
    nested: dict[str, Any] = {}
    for name, value in overrides.items():
        outer, _, inner = name.partition(".")
        if inner:
            nested.setdefault(outer, {})[inner] = value
        elif isinstance(value, dict):
            nested.setdefault(outer, {}).update(value)
        else:
            nested[outer] = value
    return nested


def _dtype_of(fields: dict[str, Any]) -> torch.dtype:
    name = fields.get("dtype") or fields.get("torch_dtype") or "bfloat16"
    found = getattr(torch, str(name).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16
