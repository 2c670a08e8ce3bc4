"""A full read of a checkpoint: checksums of its files, and what its numbers are."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lavish.checkpoints import hf, hub
from lavish.checkpoints.output import FLOATS
from lavish.checkpoints.tensor_map import Assembled, Stored, TensorMap, reshaped, view
from lavish.checkpoints.torch_file import RecordSums
from lavish.common.errors import CheckpointError, UnknownLayout
from lavish.inference.adapters import ADAPTER_FILES
from lavish.inference.source import Source, open_source

READ_BYTES = 4 << 20
CHUNK_NUMEL = 1 << 22
ADAPTER = "LoRA"
"""The part of an adapter's matrices."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_SHA256 = re.compile(r"[0-9a-f]{64}")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FileSum:
    """One file of weights."""

    file: Path
    num_bytes: int
    sha256: str
    expected: str | None
    """By the name under which a hub's cache keeps it; None: nothing says."""
    wrong: tuple[str, ...] = ()
    """Records of a torch zip file whose bytes do not have their checksum."""

    def problems(self) -> list[str]:
        """Say what is wrong with its bytes, a sentence each."""
        found: list[str] = []
        if self.wrong:
            names = ", ".join(self.wrong[:4])
            found.append(f"{self.file}: the bytes of {names} are not those that were written; fetch it again.")
        if self.expected not in (None, self.sha256):
            found.append(
                f"{self.file}: its SHA-256 is {self.sha256}, and the hub's is {self.expected}; fetch it again."
            )
        return found


@dataclass
class Part:
    """What the numbers of a part of the network are."""

    name: str
    num_tensors: int = 0
    numel: int = 0
    dtypes: set[str] = field(default_factory=set)
    num_nan: int = 0
    num_inf: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf
    total: float = 0.0
    squares: float = 0.0

    @property
    def num_finite(self) -> int:
        """Numbers that are numbers."""
        return self.numel - self.num_nan - self.num_inf

    @property
    def mean(self) -> float:
        """Of the finite ones."""
        return self.total / self.num_finite if self.num_finite else math.nan

    @property
    def std(self) -> float:
        """Of the finite ones."""
        return math.sqrt(max(self.squares / self.num_finite - self.mean**2, 0.0)) if self.num_finite else math.nan

    def add(self, values: torch.Tensor) -> None:
        """Take some numbers in."""
        wide = values.double()
        finite = wide[wide.isfinite()]
        self.num_nan += int(wide.isnan().sum())
        self.num_inf += int(wide.isinf().sum())
        if finite.numel():
            self.minimum = min(self.minimum, float(finite.min()))
            self.maximum = max(self.maximum, float(finite.max()))
            self.total += float(finite.sum())
            self.squares += float(finite.square().sum())


