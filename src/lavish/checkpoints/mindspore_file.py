"""One checkpoint file of MindSpore: `.ckpt`, a run of Protocol Buffers messages, or the safetensors variant.

    Checkpoint  { 1: repeated Value }
    Value       { 1: tag  2: TensorProto  3: MapTensorProto { 1: repeated TensorProto } }
    TensorProto { 1: repeated dims  2: tensor_type  3: tensor_content, little-endian and row-major }

The file is walked by offset through a memory map; no message is built and no weight is read, but for the CRC at its
end. Facts: files written and read by MindSpore 2.10.0 (mindspore-ai/mindspore, mindspore/python/mindspore/train/
serialization.py and checkpoint.proto). Which model the names belong to is not known here.
"""

from __future__ import annotations

import math
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lavish.checkpoints.protobuf import BYTES, Field, Walk, WireError
from lavish.checkpoints.safetensors_header import read_header, read_metadata
from lavish.checkpoints.tensor_map import ITEM_BYTES, Assembled, Piece, Stored, TensorInfo
from lavish.common.errors import CheckpointError, UnknownLayout

SUFFIX, SAFETENSORS_SUFFIX = ".ckpt", ".safetensors"
TYPES = {
    "Float32": "float32",
    "Float16": "float16",
    "BFloat16": "bfloat16",
    "Float64": "float64",
    "Int8": "int8",
    "Int16": "int16",
    "Int32": "int32",
    "Int64": "int64",
    "UInt8": "uint8",
    "UInt16": "uint16",
    "UInt32": "uint32",
    "UInt64": "uint64",
    "Bool": "bool",
    "Int4": "uint8",  # two numbers a byte; the dims count bytes
}
"""MindSpore's `tensor_type` -> torch's name of the dtype."""
TEXT_TYPE = "str"
ENCRYPTED = {b"\xd8\x5e\x3a\x7f": "AES-GCM", b"\xd9\x5e\x3a\x7f": "AES-CBC", b"\xda\x5e\x3a\x7f": "SM4-CBC"}
CRC_MARK = b"crc_num"
CRC_BYTES = 10
MAP_PARTS = ("keys", "values", "status")
"""What a hash table's `maptensor` holds, in this order."""
MAX_TAG_BYTES, MAX_TYPE_BYTES, MAX_TEXT_BYTES, MAX_DIMS = 2048, 32, 1 << 20, 64
MAX_NUMEL = 1 << 60
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Contents:
    """What one file holds."""

    infos: dict[str, Stored]
    texts: dict[str, str] = field(default_factory=dict)
    """Values of the type `str`, which a training run saves beside its weights."""
    has_crc: bool = False


@dataclass
class _Entry:
    """The values of one tag that follow each other: a tensor, or its slices."""

    tag: str
    dims: tuple[int, ...]
    type: str
    spans: list[tuple[int, int]]
    is_map: bool = False


def read_file(file: Path, *, verify: bool = True) -> Contents:
    """Read names, shapes, dtypes and places of the tensors of one file.

    Args:
        file: a `.ckpt`, or a `.safetensors` whose metadata say `format: ms`.
        verify: compare the CRC, if the file has one; it takes reading the whole file.
    Raises:
        CheckpointError: encrypted, truncated, damaged, or a dtype that lavish does not know.
        UnknownLayout: no checkpoint of MindSpore.
    """
    if file.suffix == SAFETENSORS_SUFFIX:
        return _read_safetensors(file, verify=verify)
    with file.open("rb") as handle:
        head = handle.read(4)
        _check_head(file, head)
        stop, crc = _split_crc(handle.fileno(), file)
        if verify and crc is not None:
            _check_crc(file, crc, _crc(file, [(0, stop)]))
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                entries = list(_entries(file, Walk(data), stop))
            except WireError as error:
                raise CheckpointError(f"{file}: damaged: {error}; fetch or save it again.") from error
            texts = {entry.tag: _text(file, data, entry) for entry in entries if entry.type == TEXT_TYPE}
    infos: dict[str, Stored] = {}
    for entry in entries:
        if entry.tag in infos or (entry.tag in texts and entry.type != TEXT_TYPE):
            raise CheckpointError(f"{file}: holds {entry.tag!r} twice, with other parameters between; save it again.")
        if entry.type != TEXT_TYPE:
            infos[entry.tag] = _stored(file, entry)
    return Contents(infos, texts, crc is not None)


def is_file(file: Path) -> bool:
    """Tell whether a file is one of MindSpore's, by its first bytes; an encrypted one and a strategy count too."""
    if file.suffix == SAFETENSORS_SUFFIX:
        try:
            return read_metadata(file).get("format") == "ms"
        except CheckpointError:  # whoever reads it next says what is wrong
            return False
    if file.suffix != SUFFIX:
        return False
    with file.open("rb") as handle:
        head = handle.read(4)
    return head in ENCRYPTED or head[:1] in (b"\x0a", b"\x08")


