"""LAVIS's one-liners: a registered model by name and type, with its processors.

`lavish.models` gives these names on first use. Source: salesforce/LAVIS, lavis/models/__init__.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lavish.common.config import load_yaml
from lavish.common.errors import ConfigError, shown
from lavish.common.registry import registry
from lavish.models.base_model import BaseModel
from lavish.processors.base_processor import BaseProcessor

SPLITS = ("train", "eval")


def load_model(
    name: str,
    model_type: str,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    config: Any = None,
    **options: Any,
) -> Any:
    """Load a registered model.

    Args:
        name: as `lavish.common.registry.registry.list_models()` gives it, `"blip_caption"`.
        model_type: of the model, `"base_coco"`.
        is_eval: switch dropout off; otherwise the model is ready to be trained.
        device: where to put it, or "auto".
        checkpoint: a file, folder or URL in place of the released weights, which are fetched to the cache otherwise.
        config: fields that no file records; see the model's `from_pretrained`.
        options: more of what its `from_pretrained` takes, such as `tokenizer=` of BLIP.

    Raises:
        ConfigError: no such model, type or device, or a wrong config.
        CheckpointError: weights that are absent, damaged or do not fit.
    """
    from lavish.checkpoints.placement import resolve_device  # only a call pays for torch

    if not isinstance(is_eval, bool):
        raise ConfigError(f"is_eval is True or False, not {shown(is_eval)}.")
    target = resolve_device(device)
    model = _model_class(name).from_pretrained(model_type, checkpoint=checkpoint, config=config, **options)
    if target.type == "cpu":
        model = model.float()
    return model.to(target).train(not is_eval)


def load_preprocess(config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the processors of a `preprocess` section: those of pictures and those of texts, by "train" and "eval".

    What the section leaves out is the identity.

    Raises:
        ConfigError: no such processor, or a wrong setting.
    """
    section = config or {}
    pictures, texts = (_processors(section.get(kind)) for kind in ("vis_processor", "text_processor"))
    return pictures, texts


def load_model_and_preprocess(
    name: str,
    model_type: str,
    is_eval: bool = False,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    config: Any = None,
    **options: Any,
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Load a registered model as `load_model`, and the processors that its type's YAML names.

    Pictures come out in the model's own size, also where `config` or the checkpoint has another than the YAML.

    Raises:
        ConfigError, CheckpointError: as `load_model`.
    """
    model = load_model(name, model_type, is_eval, device, checkpoint, config, **options)
    section = load_yaml(_model_class(name).default_config_path(model_type)).get("preprocess") or {}
    for settings in (one for splits in section.values() for one in (splits or {}).values()):
        settings.update({name: value for name, value in model.processor_settings.items() if name in settings})
    return model, *load_preprocess(section)


def _model_class(name: str) -> Any:
    model_class = registry.get_model_class(name)
    if not issubclass(model_class, BaseModel):
        raise ConfigError(
            f"{name!r} is a network without LAVIS's interface of samples; load it with lavish.load(folder or hub id)."
        )
    return model_class


def _processors(section: Any) -> dict[str, Any]:
    if section is not None and not isinstance(section, Mapping):
        raise ConfigError(f"preprocess: {shown(section)} where 'train' and 'eval' are expected.")
    made: dict[str, Any] = {}
    for split in SPLITS:
        settings = (section or {}).get(split)
        if settings is None:
            made[split] = BaseProcessor()
        elif isinstance(settings, Mapping) and settings.get("name"):
            made[split] = registry.get_processor_class(settings["name"]).from_config(settings)
        else:
            raise ConfigError(f"preprocess: {split} is {shown(settings)} and needs the 'name' of a processor.")
    return made
