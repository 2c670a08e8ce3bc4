"""MindSpore's checkpoints: a file (`mindspore_file.py`), or a folder `rank_i` for each process of a run, merged.

How a run cut its parameters stands in strategy files, which MindSpore and MindFormers put into a folder `strategy`:

    ParallelStrategyMap  { 1: current_stage  3: repeated parallel_layout_item }
    parallel_layout_item { 1: param_name, "<stage>-<name>"  2: parallel_layouts }
    parallel_layouts     { 1: dev_matrix { 1: dims }  2: tensor_map { 1: dims }  3: split shape  4: offsets
                           5: field  6: optimizer shard step  7: optimizer shard size }

`dev_matrix` numbers the processes, the last axis fastest. `tensor_map[axis]` is -1 for an axis that is whole; k: it is
cut over the k-th entry of `dev_matrix`, counted from the right. Source: mindspore-ai/mindspore, node_strategy.proto,
mindspore/python/mindspore/parallel/checkpoint_transform.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from lavish.checkpoints import mindspore_file
from lavish.checkpoints.mindspore_file import SAFETENSORS_SUFFIX, SUFFIX, Contents
from lavish.checkpoints.protobuf import BYTES, Field, Walk, WireError
from lavish.checkpoints.tensor_map import Assembled, Piece, Stored, TensorMap
from lavish.common.errors import CheckpointError, MissingKeys, ShapeMismatch, UnknownLayout, UnsafeCheckpoint

RANK = re.compile(r"rank_(\d+)")
STRATEGY_FOLDER = "strategy"
WHOLE = -1
MAX_RANKS = 4096
MAX_NAME_BYTES = 2048
MAX_STRATEGY_BYTES = 64_000_000
_BLOCK_BYTES = 1 << 22
_NOT_MERGED = (
    "lavish does not merge such runs: let MindSpore do it (mindspore.transform_checkpoints without a target strategy), "
    "and give the file that it writes."
)


@dataclass(frozen=True)
class Layout:
    """How one parameter is cut among the processes of a run."""

    dev_matrix: tuple[int, ...]
    tensor_map: tuple[int, ...]

    def parts(self, axis: int) -> int:
        """Give into how many parts an axis is cut."""
        return 1 if self.tensor_map[axis] == WHOLE else self.dev_matrix[-1 - self.tensor_map[axis]]

    def place(self, rank: int) -> tuple[int, ...]:
        """Give which part of each axis a process holds."""
        coordinates: list[int] = []
        for size in reversed(self.dev_matrix):
            rank, coordinate = divmod(rank, size)
            coordinates.append(coordinate)
        return tuple(0 if axis == WHOLE else coordinates[axis] for axis in self.tensor_map)


def read(path: str | Path, *, verify: bool = True) -> TensorMap:
    """Open a file, a folder that holds one, or a run's folder of `rank_i`, whose parts are merged.

    Args:
        path: what MindSpore or MindFormers saved.
        verify: compare CRCs and, among ranks, the parameters that each holds whole; both take reading the files once.
    Raises:
        UnknownLayout: nothing of MindSpore is there, or several files.
        MissingKeys: a rank, its strategy, or a parameter of one rank is absent.
        CheckpointError: encrypted, damaged, or cut in a way that lavish does not merge.
    """
    path = Path(path)
    return TensorMap(path, read_contents(path, verify=verify).infos)


def read_contents(path: Path, *, verify: bool = True) -> Contents:
    """Read what `read` reads, with the texts that stand beside the tensors.

    Raises: as `read`.
    """
    if path.is_dir() and (ranks := rank_folders(path)):
        return _read_ranks(path, ranks, verify=verify)
    folder = (path if path.is_dir() else path.parent).absolute()
    if RANK.fullmatch(folder.name) and len(siblings := rank_folders(folder.parent)) > 1:
        raise UnknownLayout(
            f"{path}: one of the {len(siblings)} ranks of a run, which hold parts; give their folder, {folder.parent}."
        )
    return mindspore_file.read_file(find_file(path), verify=verify)


def is_mindspore(path: Path) -> bool:
    """Tell whether a file or folder is MindSpore's, by names and first bytes."""
    if path.is_file():
        return mindspore_file.is_file(path)
    return path.is_dir() and (bool(rank_folders(path)) or bool(_files(path)))


