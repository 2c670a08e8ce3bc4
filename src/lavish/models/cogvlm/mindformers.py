"""The YAML of a MindFormers run of CogVLM2: what of it says something here, what does not and why, what contradicts.

Every key is in one of the tables: `FIELDS` (config), `GENERATION`, `NEEDED` (values that are the only ones), `LEFT_OUT`
(with the reason), or is read by name in `read_recipe`. Source: mindspore-lab/mindformers (v1.5.0), configs/cogvlm2/*.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from lavish.common.errors import ConfigError, shown
from lavish.models.cogvlm.manifest import VIDEO_FRAMES
from lavish.models.cogvlm.mindspore_config import VIDEO_CONTEXT

_MODEL = "model.model_config."
_VISION, _LLM = f"{_MODEL}vision_model.model_config.", f"{_MODEL}llm_model.model_config."
_TEMPLATE = "processor.model_transform_template."
ARCHITECTURES = {"CogVLM2ImageForCausalLM": False, "CogVLM2ForCausalLM": True}
"""MindFormers' classes; True: of the video model."""

FIELDS = {
    f"{_LLM}hidden_size": "hidden_size",
    f"{_LLM}num_layers": "num_hidden_layers",
    f"{_LLM}num_heads": "num_attention_heads",
    f"{_LLM}n_kv_heads": "num_multi_query_heads",
    f"{_LLM}vocab_size": "vocab_size",
    f"{_LLM}intermediate_size": "intermediate_size",
    f"{_LLM}rms_norm_eps": "rms_norm_eps",
    f"{_LLM}max_position_embedding": "max_position_embeddings",
    f"{_LLM}theta": "rope_theta",
    f"{_LLM}bos_token_id": "bos_token_id",
    f"{_LLM}eos_token_id": "eos_token_id",
    f"{_LLM}pad_token_id": "pad_token_id",
    f"{_VISION}image_size": "vision_config.image_size",
    f"{_VISION}patch_size": "vision_config.patch_size",
    f"{_VISION}hidden_size": "vision_config.hidden_size",
    f"{_VISION}num_hidden_layers": "vision_config.num_hidden_layers",
    f"{_VISION}num_attention_heads": "vision_config.num_heads",
    f"{_VISION}intermediate_size": "vision_config.intermediate_size",
    f"{_VISION}layer_norm_eps": "vision_config.layer_norm_eps",
    f"{_TEMPLATE}signal_type": "template_version",
}
"""Key of the YAML -> field of config.json."""
_INTEGERS = ("_size", "_layers", "_heads", "_embeddings", "_id")
"""Endings of fields that hold whole numbers."""
GENERATION = {
    f"{_LLM}do_sample": "do_sample",
    f"{_LLM}temperature": "temperature",
    f"{_LLM}top_k": "top_k",
    f"{_LLM}top_p": "top_p",
    f"{_LLM}repetition_penalty": "repetition_penalty",
    f"{_LLM}max_decode_length": "max_length",
    f"{_LLM}max_new_tokens": "max_new_tokens",
    "seed": "seed",
}
"""Key of the YAML -> option of an answer."""
NEEDED: dict[str, tuple[Any, ...]] = {
    "run_mode": ("predict",),
    "model.model_config.type": ("CogVLM2Config",),
    f"{_MODEL}vision_model.arch.type": ("EVAModel",),
    f"{_MODEL}llm_model.arch.type": ("LlamaForCausalLMForCogVLM2Image", "CogVLM2VideoLM"),
    f"{_LLM}scaling_factor": (1.0,),
    f"{_LLM}extend_method": ("None", None),
    f"{_LLM}offset": (0,),
    f"{_VISION}use_abs_pos_emb": (True,),
    f"{_VISION}use_rot_pos_emb": (False,),
    f"{_VISION}use_qkv_fused": (True,),
    f"{_VISION}use_qkv_simple": (True,),
    f"{_VISION}use_swiglu": (False,),
    f"{_VISION}use_scale_mlp": (False,),
    f"{_VISION}use_post_norm": (True,),
    f"{_VISION}use_attn_norm": (False,),
    f"{_VISION}post_norm": (True,),
    f"{_VISION}class_token": (True,),
    f"{_VISION}with_cls_token": (False,),
    "parallel_config.pipeline_stage": (1,),
}
"""Key of the YAML -> values that a CogVLM2 here has; another one is an error."""

