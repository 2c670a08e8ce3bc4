"""DeepSpeed's checkpoints: ZeRO 0 to 3, put together from the shards of all processes without running their pickles.

    latest                                       the name of the step's folder
    global_stepN/mp_rank_00_model_states.pt      ZeRO 0 to 2: the whole network in the precision of the run, buffers
    global_stepN/zero_pp_rank_R_mp_rank_00_model_states.pt   ZeRO 3: slices of what is frozen, buffers
    global_stepN/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt   process R's share of the float32 weights

What was trained is read in float32, as the optimizer held it: of each group of parameters ZeRO 1 and 2 lay all behind
each other and cut the row among the processes; ZeRO 3 cuts each parameter by itself. What is frozen, and buffers, are
read as stored. Not here: runs cut by tensor or expert parallelism, whose files do not say along which dimension;
pipeline runs (`models/minigpt4_qwen/weights.py`).
Source: microsoft/DeepSpeed, deepspeed/utils/zero_to_fp32.py (the same tensors, but all of them in memory),
deepspeed/runtime/engine.py (names of the files and what stands in them).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavish.checkpoints.pickles import Inert, read_tree
from lavish.checkpoints.tensor_map import Assembled, Piece, Stored, TensorInfo, TensorMap, reshaped, view
from lavish.common.errors import CheckpointError, MissingKeys, UnknownLayout, UnsafeCheckpoint

LATEST = "latest"
MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{1,4})_model_states\.pt")
OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,4})_optim_states\.pt")
CLASSES = frozenset(
    {
        "deepspeed.runtime.zero.config ZeroStageEnum",
        "deepspeed.runtime.fp16.loss_scaler LossScaler",
        "deepspeed.runtime.fp16.loss_scaler DynamicLossScaler",
        "deepspeed.utils.tensor_fragment fragment_address",
        *(f"torch {dtype}" for dtype in ("float32", "float16", "bfloat16", "device")),
    }
)
"""What DeepSpeed pickles beside tensors and plain data. None of it is made; a stage's number is all that is read."""
MAX_LATEST_BYTES = 4096


@dataclass(frozen=True)
class Run:
    """What the files of one step say, before a weight is read."""

    folder: Path
    """That of the step."""
    stage: int
    """0 to 3: what ZeRO cut among the processes; 0 is nothing."""
    num_processes: int
    step: int | None
    version: str | None
    """DeepSpeed's."""
    models: tuple[Mapping[str, Any], ...]
    """What the model files hold: one, or with ZeRO 3 one a process."""
    shares: tuple[Mapping[str, Any], ...]
    """What the optimizer's files hold, in the order of the processes; empty where the weights are whole without."""
    files: tuple[Path, ...]
    absent: tuple[str, ...] = ()
    """Files that belong to the step and are not there."""


def is_run(path: Path) -> bool:
    """Tell by names alone whether a path is of this layout: a state file, a step's folder, or a folder of steps."""
    if path.is_file():
        return _is_state(path.name)
    if not path.is_dir():
        return False
    return _holds_states(path) or any(_holds_states(folder) for folder in _steps(path))


def read(path: str | Path) -> TensorMap:
    """Open the weights of a step; no tensor is read.

    `path` is the folder that `latest` is in, a step's folder, or a model file: that alone gives the weights of ZeRO 0
    to 2 in the precision of the run.

    Raises:
        UnknownLayout: no such checkpoint, or `latest` names a step that is not there.
        MissingKeys: shards of some processes are absent.
        UnsafeCheckpoint: a pickle asks for more than tensors, plain data and the names in `CLASSES`.
        CheckpointError: shards of different runs or steps, damaged files, or a way of cutting that is not read here.
    """
    path = Path(path)
    run = survey(path)
    if run.absent:
        whole = ""
        if run.stage < 3:
            whole = f" {run.files[0].name} alone holds the weights in the precision of the run: give that file."
        raise MissingKeys(
            f"{run.folder}: {len(run.absent)} of the {run.num_processes} processes' shards are absent: "
            f"{', '.join(run.absent[:4])}{' ...' if len(run.absent) > 4 else ''}. Fetch them.{whole}"
        )
    return TensorMap(path, _assembled(run))


