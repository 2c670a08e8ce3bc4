"""Write torch's zip files (`.pt`, `.pth`, `.bin`) as a stream: bytes come in the order in which they stand in the file;
and hold the checksums of one that is read against its bytes.

The pickle that names the tensors is put together here out of the few opcodes that it needs; no pickler runs, and
neither `torch.load(weights_only=True)` nor the reader of `pickles.py` needs more to read it. Tensors are stored
uncompressed and start at multiples of 64 bytes, as torch lays them, so that they can be memory-mapped.
Source of the format: torch/serialization.py, caffe2/serialize/inline_container.cc; APPNOTE.TXT of the zip format.
"""

from __future__ import annotations

import math
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pickle import encode_long
from typing import TYPE_CHECKING, Any

from lavish.checkpoints.pickles import STORAGE_DTYPES
from lavish.checkpoints.zip_directory import open_archive
from lavish.common.errors import CheckpointError

if TYPE_CHECKING:
    from lavish.checkpoints.output import Output

ALIGNMENT = 64
FOLDER = "archive"
"""First part of every name in the archive; readers take whatever it is."""
STORAGES = {dtype: name.partition(" ")[2] for name, dtype in STORAGE_DTYPES.items()}
_OVER_32 = 0xFFFFFFFF
_DATE = 0x21  # 1980-01-01, the first that a zip file can say: equal tensors give equal files


