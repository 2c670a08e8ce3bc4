"""The pieces of a CLIP + Qwen release: three folders, their names in our modules, and LoRA adapters on them.

Source: WatchTower-Liu/VLM-learning, trainer.py (what a checkpoint-N holds). `training_args.bin` beside the weights is a
pickle of a class of the training program: it is never opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lavish.checkpoints import hf
from lavish.checkpoints.json_file import read_object, read_optional_object
from lavish.checkpoints.qwen import native_lora, qwen_rules, released_lora
from lavish.checkpoints.release import Release, find_piece, merged, with_config
from lavish.checkpoints.rules import Drop, Optional, Rename, Rule
from lavish.checkpoints.tensor_map import TensorMap
from lavish.common.errors import CheckpointError, ConfigError
from lavish.nn.qwen import read_qwen_config
from lavish.processors.qwen_tokenizer import load_qwen_tokenizer, special_ids

PIECES = ("vision_tower", "llm")
"""Beside the folder that was trained; its `base_model_name_or_path` is of the machine that trained it."""
PROJECTOR_FILE = "other_params.bin"
ADAPTER_CONFIG, ADAPTER_FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")

_TOWER, _IN_CLIP = "vision_tower", "vision_tower.vision_model"
RULES: tuple[Rule, ...] = (
    *(Drop(f"{_TOWER}.text_model{'.*' * depth}", why="CLIP's text tower") for depth in (2, 3, 5, 6)),
    Drop(f"{_TOWER}.visual_projection.weight", why="into the space that CLIP shares with texts"),
    Drop(f"{_TOWER}.text_projection.weight", why="of CLIP's text tower"),
    Drop(f"{_TOWER}.logit_scale", why="of CLIP's training"),
    Drop(f"{_IN_CLIP}.embeddings.position_ids", why="a constant of the code, stored by older files"),
    Drop(f"{_IN_CLIP}.post_layernorm.*", why="of the class row, which is not used"),
    *(Rename(f"{_IN_CLIP}{'.*' * depth}", f"{_TOWER}{'.*' * depth}") for depth in (2, 3, 5, 6)),
    *qwen_rules(),
)

UNTRAINED: tuple[Rule, ...] = (Optional("projector.*.*", why="it starts random"),)
"""In place of a projector's weights."""

TENSOR_PARALLEL_PLAN = MappingProxyType(
    {
        "language_model.layers.*.self_attn.q_proj": "colwise",
        "language_model.layers.*.self_attn.k_proj": "colwise",
        "language_model.layers.*.self_attn.v_proj": "colwise",
        "language_model.layers.*.self_attn.o_proj": "rowwise",
        "language_model.layers.*.mlp.gate_proj": "colwise",
        "language_model.layers.*.mlp.up_proj": "colwise",
        "language_model.layers.*.mlp.down_proj": "rowwise",
        "lm_head": "colwise_gather_output",
    }
)
"""What several processes share. Whole in each of them: embedding table, norms, tower and projector, 12 % of the 7B."""


def complete(network: nn.Module, absent: Iterable[str] = ()) -> None:
    """Make what no file holds: constants of transformers' tower. Call it after every load.

    Raises:
        CheckpointError: a name that cannot be computed.
    """
    for name in absent:
        if not name.endswith("embeddings.position_ids"):
            raise CheckpointError(f"{name!r} is in no file and cannot be computed. Fetch the checkpoint again.")
        embeddings: Any = network.get_submodule(name.rpartition(".")[0])
        device = embeddings.patch_embedding.weight.device
        embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]


def open_release(path: Path, pieces: Mapping[str, Path]) -> Release:
    """Open the three folders of a release as one.

    `path` is a folder that holds them side by side, or the one that was trained (`other_params.bin`, and mostly a
    LoRA), with the others beside it, named by `vision_tower=` and `llm=`, or where the LoRA's config has its base.

    Raises:
        ConfigError: a piece is absent, there twice, or of another kind.
        CheckpointError: a piece is damaged.
    """
    trained = _trained(path)
    beside = sorted(entry for entry in (path if trained != path else path.parent).iterdir() if entry.is_dir())
    places = (beside, _recorded(trained))
    projector = hf.read(hf.inside(trained, PROJECTOR_FILE))
    release, llm = _opened(path, pieces, places, projector, path)
    return replace(release, adapter=_adapter(trained), adapted=partial(_save_together, llm))


def open_untrained(folder: Path | None, pieces: Mapping[str, Path]) -> Release:
    """Open the folders that a training of the projector starts from, side by side in `folder` or named; what was
    trained is not read where the folder has it.

    Raises: as `open_release`.
    """
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give the folder that holds the decoder's and the tower's.")
    beside = [] if folder is None else sorted(entry for entry in folder.iterdir() if entry.is_dir())
    path = folder or next(iter(pieces.values()), Path())
    return replace(_opened(path, pieces, (beside,), TensorMap(path, {}), folder)[0], is_untrained=True)


