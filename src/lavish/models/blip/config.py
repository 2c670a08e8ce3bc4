"""Configuration of BLIP: transformers' own classes with the values of LAVIS, where transformers has other defaults.

A LAVIS file holds no config: head counts and epsilons come from the model type's YAML or from the caller, sizes may
also be read off the tensors. Traps: transformers' defaults (vision eps 1e-5, 8 text heads, no label smoothing) load
without any error and compute something else. Source: salesforce/LAVIS, lavis/configs/models/{med_config,
med_large_config}.json and blip_*.yaml, lavis/models/{vit,med}.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from transformers import BlipConfig, BlipTextConfig, BlipVisionConfig

from lavish.common.errors import ConfigError, UnknownLayout, did_you_mean, shown

ARCHITECTURES = {
    "blip_caption": "BlipForConditionalGeneration",
    "blip_vqa": "BlipForQuestionAnswering",
    "blip_feature_extractor": "BlipForImageTextRetrieval",
}
"""LAVIS's name of a model, and transformers' of its network."""

LAVIS_VISION = {"patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "drop_path_rate": 0.0}
LAVIS_TEXT = {
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "label_smoothing": 0.1,
}
OWN_VISION_FIELDS = ("drop_path_rate",)
"""Stochastic depth of the last block while training, from 0 in block 0 on; transformers has none."""
SECTIONS = ("vision_config", "text_config")
TOP_LEVEL = (*SECTIONS, "image_text_hidden_size")
MED_NAMES = {"encoder_width": "encoder_hidden_size"}
"""Keys of LAVIS's med_config.json that transformers spells otherwise."""
BERT_ONLY = (
    "architectures",
    "model_type",
    "add_type_embeddings",
    "add_cross_attention",
    "type_vocab_size",
    "fusion_layer",
)
"""Keys of a med_config.json that tell nothing here."""


@dataclass(frozen=True)
class SpecialIds:
    """The ids that a tokenizer gives: `[DEC]` begins an answer, `[SEP]` ends it."""

    bos_token_id: int
    sep_token_id: int
    pad_token_id: int


