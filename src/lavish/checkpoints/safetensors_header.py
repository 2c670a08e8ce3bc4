"""The header of a safetensors file, checked against the file before anything is allocated.

Format: 8 bytes little-endian header size, a JSON object {name: {dtype, shape, data_offsets}}, then the data with
neither holes nor overlaps. Source: the format's description in the safetensors repository. Read here, and not by the
library, because the library maps the whole file to answer and names neither the tensor nor what to do in its errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavish.checkpoints.tensor_map import ITEM_BYTES, TensorInfo
from lavish.common.errors import CheckpointError

MAX_HEADER_BYTES = 6_000_000
"""The 1221 tensors of a CogVLM2 need 160 kB; the library's own limit is 100 MB, which may become 2.5 GB of lists."""
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
NAMES = {name: code for code, name in DTYPES.items()}


def encode_header(entries: Sequence[tuple[str, str, Sequence[int], int]]) -> bytes:
    """Give the beginning of a file whose tensors (name, dtype by torch's name, shape, bytes) follow in this order.

    Raises:
        CheckpointError: a dtype that the format does not have.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    begin = 0
    for name, dtype, shape, nbytes in entries:
        if dtype not in NAMES:
            raise CheckpointError(f"{name!r} is {dtype}, which safetensors cannot hold.")
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, begin + nbytes]}
        begin += nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read names, shapes, dtypes and places of the tensors of one file, and none of its weights.

    Raises:
        CheckpointError: the file is truncated, or the header is not one that the format allows.
    """
    header, data_start, file_bytes = _read(file)
    header.pop("__metadata__", None)
    return _check(file, header, data_start, file_bytes - data_start)


def read_metadata(file: Path) -> dict[str, str]:
    """Read the texts that a file says of itself: `format` is "pt" or, of MindSpore, "ms".

    Raises:
        CheckpointError: as `read_header`.
    """
    metadata = _read(file)[0].get("__metadata__")
    if not isinstance(metadata, dict):
        return {}
    return {name: value for name, value in metadata.items() if isinstance(value, str)}


def _read(file: Path) -> tuple[dict[str, Any], int, int]:
    """Give the header, where the data begin, and the size of the file."""
    with file.open("rb") as handle:
        file_bytes = handle.seek(0, 2)
        handle.seek(0)
        prefix = handle.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8:
            raise CheckpointError(f"{file}: {file_bytes} bytes are too few for a safetensors file; fetch it again.")
        if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise CheckpointError(
                f"{file}: the header claims {header_bytes} bytes and the file has {file_bytes}: not a "
                "safetensors file, "
                "or cut off while it was fetched; fetch it again."
            )
        raw = handle.read(header_bytes)
    return _parse(file, raw), 8 + header_bytes, file_bytes


def _parse(file: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        for key, value in pairs:
            if key in keys:
                raise CheckpointError(f"{file}: the header names {key!r} twice.")
            keys[key] = value
        return keys

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or an integer of thousands of digits
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{file}: the safetensors header is not JSON ({type(error).__name__}); fetch it again."
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the safetensors header is a {type(header).__name__}, not an object.")
    return header


def _check(file: Path, header: dict[str, Any], data_start: int, data_bytes: int) -> dict[str, TensorInfo]:
    """Turn header entries into infos; every byte of the data must belong to exactly one tensor."""
    infos: dict[str, TensorInfo] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(file, name, entry)
        if math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
            raise CheckpointError(
                f"{file}: {name!r} has shape {shape} in {dtype}, {math.prod(shape) * ITEM_BYTES[dtype]} bytes, "
                f"but its place in the file has {end - begin}."
            )
        if end > data_bytes:
            raise CheckpointError(
                f"{file}: truncated: {name!r} ends at byte {data_start + end} and the file has "
                f"{data_start + data_bytes}; "
                "fetch it again."
            )
        infos[name] = TensorInfo(shape, dtype, file, data_start + begin)
        places.append((begin, end, name))
    reached, before = 0, None
    for begin, end, name in sorted(places):
        if begin < reached:
            raise CheckpointError(f"{file}: {name!r} overlaps {before!r} in the file.")
        if begin > reached:
            raise CheckpointError(f"{file}: {begin - reached} bytes before {name!r} belong to no tensor.")
        reached, before = end, name
    if reached != data_bytes:
        raise CheckpointError(f"{file}: {data_bytes - reached} bytes at its end belong to no tensor; fetch it again.")
    return infos


def _entry(file: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(f"{file}: the header entry of {name!r} needs dtype, shape and data_offsets.")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{file}: {name!r} has the dtype {entry['dtype']!r}; lavish reads {', '.join(DTYPES)}.")
    is_range = _naturals(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]
    if not (_naturals(shape) and is_range and (offsets[0] < offsets[1] or _is_shape(shape))):
        raise CheckpointError(f"{file}: {name!r} has a shape or data_offsets that cannot be.")
    return DTYPES[entry["dtype"]], tuple(shape), offsets[0], offsets[1]


def _naturals(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def _is_shape(shape: list[int]) -> bool:
    """Tell whether torch can make a tensor of a shape; one without elements may have other axes that are too long."""
    return math.prod(max(size, 1) for size in shape) < 2**60
