"""model_config.json of CogVLM v1 in SAT's layout and config.json, both ways; which prompt a SAT checkpoint speaks.

Source: THUDM/CogVLM, utils/models/cogvlm_model.py, utils/utils/language.py (the prompts), basic_demo/cli_demo_sat.py;
THUDM/SwissArmyTransformer, sat/model/base_model.py (model_config.json).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lavish.checkpoints import sat
from lavish.common.errors import ConfigError, UnknownLayout, did_you_mean, shown
from lavish.models.cogvlm import manifest

MODEL_CLASSES = ("CogVLMModel", "FineTuneTrainCogVLMModel", "FineTuneTestCogVLMModel")
ROPE_THETA = 10000.0

# -- model_config.json -------------------------------------------------------------------------------------------------

SIZES = {
    "hidden_size": "hidden_size",
    "inner_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
}
VISION_SIZES = {
    "patch_size": "patch_size",
    "in_channels": "in_channels",
    "max_sequence_length": "num_positions",
    "hidden_size": "hidden_size",
    "inner_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_heads",
}
"""Sizes by SAT's name -> by config.json's."""
FIXED = {"layernorm_order": "pre", "use_bias": False}
VISION_FIXED = {
    "layernorm_order": "post",
    "use_final_layernorm": False,
    "pre_len": 1,
    "post_len": 0,
    "vocab_size": 1,
    "row_parallel_linear_final_bias": False,
}
"""What every CogVLM v1 says: no config.json has it, and another value is another network."""
LAYERNORM_EPSILON, VISION_LAYERNORM_EPSILON = 1e-5, 1e-6
CONTEXT, VICUNA_CONTEXT = 2048, 4096
"""Of the Hugging Face release, and what its Vicuna was trained for; SAT's configs have the second."""
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def config_fields(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Give the fields of a config.json for those of a model_config.json; without `template_version` where none is said.

    Raises:
        UnknownLayout: of another model: CogAgent, CogVLM2, or none of CogVLM's classes.
        ConfigError: a size is absent, or one contradicts another.
    """
    _check_model(fields, where)
    eva = fields.get("eva_args")
    if not isinstance(eva, Mapping):
        raise ConfigError(f"{where}: eva_args is {shown(eva)}; it holds the sizes of the vision tower. Fetch it again.")
    _check_fixed(fields, FIXED, where, "")
    _check_fixed(eva, VISION_FIXED, where, "eva_args.")
    vision = _sizes(eva, VISION_SIZES, where, "eva_args.")
    vision["image_size"] = _image_size(eva.get("image_size"), where)
    vision |= {"layer_norm_eps": eva.get("layernorm_epsilon", VISION_LAYERNORM_EPSILON), "hidden_act": "gelu"}
    num_patches = (vision["image_size"] // vision["patch_size"]) ** 2
    if fields.get("image_length", num_patches) != num_patches:
        raise ConfigError(
            f"{where}: image_length is {shown(fields['image_length'])}, and pictures of {vision['image_size']} pixels "
            f"have {num_patches} patches of {vision['patch_size']}. Fetch it again."
        )
    made: dict[str, Any] = {
        "architectures": ["CogVLMForCausalLM"],
        **_sizes(fields, SIZES, where, ""),
        "rms_norm_eps": fields.get("layernorm_epsilon", LAYERNORM_EPSILON),
        "hidden_act": "silu",
        **{name: fields.get(name, value) for name, value in TOKEN_IDS.items()},
        "vision_config": vision,
    }
    manifest.read_sizes(made, where)  # sizes beyond all measure are refused before anything is counted by them
    version = fields.get("text_processor_version")
    return made if version is None else {**made, "template_version": _template(version, where)}


def sat_fields(fields: Mapping[str, Any], where: str, model_parallel: int = 1) -> dict[str, Any]:
    """Give the fields of a model_config.json for those of a config.json of CogVLM v1.

    Raises:
        ConfigError: of CogVLM2 or CogVLM2-Video, which SAT's layout cannot hold, or a size is absent.
    """
    sizes = manifest.read_sizes(fields, where)
    if sizes.version != 1 or sizes.is_video:
        kind = "CogVLM2-Video" if sizes.is_video else "CogVLM2"
        raise ConfigError(
            f"{where} is of {kind}, whose grouped heads, 2x2 convolution and biases the SAT layout of CogVLM v1 has no "
            "place for. Convert it to hf or mindspore."
        )
    theta = fields.get("rope_theta")
    if theta is not None and theta != ROPE_THETA:
        raise ConfigError(
            f"{where}: rope_theta is {shown(theta)}, and SAT's CogVLM computes with {ROPE_THETA:g} always."
        )
    eos = fields.get("eos_token_id", TOKEN_IDS["eos_token_id"])
    epsilon = fields.get("rms_norm_eps", LAYERNORM_EPSILON)
    return {
        "model_class": "CogVLMModel",
        "tokenizer_type": "vicuna-7b-v1.5",
        **{name: getattr(sizes, ours) for name, ours in SIZES.items()},
        **FIXED,
        **({} if epsilon == LAYERNORM_EPSILON else {"layernorm_epsilon": epsilon}),
        sat.PARALLEL: model_parallel,
        "image_length": sizes.num_patches,
        "eva_args": _eva_args(sizes.vision, fields["vision_config"], model_parallel),
        "bos_token_id": fields.get("bos_token_id", TOKEN_IDS["bos_token_id"]),
        "eos_token_id": eos[0] if isinstance(eos, list) and eos else eos,
        "pad_token_id": fields.get("pad_token_id", TOKEN_IDS["pad_token_id"]),
        "text_processor_version": _version(fields.get("template_version", "chat")),
    }


def _eva_args(sizes: Mapping[str, int], vision: Mapping[str, Any], model_parallel: int) -> dict[str, Any]:
    """Give the tower's part of a model_config.json."""
    return {
        "model_class": "EVA2CLIPModel",
        **{name: sizes[ours] for name, ours in VISION_SIZES.items()},
        **VISION_FIXED,
        "layernorm_epsilon": vision.get("layer_norm_eps", VISION_LAYERNORM_EPSILON),
        sat.PARALLEL: model_parallel,
        "image_size": [sizes["image_size"], sizes["image_size"]],
    }


def _check_model(fields: Mapping[str, Any], where: str) -> None:
    eva = fields.get("eva_args")
    if "cross_image_pix" in fields or (isinstance(eva, Mapping) and "cross_image_pix" in eva):
        raise UnknownLayout(
            f"{where}: has cross_image_pix, so it is CogAgent, which sees a second picture of 1120 pixels. lavish does "
            "not run CogAgent; it reads CogVLM v1 in this layout."
        )
    if any(name in fields for name in ("num_multi_query_heads", "multi_query_group_num")):
        raise UnknownLayout(
            f"{where}: has grouped heads, so it is CogVLM2, whose SAT layout lavish does not read. Give the Hugging "
            "Face release (THUDM/cogvlm2-llama3-chat-19B) or a MindSpore file."
        )
    name = fields.get("model_class")
    if name not in MODEL_CLASSES:
        raise UnknownLayout(
            f"{where}: model_class is {shown(name)}; of SAT's models lavish reads CogVLM v1: "
            f"{', '.join(MODEL_CLASSES)}.{did_you_mean(str(name), MODEL_CLASSES, nearness=0.85)}"
        )


def _check_fixed(fields: Mapping[str, Any], fixed: Mapping[str, Any], where: str, prefix: str) -> None:
    for name, value in fixed.items():
        if fields.get(name, value) != value:
            raise ConfigError(
                f"{where}: {prefix}{name} is {shown(fields[name])} and {value!r} in every CogVLM v1; this is another "
                "network, or the file is damaged."
            )


def _sizes(fields: Mapping[str, Any], names: Mapping[str, str], where: str, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, ours in names.items():
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            what = "absent" if name not in fields else shown(value)
            raise ConfigError(f"{where}: {prefix}{name} is {what} and must be a whole number above 0. Fetch it again.")
        found[ours] = value
    return found


def _image_size(value: Any, where: str) -> int:
    """Give the side of the square picture: SAT writes height and width."""
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or sides[0] != sides[1] or isinstance(sides[0], bool) or not isinstance(sides[0], int):
        raise ConfigError(f"{where}: eva_args.image_size is {shown(value)}; it is [side, side] of a square in pixels.")
    if sides[0] < 1:
        raise ConfigError(f"{where}: eva_args.image_size is {shown(value)} and must be above 0.")
    return sides[0]


# -- prompts -----------------------------------------------------------------------------------------------------------

TEMPLATES = {"chat_old": "chat", "base": "base", "vqa": "vqa", "chat": "inst"}
"""SAT's `--version` -> our template. What SAT calls `chat` is CogAgent's prompt with [INST]."""
TEMPLATES_OF_NAMES = {"grounding": "base", "base": "base", "chat": "chat"}
"""What in a checkpoint's name tells its template: `cogvlm-grounding-generalist-v1.1`, `cogvlm-base-490`."""


def _template(version: Any, where: str) -> str:
    if not isinstance(version, str) or version not in TEMPLATES:
        raise ConfigError(
            f"{where}: text_processor_version is {shown(version)}; it is one of {', '.join(TEMPLATES)}."
            f"{did_you_mean(str(version), TEMPLATES)}"
        )
    return TEMPLATES[version]


def _version(template: Any) -> str:
    """Give SAT's name of a template."""
    return next((version for version, ours in TEMPLATES.items() if ours == template), "chat_old")


def template_of_name(name: str) -> str | None:
    """Give the template of a released checkpoint by its name; None: the name does not tell."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((template for word, template in TEMPLATES_OF_NAMES.items() if word in words), None)


def choose_template(fields: Mapping[str, Any], name: str) -> tuple[str, str | None]:
    """Give the template of a checkpoint, and what is to be said of it: as its config says, else as its name tells,
    else `chat`."""
    if "template_version" in fields:
        return fields["template_version"], None
    if (named := template_of_name(name)) is not None:
        return named, None
    return "chat", (
        f"neither text_processor_version of {sat.CONFIG} nor the folder's name tells the prompt that this model was "
        "trained with; taken: 'chat' (cogvlm-chat). For base and grounding models, and what was trained from them, "
        "give config={'template_version': 'base'}, or chat_template='base' (--template base) in each call."
    )


def context_note(context: int) -> str | None:
    """Say that a context is longer than the Hugging Face release's."""
    if context <= CONTEXT:
        return None
    beyond = " Beyond 4096 not even the Vicuna below it was trained." if context > VICUNA_CONTEXT else ""
    return (
        f"max_sequence_length is {context}, the Hugging Face release says {CONTEXT}; longer prompts are taken.{beyond}"
    )
