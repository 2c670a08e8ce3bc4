"""The `.pth` files of LAVIS and of what was built on it: a flat dict of tensors, or one under `"model"`.

A file that a run saved also holds `optimizer`, `config`, `scaler` and `epoch` or `iters` beside the weights; they are
described by the same pickle, which the restricted interpreter of `pickles.py` reads, and none of their tensors is
touched. Source: salesforce/LAVIS, lavis/runners/runner_base.py (_save_checkpoint), lavis/models/base_model.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavish.checkpoints.hf import inside
from lavish.checkpoints.pickles import read_tree
from lavish.checkpoints.tensor_map import TensorInfo, TensorMap
from lavish.common.errors import CheckpointError, UnknownLayout

SUFFIX = ".pth"
WEIGHTS = "model"
"""The key of the weights, where they are not alone in the file."""
BESIDE = ("optimizer", "config", "scaler", "epoch", "iters", "iteration", "best_epoch")
"""What a training run saves beside them."""
OF_A_RUN = ("checkpoint_best.pth", "checkpoint_last.pth")
"""What a training run calls the file to take, beside those of its epochs."""


def read(path: str | Path) -> TensorMap:
    """Open the weights of a `.pth` file, or of a folder that holds one; no tensor is read.

    Raises:
        UnknownLayout: no such file, or a folder with none or several.
        UnsafeCheckpoint: the pickle asks for anything but tensors and plain data.
        CheckpointError: damaged, or no dict of tensors.
    """
    file = find_file(Path(path))
    return TensorMap(file, _weights(file, read_tree(file)))


def find_file(path: Path) -> Path:
    """Name the one `.pth` file that `path` is or holds; of a training run's files the best one, else the last.

    Raises:
        UnknownLayout: none or several.
        UnsafeCheckpoint: it is a link out of the folder.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UnknownLayout(f"{path}: no such file or folder; give a LAVIS checkpoint ({SUFFIX}) or its folder.")
    files = sorted(entry.name for entry in path.iterdir() if entry.suffix == SUFFIX and entry.is_file())
    if not files:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise UnknownLayout(f"{path}: a folder without a {SUFFIX} file; found {found}.")
    chosen = chosen_of(files)
    if chosen is None:
        raise UnknownLayout(f"{path}: holds {len(files)} {SUFFIX} files, {', '.join(files[:8])}; name one of them.")
    return inside(path, chosen)


def chosen_of(names: Sequence[str]) -> str | None:
    """Give the only name, or of a training run's files the best one, else the last; None where that tells nothing."""
    return names[0] if len(names) == 1 else next((name for name in OF_A_RUN if name in names), None)


def _is_wrapped(tree: Mapping[Any, Any]) -> bool:
    return isinstance(tree.get(WEIGHTS), dict)


def _weights(file: Path, tree: Any) -> dict[str, TensorInfo]:
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file}: holds a {type(tree).__name__}, not a dict of tensors.")
    is_wrapped = _is_wrapped(tree)
    table = tree[WEIGHTS] if is_wrapped else tree
    if not table:
        raise CheckpointError(f"{file}: holds no tensors{' under ' + repr(WEIGHTS) if is_wrapped else ''}.")
    for name, value in table.items():
        if isinstance(name, str) and isinstance(value, TensorInfo):
            continue
        if not is_wrapped and any(key in tree for key in BESIDE):
            keys = ", ".join(str(key) for key in list(tree)[:8])
            raise CheckpointError(
                f"{file}: a training run's file ({keys}) without a dict of weights under {WEIGHTS!r}; "
                "give the checkpoint that holds the model."
            )
        where = f"{WEIGHTS}.{name}" if is_wrapped else str(name)
        raise CheckpointError(
            f"{file}: holds a {type(value).__name__} under {where!r:.100}, where a LAVIS file has only named tensors, "
            f"or those under {WEIGHTS!r}."
        )
    return table
