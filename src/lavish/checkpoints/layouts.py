"""Which released layout a path is, and its config.json. Looks at names, and at a header where they do not tell. torch
is not imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavish.checkpoints import deepspeed, hf, lavis, mindspore, sat
from lavish.checkpoints.hf import INDEX_SUFFIX, WEIGHT_FILES
from lavish.checkpoints.json_file import read_object
from lavish.checkpoints.pickles import NEVER_OPENED
from lavish.checkpoints.tensor_map import TensorMap
from lavish.common.errors import CheckpointError, UnknownLayout

LAYOUTS = ("hf", "sat", "lavis", "mindspore", "vlm_learning", "deepspeed", "peft")
"""Hugging Face; SwissArmyTransformer (CogVLM); LAVIS, MiniGPT4-Qwen and MPP-LLaVA; MindSpore; VLM-learning (CLIP +
Qwen); DeepSpeed's shards; an adapter of PEFT."""
READABLE = (
    "a folder with config.json and model.safetensors, its shards with model.safetensors.index.json, or "
    "pytorch_model.bin; SAT's model_config.json and `latest`; a .pth of LAVIS; MindSpore's .ckpt; other_params.bin of "
    "VLM-learning; DeepSpeed's *_model_states.pt; adapter_config.json of PEFT"
)
ADAPTER_CONFIG, ADAPTER_FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PROJECTOR_FILE = "other_params.bin"


def detect(path: str | Path) -> str:
    """Name the layout, one of `LAYOUTS`.

    Raises:
        UnknownLayout: no such path, or of no layout that lavish reads; says what was found.
    """
    path = Path(path)
    if not path.exists():
        raise UnknownLayout(f"{path}: no such file or folder.")
    found = _of_file(path) if path.is_file() else _of_folder(path)
    if found is not None:
        return found
    if path.is_file():
        raise UnknownLayout(f"{path}: a file of no layout that lavish knows. It reads {READABLE}.")
    names = sorted(entry.name for entry in path.iterdir())
    inside = [name for name in names if (path / name / "config.json").is_file()]
    if inside:
        others = f" (so have {len(inside) - 1} others)" if len(inside) > 1 else ""
        raise UnknownLayout(
            f"{path}: no checkpoint itself, but its subfolder {inside[0]!r} has a config.json{others}. Give that: "
            f"{path / inside[0]}"
        )
    listed = f"{', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}" if names else "nothing"
    raise UnknownLayout(f"{path}: a folder of no layout that lavish knows; found {listed}. It reads {READABLE}.")


def _of_file(path: Path) -> str | None:
    if path.name in ADAPTER_FILES:
        return "peft"
    if path.name == PROJECTOR_FILE:
        return "vlm_learning"
    if path.suffix == mindspore.SUFFIX or mindspore.is_mindspore(path):
        return "mindspore"
    if path.name in WEIGHT_FILES or path.name.endswith((".safetensors", INDEX_SUFFIX)):
        return "hf"
    if deepspeed.is_run(path):
        return "deepspeed" if sat.find_root(path) is None else "sat"
    is_weights = path.suffix in hf.PICKLE_SUFFIXES and not path.name.startswith(NEVER_OPENED)
    return "lavis" if is_weights else None


def _of_folder(path: Path) -> str | None:
    """Weights of the Hugging Face layout come first: a trainer saves its own shards beside them."""
    names = {entry.name for entry in path.iterdir()}  # a link whose target is gone counts too: `hf.read` says so
    if names.intersection(WEIGHT_FILES) or _has(path, "*-of-*.safetensors", "*-of-*.bin"):
        return "hf"
    if sat.find_root(path) is not None:
        return "sat"
    if _has(path, PROJECTOR_FILE, f"*/{PROJECTOR_FILE}"):
        return "vlm_learning"
    if ADAPTER_CONFIG in names and "config.json" not in names:
        return "peft"
    if _has(path, "layer_*-model_states.pt") or deepspeed.is_run(path):
        return "deepspeed"
    if _has(path, f"*{lavis.SUFFIX}", "*/eva*.pth"):
        return "lavis"
    if _has(path, "*.ckpt", "rank_*/*.ckpt") or mindspore.is_mindspore(path):
        return "mindspore"
    return "hf" if "config.json" in names else None


def _has(folder: Path, *patterns: str) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def config_folder(path: Path) -> Path:
    """Give the folder in which the config.json of a path lies: the path itself, or, of a step or a file of DeepSpeed,
    the one above that has it."""
    if not deepspeed.is_run(path):
        return path
    above = (path, path.parent) if path.is_dir() else (path.parent, path.parent.parent)
    return next((folder for folder in above if (folder / "config.json").is_file()), above[0])


def read_weights(path: str | Path, *, allow_absent: bool = False) -> TensorMap:
    """Open the weights of a network that lavish or transformers saved, or that DeepSpeed saved in shards; none is read.

    Of DeepSpeed's the names of what held the network in training (`module.`, `network.`) are taken away.
    `allow_absent`: as `hf.read`.

    Raises: as `hf.read` and `deepspeed.read`.
    """
    path = Path(path)
    has_weights = path.is_dir() and any((path / name).exists() for name in WEIGHT_FILES)
    if has_weights or not deepspeed.is_run(path):
        return hf.read(path, allow_absent=allow_absent)
    tensors = deepspeed.read(path)
    infos = tensors.infos
    if lora := next((name for name in infos if name.startswith("base_model.model.") or ".lora_A." in name), None):
        raise CheckpointError(
            f"{path}: the shards of a network with a LoRA on it ({lora!r}). Give the folder in which the trainer put "
            f"{ADAPTER_CONFIG}, and base=...; the base's weights in these shards are those that it was trained on."
        )
    for prefix in ("module.", "network."):
        if all(name.startswith(prefix) for name in infos):
            infos = {name.removeprefix(prefix): info for name, info in infos.items()}
    return TensorMap(tensors.path, infos)


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