def survey(path: Path) -> Run:
    """Read what the files of a step say of themselves; shards that are not there are listed in `.absent`.

    Raises: as `read`, but for absent shards.
    """
    if path.is_file():
        return _of_file(path)
    folder = find_step(path)
    models, optimizers = _files(folder)
    trees = {rank: _read(file, "module") for rank, file in models.items()}
    shares = {rank: _read(file, "optimizer_state_dict") for rank, file in optimizers.items()}
    first = trees[min(trees)]
    states = [share["optimizer_state_dict"] for share in shares.values()]
    stage = _stage(folder, states) if states else _stage_of_config(first)
    if stage == 3 and not states:
        raise MissingKeys(
            f"{folder}: no optimizer file of ZeRO 3 (zero_pp_rank_0_mp_rank_00_optim_states.pt ...) is there, and they "
            "hold the weights. Fetch them."
        )
    if states and first.get("param_shapes") is None:
        shares, states = {}, []  # an optimizer that ZeRO did not cut; the module is whole
    world = _world(folder, states, first)
    together = {models[rank]: tree for rank, tree in trees.items()}
    _check_same(folder, together, "global_steps")
    _check_same(folder, together | {optimizers[rank]: share for rank, share in shares.items()}, "ds_version")
    absent: list[str] = []
    for files, held in ((optimizers, shares), (models, trees if stage == 3 else {})):
        absent += _absent(folder, files, held, world)
    return Run(
        folder=folder,
        stage=stage,
        num_processes=world,
        step=_natural(first.get("global_steps")),
        version=first["ds_version"] if isinstance(first.get("ds_version"), str) else None,
        models=tuple(trees[rank] for rank in sorted(trees)),
        shares=tuple(share["optimizer_state_dict"] for _, share in sorted(shares.items())),
        files=(*(models[rank] for rank in sorted(models)), *(optimizers[rank] for rank in sorted(shares))),
        absent=tuple(absent),
    )


def find_step(path: Path) -> Path:
    """Give the folder of the step that `path` is or holds: the one that `latest` names, else the only one.

    Raises:
        UnknownLayout: none, several without `latest`, or `latest` names one that is not there.
        UnsafeCheckpoint: `latest` names something outside.
    """
    if not path.is_dir():
        raise UnknownLayout(f"{path}: no such file or folder; give a DeepSpeed checkpoint's folder.")
    if _holds_states(path):
        return path
    steps = [folder for folder in _steps(path) if _holds_states(folder)]
    names = ", ".join(folder.name for folder in steps[:8]) or "none"
    latest = path / LATEST
    if latest.is_file():
        tag = latest.read_bytes()[:MAX_LATEST_BYTES].decode("utf-8", "replace").strip()
        if tag in ("", ".", "..") or re.search(r"[/\\:\0]", tag):
            raise UnsafeCheckpoint(f"{latest}: names {tag!r:.100}, which is no folder beside it; not opened.")
        if path / tag in steps:
            return path / tag
        raise UnknownLayout(f"{latest}: names {tag!r:.100}, and that is no step's folder here; there are: {names}.")
    if len(steps) == 1:
        return steps[0]
    if steps:
        raise UnknownLayout(f"{path}: holds {len(steps)} steps and no {LATEST!r} that names one: {names}. Give one.")
    raise UnknownLayout(f"{path}: no DeepSpeed checkpoint: no *_model_states.pt in it or in a folder of it.")


# -- the files ---------------------------------------------------------------------------------------------------------


def _is_state(name: str) -> bool:
    return MODEL_FILE.fullmatch(name) is not None or OPTIMIZER_FILE.fullmatch(name) is not None