class TorchZipFormat:
    """How one torch zip file is laid out; see `lavish.checkpoints.output.Format`.

    `under` is the key that the dict of tensors stands under (`"module"` of SAT, `"model"` of LAVIS); None: the dict is
    all that the file holds.
    """

    def __init__(self, under: str | None = None) -> None:
        self.under = under
        self._entries: list[tuple[str, int, int, int]] = []
        """Name, CRC, bytes and offset of what was written."""

    def begin(self, outputs: Sequence[Output]) -> Iterator[bytes]:
        """Give what stands before the first tensor: names, shapes and types of all.

        Raises:
            CheckpointError: a type that torch's zip files have no storage for, or a name twice.
        """
        offset = 0
        for name, content in (("data.pkl", _pickle(outputs, self.under)), ("byteorder", b"little")):
            for piece in self._record(name, content, offset):
                offset += len(piece)
                yield bytes(piece)

    def tensor(self, output: Output, data: memoryview, offset: int) -> Iterator[bytes | memoryview]:
        """Give a tensor's header and its bytes; `offset` is where in the file they begin."""
        number = sum(name.startswith("data/") for name, *_ in self._entries)
        yield from self._record(f"data/{number}", data, offset)

    def end(self, offset: int) -> Iterator[bytes]:
        """Give what stands behind the last tensor: the table of contents."""
        for piece in self._record("version", b"3\n", offset):
            offset += len(piece)
            yield bytes(piece)
        table = b"".join(_central(*entry) for entry in self._entries)
        yield table
        count = len(self._entries)
        if count >= 0xFFFF or offset >= _OVER_32 or len(table) >= _OVER_32:
            end = offset + len(table)
            yield struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(table), offset)
            yield struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
        short = min(count, 0xFFFF)
        yield struct.pack(
            "<4sHHHHIIH", b"PK\x05\x06", 0, 0, short, short, min(len(table), _OVER_32), min(offset, _OVER_32), 0
        )

    def state(self) -> dict[str, Any]:
        """Give what `end` needs to know of the tensors already written, as plain values."""
        return {"entries": [list(entry) for entry in self._entries]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where a `state` was taken; `begin` is not called then."""
        self._entries = [(str(name), int(crc), int(size), int(offset)) for name, crc, size, offset in state["entries"]]

    def _record(self, name: str, content: bytes | memoryview, offset: int) -> Iterator[bytes | memoryview]:
        content = memoryview(content).cast("B") if len(content) else b""
        crc, size = zlib.crc32(content), len(content)
        self._entries.append((name, crc, size, offset))
        yield _local(name, crc, size, offset)
        yield content


class RecordSums:
    """The checksums of a torch zip file's records, while the file is read from its beginning to its end."""

    def __init__(self, file: Path) -> None:
        self._records: list[tuple[int, int, int, str]] = []  # first byte, end, checksum, name
        self._sums: dict[str, int] = {}
        # A file that is none, or damaged, has no records; whoever opens it for its tensors says what is wrong.
        with suppress(CheckpointError), open_archive(file) as archive, file.open("rb") as handle:
            for entry in archive.infolist():
                handle.seek(entry.header_offset + 26)
                first = entry.header_offset + 30 + sum(struct.unpack("<HH", handle.read(4)))
                if entry.CRC:  # 0: torch was told to compute none
                    self._records.append((first, first + entry.compress_size, entry.CRC, entry.filename))
        self._records.sort()

    def add(self, chunk: bytes, offset: int) -> None:
        """Take in the bytes of the file that begin at `offset`."""
        at = max(bisect_right(self._records, (offset,)) - 1, 0)
        for first, end, _, name in self._records[at:]:
            if first >= offset + len(chunk):
                break
            part = memoryview(chunk)[max(first - offset, 0) : max(end - offset, 0)]
            self._sums[name] = zlib.crc32(part, self._sums.get(name, 0))

    def wrong(self) -> list[str]:
        """Name the records whose bytes are not those that were written."""
        return [name for _, _, checksum, name in self._records if self._sums.get(name, 0) != checksum]


def _local(name: str, crc: int, size: int, offset: int) -> bytes:
    """Give the header before a record, long enough that the record is aligned."""
    path = f"{FOLDER}/{name}".encode()
    is_large = size >= _OVER_32
    extra = struct.pack("<HHQQ", 1, 16, size, size) if is_large else b""
    padding = -(offset + 30 + len(path) + len(extra) + 4) % ALIGNMENT
    extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    short = _OVER_32 if is_large else size
    fields = (45 if is_large else 20, 0, 0, 0, _DATE, crc, short, short, len(path), len(extra))
    return struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", *fields) + path + extra


def _central(name: str, crc: int, size: int, offset: int) -> bytes:
    """Give a record's line in the table of contents."""
    path = f"{FOLDER}/{name}".encode()
    over = [*([size, size] if size >= _OVER_32 else []), *([offset] if offset >= _OVER_32 else [])]
    extra = struct.pack(f"<HH{len(over)}Q", 1, 8 * len(over), *over) if over else b""
    version, short = (45 if over else 20), min(size, _OVER_32)
    fields = (version, version, 0, 0, 0, _DATE, crc, short, short, len(path), len(extra), 0, 0, 0, 0)
    return struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", *fields, min(offset, _OVER_32)) + path + extra


# -- the pickle --------------------------------------------------------------------------------------------------------

_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
_REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def _pickle(outputs: Sequence[Output], under: str | None) -> bytes:
    """Describe the tensors in the order in which they come; the n-th one lies in the record `data/n`."""
    seen: set[str] = set()
    pieces = [b"\x80\x02", b"" if under is None else b"}" + _text(under), _ORDERED_DICT, b"("]
    for number, output in enumerate(outputs):
        if output.name in seen:
            raise CheckpointError(f"{output.name!r} would be written twice into one file.")
        seen.add(output.name)
        pieces += [_text(output.name), _tensor(output, number)]
    return b"".join([*pieces, b"u", b"" if under is None else b"s", b"."])


def _tensor(output: Output, number: int) -> bytes:
    if output.dtype not in STORAGES:
        raise CheckpointError(
            f"{output.name!r} is {output.dtype}, which torch's zip files have no storage for; they have "
            f"{', '.join(STORAGES)}."
        )
    stride = [math.prod(output.shape[axis + 1 :]) for axis in range(len(output.shape))]
    kind = f"ctorch\n{STORAGES[output.dtype]}\n".encode()
    storage = b"(" + _text("storage") + kind + _text(str(number)) + _text("cpu") + _int(math.prod(output.shape)) + b"tQ"
    return b"".join(
        [_REBUILD, b"(", storage, _int(0), _tuple(output.shape), _tuple(stride), b"\x89", _ORDERED_DICT, b"tR"]
    )


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _int(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def _tuple(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(_int(value) for value in values) + b"t"
