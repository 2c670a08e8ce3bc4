"""Write a checkpoint tensor by tensor, so that a kill loses little and leaves nothing that loads.

A family or a layout says what to write (`TargetPlan`), a `Format` how the bytes of one file lie, and `write_plan`
writes them: into a hidden folder beside the destination, `.<name>.partial`, with a journal of how far every file is on
the disk. A rerun goes on at the last tensor of the journal; the last step is one rename. Nothing here knows a family.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from lavish.checkpoints.safetensors_header import encode_header
from lavish.checkpoints.tensor_map import ITEM_BYTES, Stored, TensorInfo, TensorMap
from lavish.common.errors import CheckpointError, ConfigError, OutputError

if TYPE_CHECKING:
    import torch

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""What a change of dtype is for; whole numbers, flags and float8 stay as they are."""
FILE_SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".safetensors")
"""A destination with one of these is a single file and no folder."""
JOURNAL = ".journal"
UNFINISHED = ".part"
"""What a file is called after its name until all of its bytes are on the disk."""
RESUME_BYTES = 64 << 20
"""How much is written between two points of the journal. They outlive a kill, not the machine: after a crash of that,
only what the journal says to be on the disk counts, which is whole files."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Tells one run of the machine from the next, on Linux."""
CHUNK_BYTES = 16 << 20
CAST_NUMEL = 32_000
"""Numbers that are cast at once: below what torch shares among threads, which wait for each other on busy cores."""
CHECKED_NUMEL = 4 << 20
"""How many values are looked at together: torch needs as much memory again to look."""
AHEAD_BYTES = 256 << 20
"""The largest tensor that is made while the one before it is written."""


def _nothing() -> None:
    """Have nothing to give back."""


@dataclass(frozen=True)
class Output:
    """One tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], torch.Tensor]
    """Give it, on the CPU, in this shape and dtype; called once, when its turn comes."""
    sources: tuple[str, ...] = ()
    """Names that it comes from."""
    release: Callable[[], None] = _nothing
    """Called when it was written, for what `make` holds in memory."""

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return ITEM_BYTES[self.dtype] * _product(self.shape)


class Format(Protocol):
    """How one file is laid out: all of its bytes, in order."""

    def begin(self, outputs: Sequence[Output]) -> Iterator[bytes]:
        """Give what stands before the first tensor."""
        ...

    def tensor(self, output: Output, data: memoryview, offset: int) -> Iterator[bytes | memoryview]:
        """Give header, data and padding of a tensor that begins at `offset` of the file."""
        ...

    def end(self, offset: int) -> Iterator[bytes]:
        """Give what stands behind the last tensor."""
        ...

    def state(self) -> dict[str, Any]:
        """Give, as JSON, what the rest of the file needs of the tensors that are written."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a state back, in the place of `begin`: the file goes on behind the tensors that it is of."""
        ...


@dataclass(frozen=True)
class TensorFile:
    """One file of tensors."""

    name: str
    """Below the destination; with `/` where it is in a folder."""
    outputs: tuple[Output, ...]
    format: Callable[[], Format]