def find_file(path: Path) -> Path:
    """Name the one file of MindSpore that `path` is or holds.

    Raises:
        UnknownLayout: none or several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UnknownLayout(f"{path}: no such file or folder; give a checkpoint of MindSpore ({SUFFIX}) or its folder.")
    files = _files(path)
    if not files:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise UnknownLayout(f"{path}: a folder without a checkpoint of MindSpore ({SUFFIX}); found {found}.")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:8])
        raise UnknownLayout(f"{path}: holds {len(files)} checkpoints, {names}; give one of them.")
    return _inside(path, files[0])


def rank_folders(path: Path) -> list[Path]:
    """Give the folders `rank_i` of a run that hold a checkpoint, by number; empty without any."""
    found: dict[int, Path] = {}
    for entry in path.iterdir():
        match = RANK.fullmatch(entry.name)
        if match and len(match[1]) <= len(str(MAX_RANKS)) and entry.is_dir() and _files(entry):
            found[int(match[1])] = entry
    return [found[number] for number in sorted(found)]


def _files(folder: Path) -> list[Path]:
    """Give the checkpoints of a folder; strategies are none."""
    candidates = sorted(entry for entry in folder.iterdir() if entry.suffix in (SUFFIX, SAFETENSORS_SUFFIX))
    return [file for file in candidates if file.is_file() and mindspore_file.is_file(file) and not _is_strategy(file)]


def _inside(folder: Path, file: Path) -> Path:
    """Give a file that was found in a folder, unless it is a link out of it."""
    if not (target := file.resolve()).is_relative_to(folder.resolve()):
        raise UnsafeCheckpoint(f"{file}: is a link to {target}, outside of the folder; not opened. Copy the file here.")
    return file


def _is_strategy(file: Path) -> bool:
    if file.suffix != SUFFIX:
        return False
    with file.open("rb") as handle:
        return handle.read(1) == b"\x08"


# -- ranks -------------------------------------------------------------------------------------------------------------


def _read_ranks(path: Path, folders: Sequence[Path], *, verify: bool) -> Contents:
    numbers = [int(folder.name.removeprefix("rank_")) for folder in folders]
    if numbers == [0] and not _strategies(path)[1]:  # a run on one device
        return mindspore_file.read_file(find_file(folders[0]), verify=verify)
    layouts = read_strategy(path)
    size = math.prod(next(iter(layouts.values())).dev_matrix)
    if absent := [f"rank_{number}" for number in range(size) if number not in numbers]:
        raise MissingKeys(
            f"{path}: the strategy is of {size} processes, and {len(absent)} have no checkpoint here: "
            f"{', '.join(absent[:8])}. Copy them from the machines that ran them."
        )
    if len(folders) != size:
        raise CheckpointError(
            f"{path}: holds {len(folders)} ranks, and its strategy is of {size} processes; they are of different runs."
        )
    files = [_inside(path, find_file(folder)) for folder in folders]
    ranks = [mindspore_file.read_file(file, verify=verify) for file in files]
    for number, contents in enumerate(ranks[1:], start=1):
        _check_same_names(path, ranks[0], contents, number)
    infos: dict[str, Stored] = {}
    for name in ranks[0].infos:
        parts = [contents.infos[name] for contents in ranks]
        whole = Layout((size,), (WHOLE,) * len(parts[0].shape))
        infos[name] = _merge(path, name, parts, layouts.get(name, whole), verify=verify)
    return Contents(infos, ranks[0].texts, any(contents.has_crc for contents in ranks))


def _check_same_names(path: Path, first: Contents, other: Contents, number: int) -> None:
    differing = sorted(set(first.infos) ^ set(other.infos))
    if differing:
        holder, lacking = (0, number) if differing[0] in first.infos else (number, 0)
        raise MissingKeys(
            f"{path}: {len(differing)} parameters are not in all ranks: rank_{holder} holds {differing[0]!r} and "
            f"rank_{lacking} does not. A run in pipeline stages, which lavish does not merge, or files of two runs."
        )


def _merge(path: Path, name: str, parts: Sequence[Stored], layout: Layout, *, verify: bool) -> Stored:
    """Put the parts of one parameter together; what several ranks hold must be equal."""
    shape = parts[0].shape
    if len(layout.tensor_map) != len(shape) and not (shape == () and set(layout.tensor_map) <= {WHOLE}):
        raise ShapeMismatch(
            f"{path}: the strategy has {len(layout.tensor_map)} axes for {name!r}, which is of shape {shape}; strategy "
            "and checkpoint are of different runs."
        )
    by_place: dict[tuple[int, ...], Stored] = {}
    for rank, part in enumerate(parts):
        if part.shape != shape or part.dtype != parts[0].dtype:
            raise ShapeMismatch(
                f"{path}: {name!r} is {parts[0].dtype} {shape} in rank_0 and {part.dtype} {part.shape} in rank_{rank}; "
                "the ranks are of different runs."
            )
        held = by_place.setdefault(layout.place(rank)[: len(shape)], part)
        # The counters of a run are compared always: they tell ranks of different steps apart.
        if held is not part and (verify or part.numel == 1) and not _are_equal(held, part):
            raise CheckpointError(
                f"{path}: {name!r} is whole in several ranks, and rank_{rank} holds another value than the ranks "
                "before it. They are of different steps or runs; give ranks that were saved together."
            )
    if len(by_place) == 1:
        return parts[0]
    whole = tuple(size * layout.parts(axis) for axis, size in enumerate(shape))
    pieces: list[Piece] = []
    for place, part in sorted(by_place.items()):
        corner = tuple(index * size for index, size in zip(place, shape, strict=True))
        pieces += _moved(part, corner)
    return Assembled(whole, parts[0].dtype, tuple(pieces))


def _moved(part: Stored, corner: tuple[int, ...]) -> Iterator[Piece]:
    """Give the pieces of a part that lies at a corner of a larger tensor."""
    if not isinstance(part, Assembled):
        yield Piece(part, corner)
        return
    for piece in part.boxed().pieces:
        yield Piece(piece.info, tuple(a + b for a, b in zip(corner, piece.start, strict=True)))


def _are_equal(one: Stored, other: Stored) -> bool:
    return all(a == b for a, b in zip_longest(_blocks(one), _blocks(other)))


def _blocks(part: Stored) -> Iterator[bytes]:
    """Give the bytes of a tensor of one file, a block after the other, wherever its slices end."""
    pieces = [piece.info for piece in part.pieces] if isinstance(part, Assembled) else [part]
    block = b""
    with part.file.open("rb") as handle:
        for info in pieces:
            start, stop = info.offset, info.offset + info.nbytes
            handle.seek(start)
            while start < stop:
                taken = handle.read(min(_BLOCK_BYTES - len(block), stop - start))
                if not taken:
                    raise CheckpointError(f"{info.file}: became shorter while it was read; something is writing to it.")
                start += len(taken)
                block += taken
                if len(block) == _BLOCK_BYTES:
                    yield block
                    block = b""
    yield block


# -- strategies --------------------------------------------------------------------------------------------------------


def read_strategy(path: Path) -> dict[str, Layout]:
    """Read how the run in a folder of ranks cut its parameters, from the strategy files in it, beside it or above it.

    Raises:
        MissingKeys: there is none.
        CheckpointError: damaged, contradictory, or of a run that lavish does not merge: pipeline stages, sharded
            optimizers, fields, uneven parts.
    """
    places, files = _strategies(path)
    if not files:
        looked = ", ".join(str(place) for place in places)
        raise MissingKeys(
            f"{path}: no strategy says how the ranks were cut; looked for ckpt_strategy_rank_0{SUFFIX} in {looked}. "
            f"Copy the run's folder {STRATEGY_FOLDER!r} there."
        )
    layouts: dict[str, Layout] = {}
    for file in files:
        for name, layout in _strategy_file(file).items():
            if layouts.setdefault(name, layout) != layout:
                raise CheckpointError(
                    f"{file}: cuts {name!r} by {layout} and {files[0].name} by {layouts[name]}; the strategies are of "
                    "different runs."
                )
    sizes = {math.prod(layout.dev_matrix) for layout in layouts.values()}
    if len(sizes) != 1:
        raise CheckpointError(
            f"{files[0]}: a strategy of {' and '.join(map(str, sorted(sizes))) or 'no'} processes; lavish merges one "
            "group of processes that hold all layers."
        )
    return layouts


def _strategies(path: Path) -> tuple[list[Path], list[Path]]:
    """Give the folders where strategies are looked for, and those that the first of them with any holds."""
    places = [path, path / STRATEGY_FOLDER, path.parent / STRATEGY_FOLDER, path.parent.parent / STRATEGY_FOLDER]
    for place in places:
        files = sorted(place.glob(f"*{SUFFIX}")) if place.is_dir() else []
        if files := [file for file in files if file.is_file() and _is_strategy(file)]:
            return places, files
    return places, []


def _strategy_file(file: Path) -> dict[str, Layout]:
    if file.stat().st_size > MAX_STRATEGY_BYTES:
        raise CheckpointError(f"{file}: {file.stat().st_size} bytes are too many for a strategy.")
    data = _inside(file.parent, file).read_bytes()
    walk = Walk(data)
    layouts: dict[str, Layout] = {}
    try:
        for part in walk.fields(0, len(data)):
            if part.number == 1 and part.value != 0:
                raise CheckpointError(f"{file}: of pipeline stage {part.value}. {_NOT_MERGED}")
            if part.number == 3 and part.wire == BYTES:
                name, layout = _layout_item(file, walk, part)
                layouts[name] = layout
    except WireError as error:
        raise CheckpointError(f"{file}: damaged: {error}; copy it again.") from error
    return layouts


def _layout_item(file: Path, walk: Walk, part: Field) -> tuple[str, Layout]:
    parts = {inner.number: inner for inner in walk.fields(part.start, part.stop)}
    if not {1, 2} <= parts.keys() or parts[2].wire != BYTES:
        raise WireError(f"a layout without a name or without its sizes at byte {part.start}")
    stage, dash, name = walk.text(parts[1], MAX_NAME_BYTES).partition("-")
    if not dash or not stage.isdecimal():
        raise WireError(f"a layout of the name {stage!r:.80} at byte {part.start}, not <stage>-<name>")
    if int(stage) != 0:
        raise CheckpointError(f"{file}: {name!r} is of pipeline stage {stage}. {_NOT_MERGED}")
    sizes = _layout_sizes(walk, parts[2])
    for number, what in ((3, "in uneven parts"), (4, "in uneven parts"), (5, "by fields")):
        if any(sizes.get(number, ())):
            raise CheckpointError(f"{file}: {name!r} is cut {what}. {_NOT_MERGED}")
    if any(sizes.get(6, ())) or any(sizes.get(7, ())):
        raise CheckpointError(f"{file}: {name!r} is sharded with the optimizer (parallel_optimizer). {_NOT_MERGED}")
    matrix, axes = tuple(sizes.get(1, ())), tuple(sizes.get(2, ()))
    if not matrix or min(matrix) < 1 or math.prod(matrix) > MAX_RANKS or len(axes) > mindspore_file.MAX_DIMS:
        raise WireError(f"{name!r:.80} is cut over processes {list(matrix)[:8]}")
    if any(not WHOLE <= axis < len(matrix) for axis in axes):
        raise WireError(f"{name!r:.80} has the tensor map {list(axes)[:8]} over processes {list(matrix)[:8]}")
    return name, Layout(matrix, axes)


def _layout_sizes(walk: Walk, part: Field) -> dict[int, list[int]]:
    """Read the numbers of a layout, by the field that holds them."""
    sizes: dict[int, list[int]] = {}
    for inner in walk.fields(part.start, part.stop):
        if inner.number not in range(1, 8):
            continue
        if inner.number >= 5:
            sizes[inner.number] = walk.numbers(inner)
            continue
        if inner.number in (1, 2) and inner.number in sizes:
            raise WireError(f"a layout with an axis that is cut over several groups at byte {part.start}")
        if inner.wire != BYTES:
            raise WireError(f"a layout of kind {inner.wire} at byte {inner.start}")
        found = sizes.setdefault(inner.number, [])
        for one in walk.fields(inner.start, inner.stop):
            found += walk.numbers(one) if one.number == 1 else []
    return sizes
