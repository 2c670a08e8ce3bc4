"""A checkpoint as a mapping from name to tensor, read lazily through a memory map.

Readers fill in a `TensorInfo` a tensor from headers alone, or an `Assembled` one where several stored parts make a
tensor; bytes are touched only when a tensor is taken. torch is imported then, and not before: `lavish inspect` lists a
checkpoint without it. Nothing here knows a file format.
"""

from __future__ import annotations

import math
import mmap
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavish.common.errors import CheckpointError, did_you_mean

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
}
"""Bytes an element, by torch's name of the dtype. Readers refuse what is not listed."""

FETCHED_BYTES = 1 << 20
"""Tensors below this are not worth a word to the system."""
_NORESERVE = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0
"""MAP_NORESERVE: without it Linux refuses to map a file larger than the memory. Python names it from 3.13 on."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `dtype` is torch's name of it (`"bfloat16"`)."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    """Bytes from the start of the file to the first element."""
    stride: tuple[int, ...] | None = None
    """In elements; None when the tensor is contiguous, as in every safetensors file."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, not of what a stride leaves out."""
        return self.numel * ITEM_BYTES[self.dtype]

    @property
    def span(self) -> int:
        """Elements from the first to the last one, both included."""
        if self.numel == 0:
            return 0
        if self.stride is None:
            return self.numel
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


@dataclass(frozen=True)
class Piece:
    """A part of an `Assembled` tensor."""

    info: TensorInfo
    """Where its elements lie; may be a view of a larger stored tensor."""
    start: tuple[int, ...]
    """Corner of the box that they fill in the whole tensor; of a flat one, its first element alone."""


@dataclass(frozen=True)
class Assembled:
    """A tensor that several stored parts make: ranks of model parallelism, slices, partitions of ZeRO.

    Raises:
        CheckpointError: the pieces do not cover every element exactly once, or are of another dtype.
    """

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]
    is_flat: bool = False
    """The pieces are one-dimensional ranges of the flattened tensor."""

    def __post_init__(self) -> None:
        whole = (self.numel,) if self.is_flat else self.shape
        for piece in self.pieces:
            corner, size = piece.start, piece.info.shape
            if piece.info.dtype != self.dtype:
                raise CheckpointError(f"{piece.info.file}: a part of a {self.dtype} tensor is {piece.info.dtype}.")
            if len(corner) != len(whole) or len(size) != len(whole) or not _lies_inside(corner, size, whole):
                raise CheckpointError(
                    f"{piece.info.file}: a part of shape {size} that begins at {corner} does not lie in a tensor of "
                    f"shape {whole}."
                )
        found = sum(piece.info.numel for piece in self.pieces)
        if not self.pieces or found != self.numel or _overlap(self.pieces):
            where = f"{self.pieces[0].info.file}: " if self.pieces else ""
            raise CheckpointError(
                f"{where}the {len(self.pieces)} parts of a tensor of shape {self.shape} hold {found} elements and "
                f"should fill its {self.numel} once each; the files are not of one checkpoint."
            )

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.numel * ITEM_BYTES[self.dtype]

    @property
    def file(self) -> Path:
        """Where the first part lies."""
        return self.pieces[0].info.file

    @property
    def offset(self) -> int:
        """Where in `file` the first part lies."""
        return self.pieces[0].info.offset

    @property
    def stride(self) -> None:
        """None: it is contiguous when it is taken."""
        return None

    def boxed(self) -> Assembled:
        """Give the tensor with boxes as pieces: a range of the flattened tensor is a few of them."""
        if not self.is_flat:
            return self
        pieces: list[Piece] = []
        for piece in self.pieces:
            (first,), step, taken = piece.start, piece.info.stride or (1,), 0
            for corner, size in _boxes(self.shape, first, first + piece.info.numel):
                stride = tuple(step[0] * axis for axis in contiguous_stride(size))
                offset = piece.info.offset + taken * step[0] * ITEM_BYTES[self.dtype]
                pieces.append(Piece(_info(size, self.dtype, piece.info.file, offset, stride), corner))
                taken += math.prod(size)
        return Assembled(self.shape, self.dtype, tuple(pieces))