def _holds_states(folder: Path) -> bool:
    return any(_is_state(entry.name) for entry in folder.iterdir() if entry.suffix == ".pt")


def _steps(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.is_symlink())


def _files(folder: Path) -> tuple[dict[int, Path], dict[int, Path]]:
    """Give the model files and those of the optimizer by the number of their process."""
    models: dict[int, Path] = {}
    optimizers: dict[int, Path] = {}
    ranks: set[int] = set()
    for file in sorted(folder.iterdir()):
        for pattern, found in ((MODEL_FILE, models), (OPTIMIZER_FILE, optimizers)):
            if match := pattern.fullmatch(file.name):
                _check_inside(file)
                process, rank = int(match[1] or 0), int(match[2])
                ranks.add(rank)
                if rank == 0 and process in found:
                    raise CheckpointError(
                        f"{folder}: {found[process].name} and {file.name} are both of process {process}; files of two "
                        "runs lie together. Fetch the step again into an empty folder."
                    )
                found.setdefault(process, file)
    if len(ranks) > 1:
        raise CheckpointError(
            f"{folder}: cut among {len(ranks)} ranks of tensor parallelism (mp_rank_00 to mp_rank_{max(ranks):02d}); "
            "DeepSpeed's files do not say along which dimension. Merge them with the program that made them."
        )
    if not models:
        raise MissingKeys(
            f"{folder}: has optimizer files and no mp_rank_00_model_states.pt or "
            "zero_pp_rank_0_mp_rank_00_model_states.pt, which names the tensors. Fetch it."
        )
    if any(folder.glob("*expert_*_model_states.pt")):
        raise CheckpointError(f"{folder}: a mixture of experts, cut among processes by expert; lavish reads none.")
    return models, optimizers


def _check_inside(file: Path) -> None:
    if file.is_symlink() and not file.resolve().is_relative_to(file.parent.resolve()):
        raise UnsafeCheckpoint(f"{file}: is a link to {file.resolve()}, outside of the folder; not opened.")


def _of_file(file: Path) -> Run:
    match = MODEL_FILE.fullmatch(file.name)
    if match is None:
        raise UnknownLayout(f"{file}: one process's share of an optimizer; give the step's folder, {file.parent}.")
    tree = _read(file, "module")
    stage = _stage_of_config(tree)
    if match[1] is not None or stage == 3:
        raise UnknownLayout(f"{file}: one process's share of ZeRO 3; give the step's folder, {file.parent}.")
    version = tree.get("ds_version")
    return Run(
        folder=file.parent,
        stage=stage,
        num_processes=_natural(tree.get("dp_world_size")) or 1,
        step=_natural(tree.get("global_steps")),
        version=version if isinstance(version, str) else None,
        models=(tree,),
        shares=(),
        files=(file,),
    )


def _read(file: Path, needed: str) -> dict[str, Any]:
    tree = read_tree(file, CLASSES)
    if not isinstance(tree, dict) or not isinstance(tree.get(needed), dict):
        found = ", ".join(str(key) for key in list(tree)[:8]) if isinstance(tree, dict) else type(tree).__name__
        raise CheckpointError(f"{file}: no DeepSpeed file: holds no dict under {needed!r}; found {found:.200}.")
    return tree


