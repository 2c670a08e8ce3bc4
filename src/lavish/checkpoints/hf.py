"""The Hugging Face layout: safetensors or `.bin`, one file or shards with an index.

`read` looks at headers only (safetensors) or unpickles names and places with the restricted reader of `pickles.py`
(`.bin`). Weights are named by fixed file names or by the index: `training_args.bin`, optimizer states and `.py` files
of a folder are never opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavish.checkpoints.json_file import read_object
from lavish.checkpoints.pickles import read_table
from lavish.checkpoints.safetensors_header import read_header
from lavish.checkpoints.tensor_map import TensorInfo, TensorMap
from lavish.common.errors import CheckpointError, MissingKeys, UnknownLayout, UnsafeCheckpoint

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What a folder of this layout holds, in the order in which transformers looks for it."""
INDEX_SUFFIX = ".index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")


def __getattr__(name: str) -> Any:
    if name == "load_into":  # offered here too, but it needs torch and reading headers does not
        from lavish.checkpoints import loading

        return loading.load_into
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def read(path: str | Path, *, allow_absent: bool = False) -> TensorMap:
    """Open a folder, an index or a weight file, and read no weights.

    With `allow_absent`, shards that are not on disk are left out and listed in `.absent` (for `lavish inspect`).

    Raises:
        UnknownLayout: there are no weights of this layout.
        MissingKeys: the index names a shard that is not on disk, or a tensor that its shard does not hold.
        UnsafeCheckpoint: the index or a link leaves the folder, or a pickle asks for more than tensors.
        CheckpointError: a file is damaged, or two shards hold the same name.
    """
    path = Path(path)
    weights = find_weights(path)
    if weights.name.endswith(INDEX_SUFFIX):
        return _read_sharded(path, weights, allow_absent)
    return TensorMap(path, _read_file(weights if weights == path else inside(path, weights.name)))


def find_weights(path: Path) -> Path:
    """Name the weight file or index that `path` stands for.

    Raises:
        UnknownLayout: `path` is neither a weight file nor a folder with one.
    """
    if path.is_file():
        if path.name.endswith((".safetensors", INDEX_SUFFIX, *PICKLE_SUFFIXES)):
            return path
        raise UnknownLayout(
            f"{path}: not a weight file; lavish reads .safetensors, .bin, .pt, .pth or their .index.json."
        )
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    if not path.is_dir():
        raise UnknownLayout(f"{path}: no such file or folder.")
    for name in WEIGHT_FILES:
        if (path / name).is_symlink():
            raise UnknownLayout(f"{path}: {name} is a link whose target is gone; fetch the model again.")
    shards = sorted(path.glob("*-of-*.safetensors")) + sorted(path.glob("*-of-*.bin"))
    if shards:
        suffix = shards[0].suffix
        index = f"{'model' if suffix == '.safetensors' else 'pytorch_model'}{suffix}{INDEX_SUFFIX}"
        raise UnknownLayout(
            f"{path}: has {len(shards)} shards ({shards[0].name} ...) but not their index; fetch {index}."
        )
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise UnknownLayout(f"{path}: no weights of the Hugging Face layout ({', '.join(WEIGHT_FILES)}); found {found}.")


def inside(folder: Path, name: str) -> Path:
    """Give the file `name` of `folder`, following links only where they stay inside.

    A snapshot of the hub cache links to the `blobs` folder of its own repository: that counts as inside.

    Raises:
        UnsafeCheckpoint: the name or the link's target leaves the folder.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or ":" in name or "\0" in name:
        raise UnsafeCheckpoint(
            f"{folder}: names the weight file {name!r}, which is not a plain file name of this folder; not opened."
        )
    root = folder.resolve()
    target = (root / name).resolve()
    allowed = [root]
    for parent in (root, *root.parents):
        if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith("models--"):
            allowed.append(parent.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise UnsafeCheckpoint(
            f"{folder / name}: is a link to {target}, outside of the folder; not opened. Copy the file here, or "
            "name its folder itself."
        )
    return folder / name


def _read_file(file: Path) -> dict[str, TensorInfo]:
    return read_header(file) if file.suffix == ".safetensors" else read_table(file)


def _read_sharded(path: Path, index: Path, allow_absent: bool) -> TensorMap:
    folder = index.parent
    weight_map = _read_index(index)
    listed = sorted(set(weight_map.values()))
    shards = {name: inside(folder, name) for name in listed}
    absent = [name for name in listed if not shards[name].is_file()]
    if absent and not allow_absent:
        gone = sorted(key for key, shard in weight_map.items() if shard in absent)
        raise MissingKeys(
            f"{index}: {len(gone)} of its {len(weight_map)} tensors are in files that are not here, first {gone[0]!r}."
            + TensorMap(path, {}, listed=listed, absent=absent).shards_sentence()
        )
    infos: dict[str, TensorInfo] = {}
    held_by: dict[str, str] = {}
    for shard in listed:
        if shard in absent:
            continue
        for key, info in _read_file(shards[shard]).items():
            if key in infos:
                raise CheckpointError(
                    f"{folder}: both {held_by[key]} and {shard} hold {key!r}; one of them is from elsewhere."
                )
            infos[key], held_by[key] = info, shard
    for key, shard in weight_map.items():
        if held_by.get(key) != shard and (shard not in absent or key in held_by):
            why = "is not here" if shard in absent else "does not hold it"
            raise MissingKeys(
                f"{index}: says that {key!r} is in {shard}, which {why}"
                + (f" ({held_by[key]} does)" if key in held_by else "")
                + ". Index and shards are of different versions; fetch both again."
            )
    return TensorMap(path, infos, listed=listed, absent=absent)


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_object(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise CheckpointError(f"{index}: needs a 'weight_map' from tensor name to file name; fetch it again.")
    return weight_map