def _check_head(file: Path, head: bytes) -> None:
    if head in ENCRYPTED:
        raise CheckpointError(
            f"{file}: encrypted by MindSpore ({ENCRYPTED[head]}), and lavish opens no encrypted file. Load it in "
            "MindSpore with its key (load_checkpoint(..., dec_key=...)) and save it without enc_key."
        )
    if head[:1] == b"\x08":
        raise UnknownLayout(
            f"{file}: a strategy (how a run cut its parameters), no checkpoint. Give the folder that holds rank_0, "
            "rank_1 ..."
        )
    if head[:1] != b"\x0a":
        what = "empty" if not head else "no checkpoint of MindSpore (those begin with the byte 0a)"
        advice = " A PyTorch file under this name: rename it to .pth." if head[:2] in (b"PK", b"\x80\x02") else ""
        raise UnknownLayout(f"{file}: {what}.{advice}")


# -- the CRC -----------------------------------------------------------------------------------------------------------


def _split_crc(handle: int, file: Path) -> tuple[int, int | None]:
    """Give where the messages end, and the CRC behind them, if there is one."""
    with mmap.mmap(handle, 0, access=mmap.ACCESS_READ) as data:
        tail = len(CRC_MARK) + CRC_BYTES
        if data[max(0, len(data) - tail) :][: len(CRC_MARK)] != CRC_MARK:
            return len(data), None
        return len(data) - tail, int.from_bytes(data[len(data) - CRC_BYTES :], "big")


def _crc(file: Path, spans: list[tuple[int, int]], names: list[str] | None = None) -> int:
    """Compute the CRC-32 of parts of a file, each after its name if there are names."""
    crc, buffer = 0, memoryview(bytearray(_CHUNK_BYTES))
    with file.open("rb") as handle:
        for index, (start, stop) in enumerate(spans):
            if names is not None:
                crc = zlib.crc32(names[index].encode(), crc)
            handle.seek(start)
            while start < stop:
                count = handle.readinto(buffer[: min(_CHUNK_BYTES, stop - start)])
                if not count:
                    raise CheckpointError(f"{file}: became shorter while it was read; something is writing to it.")
                crc = zlib.crc32(buffer[:count], crc)
                start += count
    return crc


def _check_crc(file: Path, stored: int, found: int) -> None:
    if stored != found:
        raise CheckpointError(
            f"{file}: damaged: its CRC is {stored:#010x} and its bytes give {found:#010x}. Fetch or save it again."
        )


# -- the messages ------------------------------------------------------------------------------------------------------


def _entries(file: Path, walk: Walk, stop: int) -> Iterator[_Entry]:
    """Give what the file holds, slices of one tag together."""
    before: list[_Entry] = []
    for part in walk.fields(0, stop, may_pass_the_end=True):
        if part.number != 1 or part.wire != BYTES:
            continue
        if part.stop > stop:
            raise CheckpointError(_truncated(file, walk, part, stop))
        try:
            entries = _value(walk, part)
        except WireError as error:
            tag = _tag(walk, part, part.stop)
            raise CheckpointError(f"{file}: damaged in {tag}: {error}; fetch or save it again.") from error
        if [entry.tag for entry in before] == [entry.tag for entry in entries]:
            for entry, slice_ in zip(before, entries, strict=True):
                _join(file, entry, slice_)
        else:
            yield from before
            before = entries
    yield from before


def _value(walk: Walk, part: Field) -> list[_Entry]:
    """Read one Value: a tensor, or the three of a hash table."""
    tag, tensors, is_map = "", [], False
    for inner in walk.fields(part.start, part.stop):
        if inner.number == 1:
            tag = walk.text(inner, MAX_TAG_BYTES)
        elif inner.number == 2 and inner.wire == BYTES:
            tensors.append(_tensor(walk, inner))
        elif inner.number == 3 and inner.wire == BYTES:
            is_map = True
            each = walk.fields(inner.start, inner.stop)
            tensors += [_tensor(walk, one) for one in each if one.number == 1 and one.wire == BYTES]
    if not tag:
        raise WireError(f"a parameter without a name at byte {part.start}")
    if not is_map and len(tensors) != 1:
        raise WireError(f"{len(tensors)} tensors under one name at byte {part.start}")
    if len(tensors) > len(MAP_PARTS):
        raise WireError(f"{len(tensors)} tensors in one hash table at byte {part.start}")
    if not is_map:
        return [_Entry(tag, *tensors[0])]
    return [_Entry(f"{tag}.{name}", *tensor, is_map=True) for name, tensor in zip(MAP_PARTS, tensors, strict=False)]


def _tensor(walk: Walk, part: Field) -> tuple[tuple[int, ...], str, list[tuple[int, int]]]:
    dims: list[int] = []
    kind, span = "", (part.start, part.start)
    for inner in walk.fields(part.start, part.stop):
        if inner.number == 1:
            dims += walk.numbers(inner)
            if len(dims) > MAX_DIMS:
                raise WireError(f"a tensor of more than {MAX_DIMS} dimensions at byte {part.start}")
        elif inner.number == 2:
            kind = walk.text(inner, MAX_TYPE_BYTES)
        elif inner.number == 3 and inner.wire == BYTES:
            span = (inner.start, inner.stop)
    if any(size < 0 for size in dims):
        raise WireError(f"a tensor of the shape {dims} at byte {part.start}")
    return tuple(dims), kind, [span]