Stored = TensorInfo | Assembled
"""What a checkpoint says of one tensor."""


def view(info: Stored, dim: int, start: int, stop: int) -> Any:
    """Give the range `start:stop` of a stored tensor along `dim`, as a view of the file: of the same class.

    Raises:
        CheckpointError: the tensor has no such range.
    """
    if not 0 <= dim < len(info.shape) or not 0 <= start <= stop <= info.shape[dim]:
        raise CheckpointError(f"{info.file}: a tensor of shape {info.shape} has no {start}:{stop} along {dim}.")
    shape = (*info.shape[:dim], stop - start, *info.shape[dim + 1 :])
    if isinstance(info, TensorInfo):
        stride = info.stride or contiguous_stride(info.shape)
        offset = info.offset + start * stride[dim] * ITEM_BYTES[info.dtype]
        return _info(shape, info.dtype, info.file, offset, stride)
    pieces: list[Piece] = []
    for piece in info.boxed().pieces:
        begin = piece.start[dim]
        first, last = max(start, begin), min(stop, begin + piece.info.shape[dim])
        if first < last:
            corner = (*piece.start[:dim], first - start, *piece.start[dim + 1 :])
            pieces.append(Piece(view(piece.info, dim, first - begin, last - begin), corner))
    if not pieces:  # nothing was asked for; one empty piece says in which file
        pieces.append(Piece(view(info.boxed().pieces[0].info, dim, 0, 0), (0,) * len(shape)))
    return Assembled(shape, info.dtype, tuple(pieces))


def reshaped(info: Stored, shape: tuple[int, ...]) -> Any:
    """Give a stored tensor another shape, as a view of the file: of the same class.

    Raises:
        CheckpointError: another number of elements, or no view: parts of a tensor that are not contiguous take and
            lose sizes of 1 only.
    """
    if math.prod(shape) != info.numel:
        raise CheckpointError(f"{info.file}: a tensor of shape {info.shape} cannot have the shape {shape}.")
    if isinstance(info, Assembled):
        if info.is_flat:
            return replace(info, shape=shape)
        corners = [_without_ones(info.shape, shape, piece.start, fill=0) for piece in info.pieces]
        sizes = [_without_ones(info.shape, shape, piece.info.shape, fill=1) for piece in info.pieces]
        pieces = [
            Piece(reshaped(piece.info, size), corner)
            for piece, size, corner in zip(info.pieces, sizes, corners, strict=True)
            if size is not None and corner is not None
        ]
        if len(pieces) == len(info.pieces):
            return Assembled(shape, info.dtype, tuple(pieces))
    elif info.stride is None:
        return replace(info, shape=shape)
    elif (stride := _without_ones(info.shape, shape, info.stride, fill=1)) is not None:
        return _info(shape, info.dtype, info.file, info.offset, stride)
    raise CheckpointError(
        f"{info.file}: a tensor of shape {info.shape} that does not lie in one piece cannot have the shape {shape}."
    )


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Give the stride, in elements, of a contiguous tensor."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def _info(shape: tuple[int, ...], dtype: str, file: Path, offset: int, stride: tuple[int, ...]) -> TensorInfo:
    is_contiguous = all(
        size == 1 or step == plain for size, step, plain in zip(shape, stride, contiguous_stride(shape), strict=True)
    )
    return TensorInfo(shape, dtype, file, offset, None if is_contiguous else stride)


def _lies_inside(corner: Sequence[int], size: Sequence[int], whole: Sequence[int]) -> bool:
    return all(first >= 0 and first + length <= end for first, length, end in zip(corner, size, whole, strict=True))


