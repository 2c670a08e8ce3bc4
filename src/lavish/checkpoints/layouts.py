"""Which released layout a path is, and its config.json. Looks at names in the folder only; torch is not imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavish.checkpoints.hf import INDEX_SUFFIX, WEIGHT_FILES
from lavish.checkpoints.json_file import read_object
from lavish.common.errors import UnknownLayout

READABLE = (
    "a folder with config.json and model.safetensors, its shards with model.safetensors.index.json, or "
    "pytorch_model.bin"
)


def detect(path: str | Path) -> str:
    """Name the layout: `"hf"`.

    Raises:
        UnknownLayout: no such path, or of no layout that lavish reads; says what was found.
    """
    path = Path(path)
    if path.is_file():
        if path.name in WEIGHT_FILES or path.name.endswith((".safetensors", INDEX_SUFFIX)):
            return "hf"
        raise UnknownLayout(f"{path}: a file of no layout that lavish knows. It reads {READABLE}.")
    if not path.is_dir():
        raise UnknownLayout(f"{path}: no such file or folder.")
    names = sorted(entry.name for entry in path.iterdir())
    if "config.json" in names or any(name in names for name in WEIGHT_FILES):
        return "hf"
    inside = [name for name in names if (path / name / "config.json").is_file()]
    if inside:
        others = f" (so have {len(inside) - 1} others)" if len(inside) > 1 else ""
        raise UnknownLayout(
            f"{path}: no checkpoint itself, but its subfolder {inside[0]!r} has a config.json{others}. Give that: "
            f"{path / inside[0]}"
        )
    found = f"{', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}" if names else "nothing"
    raise UnknownLayout(f"{path}: a folder of no layout that lavish knows; found {found}. It reads {READABLE}.")


def read_config_json(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        UnknownLayout: no folder, or none with a config.json.
        CheckpointError: it is not a JSON object.
    """
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "not there"
        raise UnknownLayout(f"{folder} is {kind}; give the folder that holds config.json and the weights.")
    detect(folder)  # says what the folder is, where it is nothing that lavish reads
    path = folder / "config.json"
    if not path.is_file():
        raise UnknownLayout(f"{folder} has weights and no config.json; fetch the release's config.json into it.")
    return read_object(path)
