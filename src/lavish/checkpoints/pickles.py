"""Tensors out of torch's zip files (`.bin`, `.pt`, `.pth`) without unpickling.

The pickle inside is read by a small interpreter of its own: plain data, `OrderedDict`, and the handful of names by
which torch describes a tensor (`GLOBALS`). None of these names is ever imported or called: each stands for a record
of ours, and every other name, and every opcode that makes objects in another way, is refused. So a crafted file has
nothing to run, which an allow-list over `pickle.Unpickler` or `torch.load(weights_only=True)` cannot promise to the
same degree (CVE-2025-32434, CVE-2026-24747 of torch). Storages stay in the zip file, uncompressed as torch writes
them, and are memory-mapped when a tensor is taken. torch's format before 1.6 (no zip) is refused. Source of the
format: torch/serialization.py, torch/_utils.py.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Collection, Container, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from lavish.checkpoints.tensor_map import ITEM_BYTES, TensorInfo, TensorMap
from lavish.checkpoints.zip_directory import open_archive
from lavish.common.errors import CheckpointError, UnsafeCheckpoint

MAX_PICKLE_BYTES = 32_000_000  # names and places only: 150 kB for a CogVLM2
MAX_OPCODES = 300_000
"""About 45 a tensor, 55,000 for a CogVLM2; this many take half a second."""
NEVER_OPENED = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
"""File names that begin so hold pickled classes of a training script, never weights."""

STORAGE_DTYPES = {
    "torch DoubleStorage": "float64",
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
}
REBUILDERS = ("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter")
REBUILD_TYPED = "torch._tensor _rebuild_from_type_v2"
"""How torch describes a tensor that has Python attributes: by one of the others, its class, and the attributes, which
are dropped. DeepSpeed's flat groups are such."""
TENSOR_TYPES = ("torch Tensor", "torch.nn.parameter Parameter")
SEQUENCES = ("torch Size", "builtins set", "__builtin__ set")
"""What DeepSpeed writes beside the weights (shapes, names of sparse modules); read as tuples."""
GLOBALS = frozenset({*STORAGE_DTYPES, *REBUILDERS, REBUILD_TYPED, *TENSOR_TYPES, *SEQUENCES, "collections OrderedDict"})


@dataclass(frozen=True)
class Inert:
    """What stands for an object of a class that a reader knows and does not make: its name, and what it was to be made
    of. Its attributes are dropped."""

    name: str
    arguments: tuple[Any, ...]


_known: ContextVar[dict[Any, Any] | None] = ContextVar("trees of files", default=None)


def load_tensors(path: str | Path) -> TensorMap:
    """Open one file that holds a flat dict of tensors.

    Raises:
        UnsafeCheckpoint: the pickle asks for anything but tensors and plain data, or the file is a kind that is never
          opened.
        CheckpointError: no torch zip file, damaged, or not a flat dict of tensors.
    """
    path = Path(path)
    return TensorMap(path, read_table(path))


def read_table(file: Path) -> dict[str, TensorInfo]:
    """Read names and places of the tensors of one file (errors as `load_tensors`)."""
    tree = read_tree(file)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file}: holds a {type(tree).__name__}, not a dict of tensors.")
    for name, value in tree.items():
        if not isinstance(name, str) or not isinstance(value, TensorInfo):
            raise CheckpointError(
                f"{file}: holds a {type(value).__name__} under {name!r}, where this layout has only named tensors."
            )
    return tree


def read_tree(file: Path, inert: Collection[str] = ()) -> Any:
    """Read what the file holds: dicts, lists, tuples, plain values, and a `TensorInfo` in the place of each tensor.

    Objects of the classes named in `inert` ("module Class") become an `Inert`; nothing of theirs is imported or called.
    """
    known = _known.get()
    if known is None:
        return _read_tree(file, inert)
    key = (file, file.stat().st_mtime_ns, frozenset(inert))
    if key not in known:
        known[key] = _read_tree(file, inert)
    return known[key]


