"""What a model is before a weight is read: its network on the meta device, and the headers of its files.

For every family: a folder, a release in pieces, a single file of LAVIS, or a released layout of which nothing is here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lavish.models as table
from lavish.checkpoints import deepspeed, hf, hub
from lavish.checkpoints.layouts import read_config_json
from lavish.checkpoints.loading import stored_info
from lavish.checkpoints.rules import Optional, Plan, Rule, matches, plan, without_surplus
from lavish.checkpoints.tensor_map import Stored, TensorInfo, TensorMap
from lavish.inference.build import build
from lavish.inference.load import open_release, sample_family


@dataclass(frozen=True)
class Outline:
    """A network without weights, and what its files hold."""

    family: table.Family
    network: Any
    layout: str
    """`hf`, `pieces` or `lavis`."""
    config: dict[str, Any]
    tensors: TensorMap | None = None
    """None: no weights are here."""
    rules: Sequence[Rule] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what the network saves, by name; of tied tensors the first name stands for all."""
        firsts = set(self._tied.values())
        return {name: tuple(value.shape) for name, value in self._targets.items() if name in firsts}

    def stored(self) -> dict[str, Stored]:
        """Give what the files hold for each name of the network."""
        if self.tensors is None:
            return {}
        places, tied, found = self._places(self.tensors), self._tied, {}
        for target in places.sources:
            found.setdefault(tied.get(target, target), _info(self.tensors, places, target))
        return found

    def problems(self) -> dict[str, list[str]]:
        """Say what loading would refuse: `missing`, `unexpected` and `misshaped` tensors."""
        if self.tensors is None:
            return {"missing": [], "unexpected": [], "misshaped": []}
        sources, targets = self._places(self.tensors).sources, self._targets
        stored, shapes = self.stored(), self.shapes
        optional = [rule.target for rule in self.rules if isinstance(rule, Optional)]
        return {
            "missing": [name for name in shapes if name not in stored and not matches(optional, name)],
            "unexpected": [source for target, source in sources.items() if target not in targets],
            "misshaped": [
                f"{name}: {info.shape} stored, {shapes[name]} by the config"
                for name, info in stored.items()
                if name in shapes and info.shape != shapes[name]
            ],
        }

    @property
    def _targets(self) -> dict[str, torch.Tensor]:
        return self.network.state_dict(keep_vars=True)

    @property
    def _tied(self) -> dict[str, str]:
        """The first name of the tensor that each name stands for."""
        firsts: dict[int, str] = {}
        return {name: firsts.setdefault(id(value), name) for name, value in self._targets.items()}

    def _places(self, tensors: TensorMap) -> Plan:
        return without_surplus(plan(tensors, self.rules), self._targets, self.rules)


def _info(tensors: TensorMap, places: Plan, target: str) -> Stored:
    """Say what becomes `target`; of several that are joined, where the first of them lies."""
    joined = places.joined.get(target)
    if joined is None:
        return stored_info(tensors, places, target)
    infos = [None if name is None else tensors.info(name) for name in joined.names]
    first = next(info for info in infos if info is not None)
    lengths = joined.sizes or [(first if info is None else info).shape[joined.dim] for info in infos]
    shape = (*first.shape[: joined.dim], sum(lengths), *first.shape[joined.dim + 1 :])
    return TensorInfo(shape, first.dtype, first.file, first.offset)


def outline(
    name_or_path: str | Path, overrides: Mapping[str, Any] | None = None, pieces: Mapping[str, str] | None = None
) -> Outline:
    """Outline a folder, a file, a release in pieces, or a released model of `lavish.models.model_zoo` by its layout.

    Raises:
        ConfigError, CheckpointError, UnknownLayout: as `lavish.load` before the first weight is read.
    """
    fields, given = dict(overrides or {}), dict(pieces or {})
    path = Path(os.path.expanduser(name_or_path))
    if not os.path.exists(path):
        return _of_network(build(str(name_or_path), device="meta", **fields))
    family = sample_family(path, given)
    if family is not None:
        network, tensors, rules = family.outline(path, {}, fields or None)
        layout = "hf" if tensors.path == path and path.is_dir() else "lavis"
        return Outline(family, network, layout, network.config.to_dict(), tensors, rules)
    is_composite = table.detect_composite(path, given) is not None or path.is_file()
    has_weights = any((path / name).is_file() for name in hf.WEIGHT_FILES) or deepspeed.is_run(path)
    if not is_composite and not has_weights and (path / "config.json").is_file():
        return _of_network(build(path, device="meta", **fields), read_config_json(path))
    opened = open_release(path, fields, {name: hub.resolve(value) for name, value in given.items()})
    with torch.device("meta"):
        network = opened.family.model_class(opened.config)
    layout = "hf" if opened.release is None else "pieces"
    return Outline(opened.family, network, layout, opened.config_dict, opened.tensors, opened.family.rules)


def _of_network(network: nn.Module, config: dict[str, Any] | None = None) -> Outline:
    known: Any = network
    return Outline(table.family_of(network), network, "hf", config or known.config.to_dict())