class Spare:
    """Memory for the next tensor: the system takes longer to give new pages than a cast to fill them."""

    MOST = 2
    """One that is written, and the next that is made."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []
        self._lock = Lock()

    def lend(self, num_bytes: int) -> torch.Tensor:
        """Give memory of so many bytes or more."""
        import torch

        with self._lock:
            found = next((i for i, memory in enumerate(self._free) if memory.numel() >= num_bytes), None)
            if found is not None:
                return self._free.pop(found)
            if self._free:  # too small: larger ones come instead
                self._free.pop()
        return torch.empty(num_bytes, dtype=torch.uint8)

    def take_back(self, memory: torch.Tensor) -> None:
        """Keep it for the next, where it is not large."""
        with self._lock:
            if len(self._free) < self.MOST and memory.numel() <= AHEAD_BYTES:
                self._free.append(memory)


@dataclass(frozen=True)
class TargetOptions:
    """How a checkpoint is written."""

    dtype: str | None = None
    """torch's name of the dtype of floating-point tensors; None: as stored."""
    model_parallel: int = 1
    max_shard_bytes: int = 5_000_000_000
    merge_lora: bool = False
    clamp: bool = False
    """Write the largest value in the place of one that does not fit the dtype."""
    clamped: dict[str, int] = field(default_factory=dict, compare=False)
    """Filled while tensors are made: name -> how many values were clamped."""
    spare: Spare = field(default_factory=Spare, compare=False)

    def dtype_of(self, stored: str) -> str:
        """Give the dtype that a tensor is written in."""
        return self.dtype if self.dtype is not None and stored in FLOATS else stored

    def cast(
        self, name: str, value: torch.Tensor, dtype: str, into: Callable[[int], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Cast a tensor to a dtype (torch's name of it), and look whether its values fit.

        `into` gives memory of so many bytes, where it need not be new.

        Raises:
            CheckpointError: they do not, and nobody asked for clamping.
        """
        import torch

        to: torch.dtype = getattr(torch, dtype)
        if value.dtype == to:
            return value
        num_bytes = value.numel() * to.itemsize
        made = torch.empty(value.shape, dtype=to) if into is None else into(num_bytes).view(to).view(value.shape)
        _cast_into(made, value)
        if torch.finfo(to).max >= torch.finfo(value.dtype).max or not made.numel():
            return made
        low, high = (float(bound) for bound in made.aminmax())  # far faster than looking for infinities
        if low > -math.inf and high < math.inf:  # NaN is neither
            return made
        parts = zip(made.reshape(-1).split(CHECKED_NUMEL), value.reshape(-1).split(CHECKED_NUMEL), strict=True)
        lost = sum(int((part.isinf() & ~source.isinf()).sum()) for part, source in parts)
        if not lost:
            return made
        largest = torch.finfo(to).max
        if not self.clamp:
            peak = float(value[value.isfinite()].abs().max())
            raise CheckpointError(
                f"{name!r}: {lost} of {value.numel()} values do not fit {dtype}, the largest is {peak:.6g} and {dtype} "
                f"ends at {largest:.6g}. Write bfloat16 or float32, or clamp them (--clamp)."
            )
        self.clamped[name] = lost
        return torch.where(value.isinf(), made, made.clamp(-largest, largest))

    def take(
        self, name: str, tensors: TensorMap, info: Stored, sources: tuple[str, ...], dtype: str | None = None
    ) -> Output:
        """Say that a stored tensor (a view of one, or one in parts) is written as `name`, in the dtype of the options.

        `dtype`: where the target allows one only.
        """
        to = dtype or self.dtype_of(info.dtype)
        if isinstance(info, TensorInfo) and info.stride is None and to == info.dtype:
            kept: list[Any] = []

            def mapped() -> torch.Tensor:
                kept.append(tensors.open(info.file))
                kept[0].fetch(info)
                return kept[0].tensor(info)

            def release() -> None:
                kept.pop().forget(info)

            return Output(name, info.shape, to, mapped, sources, release)

        lent: list[torch.Tensor] = []

        def memory(num_bytes: int) -> torch.Tensor:
            lent.append(self.spare.lend(num_bytes))
            return lent[-1][:num_bytes]

        def made() -> torch.Tensor:
            if isinstance(info, TensorInfo) and to != info.dtype:  # cast from the file: no copy in between
                held = tensors.open(info.file)
                held.fetch(info)
                value = self.cast(name, held.tensor(info), to, memory)
                held.forget(info)
                return value
            return self.cast(name, tensors.assemble(info), to, memory)

        def give_back() -> None:
            while lent:
                self.spare.take_back(lent.pop())

        return Output(name, info.shape, to, made, sources, give_back)


@dataclass(frozen=True)
class TargetPlan:
    """Everything that a conversion writes."""

    files: tuple[TensorFile, ...]
    texts: Mapping[str, bytes] = field(default_factory=dict)
    """Small files by their name below the destination: configs, `latest`, an index."""
    copies: Mapping[str, Path] = field(default_factory=dict)
    """Files that go over as they are: a tokenizer's."""
    dropped: tuple[tuple[str, str], ...] = ()
    """Names of the source that are not written, and why."""
    made: tuple[tuple[str, str], ...] = ()
    """Names that are written though the source has no such tensor, and why."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(output.nbytes for file in self.files for output in file.outputs)


class SafetensorsFormat:
    """A safetensors file. Wide dtypes come first (`in_file_order`), so that each tensor begins at a multiple of its
    element's size."""

    def begin(self, outputs: Sequence[Output]) -> Iterator[bytes]:
        """Give the header."""
        yield encode_header([(output.name, output.dtype, output.shape, output.nbytes) for output in outputs])

    def tensor(self, output: Output, data: memoryview, offset: int) -> Iterator[bytes | memoryview]:
        """Give the data alone."""
        yield data

    def end(self, offset: int) -> Iterator[bytes]:
        """Give nothing."""
        yield from ()

    def state(self) -> dict[str, Any]:
        """Give nothing: the header says it all."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take nothing."""


def in_file_order(outputs: Sequence[Output]) -> tuple[Output, ...]:
    """Give the tensors of a safetensors file with the widest dtype first, else in their order."""
    return tuple(sorted(outputs, key=lambda output: -ITEM_BYTES[output.dtype]))


def into_shards(outputs: Sequence[Output], max_shard_bytes: int) -> list[list[Output]]:
    """Share tensors out among files of at most so many bytes of tensors; a larger tensor gets a file of its own."""
    shards: list[list[Output]] = [[]]
    held = 0
    for output in outputs:
        if shards[-1] and held + output.nbytes > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(output)
        held += output.nbytes
    return shards


def safetensors_files(
    outputs: Sequence[Output], max_shard_bytes: int, stem: str = "model"
) -> tuple[tuple[TensorFile, ...], dict[str, bytes]]:
    """Give the files of the Hugging Face layout, and the text of their index where there are several.

    Raises:
        CheckpointError: nothing to write.
    """
    if not outputs:
        raise CheckpointError("There are no tensors to write.")
    shards = into_shards(outputs, max_shard_bytes)
    if len(shards) == 1:
        return (TensorFile(f"{stem}.safetensors", in_file_order(shards[0]), SafetensorsFormat),), {}
    names = [f"{stem}-{index:05}-of-{len(shards):05}.safetensors" for index in range(1, len(shards) + 1)]
    files = tuple(
        TensorFile(name, in_file_order(shard), SafetensorsFormat) for name, shard in zip(names, shards, strict=True)
    )
    index = {
        "metadata": {"total_size": sum(output.nbytes for output in outputs)},
        "weight_map": {output.name: name for name, shard in zip(names, shards, strict=True) for output in shard},
    }
    return files, {f"{stem}.safetensors.index.json": json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"}


def _cast_into(made: torch.Tensor, value: torch.Tensor) -> None:
    """Cast with one thread, a few numbers at a time; from float16 to bfloat16 by way of float32, which is faster."""
    import torch

    if not value.is_contiguous():
        made.copy_(value)
        return
    between = torch.empty(CAST_NUMEL) if (value.dtype, made.dtype) == (torch.float16, torch.bfloat16) else None
    for to, source in zip(made.view(-1).split(CAST_NUMEL), value.view(-1).split(CAST_NUMEL), strict=True):
        to.copy_(source if between is None else between[: len(source)].copy_(source))


def data_of(tensor: torch.Tensor) -> memoryview:
    """Give the bytes of a CPU tensor: a view where it is contiguous."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


# -- the driver --------------------------------------------------------------------------------------------------------


def partial_folder(destination: Path) -> Path:
    """Give the folder where an unfinished conversion to `destination` lies."""
    return destination.with_name(f".{destination.name}.partial")


def is_file_target(destination: Path) -> bool:
    """Tell whether a destination is one file and no folder, by its name."""
    return destination.suffix in FILE_SUFFIXES


def write_plan(
    plan: TargetPlan,
    destination: Path,
    *,
    identity: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
    resume_bytes: int = RESUME_BYTES,
) -> int:
    """Write a plan to a folder, or to a single file where the destination has a weight file's suffix.

    Args:
        identity: what was asked (source and its state, options), as JSON: a rerun with the same goes on where a killed
            one ended.
        progress: called with the bytes of tensors that are written and with those of all.
        resume_bytes: how much is written at most before the journal notes it.

    Returns: bytes of tensors that an earlier run had written.

    Raises:
        ConfigError: the destination exists, a single file cannot hold the plan, or what lies unfinished there is of
            another conversion.
        OutputError: the disk is full or cannot be written; what is there stays, for a rerun.
        CheckpointError: as the tensors are made; then nothing is left.
    """
    destination = Path(destination)
    check_destination(destination)
    _check_names(plan, destination)
    partial = partial_folder(destination)
    writing = _Writing(plan, destination, partial, identity, progress, resume_bytes)
    with _disk_errors(destination):
        partial.mkdir(parents=True, exist_ok=True)
        with (partial / JOURNAL).open("a+b") as journal:
            _lock(journal, destination)
            resumed = writing.take_up(journal)
            if not resumed:
                _check_space(plan, partial, destination)
            try:
                writing.write_files()
            except CheckpointError as error:
                if not isinstance(error.__cause__, OSError):  # a disk may come back; the same values stop it again
                    shutil.rmtree(partial)
                raise
            _add_small(plan, partial, destination)
        _publish(plan, partial, destination)
    return resumed


def check_destination(destination: Path) -> None:
    """Check that nothing is overwritten.

    Raises:
        ConfigError: something is there.
    """
    if os.path.lexists(destination):
        raise ConfigError(
            f"{destination} is there already, and nothing is overwritten. Give another destination, or remove it."
        )


class _Writing:
    """One run of the driver: where each file stands, by the journal."""

    def __init__(
        self,
        plan: TargetPlan,
        destination: Path,
        partial: Path,
        identity: Mapping[str, Any],
        progress: Callable[[int, int], None] | None,
        resume_bytes: int,
    ) -> None:
        self.plan, self.destination, self.partial = plan, destination, partial
        self.identity = json.loads(json.dumps(identity))
        self.progress, self.resume_bytes = progress, resume_bytes
        self.total, self.done = plan.nbytes, 0
        self.points: dict[int, dict[str, Any]] = {}
        """The last point of the journal for each file: how many tensors, up to which byte, the format's state."""
        self.boot = _boot_id()
        self.journal: BinaryIO
        self.noting = Lock()

    def take_up(self, journal: BinaryIO) -> int:
        """Read the journal, or begin it; gives the bytes of tensors that are on the disk already."""
        self.journal = journal
        fingerprint = _fingerprint(self.plan, self.identity)
        journal.seek(0)
        lines = _whole_lines(journal.read())
        if not lines:
            others = sorted(entry.name for entry in self.partial.iterdir() if entry.name != JOURNAL)
            if others:
                raise ConfigError(
                    f"{self.partial} holds {others[0]!r} and no journal of a conversion; move it away, or remove it."
                )
            journal.truncate(0)
            self._note({"begun": self.identity, "fingerprint": fingerprint}, is_lasting=True)
            return 0
        begun = lines[0]
        if begun.get("fingerprint") != fingerprint:
            raise ConfigError(
                f"{self.partial} is an unfinished conversion of another kind: {_difference(begun, self.identity)}. "
                "Finish it with the command that began it, give another destination, or remove that folder."
            )
        journal.truncate(sum(len(_line(line)) for line in lines))
        for line in lines[1:]:
            if line.get("boot") in (None, self.boot):  # else the machine was off in between, and may have lost it
                self.points[line["file"]] = line
        for index, point in self.points.items():
            outputs = self.plan.files[index].outputs
            self.done += sum(output.nbytes for output in outputs[: point["tensors"]])
        return self.done

    def write_files(self) -> None:
        """Write all files, or what is left of them; each is put on the disk while the next is written."""
        with ThreadPoolExecutor(1, thread_name_prefix="lavish-disk") as disk:
            finishing: Future[None] | None = None
            for index in range(len(self.plan.files)):
                finish = self._write_file(index)
                if finishing is not None:
                    finishing.result()
                finishing = None if finish is None else disk.submit(finish)
            if finishing is not None:
                finishing.result()

    def _write_file(self, index: int) -> Callable[[], None] | None:
        """Write one file, and give what waits for the disk and gives it its name; None: all of that was done."""
        file, point = self.plan.files[index], self.points.get(index, {"tensors": 0, "bytes": 0, "state": None})
        path = self.partial / file.name
        if point.get("is_done"):
            self._check_size(path, point["bytes"], is_done=True)
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + UNFINISHED)
        is_new = point["state"] is None
        if path.exists():  # killed between the rename and the line of the journal
            path.replace(unfinished)
        if not is_new:
            self._check_size(unfinished, point["bytes"], is_done=False)
        layout = file.format()
        handle = unfinished.open("wb" if is_new else "r+b", buffering=0)
        try:
            handle.truncate(point["bytes"])
            handle.seek(point["bytes"])
            if is_new:
                for chunk in layout.begin(file.outputs):
                    _write(handle, chunk)
            else:
                layout.restore(point["state"])
            self._write_tensors(index, handle, layout, point["tensors"])
            for chunk in layout.end(handle.tell()):
                _write(handle, chunk)
        except BaseException:
            handle.close()
            raise
        return lambda: self._finish(index, handle, unfinished, path)

    def _finish(self, index: int, handle: Any, unfinished: Path, path: Path) -> None:
        with handle:
            os.fsync(handle.fileno())
            size = handle.tell()
        unfinished.replace(path)
        _sync_folder(path.parent)
        count = len(self.plan.files[index].outputs)
        self._note({"file": index, "tensors": count, "bytes": size, "state": {}, "is_done": True}, is_lasting=True)

    def _write_tensors(self, index: int, handle: Any, layout: Format, first: int) -> None:
        outputs = self.plan.files[index].outputs
        unsaved = 0
        for number, output, tensor in _made_ahead(outputs, first):
            for chunk in layout.tensor(output, data_of(tensor), handle.tell()):
                _write(handle, chunk)
            del tensor
            output.release()
            self.done += output.nbytes
            unsaved += output.nbytes
            if unsaved >= self.resume_bytes and number + 1 < len(outputs):
                point = {"file": index, "tensors": number + 1, "bytes": handle.tell(), "state": layout.state()}
                if self.boot is None:  # nothing would tell that the machine was off in between
                    os.fsync(handle.fileno())
                self._note({**point, "boot": self.boot}, is_lasting=self.boot is None)
                unsaved = 0
            if self.progress is not None:
                self.progress(self.done, self.total)

    def _check_size(self, path: Path, needed: int, *, is_done: bool) -> None:
        found = path.stat().st_size if path.is_file() else -1
        if found < needed or (is_done and found != needed):
            raise ConfigError(
                f"{path}: should hold {needed} bytes by the journal of this conversion and "
                f"{'is not there' if found < 0 else f'has {found}'}; remove {self.partial} and start again."
            )

    def _note(self, line: Mapping[str, Any], *, is_lasting: bool) -> None:
        with self.noting:
            self.journal.seek(0, 2)
            self.journal.write(_line(line))
            self.journal.flush()
            if is_lasting:
                os.fsync(self.journal.fileno())


def _boot_id() -> str | None:
    try:
        return BOOT_ID.read_text(encoding="ascii").strip() or None
    except OSError:  # another system, or a sandbox without /proc
        return None


def _made_ahead(outputs: Sequence[Output], first: int) -> Iterator[tuple[int, Output, torch.Tensor]]:
    """Give the tensors from `first` on, each made while the one before it is written, where it is not large."""
    with ThreadPoolExecutor(1, thread_name_prefix="lavish-convert") as ahead:
        coming: Future[torch.Tensor] | None = None
        for number in range(first, len(outputs)):
            output = outputs[number]
            tensor = _make(output) if coming is None else coming.result()
            coming = None
            if number + 1 < len(outputs) and outputs[number + 1].nbytes <= AHEAD_BYTES:
                coming = ahead.submit(_make, outputs[number + 1])
            _check_made(output, tensor)
            yield number, output, tensor
            del tensor


def _make(output: Output) -> torch.Tensor:
    try:
        return output.make()
    except OSError as error:
        raise CheckpointError(
            f"{output.name!r} cannot be read from its source: {error}. The same command goes on from here."
        ) from error


def _check_made(output: Output, tensor: torch.Tensor) -> None:
    found = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    if found != (tuple(output.shape), output.dtype):
        raise CheckpointError(
            f"{output.name!r} was to be {output.shape} in {output.dtype} and came as {found[0]} in {found[1]}."
        )


def _write(handle: Any, chunk: bytes | memoryview) -> None:
    """Write all of a chunk; a raw file may take less than it is given."""
    left = memoryview(chunk).cast("B") if len(chunk) else memoryview(b"")
    while left:
        left = left[handle.write(left[:CHUNK_BYTES]) :]


def _add_small(plan: TargetPlan, partial: Path, destination: Path) -> None:
    """Add the small files, which nothing loads without."""
    if is_file_target(destination):
        return
    for name, source in plan.copies.items():
        _put(partial / name, source.read_bytes())
    for name, content in plan.texts.items():
        _put(partial / name, content)
    for folder in {(partial / name).parent for name in [*plan.copies, *plan.texts, *(f.name for f in plan.files)]}:
        _sync_folder(folder)


def _publish(plan: TargetPlan, partial: Path, destination: Path) -> None:
    """Give it its name in one step. The journal is closed: Windows moves no folder of open files."""
    check_destination(destination)
    if is_file_target(destination):
        (partial / plan.files[0].name).replace(destination)
        _sync_folder(destination.parent)
        _remove(partial)
        return
    partial.rename(destination)
    _sync_folder(destination.parent)
    (destination / JOURNAL).unlink(missing_ok=True)


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    with unfinished.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    unfinished.replace(path)


def _remove(partial: Path) -> None:
    """Remove the folder of a finished conversion; the file of a single-file target is not in it any more."""
    (partial / JOURNAL).unlink(missing_ok=True)
    with suppress(OSError):  # what somebody else put there stays
        partial.rmdir()


def _sync_folder(folder: Path) -> None:
    """Put the names of a folder on the disk; Windows has no such call."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_names(plan: TargetPlan, destination: Path) -> None:
    names = [*(file.name for file in plan.files), *plan.texts, *plan.copies]
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
            raise ConfigError(f"{destination}: {name!r} does not lie in it; nothing was written.")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{destination}: {twice!r} would be written twice.")
    if is_file_target(destination) and (len(plan.files) != 1 or "/" in plan.files[0].name):
        raise ConfigError(
            f"{destination} is the name of one file, and {len(plan.files)} are to be written; give a folder's name."
        )


def _check_space(plan: TargetPlan, partial: Path, destination: Path) -> None:
    free = shutil.disk_usage(partial).free
    if plan.nbytes > free:
        raise OutputError(
            f"{destination}: needs {plan.nbytes / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left. Free "
            f"{(plan.nbytes - free) / 1e9:.2f} GB, or give a destination on another disk."
        )


@contextmanager
def _disk_errors(destination: Path) -> Iterator[None]:
    """Turn what the system says of a disk into a word on what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "Free some space and run" if is_full else "When that is mended, run"
        raise OutputError(
            f"{destination}: cannot be written ({error.strerror or error}). What was written stays in "
            f"{partial_folder(destination)}. {advice} the same command again: it goes on from there."
        ) from error


def _lock(journal: BinaryIO, destination: Path) -> None:
    """Keep a second process from writing the same conversion; the lock ends with the process."""
    try:
        import fcntl  # not on Windows, where a file that is open for writing cannot be renamed by another anyway
    except ImportError:
        return
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"{destination}: another process is converting to it at this moment.") from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system without locks
            raise


def _fingerprint(plan: TargetPlan, identity: Mapping[str, Any]) -> str:
    """Give a digest of everything that decides the bytes of a conversion."""
    files = [
        [file.name, [[o.name, list(o.shape), o.dtype, list(o.sources)] for o in file.outputs]] for file in plan.files
    ]
    texts = {name: hashlib.sha256(content).hexdigest() for name, content in plan.texts.items()}
    whole = json.dumps([identity, files, texts, sorted(plan.copies)], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def _difference(begun: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """Say in what a conversion differs from the one that was begun."""
    before = begun.get("begun")
    if not isinstance(before, dict):
        return "its journal cannot be read"
    for key in dict.fromkeys([*before, *identity]):
        if before.get(key) != identity.get(key) and key == "files":
            return "a file of the source has changed since it was begun"
        if before.get(key) != identity.get(key):
            return f"it was begun with {key}={before.get(key)!r:.200} and now has {key}={identity.get(key)!r:.200}"
    return "it was begun by another version of lavish, which wrote other tensors"


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _whole_lines(content: bytes) -> list[dict[str, Any]]:
    """Give the lines of a journal; the last may have been torn by a kill."""
    lines: list[dict[str, Any]] = []
    for raw in content.split(b"\n")[:-1]:
        try:
            line = json.loads(raw)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
