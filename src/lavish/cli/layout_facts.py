"""What a checkpoint says of itself beside its tensors: step, processes, LoRA; and the commands that load or convert it.

One function a layout; headers and small files are read, weights and torch are not.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavish.checkpoints import deepspeed, lavis, mindspore, sat
from lavish.checkpoints.json_file import read_optional_object
from lavish.checkpoints.layouts import ADAPTER_CONFIG, PROJECTOR_FILE
from lavish.checkpoints.pickles import read_tree
from lavish.checkpoints.tensor_map import TensorInfo

if TYPE_CHECKING:
    from lavish.models import Family

SHOWN_TARGETS = 8
_CHECKPOINT = re.compile(r"checkpoint[-_](\d+)")


def facts_of(path: Path, layout: str) -> dict[str, str]:
    """Give what the layout says, by a short name each.

    Raises:
        CheckpointError, UnknownLayout: as the layout's reader.
    """
    return _READERS[layout](path)


def _hf(path: Path) -> dict[str, str]:
    folder = path if path.is_dir() else path.parent
    return {**_step_of(folder), **_lora(read_optional_object(folder / ADAPTER_CONFIG))}


def _sat(path: Path) -> dict[str, str]:
    opened = sat.open_checkpoint(path)
    found = {"iteration": opened.folder.name, "parallel ranks": str(opened.num_ranks)}
    if opened.iteration is not None and str(opened.iteration) != opened.folder.name:
        found["step"] = str(opened.iteration)
    matrices = [name for name in opened.tensors if ".matrix_A." in name or ".matrix_B." in name]
    if matrices:
        found["LoRA"] = f"rank {opened.fields.get('lora_rank', 'unknown')}, {len(matrices)} matrices"
    return found


def _mindspore(path: Path) -> dict[str, str]:
    contents = mindspore.read_contents(path, verify=False)
    ranks = mindspore.rank_folders(path) if path.is_dir() else []
    found = {"parallel ranks": str(max(len(ranks), 1))}
    for name in ("epoch_num", "step_num", "global_step"):
        if name in contents.texts:
            found[name] = contents.texts[name]
    lora = [name for name in contents.infos if "lora_a" in name.lower()]
    if lora:
        found["LoRA"] = f"{len(lora)} pairs of matrices"
    found["CRC"] = "stored" if contents.has_crc else "none"
    return found


def _lavis(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(path.glob(f"*{lavis.SUFFIX}"))
    if len(files) != 1:
        return {}
    tree = read_tree(files[0])
    if not isinstance(tree, dict):
        return {}
    found = {"weights": f"under {lavis.WEIGHTS!r}" if isinstance(tree.get(lavis.WEIGHTS), dict) else "a flat dict"}
    for name in ("epoch", "iters", "iteration"):
        if isinstance(tree.get(name), int):
            found[name] = str(tree[name])
    if beside := [name for name in lavis.BESIDE if name in tree and not isinstance(tree[name], int)]:
        found["beside them"] = ", ".join(beside)
    return found


def _vlm_learning(path: Path) -> dict[str, str]:
    files = [path / PROJECTOR_FILE] if (path / PROJECTOR_FILE).is_file() else sorted(path.glob(f"*/{PROJECTOR_FILE}"))
    folders = [file.parent for file in files]
    if len(folders) != 1:
        return {"trained folders": ", ".join(folder.name for folder in folders)} if folders else {}
    lora = _lora(read_optional_object(folders[0] / ADAPTER_CONFIG))
    return {**_step_of(folders[0]), **(lora or {"LoRA": "none; it may be merged"})}


def _deepspeed(path: Path) -> dict[str, str]:
    if path.is_dir() and (layers := sorted(path.glob("layer_*-model_states.pt"))):
        return {"pipeline": f"{len(layers)} layers, a file each"}
    run = deepspeed.survey(path)
    found = {"ZeRO": str(run.stage), "processes": str(run.num_processes)}
    if run.step is not None:
        found["step"] = str(run.step)
    if run.version is not None:
        found["DeepSpeed"] = run.version
    if run.stage and run.stage < 3 and not run.shares:
        found["precision"] = "that of the run: the optimizer's float32 weights are not here"
    return found


def _peft(path: Path) -> dict[str, str]:
    folder = path if path.is_dir() else path.parent
    fields = read_optional_object(folder / ADAPTER_CONFIG)
    found = {**_step_of(folder), **_lora(fields)}
    base = fields.get("base_model_name_or_path")
    found["base"] = base if isinstance(base, str) and base else "not recorded"
    return found


_READERS: Mapping[str, Callable[[Path], dict[str, str]]] = {
    "hf": _hf,
    "sat": _sat,
    "mindspore": _mindspore,
    "lavis": _lavis,
    "vlm_learning": _vlm_learning,
    "deepspeed": _deepspeed,
    "peft": _peft,
}


def _lora(fields: Mapping[str, Any]) -> dict[str, str]:
    """Say what an adapter_config.json describes; nothing of an empty one."""
    if not fields:
        return {}
    targets = fields.get("target_modules")
    named = [str(name) for name in targets] if isinstance(targets, list) else [str(targets)]
    more = f" and {len(named) - SHOWN_TARGETS} more" if len(named) > SHOWN_TARGETS else ""
    kind = fields.get("peft_type")
    return {
        "LoRA" if kind in (None, "LORA") else str(kind): f"rank {fields.get('r', 'unknown')}, alpha "
        f"{fields.get('lora_alpha', 'unknown')}, on {', '.join(named[:SHOWN_TARGETS])}{more}"
    }


def _step_of(folder: Path) -> dict[str, str]:
    """Say the step that a trainer of transformers notes, or that the folder's name has."""
    step = read_optional_object(folder / "trainer_state.json").get("global_step")
    found = _CHECKPOINT.fullmatch(folder.resolve().name)
    if isinstance(step, int):
        return {"step": str(step)}
    return {"step": found[1]} if found else {}