_DEVICE = "settings of MindSpore and its devices; --device says where lavish computes"
_TRAINING = "of training; nothing is trained here"
_FOLDERS = "lavish writes no files when it answers"
_DTYPE = "weights keep the dtype that they are stored in; --dtype says another"
_PADDING = "nothing is padded and no prompt is cut: the context is max_position_embedding"
_CACHE = "the cache grows with the answer"
LEFT_OUT = {
    f"{_LLM}rotary_dtype": "the rotary table is always float32: in bfloat16 position 257 would be position 256",
    f"{_LLM}seq_length": _PADDING,
    f"{_MODEL}seq_length": _PADDING,
    "processor.max_length": _PADDING,
    f"{_TEMPLATE}pad_length": _PADDING,
    f"{_TEMPLATE}pos_pad_length": _PADDING,
    "*.tokenizer.max_length": _PADDING,
    f"{_MODEL}use_past": _CACHE,
    f"{_MODEL}is_dynamic": _CACHE,
    f"{_MODEL}block_size": _CACHE,
    f"{_MODEL}num_blocks": _CACHE,
    f"{_MODEL}batch_size": "one question is one row",
    f"{_LLM}batch_size": "one question is one row",
    f"{_MODEL}num_queries": "follows from image and patch size",
    f"{_LLM}*_type": _DTYPE,
    f"{_LLM}*_dtype": _DTYPE,
    f"{_VISION}*_type": _DTYPE,
    f"{_VISION}*_dtype": _DTYPE,
    f"{_LLM}use_flash_attention": "attention is torch's, which chooses its kernel",
    f"{_LLM}fine_grain_interleave": _DEVICE,
    f"{_LLM}ignore_token_id": _TRAINING,
    f"{_MODEL}*.type": "names of classes of MindFormers",
    f"{_TEMPLATE}type": "names of classes of MindFormers",
    "processor.type": "names of classes of MindFormers",
    "*.tokenizer.type": "names of classes of MindFormers",
    "*.tokenizer.pad_token": "pad_token_id says it",
    "*.tokenizer.add_bos_token": "the template sets the begin token",
    "*.tokenizer.add_eos_token": "the template sets the end token",
    f"{_TEMPLATE}output_columns": "columns of MindFormers' data sets",
    f"{_TEMPLATE}vstack_columns": "columns of MindFormers' data sets",
    f"{_TEMPLATE}max_num_frames": "a CogVLM2-Video sees up to 24 frames, as its release",
    "output_dir": _FOLDERS,
    "src_strategy_path_or_dir": "the strategy of ranks is looked for in their folder and in `strategy` beside it",
    "auto_trans_ckpt": "ranks are merged and cut while they are loaded",
    "load_ckpt_format": "the file's first bytes tell its format",
    "only_save_strategy": _TRAINING,
    "resume_training": _TRAINING,
    "runner_config.*": _TRAINING,
    "runner_wrapper.*": _TRAINING,
    "callbacks*": _TRAINING,
    "optimizer.*": _TRAINING,
    "lr_schedule.*": _TRAINING,
    "layer_scale": _TRAINING,
    "layer_decay": _TRAINING,
    "lr_scale*": _TRAINING,
    "train_dataset*": _TRAINING,
    "eval_dataset*": _TRAINING,
    "eval_callbacks*": _TRAINING,
    "do_eval": _TRAINING,
    "metric*": _TRAINING,
    "recompute_config.*": _TRAINING,
    "micro_batch_interleave_num": _TRAINING,
    "trainer.*": "names of classes of MindFormers",
    "parallel_config.data_parallel": "one question is answered by one model",
    "parallel_config.*": _TRAINING,
    "parallel.*": _DEVICE,
    "context.*": _DEVICE,
    "moe_config.*": "CogVLM2's experts are chosen by the kind of token, not by a router",
    "profile*": _DEVICE,
    "init_start_profile": _DEVICE,
    "remote_save_url": _FOLDERS,
    "auto_tune": _DEVICE,
    "filepath_prefix": _FOLDERS,
    "autotune_per_step": _DEVICE,
}
"""Pattern of keys of the YAML -> why they have no meaning here."""
_PLACES = ("model.tokenizer.", "model.model_config.tokenizer.", "processor.tokenizer.")
"""Where the tokenizer stands: the model card's examples have it under `model`, the YAML files under `processor`."""
UNKNOWN = "lavish does not know this key"


@dataclass(frozen=True)
class Recipe:
    """What a YAML of MindFormers says, in lavish's words."""

    fields: dict[str, Any]
    """As overrides of a config.json, `vision_config` nested."""
    generation: dict[str, Any]
    """Options of an answer that it sets."""
    tokenizer: str | None
    """Its `vocab_file`."""
    checkpoint: str | None
    model_parallel: int
    is_video: bool
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """Keys that have no meaning here, and why."""
    warnings: list[str] = field(default_factory=list)


