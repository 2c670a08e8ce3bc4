"""What can be known of a model of a family without a manifest: from its network on the meta device, and the headers.

torch is imported; no weight is read. Releases in pieces are looked at as a whole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavish.checkpoints import hub
from lavish.checkpoints.rules import Optional, matches, plan
from lavish.checkpoints.tensor_map import TensorInfo
from lavish.cli.inspection import Inspection, Memory, Part
from lavish.inference.build import build
from lavish.inference.load import open_release
from lavish.inference.quantization import quantized_layers
from lavish.models import Family, family_of


def look_at_folder(path: Path, overrides: Mapping[str, Any], pieces: Mapping[str, str]) -> Inspection:
    """Inspect a folder, or a release in pieces.

    Raises:
        ConfigError, CheckpointError: as `lavish.load` before the first weight is read.
    """
    import torch

    opened = open_release(path, dict(overrides), {name: hub.resolve(value) for name, value in pieces.items()})
    with torch.device("meta"):
        network = opened.family.model_class(opened.config)
    expected = _shapes(network)
    places = plan(opened.tensors, opened.family.rules)
    optional = [rule.target for rule in opened.family.rules if isinstance(rule, Optional)]
    used = set(places.sources.values())
    infos = {name: info for name, info in opened.tensors.infos.items() if name in used}
    return _inspection(
        network,
        path=str(path),
        layout="pieces" if opened.release is not None else "hf",
        config=opened.config_dict,
        infos=infos,
        files=len({info.file for info in infos.values()}),
        has_weights=True,
        missing=[name for name in expected if name not in places.sources and not matches(optional, name)],
        unexpected=[source for target, source in places.sources.items() if target not in expected],
    )


def look_at_layout(name: str, overrides: Mapping[str, Any]) -> Inspection:
    """Inspect the layout of a model of the zoo: nothing of it is on this machine."""
    network = build(name, device="meta", **overrides)
    infos = {key: TensorInfo(shape, "bfloat16", Path(), 0) for key, shape in _shapes(network).items()}
    notes = ["Nothing of it is on this machine: sizes are those of the released config, in bfloat16."]
    return _inspection(network, path=name, config=network.config.to_dict(), infos=infos, notes=notes)


def _shapes(network: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def _inspection(network: Any, *, infos: Mapping[str, TensorInfo], layout: str | None = None, **said: Any) -> Inspection:
    family = family_of(network)
    dtypes: Counter[str] = Counter()
    for info in infos.values():
        dtypes[info.dtype] += info.nbytes
    return Inspection(
        family=family.name,
        version=1,
        layout=layout,
        sizes=None,
        parts=_parts(network, family),
        dtypes=dict(dtypes.most_common()),
        misshaped=[],
        memory=_memory(network),
        **{"files": 0, "absent_files": [], "has_weights": False, "missing": [], "unexpected": [], **said},
    )


def _parts(network: Any, family: Family) -> list[Part]:
    """Count decoder layers, what sees, and the rest (tables, norms, head), in bfloat16."""
    groups: dict[str, list[int]] = {"decoder layers": [], "what sees": [], "embedding, norms, head": []}
    for name, shape in _shapes(network).items():
        is_decoder = name.startswith(family.decoder_layers)
        group = "decoder layers" if is_decoder else "what sees" if name.startswith(family.towers) else list(groups)[2]
        groups[group].append(math.prod(shape))
    return [Part(name, len(rows), sum(rows), 2 * sum(rows)) for name, rows in groups.items() if rows]


def _memory(network: Any) -> list[Memory]:
    total = sum(math.prod(shape) for shape in _shapes(network).values())
    layers = [network.get_submodule(name).weight for name in quantized_layers(network)]
    quantized, rows = sum(weight.numel() for weight in layers), sum(weight.shape[0] for weight in layers)
    weights = {
        "bfloat16": 2 * total,
        "int8": 2 * (total - quantized) + quantized + 2 * rows,
        "nf4": 2 * (total - quantized) + quantized * 9 // 16,
    }
    return [Memory(f"inference, {kind}", {"weights": count}) for kind, count in weights.items()]