# -- tensors, where no network can be made -----------------------------------------------------------------------------


def headers(path: Path, layout: str) -> dict[str, dict[str, Any]]:
    """Give what each weight file of a path holds, under the layout's own names, by the file's name.

    Of DeepSpeed's shards the parameters as a whole, also where shards are absent.

    Raises:
        CheckpointError: as the layout's reader.
    """
    from lavish.checkpoints import hf

    if layout == "deepspeed" and not (path.is_dir() and list(path.glob("layer_*-model_states.pt"))):
        return {"parameters": _parameters(path)}
    if layout in ("sat", "mindspore"):
        tensors = sat.read(path) if layout == "sat" else mindspore.read(path, verify=False)
        return {layout: dict(tensors.infos)}
    suffixes = {"lavis": ("*.pth", "*/*.pth"), "deepspeed": ("layer_*-model_states.pt",)}
    patterns = suffixes.get(layout, ("*.safetensors", "adapter_model.bin", PROJECTOR_FILE, f"*/{PROJECTOR_FILE}"))
    files = [path] if path.is_file() else sorted({file for pattern in patterns for file in path.glob(pattern)})
    root = path.parent if path.is_file() else path
    reader = lavis.read if layout == "lavis" else hf.read
    return {str(file.relative_to(root)): dict(reader(file).infos) for file in files}


def _parameters(path: Path) -> dict[str, Any]:
    run = deepspeed.survey(path)
    if not run.absent:
        return dict(deepspeed.read(path).infos)
    model, found = run.models[0], {}
    for groups in (model.get("param_shapes") or [], [model.get("frozen_param_shapes") or {}]):
        for table in groups if isinstance(groups, list) else ():
            for name, shape in table.items() if isinstance(table, dict) else ():
                found[str(name)] = TensorInfo(tuple(shape), "float32", run.files[0], 0)
    return found


def total_bytes(files: Mapping[str, Mapping[str, Any]]) -> int:
    """Add up the bytes of tensors."""
    return sum(info.nbytes for infos in files.values() for info in infos.values())


# -- commands ----------------------------------------------------------------------------------------------------------


def commands_of(
    path: Path,
    layout: str,
    family: Family | None,
    pieces: Mapping[str, str],
    *,
    version: int = 0,
    reason: str = "",
) -> list[str]:
    """Give the commands that load and convert a path; what only the user knows stands in capitals.

    `reason`: why no network can be made of it alone.
    """
    here = shlex.quote(str(path))
    named = "".join(f" --piece {shlex.quote(f'{name}={place}')}" for name, place in pieces.items())
    if absent := _absent_pieces(path, family, reason):
        named += "".join(f" --piece {name}=PATH" for name in absent)
    elif "config" in reason:
        named += " --config FILE"
    if layout == "peft":
        return [f"lavish chat {here} --base BASE", f"lavish convert {here} DST --base BASE --merge-lora"]
    if family is not None and family.opener is not None:
        load = f"lavish predict {here} --image FILE{named}" if "caption" in family.capabilities else None
    else:
        load = f"lavish chat {here}{named}"
    found = [] if load is None else [load]
    if layout != "hf":
        merge = " --merge-lora" if layout == "vlm_learning" and _has_adapter(path) else ""
        return [*found, f"lavish convert {here} DST --to hf{merge}{named}"]
    held = {"sat": 1, "mindspore": 2}  # versions of CogVLM
    others = [to for to in (family.layouts[1:] if family is not None else ()) if held.get(to, version) == version]
    return [*found, *(f"lavish convert {here} DST --to {to}" for to in others)]


def _absent_pieces(path: Path, family: Family | None, reason: str) -> list[str]:
    """Name the pieces to give: of a piece alone all that a release needs, of a folder the one that was not found."""
    found = re.search(r"the piece '(\w+)' is absent", reason)
    if found is None:
        return []
    if path.is_dir() or family is None:
        return [found[1]]
    return [name for name in family.pieces if name != "qformer"]  # BERT's sizes are known


def _has_adapter(path: Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file() or any(path.glob(f"*/{ADAPTER_CONFIG}"))
