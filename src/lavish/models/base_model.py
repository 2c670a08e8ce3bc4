"""The registered models of LAVIS: a network and its processors behind one interface of sample dicts.

A subclass gives `PRETRAINED_MODEL_CONFIG_DICT` (model type -> YAML, relative to the package), `from_config(cfg)` of the
YAML's `model` section, and `forward(samples)` with a `loss`. It may inherit from a transformers class as well. Source:
salesforce/LAVIS, lavis/models/base_model.py. Unlike there, loading a checkpoint is strict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lavish.checkpoints import lavis
from lavish.checkpoints.download import fetch, is_url
from lavish.checkpoints.loading import load_into
from lavish.checkpoints.rules import Rule
from lavish.common.config import find_default, load_yaml, merge
from lavish.common.errors import ConfigError, did_you_mean, shown
from lavish.common.registry import registry


class BaseModel(nn.Module):
    """Base of the models that `lavish.models.load_model` gives."""

    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {}
    """Model type -> default YAML."""

    @classmethod
    def default_config_path(cls, model_type: str) -> Path:
        """Give the YAML of a model type; a relative path stands in the package, or beside the class's module.

        Raises:
            ConfigError: the class has no such type.
        """
        if model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
            known = ", ".join(cls.PRETRAINED_MODEL_CONFIG_DICT) or "none"
            hint = did_you_mean(str(model_type), cls.PRETRAINED_MODEL_CONFIG_DICT)
            raise ConfigError(f"{cls.__name__} has no model type {model_type!r}.{hint} Known: {known}.")
        return find_default(cls.PRETRAINED_MODEL_CONFIG_DICT[model_type], cls)

    @classmethod
    def check_config(cls, cfg: Mapping[str, Any]) -> None:
        """Check a `model` section before anything is fetched or built; nothing, unless a model knows more.

        Raises:
            ConfigError: an unknown key or a wrong value.
        """

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> BaseModel:
        """Make the model of a `model` section, weights included where it names some."""
        raise NotImplementedError(f"{cls.__name__} does not say how it is made of a config; override from_config(cfg).")

    @classmethod
    def from_pretrained(
        cls, model_type: str, *, checkpoint: str | Path | None = None, config: Any = None, **options: Any
    ) -> BaseModel:
        """Make the model of a type: its YAML, then `checkpoint` (a path or URL) in place of the released weights.

        Args:
            model_type: a key of `PRETRAINED_MODEL_CONFIG_DICT`.
            checkpoint: weights to load; then none of those that the YAML names are.
            config: keys of the `model` section to replace, as a mapping or a YAML file.
            options: more keys of the `model` section (`llm_device_map="cpu"`).

        Raises:
            ConfigError: no such type, or a wrong config.
            CheckpointError: the weights are absent, damaged, or do not fit.
        """
        section = model_section(cls.default_config_path(model_type), config, options)
        if checkpoint is None:
            return cls.from_config(section)
        model = cls.from_config({**section, "load_finetuned": False, "load_pretrained": False})
        model.load_checkpoint(checkpoint)
        return model

    def load_checkpoint(self, url_or_filename: str | Path) -> None:
        """Load a `.pth` file of this class, strictly; the weights keep their device and dtype.

        Raises:
            CheckpointError: absent, damaged, or tensors that are missing, unexpected or of another shape.
        """
        tensors = lavis.read(local_file(url_or_filename))
        first = next(self.parameters())
        load_into(self, tensors, dtype=first.dtype, device=first.device)

    def forward(self, samples: Mapping[str, Any]) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Give the losses of a batch of samples: a mapping with `loss`."""
        raise NotImplementedError(f"{type(self).__name__} cannot be trained; override forward(samples).")

    def extract_features(self, samples: Mapping[str, Any], mode: str = "multimodal") -> Any:
        """Give the features of a batch of samples."""
        raise NotImplementedError(f"{type(self).__name__} gives no features; use 'blip_feature_extractor'.")

    @property
    def image_size(self) -> int | None:
        """Side of the pictures it takes, in pixels; None where it takes none, or leaves that to its processors."""
        return None

    @property
    def processor_settings(self) -> dict[str, Any]:
        """What the loaded model knows better than the YAML of its processors, by the settings' names there."""
        return {} if self.image_size is None else {"image_size": self.image_size}

    @property
    def release_rules(self) -> Sequence[Rule] | None:
        """Rules from the release's tensors to those of `self.network`, by which a run's checkpoints get the release's
        names; None: they have the model's own."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def show_n_params(self, return_str: bool = True) -> str | int:
        """Count the parameters, each tied one once: `"224.0M"`, or the number itself."""
        total = sum(parameter.numel() for parameter in self.parameters())
        if not return_str:
            return total
        return f"{total / 1e6:.1f}M" if total >= 1e6 else f"{total / 1e3:.1f}K"

    def save_trained(self, folder: Path) -> None:
        """Write what a finished run leaves besides its checkpoints; nothing, unless a model knows more."""

    def before_evaluation(self, **kwargs: Any) -> None:
        """Do what an evaluation needs first; nothing, unless a model knows more."""

    def get_optimizer_params(self, weight_decay: float, lr_scale: float = 1.0) -> list[dict[str, Any]]:
        """Sort the trainable parameters into groups with and without weight decay, as LAVIS's optimizers take them.

        Vectors and single numbers do not decay. By names LAVIS also spares every parameter that has `bn` or `ln`
        somewhere in its name, as `subnet.weight` has; ours goes by the shape and by `bias` alone.
        """
        decayed, spared = [], []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                is_spared = parameter.ndim < 2 or name.rsplit(".", 1)[-1] == "bias"
                (spared if is_spared else decayed).append(parameter)
        groups = [(decayed, weight_decay), (spared, 0.0)]
        return [
            {"params": params, "weight_decay": float(decay), "lr_scale": lr_scale} for params, decay in groups if params
        ]


def local_file(url_or_filename: str | Path) -> Path:
    """Give the local path of a checkpoint, fetched to the cache if it is a URL."""
    return fetch(str(url_or_filename)) if is_url(url_or_filename) else Path(url_or_filename)


def model_section(path: Path, config: Any = None, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read the `model` section of a default YAML, with what a caller replaces over it, as plain dicts.

    Raises:
        ConfigError: no section there, or a config that is neither a mapping nor a file.
    """
    from omegaconf import OmegaConf

    section = load_yaml(path).get("model")
    if section is None:
        raise ConfigError(f"{path}: has no section 'model'.")
    layers = [section, read_fields(config), options or {}]
    plain = OmegaConf.to_container(merge(*layers), resolve=True)
    return {str(name): value for name, value in plain.items()} if isinstance(plain, dict) else {}


def read_fields(config: Any) -> dict[str, Any]:
    """Give the fields of a mapping, of a JSON or YAML file, or none.

    Raises:
        ConfigError: something else, or a file that cannot be read.
    """
    from omegaconf import Container, OmegaConf

    if config is None:
        return {}
    if isinstance(config, str | Path):
        config = load_yaml(config)
    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, Container) else config
    if not isinstance(plain, Mapping):
        raise ConfigError(f"config= must be a dict of fields or a JSON or YAML file, not {shown(config)}.")
    return {str(name): value for name, value in plain.items()}


def check_model(section: Mapping[str, Any]) -> None:
    """Check the `model` section of a recipe before anything is fetched or built.

    Raises:
        ConfigError: no such model, an unknown key, or a wrong value.
    """
    found = registry.get_model_class(section["arch"])
    if issubclass(found, BaseModel):  # a model of one's own may be any module
        found.check_config(section)
