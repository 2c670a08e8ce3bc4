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

from lavish.checkpoints.safetensors_header import DTYPES
from lavish.checkpoints.tensor_map import ITEM_BYTES, TensorMap
from lavish.common.errors import CheckpointError

SAFETENSORS_NAMES = {name: code for code, name in DTYPES.items()}
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
    sizes = {name: _nbytes(tensors, name) for name in tensors}
    if not sizes:
        raise CheckpointError(f"{folder}: no tensors to write.")
    shards = _plan(sizes, max_shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in (*names, INDEX)}
    try:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(temporary[name], tensors, shard)
        if len(shards) > 1:
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            _write(temporary[INDEX], [json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"])
            names.append(INDEX)
        _publish(folder, names, temporary)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)
    return [folder / name for name in names]


def _nbytes(tensors: Mapping[str, torch.Tensor], name: str) -> int:
    if isinstance(tensors, TensorMap):
        return tensors.info(name).nbytes
    dtype = _dtype_name(tensors[name])
    if dtype not in SAFETENSORS_NAMES:
        raise CheckpointError(f"{name!r} is {dtype}, which safetensors cannot hold.")
    return tensors[name].numel() * ITEM_BYTES[dtype]


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _plan(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name, nbytes in sizes.items():
        if shards[-1] and held + nbytes > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += nbytes
    return shards


def _write_shard(file: Path, tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
    """Write one safetensors file; wide dtypes first, so that every tensor starts at a multiple of its element."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    infos = {name: (_dtype_name(tensors[name]), list(tensors[name].shape), _nbytes(tensors, name)) for name in names}
    order = sorted(names, key=lambda name: -ITEM_BYTES[infos[name][0]])
    begin = 0
    for name in order:
        dtype, shape, nbytes = infos[name]
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [begin, begin + nbytes]}
        begin += nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)

    def pieces() -> Iterator[bytes | memoryview]:
        yield len(raw).to_bytes(8, "little")
        yield raw
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data if flat.numel() else b""

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
