"""A checkpoint as a mapping from name to tensor, read lazily through a memory map.

Readers fill in a `TensorInfo` a tensor from headers alone; bytes are touched only when a tensor is taken. torch is
imported then, and not before: `lavish inspect` lists a checkpoint without it. Nothing here knows a file format.
"""

from __future__ import annotations

import math
import mmap
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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


class MappedFile:
    """One file, mapped privately: tensors of it cost no memory until their pages are read, and writing to them never
    reaches the disk."""

    def __init__(self, file: Path, file_bytes: int) -> None:
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
        """Give a view of the mapped bytes: (info.shape), info.dtype, on the CPU."""
        import torch

        dtype: torch.dtype = getattr(torch, info.dtype)  # a key of ITEM_BYTES, all of which are names of torch
        if info.numel == 0:
            return torch.empty(info.shape, dtype=dtype)
        flat = torch.frombuffer(self._map, dtype=dtype, count=info.span, offset=info.offset)
        return flat.view(info.shape) if info.stride is None else flat.as_strided(info.shape, info.stride)

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
        infos: Mapping[str, TensorInfo],
        *,
        listed: Iterable[str] = (),
        absent: Iterable[str] = (),
    ) -> None:
        self.path = path
        self.infos = dict(infos)
        self.listed = tuple(listed)
        self.absent = tuple(absent)
        self._file_bytes = {file: file.stat().st_size for file in {info.file for info in self.infos.values()}}
        self._maps: dict[Path, MappedFile] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        info = self.info(name)
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

    def info(self, name: str) -> TensorInfo:
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

    def shards_sentence(self) -> str:
        """Say which shards the index lists, which are on disk and which to fetch; empty without an index."""
        if not self.listed:
            return ""
        if not self.absent:
            return f" The index lists {len(self.listed)} shards and all are on disk."
        on_disk = len(self.listed) - len(self.absent)
        return f" The index lists {len(self.listed)} shards and {on_disk} are on disk; fetch {', '.join(self.absent)}."