@dataclass(frozen=True)
class Checkup:
    """What a full read found."""

    path: Path
    layout: str
    family: str
    files: tuple[FileSum, ...]
    parts: tuple[Part, ...]
    problems: tuple[str, ...]
    """What is wrong, a sentence each; empty: nothing."""
    notes: tuple[str, ...]
    """What is strange and may be right."""

    def as_dict(self) -> dict[str, Any]:
        """Give it as JSON has it."""
        return {
            "path": str(self.path),
            "layout": self.layout,
            "family": self.family,
            "files": [
                {"file": str(f.file), "bytes": f.num_bytes, "sha256": f.sha256, "expected": f.expected}
                for f in self.files
            ],
            "parts": [
                {
                    "name": part.name,
                    "tensors": part.num_tensors,
                    "numbers": part.numel,
                    "dtypes": sorted(part.dtypes),
                    "nan": part.num_nan,
                    "inf": part.num_inf,
                    **{
                        name: value if math.isfinite(value) else None
                        for name, value in (
                            ("min", part.minimum),
                            ("max", part.maximum),
                            ("mean", part.mean),
                            ("std", part.std),
                        )
                    },
                }
                for part in self.parts
            ],
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def check(
    path: str | Path,
    *,
    base: str | Path | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    pieces: Mapping[str, str | Path] | None = None,
    progress: Progress | None = None,
) -> Checkup:
    """Read all of a checkpoint: is it whole, what are its checksums, which numbers are none.

    Args: as `lavish.inference.convert.convert`.

    Raises:
        UnknownLayout: it is no checkpoint. ConfigError: as `lavish.load`. What is damaged is a problem of the result.
    """
    tell = progress or _say_nothing
    problems: list[str] = []
    source: Source | None = None
    try:
        source = open_source(path, base=base, config=config, pieces=pieces)
        source.check()
    except UnknownLayout:
        raise
    except CheckpointError as error:
        problems.append(str(error))
    folder, maps = hub.resolve(path), _maps(source)
    files = [file for tensors in maps.values() for file in tensors.files] or _weight_files(folder)
    file_bytes = sum(file.stat().st_size for file in files)
    total = file_bytes + sum(info.nbytes for tensors in maps.values() for info in _each_once(tensors).values())
    sums = tuple(_summed(files, lambda done: tell("check", done, total)))
    problems += [problem for found in sums for problem in found.problems()]
    if source is None:
        return Checkup(folder, "", "", sums, (), tuple(problems), ())
    parts, notes = _statistics(source, maps, problems, lambda done: tell("check", file_bytes + done, total))
    return Checkup(folder, source.layout, source.family.name, sums, tuple(parts), tuple(problems), tuple(notes))


def _say_nothing(phase: str, done: int, total: int) -> None:
    """Take the place of a caller's progress."""


def _weight_files(path: Path) -> list[Path]:
    """Find what may hold weights in a checkpoint that cannot be opened."""
    if path.is_file():
        return [path]
    return [file for file in sorted(path.rglob("*")) if file.suffix in WEIGHT_SUFFIXES and file.is_file()]


def _summed(files: list[Path], tell: Callable[[int], None]) -> Iterator[FileSum]:
    done = 0
    for file in files:
        digest, held, records = hashlib.sha256(), 0, RecordSums(file)
        with file.open("rb") as handle:
            while chunk := handle.read(READ_BYTES):
                digest.update(chunk)
                records.add(chunk, held)
                held += len(chunk)
                tell(done + held)
        done += held
        blob = file.resolve().name if file.is_symlink() else ""
        expected = blob if _SHA256.fullmatch(blob) else None
        yield FileSum(file, held, digest.hexdigest(), expected, tuple(records.wrong()))


def _each_once(tensors: TensorMap) -> dict[str, Stored]:
    """Give the tensors without second names for the same bytes."""
    return {name: info for info, name in {info: name for name, info in reversed(tensors.infos.items())}.items()}


def _maps(source: Source | None) -> dict[str, TensorMap]:
    """Give the tensors of a checkpoint, and those of a LoRA in files of its own, which are a part by that name."""
    if source is None:
        return {}
    maps = {"": source.tensors}
    if isinstance(source.adapter, Path):
        weights = next((source.adapter / name for name in ADAPTER_FILES if (source.adapter / name).is_file()), None)
        if weights is not None:
            maps[ADAPTER] = hf.read(weights)
    return maps


def _statistics(
    source: Source, maps: dict[str, TensorMap], problems: list[str], tell: Callable[[int], None]
) -> tuple[list[Part], list[str]]:
    """Read every tensor once, in the order of the files; gives the parts and what is strange."""
    parts: dict[str, Part] = {}
    notes: list[str] = []
    done = 0
    found = [(prefix, name, info) for prefix in maps for name, info in _each_once(maps[prefix]).items()]
    for prefix, name, info in sorted(found, key=lambda entry: (entry[2].file, entry[2].offset)):
        title = prefix or _part_of(source, name)
        part = parts.setdefault(title, Part(title))
        part.num_tensors += 1
        part.numel += info.numel
        part.dtypes.add(info.dtype)
        alone = Part(name, numel=info.numel)
        for values in _chunks(maps[prefix], info) if info.dtype in FLOATS else ():
            part.add(values)
            alone.add(values)
        if alone.num_nan or alone.num_inf:
            problems.append(f"{name!r} in {info.file.name} holds {alone.num_nan} NaN and {alone.num_inf} infinities.")
        elif info.numel > 1 and len(info.shape) > 1 and alone.minimum == alone.maximum == 0:
            notes.append(f"{name!r} in {info.file.name} is zero throughout.")
        done += info.nbytes
        tell(done)
    return list(parts.values()), notes


def _chunks(tensors: TensorMap, info: Stored) -> Iterator[torch.Tensor]:
    """Give the numbers of a tensor in pieces of a few MB."""
    if isinstance(info, Assembled) or info.stride is not None:
        yield from tensors.assemble(info).view(-1).split(CHUNK_NUMEL)
        return
    flat = reshaped(info, (info.numel,))
    for start in range(0, info.numel, CHUNK_NUMEL):
        yield tensors.assemble(view(flat, 0, start, min(start + CHUNK_NUMEL, info.numel)))


def _part_of(source: Source, name: str) -> str:
    for prefix in (*source.family.towers, source.family.decoder_layers):
        if name.startswith(prefix):
            return prefix.removesuffix(".")
    return ".".join(name.split(".")[:-1][:2]) or name
