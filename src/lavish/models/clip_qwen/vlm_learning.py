"""CLIP + Qwen as its training leaves it: the folders of the decoder and of the tower, and `other_params.bin`.

    Qwen-7B-Chat/               config.json, weights, tokenizer (the name is the one that the config records)
    clip-vit-large-patch14/     config.json, preprocessor_config.json, weights of the tower alone
    checkpoint/other_params.bin     the projector, a flat dict
    config.json                 ours: what none of them says, such as the system prompt

Reading is in `weights.py`. A LoRA is added to the decoder before (`merge_lora`). The decoder's Python files, which the
release's code asks for, are not written. Source: WatchTower-Liu/VLM-learning, trainer.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lavish.checkpoints.json_file import read_optional_object
from lavish.checkpoints.layouts import PROJECTOR_FILE
from lavish.checkpoints.output import Output, TargetOptions, TargetPlan, TensorFile, safetensors_files
from lavish.checkpoints.qwen import released_config, tokenizer_files
from lavish.checkpoints.released import Released, released
from lavish.checkpoints.tensor_map import TensorMap
from lavish.checkpoints.torch_file import TorchZipFormat
from lavish.common.errors import ConfigError, MissingKeys

if TYPE_CHECKING:
    import torch

DECODER, TOWER, TRAINED = "Qwen-7B-Chat", "clip-vit-large-patch14", "checkpoint"
"""Names of the folders; those that the config records count before the first two."""
POST_NORM = "vision_model.post_layernorm"
WHY = "of the class row, which the model does not use; transformers' tower has it"


def plan_target(fields: Mapping[str, Any], tensors: TensorMap, options: TargetOptions) -> TargetPlan:
    """Say how the network is written as the release's folders.

    Raises:
        ConfigError: a section of the config is absent.
        MissingKeys: a folder would have no tensors.
    """
    from lavish.models.clip_qwen.weights import RULES

    where = str(tensors.path)
    vision, text = (_section(fields, name, where) for name in ("vision_config", "text_config"))
    found = released(tensors, RULES, options)
    decoder, tower = _name(fields.get("language_model"), DECODER), _name(fields.get("vision_tower"), TOWER)
    llm, llm_texts = safetensors_files(
        (*_piece(found, "transformer.", "transformer.", where), *_piece(found, "lm_head.", "lm_head.", where)),
        options.max_shard_bytes,
    )
    seen = _piece(found, "vision_tower.", "", where)
    made = _post_norm(seen, vision)
    clip, clip_texts = safetensors_files((*seen, *made), options.max_shard_bytes)
    copies, tokenizer = tokenizer_files(tensors, decoder)
    return TargetPlan(
        files=(
            *(TensorFile(f"{decoder}/{file.name}", file.outputs, file.format) for file in llm),
            *(TensorFile(f"{tower}/{file.name}", file.outputs, file.format) for file in clip),
            TensorFile(f"{TRAINED}/{PROJECTOR_FILE}", _piece(found, "projector.", "", where), TorchZipFormat),
        ),
        texts={
            **{f"{decoder}/{name}": content for name, content in llm_texts.items()},
            **{f"{tower}/{name}": content for name, content in clip_texts.items()},
            **tokenizer,
            "config.json": _json({**fields, "model_type": "clip_qwen"}),
            f"{decoder}/config.json": _json(released_config(text)),
            f"{decoder}/generation_config.json": _json(_answering(fields, tensors)),
            f"{tower}/config.json": _json({**_plain(vision), "architectures": ["CLIPVisionModel"]}),
            f"{tower}/preprocessor_config.json": _json(_pixels(fields, vision)),
        },
        copies=copies,
        dropped=found.dropped,
        made=tuple((output.name, WHY) for output in made),
    )


def _section(fields: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    section = fields.get(name)
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where}: its config lacks {name}, without which the folders cannot be written.")
    return section


def _name(recorded: Any, usual: str) -> str:
    """Give a folder's name: the recorded one, if it is one."""
    is_name = isinstance(recorded, str) and re.fullmatch(r"[\w][\w.+-]{0,99}", recorded) is not None
    return recorded if is_name and recorded != TRAINED else usual


def _piece(found: Released, prefix: str, instead: str, where: str) -> tuple[Output, ...]:
    outputs = found.named(prefix, instead)
    if not outputs:
        raise MissingKeys(f"{where}: has no tensor that a release calls {prefix}*; the folders would not be whole.")
    return outputs


def _post_norm(seen: tuple[Output, ...], vision: Mapping[str, Any]) -> tuple[Output, ...]:
    """Give the norm that the network leaves out, which does nothing."""
    names = {output.name for output in seen}
    width, dtype = vision["hidden_size"], seen[0].dtype

    def filled(value: float) -> torch.Tensor:
        import torch

        return torch.full((width,), value, dtype=getattr(torch, dtype))

    made = {f"{POST_NORM}.weight": lambda: filled(1.0), f"{POST_NORM}.bias": lambda: filled(0.0)}
    return tuple(Output(name, (width,), dtype, make) for name, make in made.items() if name not in names)


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in fields.items() if not name.startswith("_") and name != "dtype"}
    return {**kept, "model_type": "clip_vision_model"}


def _answering(fields: Mapping[str, Any], tensors: TensorMap) -> dict[str, Any]:
    """Give what the decoder's generation_config.json says."""
    known = read_optional_object(tensors.path / "generation_config.json") if tensors.path.is_dir() else {}
    found = {name: value for name, value in known.items() if name != "eos_token_id"}
    for name, place in (("max_window_size", "max_window_tokens"), ("repetition_penalty", "repetition_penalty")):
        if place in fields:
            found[name] = fields[place]
    if "pad_token_id" in fields:
        found |= {"eos_token_id": fields["pad_token_id"], "pad_token_id": fields["pad_token_id"]}
    return {"chat_format": "chatml", **found}


def _pixels(fields: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    from lavish.processors.pixels import CLIP_MEAN, CLIP_STD

    return {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
        "resample": 3,
        "size": fields.get("shortest_edge") or vision["image_size"],
        "crop_size": vision["image_size"],
        "image_mean": list(fields.get("image_mean") or CLIP_MEAN),
        "image_std": list(fields.get("image_std") or CLIP_STD),
    }


def _json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, indent=2, ensure_ascii=False).encode() + b"\n"
