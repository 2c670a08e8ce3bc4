"""A model that talks and has yet to learn: all of it random, or its projector alone.

`lavish.load` never makes a weight up. A training that starts from nothing asks for it by name, and gets the network,
the processor of the same folder, and a model that can be saved, evaluated and opened again as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import lavish.models as table
from lavish.checkpoints import hub
from lavish.checkpoints.json_file import read_optional_object
from lavish.checkpoints.layouts import read_config_json
from lavish.checkpoints.placement import resolve_device, resolve_dtype
from lavish.checkpoints.tensor_map import TensorMap
from lavish.common.errors import ConfigError
from lavish.inference.build import build
from lavish.inference.load import Opened, known_pieces, load_network, read_overrides, stored_dtype, talking
from lavish.inference.options import read_sampling_defaults
from lavish.inference.register import register
from lavish.inference.vlm import VLM


def random_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    tokenizer: str | Path | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
) -> VLM:
    """Make a model with random weights of a folder's config.json and tokenizer; weights that lie there are not read.

    The weights follow torch's seed (`torch.manual_seed`), and the random state is left alone.

    Args:
        path: folder or hub id, of which only the small files are fetched.
        dtype: "auto" is the config's, else bfloat16.
        device: where to put it.
        tokenizer: folder or hub id of the tokenizer; None: of `path`.
        config: fields that replace those of config.json, as a dict or file.

    Raises:
        ConfigError: a field that is none or contradicts others, or a model that holds no conversation.
        UnknownLayout: no such folder, or one without a config.json.
        CheckpointError: no tokenizer, or a damaged file.
    """
    folder = hub.resolve_small(path)
    fields, overrides = read_config_json(folder), read_overrides(config)
    family = table.detect_family(fields, str(folder / "config.json"))
    if family.opener is not None:
        raise ConfigError(f"{folder} is a model of the family {family.name!r}, which holds no conversation.")
    where = None if tokenizer is None else hub.resolve_small(tokenizer)
    processor = family.processor_class.from_pretrained(folder, tokenizer=where)  # before the weights: it may be absent
    network = build(folder, dtype=dtype, device=device, seed=torch.initial_seed(), **overrides)
    network.config.dtype = network.dtype
    if overrides:
        processor = family.processor_class.from_config(network.config, processor.tokenizer)
    answering = read_optional_object(folder / "generation_config.json")
    sampling = read_sampling_defaults(answering, str(folder / "generation_config.json"))
    opened = Opened(folder, fields, family, network.config, TensorMap(folder, {}), answering, sampling)
    register()
    return talking(path, opened, network, processor)


def with_random_projector(
    path: str | Path | None,
    pieces: Mapping[str, str | Path],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    quantization: str | None = None,
    tokenizer: str | Path | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
) -> VLM:
    """Load a release that comes in pieces without the one that was trained: its projector starts random.

    Args:
        path: the folder that holds the pieces side by side; None: all are named. What was trained is not read.
        pieces: by name, those that are not in the folder.
        dtype, device, quantization, tokenizer, config: as `lavish.load` takes them.

    Raises:
        ConfigError: no release in pieces, an absent piece, or a wrong config.
        CheckpointError: a piece that is damaged or does not fit.
    """
    folder = None if path is None else hub.resolve(path)
    family = _family(folder, pieces)
    named = {name: hub.resolve(value) for name, value in pieces.items()}
    overrides = read_overrides(config)
    release = family.open_untrained(folder, named)
    where = str(folder or release.tokenizer)
    opened = Opened(
        Path(where),
        release.fields,
        family,
        family.read_config(release.fields, where, **overrides),
        release.tensors,
        release.generation_config,
        read_sampling_defaults(release.generation_config, f"{where}: generation_config.json"),
        release=release,
    )
    target = resolve_device(device)
    weight_dtype = resolve_dtype(dtype, stored_dtype(release.tensors), target)
    processor = opened.processor(tokenizer, is_overridden=bool(overrides))
    network = load_network(opened, weight_dtype, target, quantization)
    register()
    return talking(where, opened, network, processor)


def _family(folder: Path | None, pieces: Mapping[str, str | Path]) -> table.Family:
    """Give the family of the pieces.

    Raises:
        ConfigError: none of them comes in pieces whose projector is one.
    """
    families = [row for row in table.FAMILIES if row.is_composite and row.pieces]
    said = "; ".join(f"{row.name}: {', '.join(row.pieces)}" for row in families)
    if unknown := [name for name in pieces if name not in known_pieces()]:
        raise ConfigError(f"{unknown[0]!r} is no piece of a release. Pieces: {said}.")
    marked = [row for row in families if set(pieces).intersection(row.piece_marks)]
    if not marked and folder is not None:
        found = table.detect_composite(folder, pieces)
        marked = [row for row in families if found is row or (row.name == "clip_qwen" and _has_folders(folder))]
    if not marked:
        raise ConfigError(
            f"{folder or 'The recipe'} names no release in pieces, and only such a one starts with a random projector. "
            f"Name its pieces: {said}. A whole folder's projector is trained on from what it is: model.train: "
            "[projector]."
        )
    family = marked[0]
    if strange := [name for name in pieces if name not in family.pieces]:
        raise ConfigError(f"{strange[0]!r} is no piece of {family.name!r}, which has {', '.join(family.pieces)}.")
    return family


def _has_folders(folder: Path) -> bool:
    """Tell a decoder's and a tower's folder side by side, without what was trained of them."""
    types = {
        str(read_optional_object(file).get("model_type")) for file in folder.glob("*/config.json") if folder.is_dir()
    }
    return "qwen" in types and bool({"clip", "clip_vision_model"} & types)
