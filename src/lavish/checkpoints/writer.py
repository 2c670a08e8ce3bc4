"""Write the Hugging Face layout: safetensors, in shards with an index when they do not fit one file.

All files are written under temporary names first and renamed when the last one is complete; a reader that comes in
between finds either no index (and refuses) or a whole checkpoint. Tensors are taken one at a time, so a lazy
`TensorMap` is rewritten in the memory of one tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from lavish.checkpoints.output import Output, SafetensorsFormat, data_of, in_file_order, into_shards
from lavish.checkpoints.safetensors_header import NAMES
from lavish.checkpoints.tensor_map import TensorMap
from lavish.common.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def save_sharded(
    tensors: Mapping[str, torch.Tensor], folder: str | Path, max_shard_bytes: int = 5_000_000_000
) -> list[Path]:
    """Write `tensors` to `folder` in their order, replacing the weights that it holds; gives the files written.

    `max_shard_bytes` counts tensor bytes; a larger tensor gets a shard of its own. Names are written as they are:
    pass the release's.

    Raises:
        CheckpointError: nothing to write, or a dtype that safetensors does not have.
    """
    folder = Path(folder)
    outputs = [_output(tensors, name) for name in tensors]
    if not outputs:
        raise CheckpointError(f"{folder}: no tensors to write.")
    shards = into_shards(outputs, max_shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in (*names, INDEX)}
    try:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(temporary[name], shard)
        if len(shards) > 1:
            weight_map = {output.name: name for name, shard in zip(names, shards, strict=True) for output in shard}
            index = {"metadata": {"total_size": sum(output.nbytes for output in outputs)}, "weight_map": weight_map}
            _write(temporary[INDEX], [json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"])
            names.append(INDEX)
        _publish(folder, names, temporary)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)
    return [folder / name for name in names]


def _output(tensors: Mapping[str, torch.Tensor], name: str) -> Output:
    if isinstance(tensors, TensorMap):
        info = tensors.info(name)
        shape, dtype = info.shape, info.dtype
    else:
        shape, dtype = tuple(tensors[name].shape), str(tensors[name].dtype).removeprefix("torch.")
    if dtype not in NAMES:
        raise CheckpointError(f"{name!r} is {dtype}, which safetensors cannot hold.")
    return Output(name, shape, dtype, lambda: tensors[name].detach().cpu())


def _write_shard(file: Path, outputs: Sequence[Output]) -> None:
    layout = SafetensorsFormat()
    ordered = in_file_order(outputs)

    def pieces() -> Iterator[bytes | memoryview]:
        yield from layout.begin(ordered)
        for output in ordered:
            yield from layout.tensor(output, data_of(output.make()), 0)

    _write(file, pieces())


def _write(file: Path, pieces: Iterator[bytes | memoryview] | list[bytes]) -> None:
    with file.open("wb") as handle:
        for piece in pieces:
            handle.write(piece)
        handle.flush()
        os.fsync(handle.fileno())


def _publish(folder: Path, names: Sequence[str], temporary: Mapping[str, Path]) -> None:
    """Rename the complete files into place, the index last; old weights that the new ones do not replace go."""
    if len(names) > 1:  # without an index the folder is refused, never read half old and half new
        (folder / INDEX).unlink(missing_ok=True)
        (folder / SINGLE).unlink(missing_ok=True)
    for name in names:
        temporary[name].replace(folder / name)
    if len(names) == 1:
        (folder / INDEX).unlink(missing_ok=True)
    for stale in folder.glob("model-*-of-*.safetensors"):
        if stale.name not in names:
            stale.unlink()
