"""The config of a CogVLM2 in MindSpore's files, which hold none: from a config.json beside them, else from shapes.

Source of what shapes do not say: mindspore-lab/mindformers (v1.5.0), configs/cogvlm2/*.yaml, which give the release's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavish.checkpoints.json_file import read_object
from lavish.checkpoints.tensor_map import Stored
from lavish.common.errors import ConfigError
from lavish.models.cogvlm.manifest import VIDEO_ARCHITECTURE, VIDEO_FRAMES

IMAGE_ARCHITECTURE = "CogVLMForCausalLM"
ROPE_THETA = 500000.0
CONTEXT, VIDEO_CONTEXT = 8192, 2048
RELEASED_WIDTH, RELEASED_HEAD_DIM = 4096, 128
RELEASED_TOWER_WIDTH, RELEASED_TOWER_HEADS = 1792, 16
RELEASED_VOCABULARY = 128256
TOKEN_IDS = {"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128002}
"""Of the released vocabulary; of another one the ids are not known."""


def config_fields(path: Path, infos: Mapping[str, Stored], freqs: Stored | None) -> dict[str, Any]:
    """Give the fields of a config.json, as far as they are known; `lavish.load(config=...)` may say the others.

    Args:
        path: the checkpoint, a file or a folder.
        infos: its tensors under the release's names.
        freqs: its rotary table, whose length says how wide a head is.
    Raises:
        ConfigError: the config.json beside it is of another model.
    """
    fields = _of_shapes(infos, freqs)
    beside = (path if path.is_dir() else path.parent) / "config.json"
    if beside.is_file():
        fields = _merged(fields, _read(beside))
    return {**fields, "rope": "float32"}


def _read(file: Path) -> dict[str, Any]:
    fields = read_object(file)
    architectures = fields.get("architectures") or []
    known = (IMAGE_ARCHITECTURE, VIDEO_ARCHITECTURE)
    if fields.get("model_type") != "cogvlm" and not any(name in known for name in architectures):
        raise ConfigError(
            f"{file} is of another model (architectures {architectures!r}), and the checkpoint beside it is a CogVLM2. "
            "Move one of them into a folder of its own."
        )
    return fields


def _merged(fields: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    vision = given.get("vision_config")
    nested = {**fields["vision_config"], **vision} if isinstance(vision, dict) else fields["vision_config"]
    return {**fields, **given, "vision_config": nested}


def _of_shapes(infos: Mapping[str, Stored], freqs: Stored | None) -> dict[str, Any]:
    """Give what the shapes say, and of the released sizes what goes with them."""
    is_video = not any("vision_expert_" in name for name in infos)
    vocab_size, hidden_size = _shape(infos, "model.embed_tokens.weight", 2)
    (intermediate_size, _) = _shape(infos, "model.layers.0.mlp.language_mlp.gate_proj.weight", 2)
    fields: dict[str, Any] = {
        "architectures": [VIDEO_ARCHITECTURE if is_video else IMAGE_ARCHITECTURE],
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": _count(infos, "model.layers."),
        **_heads(infos, hidden_size, freqs),
        "max_position_embeddings": VIDEO_CONTEXT if is_video else CONTEXT,
        "rope_theta": ROPE_THETA,
        "template_version": "chat",
        "vision_config": _tower(infos),
    }
    if is_video:
        fields["max_frames"] = VIDEO_FRAMES
    ids = TOKEN_IDS if vocab_size == RELEASED_VOCABULARY else dict.fromkeys(TOKEN_IDS)
    return {name: value for name, value in {**fields, **ids}.items() if value is not None or name in ids}


def _heads(infos: Mapping[str, Stored], hidden_size: int | None, freqs: Stored | None) -> dict[str, Any]:
    """Give the number of heads, by the width of one: twice the rotary table's length."""
    (rows, _) = _shape(infos, "model.layers.0.self_attn.language_expert_query_key_value.weight", 2)
    head_dim = RELEASED_HEAD_DIM if hidden_size == RELEASED_WIDTH else None
    if freqs is not None and freqs.numel > 0:
        head_dim = 2 * freqs.numel
    if hidden_size is None or rows is None or head_dim is None or hidden_size % head_dim:
        return {}
    return {
        "num_attention_heads": hidden_size // head_dim,
        "num_multi_query_heads": max((rows - hidden_size) // (2 * head_dim), 1),
    }


def _tower(infos: Mapping[str, Stored]) -> dict[str, Any]:
    prefix = "model.vision.patch_embedding."
    width, channels, patch_size, _ = _shape(infos, f"{prefix}proj.weight", 4)
    positions, _ = _shape(infos, f"{prefix}position_embedding.weight", 2)
    inner, _ = _shape(infos, "model.vision.transformer.layers.0.mlp.fc1.weight", 2)
    side = math.isqrt(max((positions or 1) - 1, 0))
    fields = {
        "hidden_size": width,
        "in_channels": channels,
        "patch_size": patch_size,
        "num_positions": positions,
        "image_size": None if patch_size is None else side * patch_size,
        "intermediate_size": inner,
        "num_hidden_layers": _count(infos, "model.vision.transformer.layers."),
        "num_heads": RELEASED_TOWER_HEADS if width == RELEASED_TOWER_WIDTH else None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _shape(infos: Mapping[str, Stored], name: str, axes: int) -> tuple[int | None, ...]:
    """Give the sizes of a tensor; None for each where it is absent or has another number of them (loading says so)."""
    shape = infos[name].shape if name in infos else ()
    return shape if len(shape) == axes else (None,) * axes


def _count(infos: Mapping[str, Stored], prefix: str) -> int | None:
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in infos if name.startswith(prefix)}
    return len(numbers) or None