def _join(file: Path, entry: _Entry, slice_: _Entry) -> None:
    """Add a slice to the tensor that it continues. Those of a hash table have shapes of their own, which add up."""
    same = entry.dims == slice_.dims
    if entry.is_map and entry.dims and slice_.dims:
        same = entry.dims[1:] == slice_.dims[1:]
    if not same or entry.type != slice_.type or entry.is_map != slice_.is_map:
        raise CheckpointError(
            f"{file}: the slices of {entry.tag!r} differ: {entry.type} {entry.dims} and {slice_.type} {slice_.dims}."
        )
    if entry.is_map and entry.dims:
        entry.dims = (entry.dims[0] + slice_.dims[0], *entry.dims[1:])
    entry.spans += slice_.spans


def _truncated(file: Path, walk: Walk, part: Field, stop: int) -> str:
    tag = _tag(walk, part, stop)
    return f"{file}: truncated: {tag} ends at byte {part.stop} and the file has {stop}; fetch or save it again."


def _tag(walk: Walk, part: Field, stop: int) -> str:
    """Name a parameter that cannot be read whole."""
    try:
        for inner in walk.fields(part.start, min(part.stop, stop)):
            if inner.number == 1:
                return repr(walk.text(inner, MAX_TAG_BYTES))
    except WireError:
        pass
    return f"the parameter at byte {part.start}"


def _text(file: Path, data: mmap.mmap, entry: _Entry) -> str:
    """Decode a value of the type `str`: UTF-32, little-endian."""
    if sum(stop - start for start, stop in entry.spans) > MAX_TEXT_BYTES:
        raise CheckpointError(f"{file}: the text {entry.tag!r} has over {MAX_TEXT_BYTES} bytes.")
    try:
        return b"".join(data[start:stop] for start, stop in entry.spans).decode("utf-32-le")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: the text {entry.tag!r} is no UTF-32; save it again.") from error


def _stored(file: Path, entry: _Entry) -> Stored:
    """Say where a tensor lies, and check its bytes against its shape."""
    dtype = entry.type if entry.is_map and entry.type in ITEM_BYTES else TYPES.get(entry.type)
    if dtype is None:
        raise CheckpointError(f"{file}: {entry.tag!r} is of the type {entry.type!r}; lavish reads {', '.join(TYPES)}.")
    if math.prod(max(size, 1) for size in entry.dims) >= MAX_NUMEL:  # also of a tensor that is empty by another axis
        raise CheckpointError(f"{file}: {entry.tag!r} is of a shape that cannot be, {entry.dims}; save it again.")
    item, found = ITEM_BYTES[dtype], sum(stop - start for start, stop in entry.spans)
    shape = () if entry.dims == (0,) and found == item and not entry.is_map else entry.dims  # old files: scalars as [0]
    if math.prod(shape) * item != found:
        slices = f"in {len(entry.spans)} slices " if len(entry.spans) > 1 else ""
        raise CheckpointError(
            f"{file}: {entry.tag!r} is {entry.type} of shape {shape}, {math.prod(shape) * item} bytes, and {found} "
            f"{slices}are in the file; it is damaged, or slices are missing. Fetch or save it again."
        )
    spans = [(start, stop) for start, stop in entry.spans if stop > start]
    if len(spans) < 2:
        return TensorInfo(shape, dtype, file, (spans or entry.spans)[0][0])
    pieces: list[Piece] = []
    first = 0
    for start, stop in spans:
        count, over = divmod(stop - start, item)
        if over:
            raise CheckpointError(f"{file}: a slice of {entry.tag!r} ends inside of an element; save it again.")
        pieces.append(Piece(TensorInfo((count,), dtype, file, start), (first,)))
        first += count
    return Assembled(shape, dtype, tuple(pieces), is_flat=True)


# -- the safetensors variant -------------------------------------------------------------------------------------------


def _read_safetensors(file: Path, *, verify: bool) -> Contents:
    """Read a file that MindSpore saved with `format="safetensors"`: the CRC covers names and values by name."""
    metadata = read_metadata(file)
    if metadata.get("format") != "ms":
        raise UnknownLayout(f"{file}: its metadata do not say format 'ms', so MindSpore did not write it.")
    infos = read_header(file)
    stored = metadata.get("crc_num")
    if verify and stored is not None:
        if not stored.isdecimal() or len(stored) > 20:
            raise CheckpointError(f"{file}: damaged: its CRC is {stored!r:.40}, no number. Fetch or save it again.")
        names = sorted(infos)
        spans = [(infos[name].offset, infos[name].offset + infos[name].nbytes) for name in names]
        _check_crc(file, int(stored), _crc(file, spans, names))
    return Contents(dict(infos), {}, stored is not None)
