"""What can be known of a model of a family without a manifest: from its network on the meta device, and the headers.

torch comes with the call, not with the import; no weight is read. Releases in pieces are looked at as a whole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavish.checkpoints.tensor_map import Stored, TensorInfo
from lavish.cli.inspection import Inspection, Memory, Part

if TYPE_CHECKING:
    from lavish.inference.outline import Outline

NOT_HERE = "Nothing of it is on this machine: sizes are those of the released config, in {}."
NO_WEIGHTS = "The folder has a config and no weights."


def look(name_or_path: str | Path, overrides: Mapping[str, Any], pieces: Mapping[str, str]) -> Inspection:
    """Inspect a folder, a file, a release in pieces, or the layout of a model of the zoo.

    Raises:
        ConfigError, CheckpointError: as `lavish.load` before the first weight is read.
    """
    from lavish.inference.outline import outline

    seen = outline(name_or_path, overrides, pieces)
    is_here = Path(name_or_path).expanduser().exists()
    kind = "bfloat16" if seen.family.opener is None else "float32"
    stored = seen.stored()
    if seen.tensors is None:
        stored = {name: TensorInfo(shape, kind, Path(), 0) for name, shape in seen.shapes.items()}
    dtypes: Counter[str] = Counter()
    for info in stored.values():
        dtypes[info.dtype] += info.nbytes
    return Inspection(
        path=str(name_or_path),
        family=seen.family.name,
        version=1,
        layout=seen.layout if is_here else None,
        config=seen.config,
        sizes=None,
        parts=_parts(seen, stored),
        dtypes=dict(dtypes.most_common()),
        files=0 if seen.tensors is None else len({info.file for info in stored.values()}),
        absent_files=[] if seen.tensors is None else list(seen.tensors.absent),
        has_weights=seen.tensors is not None,
        memory=_memory(seen),
        notes=[] if seen.tensors is not None else [NO_WEIGHTS if is_here else NOT_HERE.format(kind)],
        **seen.problems(),  # pyright: ignore[reportArgumentType] - missing, unexpected, misshaped
    )


def _parts(seen: Outline, stored: Mapping[str, Stored]) -> list[Part]:
    """Count decoder layers, what sees, and the rest (tables, norms, head); other networks by their first modules."""
    family = seen.family
    groups: dict[str, list[Stored]] = {}
    if family.opener is None:
        groups = {"decoder layers": [], "what sees": [], "embedding, norms, head": []}
    for name, info in stored.items():
        if family.opener is not None:
            part = name.partition(".")[0]
        elif name.startswith(family.decoder_layers):
            part = "decoder layers"
        else:
            part = "what sees" if name.startswith(family.towers) else "embedding, norms, head"
        groups.setdefault(part, []).append(info)
    return [
        Part(name, len(rows), sum(info.numel for info in rows), sum(info.nbytes for info in rows))
        for name, rows in groups.items()
        if rows
    ]


def _memory(seen: Outline) -> list[Memory]:
    from lavish.inference.quantization import quantized_layers

    total = sum(math.prod(shape) for shape in seen.shapes.values())
    if seen.family.opener is not None:  # they are not quantised
        weights = {"float32": 4 * total, "bfloat16": 2 * total}
    else:
        layers = [seen.network.get_submodule(name).weight for name in quantized_layers(seen.network)]
        quantized, rows = sum(weight.numel() for weight in layers), sum(weight.shape[0] for weight in layers)
        weights = {
            "bfloat16": 2 * total,
            "int8": 2 * (total - quantized) + quantized + 2 * rows,
            "nf4": 2 * (total - quantized) + quantized * 9 // 16,
        }
    return [Memory(f"inference, {kind}", {"weights": count}) for kind, count in weights.items()]