def start_projector(network: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Fill the projector, which is on the meta device, with random weights as the release starts it."""
    network.projector.to_empty(device=device).to(dtype)
    for linear in (network.projector[0], network.projector[2]):
        nn.init.normal_(linear.weight, std=network.config.initializer_range)
        nn.init.zeros_(linear.bias)


def _opened(
    path: Path,
    pieces: Mapping[str, Path],
    places: Iterable[Iterable[Path]],
    projector: TensorMap,
    folder: Path | None,
) -> tuple[Release, Path]:
    """Put tower, decoder and projector together; gives the decoder's folder too."""
    vision_folder = _piece("vision_tower", path, pieces, places, "clip", "clip_vision_model")
    llm = _piece("llm", path, pieces, places, "qwen")
    tensors = merged(path, [("", hf.read(llm)), (f"{_TOWER}.", hf.read(vision_folder)), ("projector.", projector)])
    answering = read_optional_object(llm / "generation_config.json")
    fields = {
        "architectures": ["ClipQwenForConditionalGeneration"],
        "vision_config": _vision_fields(vision_folder, tensors),
        "text_config": read_qwen_config(read_object(llm / "config.json"), str(llm / "config.json")).to_dict(),
        "vision_tower": vision_folder.resolve().name,
        "language_model": llm.resolve().name,
        **_token_fields(llm),
        **_pixel_fields(vision_folder),
    }
    if isinstance(answering.get("max_window_size"), int):
        fields["max_window_tokens"] = answering["max_window_size"]
    if answering.get("repetition_penalty") is not None:
        fields["repetition_penalty"] = answering["repetition_penalty"]
    # Its eos is <|endoftext|>; the chat model ends with <|im_end|>. The config's list says all.
    sampling = {name: value for name, value in answering.items() if name != "eos_token_id"}
    return Release(with_config(folder, "clip_qwen", fields), tensors, llm, load_qwen_tokenizer, sampling), llm


def native_adapter(fields: dict[str, Any], tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give a released LoRA (on c_attn, w1, w2) as one for our modules; one for ours as it is."""
    return native_lora(fields, tensors, "language_model.")


def tie_shared_lora(network: nn.Module) -> int:
    """Let q, k and v of each layer share one lora_A, as a LoRA on the fused c_attn does; gives how many were tied.

    For training as the release trains: apart, the three would move apart.
    """
    tied = 0
    for module in network.modules():
        projections = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        if all(hasattr(projection, "lora_A") for projection in projections):  # what peft puts there
            first: Any = projections[0]
            for other in projections[1:]:
                for adapter in first.lora_A:
                    other.lora_A[adapter].weight = first.lora_A[adapter].weight  # pyright: ignore
                    tied += 1
    return tied


def save_trained(model: Any, folder: str | Path) -> None:
    """Write what was trained as the release's training leaves it: `other_params.bin`, and the active LoRA if there is
    one. `lavish.load(folder, llm=..., vision_tower=...)` reads it again, and so does the release's code.

    Raises:
        ConfigError: a LoRA that the release's names cannot say: q, k and v with a lora_A of their own.
    """
    folder = Path(folder)
    has_lora = hasattr(model, "peft_config")  # a PeftModel has it
    fields: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    if has_lora:
        name = model.active_adapter
        ending = f".{name}.weight"
        found = {
            key.removesuffix(ending) + ".weight": value.detach().cpu()
            for key, value in model.named_parameters(remove_duplicate=False)
            if key.endswith(ending)
        }
        fields, lora = released_lora(model.peft_config[name].to_dict(), found)
    folder.mkdir(parents=True, exist_ok=True)
    _save_projector(model.get_base_model() if has_lora else model, folder)
    if has_lora:
        torch.save({key: value.clone() for key, value in lora.items()}, folder / "adapter_model.bin")
        text = json.dumps(fields, default=sorted, indent=2)  # the only values that JSON lacks are sets
        (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


def _trained(path: Path) -> Path:
    """Give the folder of `other_params.bin`: `path`, or the one inside it; of several checkpoint-N none is chosen."""
    if not path.is_dir():
        raise ConfigError(f"{path} is a file; give the folder that holds {PROJECTOR_FILE}.")
    if (path / PROJECTOR_FILE).is_file():
        return path
    found = sorted(file.parent for file in path.glob(f"*/{PROJECTOR_FILE}"))
    if not found:
        raise ConfigError(f"{path}: no {PROJECTOR_FILE} (the projector), neither there nor in a folder inside.")
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise ConfigError(
            f"{path} holds {len(found)} trained folders ({names}). Give one of them as the path; the pieces beside it "
            "are found."
        )
    return found[0]


def _adapter(trained: Path) -> Path | None:
    """Give the trained folder if it holds a LoRA too; one without its config would not be what was trained."""
    if (trained / ADAPTER_CONFIG).is_file():
        return trained
    if found := next((name for name in ADAPTER_FILES if (trained / name).is_file()), None):
        raise CheckpointError(
            f"{trained}: {found} is there and {ADAPTER_CONFIG} is not, so the LoRA cannot be read. Fetch that file "
            f"too; for the model without its LoRA move {found} elsewhere."
        )
    return None


def _recorded(trained: Path) -> list[Path]:
    """Give the base that a LoRA's config names and what lies beside it, where it is on this machine."""
    name = read_optional_object(trained / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not Path(name).is_absolute() or not Path(name).is_dir():
        return []
    return sorted(entry for entry in Path(name).parent.iterdir() if entry.is_dir())


def _save_together(llm: Path, model: Any) -> None:
    """Let `save_pretrained` of a network with a LoRA write the projector too, and where the LLM is."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(llm.resolve())
    model.save_pretrained = partial(_save_lora_and_projector, model)


def _save_lora_and_projector(model: Any, save_directory: str | Path, **options: Any) -> None:
    # peft would look for the base's config on the hub, to see whether its embeddings grew.
    type(model).save_pretrained(model, str(save_directory), **{"save_embedding_layers": False, **options})
    _save_projector(model.get_base_model(), Path(save_directory))


def _save_projector(network: Any, folder: Path) -> None:
    stored = {key: value.detach().cpu().clone() for key, value in network.projector.state_dict().items()}
    torch.save(stored, folder / PROJECTOR_FILE)


def _piece(
    name: str, path: Path, pieces: Mapping[str, Path], places: Iterable[Iterable[Path]], *model_types: str
) -> Path:
    """Give the folder of a piece: the named one, or the one in the first of `places` that has any whose config.json is
    of the model_type."""
    here: list[Path] = []
    for folders in places:
        if name not in pieces and not here:
            here = [
                folder
                for folder in folders
                if read_optional_object(folder / "config.json").get("model_type") in model_types
            ]
    folder = find_piece(name, path, pieces, here)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{name}={str(folder)!r} has no config.json; give the folder of the released {name}.")
    found = read_object(folder / "config.json").get("model_type")
    if found not in model_types:
        raise ConfigError(f"{folder}: config.json says model_type {found!r}; {name} takes {' or '.join(model_types)}.")
    return folder


def _vision_fields(folder: Path, tensors: TensorMap) -> dict[str, Any]:
    """Give the tower's config; sizes that the file leaves out are CLIP's defaults."""
    from transformers import CLIPVisionConfig

    config = read_object(folder / "config.json")
    fields = config.get("vision_config", config if config.get("model_type") == "clip_vision_model" else None)
    if not isinstance(fields, dict):
        raise ConfigError(f"{folder / 'config.json'}: has no vision_config; give the folder of a CLIP model.")
    if f"{_IN_CLIP}.embeddings.class_embedding" not in tensors:
        raise CheckpointError(f"{folder}: its weights hold no vision_model; fetch the released CLIP folder again.")
    known = CLIPVisionConfig(**{key: value for key, value in fields.items() if key != "model_type"}).to_dict()
    names = (*CLIPVisionConfig.__annotations__, "model_type")
    return {name: known[name] for name in names if name in known}


def _token_fields(llm: Path) -> dict[str, Any]:
    """Give the special ids, which follow from the number of ranks."""
    tokenizer = load_qwen_tokenizer(llm)
    ids = special_ids(tokenizer)
    return {
        "image_token_id": ids.image,
        "pad_token_id": ids.end_of_text,
        "eos_token_id": list(ids.stop),
        "num_token_ids": len(tokenizer),
    }


def _pixel_fields(folder: Path) -> dict[str, Any]:
    """Give what preprocessor_config.json says of pixels; its sizes are whole numbers or dicts."""
    fields = read_optional_object(folder / "preprocessor_config.json")
    found: dict[str, Any] = {name: fields[name] for name in ("image_mean", "image_std") if name in fields}
    size = fields.get("size")
    size = size.get("shortest_edge") if isinstance(size, dict) else size
    if isinstance(size, int):
        found["shortest_edge"] = size
    if fields.get("resample", 3) != 3:
        raise ConfigError(f"{folder}: preprocessor_config.json says resample {fields['resample']!r}, not 3 (bicubic).")
    return found