def _overlap(pieces: Sequence[Piece]) -> bool:
    """Tell whether two boxes share an element. Sorted by their first axis, only near ones are compared."""
    boxes = sorted((piece.start, piece.info.shape) for piece in pieces if piece.info.numel)
    for index, (corner, size) in enumerate(boxes):
        for other, length in boxes[index + 1 :]:
            if corner and other[0] >= corner[0] + size[0]:
                break
            if all(max(a, b) < min(a + m, b + n) for a, m, b, n in zip(corner, size, other, length, strict=True)):
                return True
    return False


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Give corners and sizes of the boxes that the elements `start:stop` of a flattened tensor fill, in order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    while start < stop:
        index, inside = divmod(start, row)
        whole = (stop - start) // row if inside == 0 else 0
        if whole:
            yield (index, *(0 for _ in shape[1:])), (whole, *shape[1:])
            start += whole * row
            continue
        end = min(stop, (index + 1) * row)
        for corner, size in _boxes(shape[1:], inside, end - index * row):
            yield (index, *corner), (1, *size)
        start = end


def _without_ones(
    old: Sequence[int], new: Sequence[int], values: Sequence[int], *, fill: int
) -> tuple[int, ...] | None:
    """Carry one value an axis over to a shape that differs in sizes of 1 only; None if it differs in more."""
    kept = [value for size, value in zip(old, values, strict=True) if size != 1]
    if [size for size in old if size != 1] != [size for size in new if size != 1]:
        return None
    rest = iter(kept)
    return tuple(fill if size == 1 else next(rest) for size in new)