def _natural(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**53 else None


def _stage(folder: Path, states: Sequence[Mapping[str, Any]]) -> int:
    """Give the stage that all shares name: a number, or an `Inert` of it."""
    found: set[int] = set()
    for state in states:
        value = state.get("zero_stage", 0)
        if isinstance(value, Inert):
            value = value.arguments[0] if value.arguments else None
        if type(value) is not int or not 0 <= value <= 3:
            raise CheckpointError(f"{folder}: an optimizer file names the ZeRO stage {value!r:.60}; there are 0 to 3.")
        found.add(value)
    if len(found) > 1:
        raise CheckpointError(f"{folder}: shards of ZeRO {' and '.join(map(str, sorted(found)))} lie together.")
    return found.pop()


def _stage_of_config(tree: Mapping[str, Any]) -> int:
    config = tree.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return (_natural(zero.get("stage")) or 0) if isinstance(zero, dict) else 0


def _world(folder: Path, states: Sequence[Mapping[str, Any]], model: Mapping[str, Any]) -> int:
    """Give the number of processes that the weights are cut among."""
    found: set[int] = set()
    for state in states:
        count = state.get("partition_count")
        counts = count if type(count) is list else [count]
        found.add(max((_natural(value) or 0 for value in counts), default=0))
    if not states:
        found.add(_natural(model.get("dp_world_size")) or 1)
    if len(found) > 1:
        said = " and ".join(map(str, sorted(found)))
        raise CheckpointError(f"{folder}: shards of runs of {said} processes lie together; fetch the step again.")
    world = found.pop()
    if not 1 <= world <= 1_000_000:
        raise CheckpointError(f"{folder}: the optimizer files do not say among how many processes they were cut.")
    return world


def _absent(folder: Path, files: Mapping[int, Path], held: Mapping[int, Any], world: int) -> list[str]:
    """Name the files of a kind that are not there, after checking that none is there of another run."""
    if not held:
        return []
    if extra := [rank for rank in sorted(held) if rank >= world]:
        raise CheckpointError(
            f"{folder}: holds a shard of process {extra[0]}, and the others are of a run of {world}: files of two runs "
            "lie together. Fetch the step again into an empty folder."
        )
    name = files[min(files)].name
    return [re.sub(r"zero_pp_rank_\d+", f"zero_pp_rank_{rank}", name) for rank in range(world) if rank not in held]


def _check_same(folder: Path, trees: Mapping[Path, Mapping[str, Any]], key: str) -> None:
    """Refuse files of one step that say different things of the run."""
    said = [(file, tree[key]) for file, tree in trees.items() if tree.get(key) is not None]
    for file, value in said[1:]:
        if value != said[0][1]:
            raise CheckpointError(
                f"{folder}: {said[0][0].name} says {key} {said[0][1]!r:.60} and {file.name} {value!r:.60}; they are of "
                "different runs or steps. Fetch the step again."
            )


# -- the weights -------------------------------------------------------------------------------------------------------


def _assembled(run: Run) -> dict[str, Stored]:
    """Give every tensor of a run: trained, frozen, buffers, and second names of shared ones."""
    model = run.models[0]
    module = {name: info for name, info in model["module"].items() if isinstance(info, TensorInfo)}
    if wrong := [name for name in model["module"] if not isinstance(name, str) or name not in module]:
        raise CheckpointError(f"{run.files[0]}: holds no tensor under {'module.' + str(wrong[0])!r:.100}.")
    made: dict[str, Stored] = {}
    if run.shares:
        made |= _trained_by_tensor(run) if run.stage == 3 else _trained_by_group(run)
    if run.stage == 3:
        made |= _frozen_slices(run)
        buffers = model.get("buffer_names")
        names = buffers if isinstance(buffers, list) else []
        made |= {name: module[name] for name in names if isinstance(name, str) and name in module}
    shared = model.get("shared_params")
    for alias, name in shared.items() if isinstance(shared, dict) else ():
        if isinstance(alias, str) and isinstance(name, str) and name in made:
            made[alias] = made[name]
    if run.stage < 3:
        made = {**module, **made}
    if not made:
        raise CheckpointError(f"{run.folder}: its files hold no tensors.")
    if lost := [name for name, info in module.items() if name not in made and info.numel]:
        raise CheckpointError(f"{run.folder}: {lost[0]!r} is in a model file, but no shard says how it is cut.")
    order = {name: index for index, name in enumerate(module)}
    return dict(sorted(made.items(), key=lambda item: order.get(item[0], len(order))))


def _shapes(run: Run, key: str) -> list[dict[str, tuple[int, ...]]]:
    """Give names and shapes of parameters, group by group; all model files must agree."""
    found = []
    for tree, file in zip(run.models, run.files, strict=False):  # the model files come first
        groups = tree.get(key) or []
        groups = groups if isinstance(groups, list) else [groups]
        for name, shape in ((n, s) for group in groups if isinstance(group, dict) for n, s in group.items()):
            if not isinstance(name, str) or type(shape) is not tuple or any(_natural(size) is None for size in shape):
                raise CheckpointError(f"{file}: {key} gives {name!r:.100} the shape {shape!r:.60}.")
        found.append([dict(group) for group in groups if isinstance(group, dict)])
    if any(other != found[0] for other in found[1:]):
        raise CheckpointError(f"{run.folder}: the model files of its processes differ in {key}; fetch the step again.")
    return found[0]


def _flat_groups(run: Run, key: str) -> list[list[TensorInfo]]:
    """Give the flat tensors of each process, as many of each."""
    shares: list[list[TensorInfo]] = []
    for state in run.shares:
        flat = state.get(key)
        if not isinstance(flat, list) or not all(isinstance(part, TensorInfo) for part in flat):
            raise CheckpointError(f"{run.folder}: an optimizer file holds no list of tensors under {key!r}.")
        if wrong := [part for part in flat if len(part.shape) != 1 or part.stride is not None]:
            raise CheckpointError(f"{wrong[0].file}: a share of the weights has the shape {wrong[0].shape}, not flat.")
        shares.append(flat)
    if len({len(flat) for flat in shares}) > 1 or not shares[0]:
        raise CheckpointError(f"{run.folder}: its processes hold different numbers of groups; fetch the step again.")
    return shares


def _trained_by_group(run: Run) -> dict[str, Stored]:
    """ZeRO 1 and 2: a group's parameters lie behind each other, and the row is cut among the processes."""
    groups = _shapes(run, "param_shapes")
    shares = _flat_groups(run, "single_partition_of_fp32_groups")
    if len(groups) != len(shares[0]):
        raise CheckpointError(f"{run.folder}: {len(groups)} groups of parameters, and shares of {len(shares[0])}.")
    paddings = _paddings(run, groups)
    made: dict[str, Stored] = {}
    for index, group in enumerate(groups):
        row = [flat[index] for flat in shares]
        at, length = 0, sum(part.numel for part in row)
        for (name, shape), padding in zip(group.items(), paddings[index], strict=True):
            made[name] = _from_row(run, name, shape, row, at)
            at += math.prod(shape) + padding
        align = 2 * run.num_processes  # DeepSpeed pads a row to this, and leaves some of that away
        if -(-at // align) != -(-length // align):
            raise CheckpointError(
                f"{run.folder}: group {index} of the parameters has {at} elements and its shards hold {length}: they "
                "are not of one run. Fetch the step again."
            )
    return made


def _paddings(run: Run, groups: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Give the elements that lie between a parameter and the next; a newer DeepSpeed writes them down."""
    stated = run.shares[0].get("param_alignment_paddings")
    if stated is None:
        return [[0] * len(group) for group in groups]
    fitting: list[Any] = stated if isinstance(stated, list) and len(stated) == len(groups) else [None] * len(groups)
    for group, found in zip(groups, fitting, strict=True):
        if not isinstance(found, list) or len(found) != len(group) or any(_natural(one) is None for one in found):
            raise CheckpointError(f"{run.folder}: param_alignment_paddings do not fit the groups of parameters.")
    return stated


def _from_row(run: Run, name: str, shape: tuple[int, ...], row: Sequence[TensorInfo], at: int) -> Stored:
    """Give the tensor whose elements begin at `at` of the tensors of `row` behind each other."""
    numel, first, pieces = math.prod(shape), 0, []
    for part in row:
        start, stop = max(at, first), min(at + numel, first + part.numel)
        if start < stop:
            pieces.append(Piece(view(part, 0, start - first, stop - first), (start - at,)))
        first += part.numel
    return _tensor(run, name, shape, pieces, row[0])


def _tensor(run: Run, name: str, shape: tuple[int, ...], pieces: list[Piece], some: TensorInfo) -> Stored:
    if not math.prod(shape):
        return reshaped(view(some, 0, 0, 0), shape)
    if sum(piece.info.numel for piece in pieces) != math.prod(shape):
        raise CheckpointError(
            f"{run.folder}: {name!r} is {shape} and the shards hold {sum(piece.info.numel for piece in pieces)} of "
            f"its {math.prod(shape)} elements; they are not of one run. Fetch the step again."
        )
    if len(pieces) == 1:
        return reshaped(pieces[0].info, shape)
    return Assembled(shape, pieces[0].info.dtype, tuple(pieces), is_flat=True)


def _trained_by_tensor(run: Run) -> dict[str, Stored]:
    """ZeRO 3: each parameter is cut among the processes by itself, the last slice padded; a process has its slices
    behind each other, in several tensors where they are large."""
    shares = _flat_groups(run, "fp32_flat_groups")
    if any("ds_zero_partition_groups" in state for state in run.shares):
        raise CheckpointError(f"{run.folder}: cut by DeepSpeed's AutoEP, whose shards lavish does not put together.")
    shapes = {name: shape for group in _shapes(run, "param_shapes") for name, shape in group.items()}
    made: dict[str, Stored] = {}
    at = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        length = -(-numel // run.num_processes)
        pieces: list[Piece] = []
        for rank, flat in enumerate(shares):
            begin = rank * length
            pieces += _cut(flat, at, min(length, max(numel - begin, 0)), begin)
        made[name] = _tensor(run, name, shape, pieces, shares[0][0])
        at += length
    for rank, flat in enumerate(shares):
        held = sum(part.numel for part in flat)
        if held != at:
            raise CheckpointError(
                f"{run.folder}: the slices of all parameters are {at} elements and process {rank} holds {held}: they "
                "are not of one run. Fetch the step again."
            )
    return made


def _cut(flat: Sequence[TensorInfo], at: int, numel: int, begin: int) -> list[Piece]:
    """Give the elements `at` to `at + numel` of tensors behind each other, as pieces from `begin` on."""
    first, pieces = 0, []
    for part in flat:
        start, stop = max(at, first), min(at + numel, first + part.numel)
        if start < stop:
            pieces.append(Piece(view(part, 0, start - first, stop - first), (begin + start - at,)))
        first += part.numel
    return pieces


def _frozen_slices(run: Run) -> dict[str, Stored]:
    """ZeRO 3: what is not trained lies in the model files, cut in the same way, one tensor a parameter."""
    shapes = {name: shape for group in _shapes(run, "frozen_param_shapes") for name, shape in group.items()}
    made: dict[str, Stored] = {}
    for name, shape in shapes.items():
        numel = math.prod(shape)
        length = -(-numel // run.num_processes)
        pieces: list[Piece] = []
        for rank, tree in enumerate(run.models):
            fragments = tree.get("frozen_param_fragments")
            slice_ = fragments.get(name) if isinstance(fragments, dict) else None
            if not isinstance(slice_, TensorInfo) or len(slice_.shape) != 1 or slice_.stride is not None:
                raise CheckpointError(f"{run.files[rank]}: holds no slice of the frozen {name!r}; fetch it again.")
            taken = min(length, max(numel - rank * length, 0))
            pieces += _cut([slice_], 0, taken, rank * length)
        some = run.models[0]["frozen_param_fragments"][name]
        made[name] = _tensor(run, name, shape, pieces, some)
    return made
