"""What a conversion reads: any released layout, opened as far as its headers and checked against its network.

Names come in two kinds: those of the release (what a family's RULES know, and what other layouts are planned from) and
those of the network, under which a Hugging Face folder is written. For CogVLM and GLM-4V they are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

import lavish.models as table
from lavish.checkpoints import hub, layouts
from lavish.checkpoints.loading import read_joined, stored_info, stored_shape
from lavish.checkpoints.output import Output, TargetOptions
from lavish.checkpoints.release import Lora
from lavish.checkpoints.rules import Plan, Rule, plan, reasons, without_surplus
from lavish.checkpoints.tensor_map import TensorMap
from lavish.common.errors import ConfigError, MissingKeys, ShapeMismatch, UnexpectedKeys, UnknownLayout
from lavish.inference.adapters import find_base, is_adapter
from lavish.inference.load import Opened, open_release, read_overrides, sample_family
from lavish.inference.lora import Delta
from lavish.inference.outline import Outline


@dataclass(frozen=True)
class Source:
    """A checkpoint before its weights are read."""

    path: Path
    layout: str
    family: table.Family
    fields: dict[str, Any]
    """config.json as it is, or what stands for it, with what the caller replaced."""
    config: Any
    """The family's config."""
    tensors: TensorMap
    rules: tuple[Rule, ...]
    opened: Opened | None
    """None: a family of no chat networks."""
    adapter: Path | Lora | None
    """The LoRA that belongs to it: its folder, or what lies in the same files."""
    overrides: dict[str, Any] = field(default_factory=dict)
    network_class: Any = None
    """Of a family that has several: the one that the file is of."""

    @property
    def is_folder_of_release(self) -> bool:
        """True for a Hugging Face folder: its names and small files go over as they are."""
        return self.opened is not None and self.opened.release is None

    @property
    def folder(self) -> Path:
        """Where its small files are."""
        return self.path if self.opened is None else self.opened.path

    @cached_property
    def network(self) -> Any:
        """The network, on the meta device."""
        make = self.family.model_class if self.opened is not None else self.network_class
        with torch.device("meta"):
            return make(self.config)

    @cached_property
    def places(self) -> Plan:
        """Which stored tensors become which of the network's names."""
        if self.is_folder_of_release:
            return Plan({name: name for name in self.tensors}, ())
        targets = self.network.state_dict(keep_vars=True)
        return without_surplus(plan(self.tensors, self.rules), targets, self.rules)

    @property
    def dropped(self) -> list[tuple[str, str]]:
        """Stored tensors that the network does not take, and why."""
        return [] if self.is_folder_of_release else reasons(self.places, self.rules)

    def check(self) -> None:
        """Check that the tensors are those of the config, before the first is written.

        Raises:
            MissingKeys, UnexpectedKeys, ShapeMismatch: they are not.
        """
        outline = Outline(self.family, self.network, self.layout, self.fields, self.tensors, self.rules)
        problems = outline.problems()
        advice = "Do config and weights belong together? `lavish inspect` says more."
        for kind, error in (("missing", MissingKeys), ("unexpected", UnexpectedKeys), ("misshaped", ShapeMismatch)):
            if names := problems[kind]:
                raise error(
                    f"{self.path}: {len(names)} tensor{'s are' if len(names) > 1 else ' is'} {kind}, first {names[0]}. "
                    f"{advice}{self.tensors.shards_sentence() if kind == 'missing' else ''}"
                )


def open_source(
    path: str | Path,
    *,
    base: str | Path | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    pieces: Mapping[str, str | Path] | None = None,
) -> Source:
    """Open a checkpoint of any layout; the arguments are those of `lavish.load`.

    Raises: as `lavish.load`, before the first weight is read.
    """
    given, overrides = dict(pieces or {}), read_overrides(config)
    folder = hub.resolve(path)
    adapter = None
    if is_adapter(folder) and table.detect_composite(folder, given) is None:
        folder, adapter = (find_base(folder) if base is None else hub.resolve(base)), folder
    elif base is not None:
        raise ConfigError(f"base= was given, but {folder} is no adapter.")
    family = sample_family(folder, given)
    if family is not None:
        network, tensors, rules = family.outline(folder, {}, overrides or None)
        where = _layout(folder, is_pieces=False)
        return Source(
            folder,
            where,
            family,
            network.config.to_dict(),
            network.config,
            tensors,
            tuple(rules),
            None,
            adapter,
            overrides,
            network_class=type(network),
        )
    opened = open_release(folder, overrides, given)
    if opened.is_int8:
        raise ConfigError(f"{folder} was saved in int8, which no other layout holds; convert the float original.")
    if adapter is None and opened.release is not None:
        adapter = opened.release.adapter
    where = _layout(folder, is_pieces=opened.release is not None)
    fields = opened.config_dict
    if overrides:  # what was given may be nested, or in another program's words: the config has it in its own
        fields = {**fields, **json.loads(opened.config.to_json_string())}
    rules = tuple(opened.family.rules)
    return Source(
        folder, where, opened.family, fields, opened.config, opened.tensors, rules, opened, adapter, overrides
    )


def network_outputs(source: Source, options: TargetOptions, deltas: Mapping[str, Delta] | None = None) -> list[Output]:
    """Give every tensor under the network's name, in the order in which the files hold them, LoRA added."""
    places, tensors, deltas = source.places, source.tensors, deltas or {}
    outputs: list[Output] = []
    for name, first in places.sources.items():
        joined = places.joined.get(name)
        if joined is None:
            info = stored_info(tensors, places, name)
            made = options.take(name, tensors, info, (first,))
        else:
            dtype = options.dtype_of(tensors.info(first).dtype)
            names = tuple(part for part in joined.names if part is not None)

            def join(name: str = name, dtype: str = dtype, joined: Any = joined) -> torch.Tensor:
                return options.cast(name, read_joined(tensors, joined), dtype)

            made = Output(name, stored_shape(tensors, places, name), dtype, join, names)
        if name in deltas:
            made = deltas[name].added(made, options, partial(_whole, source, name))
        outputs.append(made)
    return outputs


def _whole(source: Source, name: str) -> torch.Tensor:
    """Give a tensor of the network as it is stored."""
    places = source.places
    if name in places.joined:
        return read_joined(source.tensors, places.joined[name])
    return source.tensors.assemble(stored_info(source.tensors, places, name))


def _layout(path: Path, *, is_pieces: bool) -> str:
    try:
        return layouts.detect(path)
    except UnknownLayout:
        return "pieces" if is_pieces else "lavis"