def check_fields(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Give config fields as nested dicts, after checking their names; a `text_config` may be a med_config of LAVIS.

    Raises:
        ConfigError: a section that is none, or a name that is no field; the nearest is suggested.
    """
    _check_names(fields, TOP_LEVEL, where, "")
    checked: dict[str, Any] = dict(fields)
    for section, known in (("vision_config", vision_fields()), ("text_config", text_fields())):
        if section not in fields:
            continue
        if not isinstance(fields[section], Mapping):
            raise ConfigError(f"{where}: {section} is {shown(fields[section])} and must be an object.")
        given: Mapping[str, Any] = fields[section]
        values = {MED_NAMES.get(name, name): value for name, value in given.items() if name not in BERT_ONLY}
        _check_names(values, known, where, f"{section}.")
        checked[section] = values
    return checked


def tower_of(config: BlipConfig) -> BlipVisionConfig:
    """Give `vision_config`, which is a config as soon as the whole one is made."""
    return cast(BlipVisionConfig, config.vision_config)


def text_of(config: BlipConfig) -> BlipTextConfig:
    """Give `text_config`, as `tower_of`."""
    return cast(BlipTextConfig, config.text_config)


def image_size_of(config: BlipConfig) -> int:
    """Give the picture size of a config that was made here: one whole number, pictures are square."""
    return cast(int, tower_of(config).image_size)


def architecture_in(config: BlipConfig) -> str:
    """Give transformers' name of the network, which every config that was made here holds."""
    return cast(list[str], config.architectures)[0]


def vision_fields() -> tuple[str, ...]:
    """Names of what a `vision_config` may hold."""
    return (*BlipVisionConfig.__dataclass_fields__, *OWN_VISION_FIELDS)


def text_fields() -> tuple[str, ...]:
    """Names of what a `text_config` may hold."""
    return tuple(BlipTextConfig.__dataclass_fields__)


def _check_names(fields: Mapping[str, Any], known: tuple[str, ...], where: str, prefix: str) -> None:
    for name in fields:
        if name not in known:
            raise ConfigError(f"{where}: {prefix}{name} is no field of a BLIP config.{did_you_mean(str(name), known)}")


def read_med_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Give the `text_config` of a LAVIS med_config.json beside a file; ids are the tokenizer's, what BERT alone has is
    left."""
    known = set(text_fields()) - set(SpecialIds.__dataclass_fields__) - set(BERT_ONLY)
    renamed = {MED_NAMES.get(name, name): value for name, value in fields.items()}
    return {name: value for name, value in renamed.items() if name in known}


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Lay configs over one another, the strongest last; sections are merged field by field."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            merged[name] = {**merged.get(name, {}), **value} if name in SECTIONS else value
    return merged


def lavis_config(fields: Mapping[str, Any], ids: SpecialIds, architecture: str, where: str) -> BlipConfig:
    """Make the config of a LAVIS model: the fields over what all of them share.

    Raises:
        ConfigError: sizes that contradict each other, or a field of another type.
    """
    vision = {**LAVIS_VISION, **fields.get("vision_config", {})}
    text = {**LAVIS_TEXT, **vars(ids), **fields.get("text_config", {})}
    given = fields.get("text_config", {})
    for name, value in vars(ids).items():
        if given.get(name, value) != value:
            raise ConfigError(
                f"{where}: text_config.{name} is {given[name]} and the tokenizer's is {value}: the tokenizer belongs "
                "to another model. Name the right one with tokenizer=..."
            )
    return _make({**fields, "vision_config": vision, "text_config": text}, architecture, where)


def read_config(config: Mapping[str, Any], where: str, **overrides: Any) -> BlipConfig:
    """Make the config of a transformers folder's config.json.

    The folder's values stand, also where LAVIS has others: transformers computes with them. `overrides` may be nested.

    Raises:
        UnknownLayout: a config of another model.
        ConfigError: an override that is no field, or sizes that contradict each other.
    """
    architecture = (config.get("architectures") or ["?"])[0]
    if config.get("model_type") != "blip" or architecture not in ARCHITECTURES.values():
        raise UnknownLayout(
            f"{where}: names model_type {config.get('model_type')!r} and architecture {architecture!r}; lavish loads "
            f"BLIP as {', '.join(ARCHITECTURES.values())}."
        )
    own = {
        name: value for name, value in config.items() if name not in ("auto_map", "model_type", "transformers_version")
    }
    return _make(layered(own, check_fields(overrides, "config")), architecture, where)


def _make(fields: Mapping[str, Any], architecture: str, where: str) -> BlipConfig:
    fields = {name: value for name, value in fields.items() if name != "architectures"}
    try:
        config = BlipConfig(**fields, architectures=[architecture])
    except (TypeError, ValueError) as error:  # StrictDataclassFieldValidationError is a ValueError
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
    vision, text = tower_of(config), text_of(config)
    # transformers overwrites encoder_hidden_size with the tower's width, whatever was given.
    wanted = fields["text_config"].get("encoder_hidden_size", vision.hidden_size)
    if wanted != vision.hidden_size:
        raise ConfigError(
            f"{where}: text_config.encoder_hidden_size is {wanted} and the tower's hidden_size is "
            f"{vision.hidden_size}; the text half attends the tower's states, so they are equal."
        )
    for name, section in (("vision_config", vision), ("text_config", text)):
        if section.hidden_size % section.num_attention_heads:
            raise ConfigError(
                f"{where}: {name}: hidden_size {section.hidden_size} does not divide into "
                f"{section.num_attention_heads} heads."
            )
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        raise ConfigError(f"{where}: image_size and patch_size are whole numbers: BLIP's pictures are square.")
    if vision.image_size % vision.patch_size:
        raise ConfigError(f"{where}: image_size {vision.image_size} is no multiple of patch_size {vision.patch_size}.")
    if architecture == "BlipForQuestionAnswering" and vision.hidden_size != text.hidden_size:
        raise ConfigError(
            f"{where}: the answer decoder attends the question's states as wide as the tower's: hidden_size "
            f"{vision.hidden_size} of vision_config and {text.hidden_size} of text_config must be equal."
        )
    return config