class MappedFile:
    """One file, mapped privately: tensors of it cost no memory until their pages are read, and writing to them never
    reaches the disk."""

    def __init__(self, file: Path, file_bytes: int) -> None:
        self._file = file
        with file.open("rb") as handle:
            found = handle.seek(0, 2)
            if found != file_bytes:
                raise CheckpointError(
                    f"{file}: was {file_bytes} bytes when its header was read and is {found} now; something is "
                    "writing to it."
                )
            if _NORESERVE:
                flags = mmap.MAP_PRIVATE | _NORESERVE
                self._map = mmap.mmap(handle.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            else:
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """Give a view of the mapped bytes: (info.shape), info.dtype, on the CPU.

        Trap: compiled loops take it that a number of four bytes begins at a multiple of four. Of a tensor that does
        not (MindSpore's files align nothing) it is a copy.
        """
        import torch

        dtype: torch.dtype = getattr(torch, info.dtype)  # a key of ITEM_BYTES, all of which are names of torch
        if info.numel == 0:
            return torch.empty(info.shape, dtype=dtype)
        item = ITEM_BYTES[info.dtype]
        if info.offset % min(item, 8) == 0:
            flat = torch.frombuffer(self._map, dtype=dtype, count=info.span, offset=info.offset)
        else:
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=info.span * item, offset=info.offset)
            flat = torch.empty(info.span, dtype=dtype)
            flat.view(torch.uint8).numpy()[:] = raw.numpy()
        return flat.view(info.shape) if info.stride is None else flat.as_strided(info.shape, info.stride)

    def fetch(self, info: TensorInfo) -> None:
        """Let the system read a tensor's bytes ahead.

        By the file and not by the map: Python holds its lock during madvise, which waits for a busy disk.
        """
        if hasattr(os, "posix_fadvise") and info.nbytes >= FETCHED_BYTES:
            with self._file.open("rb") as handle:
                num_bytes = info.span * ITEM_BYTES[info.dtype]
                os.posix_fadvise(handle.fileno(), info.offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def forget(self, info: TensorInfo) -> None:
        """Give the pages of a tensor that was copied out back to the system; taken again, they are read again."""
        if not hasattr(self._map, "madvise"):  # Windows has no madvise; there the pages go when the file is closed
            return
        start = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: neighbours share the outer ones
        stop = (info.offset + info.span * ITEM_BYTES[info.dtype]) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


class TensorMap(Mapping[str, "torch.Tensor"]):
    """Name -> tensor, lazily. `tensors[name]` is a view of the file (writes to it stay in this process).

    `path` is what the user named, for messages; `listed` and `absent` are the names of the shards that an index lists
    and of those that are not on disk.
    """

    def __init__(
        self,
        path: Path,
        infos: Mapping[str, Stored],
        *,
        listed: Iterable[str] = (),
        absent: Iterable[str] = (),
    ) -> None:
        self.path = path
        self.infos = dict(infos)
        self.listed = tuple(listed)
        self.absent = tuple(absent)
        files = {part.file for info in self.infos.values() for part in _parts(info)}
        self._file_bytes = {file: file.stat().st_size for file in files}
        self._maps: dict[Path, MappedFile] = {}
        self._read_maps: dict[Path, MappedFile] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        info = self.info(name)
        if isinstance(info, Assembled):
            return self.assemble(info)
        if info.file not in self._maps:
            self._maps[info.file] = self.open(info.file)
        return self._maps[info.file].tensor(info)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    def __repr__(self) -> str:
        return f"TensorMap({str(self.path)!r}, {len(self)} tensors, {self.nbytes / 1e9:.2f} GB)"

    def info(self, name: str) -> Stored:
        """Give what the headers say of a tensor.

        Raises:
            KeyError: there is no such tensor.
        """
        if name not in self.infos:
            raise KeyError(f"{self.path}: no tensor {name!r}.{did_you_mean(name, self.infos)}")
        return self.infos[name]

    def meta(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Give shape and dtype, from the headers alone."""
        import torch

        info = self.info(name)
        return info.shape, getattr(torch, info.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.infos.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files that hold a tensor, by name."""
        return tuple(sorted(self._file_bytes))

    def open(self, file: Path) -> MappedFile:
        """Map one of `files` apart from the maps that `[name]` keeps: the caller decides how long its pages stay."""
        return MappedFile(file, self._file_bytes[file])

    def assemble(self, info: Stored) -> torch.Tensor:
        """Copy a tensor of `files` into new memory, its parts together; the pages of the files are given back."""
        import torch

        value = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
        for piece in info.pieces if isinstance(info, Assembled) else (Piece(info, (0,) * len(info.shape)),):
            part = piece.info
            if part.numel == 0:
                continue
            if part.file not in self._read_maps:  # apart from those of `[name]`, whose pages a caller may have changed
                self._read_maps[part.file] = self.open(part.file)
            mapped = self._read_maps[part.file]
            mapped.fetch(part)
            box = value.view(-1) if isinstance(info, Assembled) and info.is_flat else value
            for axis, (first, length) in enumerate(zip(piece.start, part.shape, strict=True)):
                box = box.narrow(axis, first, length)
            # NumPy copies with one thread; torch's would wait for each other on busy cores (see loading.py).
            _as_numpy(box)[...] = _as_numpy(mapped.tensor(part))
            mapped.forget(part)
        return value

    def shards_sentence(self) -> str:
        """Say which shards the index lists, which are on disk and which to fetch; empty without an index."""
        if not self.listed:
            return ""
        if not self.absent:
            return f" The index lists {len(self.listed)} shards and all are on disk."
        on_disk = len(self.listed) - len(self.absent)
        return f" The index lists {len(self.listed)} shards and {on_disk} are on disk; fetch {', '.join(self.absent)}."


def _parts(info: Stored) -> tuple[TensorInfo, ...]:
    return tuple(piece.info for piece in info.pieces) if isinstance(info, Assembled) else (info,)


def _as_numpy(tensor: torch.Tensor) -> Any:
    """Give the elements as whole numbers of the same size: NumPy has neither bfloat16 nor float8."""
    import torch

    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.element_size()]).numpy()