@contextmanager
def remembered() -> Iterator[None]:
    """Read each file once while this lasts; who looks at a checkpoint from several sides reads it several times."""
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def _read_tree(file: Path, inert: Container[str]) -> Any:
    if file.name.startswith(NEVER_OPENED):
        raise UnsafeCheckpoint(f"{file}: holds a training run's pickled objects, not weights; never opened.")
    with open_archive(file) as archive:
        records = _records(file, archive)
        pickle_bytes = archive.read(records["data.pkl"])
    with file.open("rb") as handle:
        return _Interpreter(file, handle, records, inert).run(pickle_bytes)


def _records(file: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Give the archive's entries without their common first folder, after checking that none is odd."""
    records: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        record = entry.filename.partition("/")[2]
        if record in records:
            raise CheckpointError(f"{file}: the zip file holds {entry.filename!r} twice.")
        if not 0 <= entry.header_offset < file.stat().st_size:
            raise CheckpointError(f"{file}: places {entry.filename!r} outside of the file; fetch it again.")
        if entry.CRC == 0:  # torch was told to compute none; without the field zipfile compares nothing
            del entry.CRC
        records[record] = entry
    if "data.pkl" not in records:
        raise CheckpointError(f"{file}: a zip file, but not one of torch: it holds no data.pkl.")
    for record, max_bytes in (("data.pkl", MAX_PICKLE_BYTES), ("byteorder", 16)):
        entry = records.get(record)
        if entry and (entry.file_size > max_bytes or entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1):
            raise CheckpointError(
                f"{file}: its {record} claims {entry.file_size} bytes or is compressed; torch writes at most "
                f"{max_bytes} plain ones."
            )
    if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
        raise CheckpointError(f"{file}: was saved on a big-endian machine; save it again on a little-endian one.")
    return records


@dataclass(frozen=True)
class _Global:
    """A name that the pickle asked for, by its text. Nothing is imported."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: str
    offset: int
    numel: int


class _Mark:
    """The stack's mark: never a value."""


_MARK = _Mark()
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")


class _Interpreter:
    """Run the opcodes that torch's state dicts are made of, on a stack of plain data."""

    def __init__(
        self, file: Path, handle: BinaryIO, records: dict[str, zipfile.ZipInfo], inert: Container[str]
    ) -> None:
        self.file, self.handle = file, handle
        self.inert = inert
        self.records = records
        self.file_bytes = file.stat().st_size
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}
        self.handlers: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(_LITERALS, self.stack.append),
            "NONE": lambda _: self.stack.append(None),
            "NEWTRUE": lambda _: self.stack.append(True),
            "NEWFALSE": lambda _: self.stack.append(False),
            "GLOBAL": self._global,
            "STACK_GLOBAL": lambda _: self._global(f"{self._text(-2)} {self._text(-1)}", pop=2),
            "BINPERSID": lambda _: self.stack.append(self._storage(self.stack.pop())),
            "REDUCE": lambda _: self._reduce(),
            "NEWOBJ": lambda _: self._new_object(),
            "BUILD": lambda _: self._build(),
            "MARK": lambda _: self.stack.append(_MARK),
            "EMPTY_DICT": lambda _: self.stack.append({}),
            "EMPTY_LIST": lambda _: self.stack.append([]),
            "EMPTY_TUPLE": lambda _: self.stack.append(()),
            "TUPLE": lambda _: self.stack.append(tuple(self._since_mark())),
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            "APPEND": lambda _: self._extend([self.stack.pop()]),
            "APPENDS": lambda _: self._extend(self._since_mark()),
            "SETITEM": lambda _: self._set_items([self.stack.pop(-2), self.stack.pop()]),
            "SETITEMS": lambda _: self._set_items(self._since_mark()),
            "BINPUT": self._remember,
            "LONG_BINPUT": self._remember,
            "MEMOIZE": lambda _: self._remember(len(self.memo)),
            "BINGET": lambda key: self.stack.append(self.memo[key]),
            "LONG_BINGET": lambda key: self.stack.append(self.memo[key]),
            "PROTO": lambda _: None,
            "FRAME": lambda _: None,
        }

    def run(self, pickle_bytes: bytes) -> Any:
        """Give the value that the pickle describes.

        Raises:
            UnsafeCheckpoint: an opcode or a name beyond the allow-list.
            CheckpointError: the pickle is damaged, or a tensor does not lie inside of its storage.
        """
        try:
            stream = io.BytesIO(pickle_bytes)
            left = MAX_OPCODES
            while code := stream.read(1):
                left -= 1
                if left < 0:
                    raise ValueError(f"more than {MAX_OPCODES} opcodes")
                opcode = _OPCODES.get(code)
                if opcode is None:
                    raise ValueError(f"{code!r} at {stream.tell() - 1} is no opcode")
                argument = None if opcode.arg is None else opcode.arg.reader(stream)
                if opcode.name == "STOP":
                    return self.stack.pop()
                handler = self.handlers.get(opcode.name)
                if handler is None:
                    self._refuse(opcode.name, argument)
                handler(argument)
            raise ValueError("it ends without STOP")
        except (UnsafeCheckpoint, CheckpointError):
            raise
        except (ValueError, IndexError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{self.file}: its pickle is damaged ({type(error).__name__}: {error}).") from error

    def _refuse(self, opcode: str, argument: Any) -> NoReturn:
        what = f"{opcode} {argument!r:.100}" if argument is not None else opcode
        raise UnsafeCheckpoint(
            f"{self.file}: its pickle uses {what}, which no file of tensors needs; nothing of it was run."
        )

    def _global(self, name: str, pop: int = 0) -> None:
        if name not in GLOBALS and name not in self.inert:
            raise UnsafeCheckpoint(
                f"{self.file}: its pickle asks for {name.replace(' ', '.', 1)!r:.200}, which is no part of a tensor; "
                "nothing of it was run. "
                "Get the model as safetensors."
            )
        del self.stack[len(self.stack) - pop :]
        self.stack.append(_Global(name))

    def _text(self, place: int) -> str:
        if not isinstance(self.stack[place], str):
            raise TypeError("STACK_GLOBAL without names")
        return self.stack[place]

    def _since_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise IndexError("no mark on the stack")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _tuple(self, size: int) -> None:
        items = tuple(self.stack[-size:])
        if len(items) < size or _MARK in self.stack[-size:]:
            raise IndexError("too few values for a tuple")
        self.stack[-size:] = [items]

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError("append to what is no list")
        self.stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise TypeError("items set on what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):  # a key of nested tuples could exhaust the C stack in hash()
                raise TypeError(f"a {type(key).__name__} as the key of a dict")
            target[key] = value

    def _remember(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def _build(self) -> None:
        """Drop the state that torch hangs on a state dict (`_metadata`), and that of an inert object: plain attributes
        that no weight depends on."""
        self.stack.pop()
        if type(self.stack[-1]) not in (dict, Inert):
            raise UnsafeCheckpoint(
                f"{self.file}: its pickle sets the state of a {type(self.stack[-1]).__name__}; nothing of it was run."
            )

    def _new_object(self) -> None:
        arguments, target = self.stack.pop(), self.stack.pop()
        if not isinstance(target, _Global) or target.name not in self.inert or type(arguments) is not tuple:
            name = target.name.replace(" ", ".") if isinstance(target, _Global) else type(target).__name__
            raise UnsafeCheckpoint(f"{self.file}: its pickle makes an object of {name!r:.100}; nothing of it was run.")
        self.stack.append(Inert(target.name, arguments))

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        target = self.stack.pop()
        if not isinstance(target, _Global) or type(arguments) is not tuple:
            raise UnsafeCheckpoint(f"{self.file}: its pickle calls a {type(target).__name__}; nothing of it was run.")
        if target.name == "collections OrderedDict" and arguments in ((), ([],)):
            self.stack.append({})  # dicts keep their order
        elif target.name in SEQUENCES and len(arguments) == 1 and type(arguments[0]) in (tuple, list):
            self.stack.append(tuple(arguments[0]))
        elif (
            target.name == "torch._utils _rebuild_parameter"
            and len(arguments) == 3
            and isinstance(arguments[0], TensorInfo)
        ):
            self.stack.append(arguments[0])
        elif target.name in REBUILDERS[:2] and len(arguments) >= 4:
            self.stack.append(self._tensor(*arguments[:4]))
        elif target.name == REBUILD_TYPED and (description := _typed(arguments)):
            self.stack.append(self._tensor(*description))
        elif target.name in self.inert:
            self.stack.append(Inert(target.name, arguments))
        else:
            raise UnsafeCheckpoint(
                f"{self.file}: its pickle calls {target.name.replace(' ', '.')} in a way that torch does not."
            )

    def _storage(self, reference: Any) -> _Storage:
        """Find the record of ("storage", type, key, location, numel) in the zip file."""
        if type(reference) is not tuple or len(reference) != 5 or reference[0] != "storage":
            raise TypeError("a persistent id that is no storage")
        _, kind, key, _, numel = reference
        if (
            not isinstance(kind, _Global)
            or kind.name not in STORAGE_DTYPES
            or type(key) is not str
            or not _natural(numel)
        ):
            raise TypeError("a storage without type, key and size")
        dtype = STORAGE_DTYPES[kind.name]
        if key not in self.storages:
            self.storages[key] = _Storage(dtype, self._place(key, numel * ITEM_BYTES[dtype]), numel)
        storage = self.storages[key]
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise CheckpointError(f"{self.file}: storage {key!r} is described in two ways.")
        return storage

    def _place(self, key: str, nbytes: int) -> int:
        """Give the offset of a storage's bytes in the file, after checking that they are all there."""
        entry = self.records.get(f"data/{key}")
        if entry is None:
            raise CheckpointError(f"{self.file}: a tensor needs storage {key!r} and the zip file holds no data/{key}.")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != nbytes:
            raise CheckpointError(
                f"{self.file}: storage {key!r} should be {nbytes} plain bytes and its entry has {entry.file_size}"
                f"{' compressed' if entry.compress_type else ''}; fetch the file again."
            )
        self.handle.seek(entry.header_offset)
        header = self.handle.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"{self.file}: damaged at storage {key!r}; fetch the file again.")
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        offset = entry.header_offset + 30 + name_bytes + extra_bytes
        if offset + nbytes > self.file_bytes:
            raise CheckpointError(
                f"{self.file}: truncated: storage {key!r} ends at byte {offset + nbytes} of {self.file_bytes}."
            )
        return offset

    def _tensor(self, storage: Any, start: Any, shape: Any, stride: Any) -> TensorInfo:
        plain = isinstance(storage, _Storage) and _natural(start) and type(shape) is tuple and type(stride) is tuple
        if not plain or len(shape) != len(stride) or len(shape) > 64 or not all(map(_natural, shape + stride)):
            raise TypeError("a tensor without storage, offset, shape and stride")
        offset = storage.offset + start * ITEM_BYTES[storage.dtype]
        contiguous = stride == tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        info = TensorInfo(shape, storage.dtype, self.file, offset, None if contiguous else stride)
        if info.numel > storage.numel or start + info.span > storage.numel:
            raise CheckpointError(
                f"{self.file}: a tensor of shape {shape} reaches beyond its storage ({storage.numel} elements, from "
                f"{start})."
            )
        return info


def _typed(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give storage, offset, shape and stride out of (rebuilder, class, its arguments, attributes) of a tensor; empty
    where these are none."""
    if len(arguments) != 4 or not all(isinstance(name, _Global) for name in arguments[:2]):
        return ()
    rebuilder, kind, inner, _ = arguments
    is_one = rebuilder.name in REBUILDERS[:2] and kind.name in TENSOR_TYPES
    return inner[:4] if is_one and type(inner) is tuple and len(inner) >= 4 else ()


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