def read_recipe(content: Mapping[str, Any], where: str) -> Recipe:
    """Sort the keys of a YAML into what says something, what does not, and what contradicts.

    Raises:
        ConfigError: a value that no CogVLM2 here has, a key of the wrong kind, or two that contradict each other.
    """
    keys = dict(flattened(content))
    name = keys.get("model.arch.type")
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"{where}: model.arch.type is {shown(name)}; of MindFormers' models lavish knows "
            f"{' and '.join(ARCHITECTURES)}."
        )
    is_video = ARCHITECTURES[name]
    for key, values in NEEDED.items():
        if key in keys and keys[key] not in values:
            raise ConfigError(
                f"{where}: {key} is {shown(keys[key])}, and a CogVLM2 here has {' or '.join(map(repr, values))}. "
                "Correct the file, or take that line out."
            )
    fields = _fields(keys, where)
    _check_queries(keys, fields, where)
    if is_video:
        fields["max_frames"] = VIDEO_FRAMES
        fields.setdefault("max_position_embeddings", VIDEO_CONTEXT)
    generation = {option: keys[key] for key, option in GENERATION.items() if keys.get(key) is not None}
    warnings: list[str] = []
    tokenizer = _tokenizer(keys, where, warnings)
    is_parallel = keys.get("use_parallel") in (True, "True")
    left_out = [(key, reason) for key in keys if (reason := _why(key, is_parallel=is_parallel)) is not None]
    return Recipe(
        fields=fields,
        generation=generation,
        tokenizer=tokenizer,
        checkpoint=str(keys["load_checkpoint"]) if keys.get("load_checkpoint") else None,
        model_parallel=_whole("parallel_config.model_parallel", keys, where) if is_parallel else 1,
        is_video=is_video,
        left_out=left_out,
        warnings=warnings,
    )


def flattened(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give dotted keys and values; lists stay as they are."""
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def is_known(key: str) -> bool:
    """Tell whether a dotted key is in one of the tables."""
    return _why(key, is_parallel=True) != UNKNOWN


def known_keys() -> list[str]:
    """Give the keys that say something, to suggest one."""
    return [*FIELDS, *GENERATION, *NEEDED, *(key for key in LEFT_OUT if "*" not in key)]


def _why(key: str, *, is_parallel: bool) -> str | None:
    """Say why a key has no meaning here; None for one that has."""
    if key in FIELDS or key in GENERATION or key in NEEDED or key == "model.arch.type":
        return None
    if key in ("load_checkpoint", "use_parallel") or key in [f"{place}vocab_file" for place in _PLACES]:
        return None
    if key == "parallel_config.model_parallel":
        return None if is_parallel else "use_parallel is False; --model-parallel N shares the model among N processes"
    return next((why for pattern, why in LEFT_OUT.items() if fnmatchcase(key, pattern)), UNKNOWN)


def _fields(keys: Mapping[str, Any], where: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    vision: dict[str, Any] = {}
    for key, name in FIELDS.items():
        value = keys.get(key)
        if value is None:
            continue
        outer, _, inner = name.rpartition(".")
        if inner.endswith(_INTEGERS):
            value = value if isinstance(value, list) and inner == "eos_token_id" else _whole(key, keys, where)
        elif inner.endswith(("_eps", "_theta")):
            value = _number(key, value, where)
        (vision if outer else fields)[inner] = value
    if vision:
        fields["vision_config"] = vision
    return fields


def _whole(key: str, keys: Mapping[str, Any], where: str) -> int:
    value = keys.get(key, 1)
    try:
        found = int(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise ConfigError(f"{where}: {key} is {shown(value)} and must be a whole number.")
    return found


def _number(key: str, value: Any, where: str) -> float:
    """Read a number; YAML takes `1e-6`, which has no point, for a text."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {key} is {shown(value)} and must be a number.") from error


def _check_queries(keys: Mapping[str, Any], fields: Mapping[str, Any], where: str) -> None:
    """Check the slots of a frame, which MindFormers says apart, against the sizes that they follow from."""
    vision = fields.get("vision_config", {})
    if (
        f"{_MODEL}num_queries" not in keys
        or not {"image_size", "patch_size"} <= vision.keys()
        or not vision["patch_size"]
    ):
        return
    slots = (vision["image_size"] // vision["patch_size"] // 2) ** 2 + 2
    if keys[f"{_MODEL}num_queries"] != slots:
        raise ConfigError(
            f"{where}: {_MODEL}num_queries is {shown(keys[f'{_MODEL}num_queries'])}, and a picture of "
            f"{vision['image_size']} pixels in patches of {vision['patch_size']} takes {slots} slots."
        )


def _tokenizer(keys: Mapping[str, Any], where: str, warnings: list[str]) -> str | None:
    found = {place: str(keys[f"{place}vocab_file"]) for place in _PLACES if keys.get(f"{place}vocab_file")}
    if len(set(found.values())) > 1:
        named = " and ".join(f"{place}vocab_file={path}" for place, path in found.items())
        raise ConfigError(f"{where}: two tokenizers: {named}. Leave one of them.")
    if found and "processor.tokenizer." not in found:
        warnings.append(f"{next(iter(found))}vocab_file: MindFormers reads the tokenizer under processor; taken here.")
    return next(iter(found.values()), None)
