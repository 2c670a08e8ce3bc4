"""Configuration: YAML layers merged by OmegaConf, checked against dataclasses, saved whole.

Weakest layer first: the model's default YAML < the datasets' default YAML < the recipe < dotted overrides. `check`
turns the merged layers into an instance of a dataclass; every unknown key and wrong type is told with its dotted name,
the nearest known one and the layer that it came from. YAML never names Python objects. OmegaConf is imported on first
use.
"""

import json
import os
import re
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lavish.common.errors import ConfigError, did_you_mean, shown
from lavish.common.registry import Registry, registry
from lavish.common.schema import FieldHelp, field_help, help_text, instantiate

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = [
    "Config",
    "FieldHelp",
    "check",
    "field_help",
    "find_default",
    "help_text",
    "label",
    "load_yaml",
    "merge",
    "parse_overrides",
    "save",
    "write_json",
    "write_text",
]

Schema = TypeVar("Schema")
Layer = tuple[str, dict[str, Any]]

PACKAGE = Path(__file__).resolve().parents[1]
SECTIONS = ("model", "preprocess", "datasets", "run")


def load_yaml(path: str | Path) -> "DictConfig":
    """Read a YAML file; an empty one is an empty config.

    Raises: ConfigError when the file is absent, is no YAML, or holds something other than keys and values.
    """
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ConfigError(f"{shown(str(path))}: no such config file (looked in {Path.cwd()}).") from error
    except OSError as error:
        why = error.strerror or error  # an OSError's own text holds the whole path again
        raise ConfigError(f"{shown(str(path))}: the config file cannot be read: {why}.") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:  # ValueError: bytes that are no UTF-8 too
        raise ConfigError(f"{path}: not a YAML file that lavish can read: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: a config holds `key: value` lines at its top level; this file holds a list.")
    return label(loaded, str(path))


def parse_overrides(overrides: Iterable[str]) -> "DictConfig":
    """Read dotted overrides, `["run.max_epoch=3"]` or as LAVIS pairs `["run.max_epoch", "3"]`; values are YAML.

    `stages.0.name=x` or `stages[0].name=x` reaches into a list.

    Raises: ConfigError when an item has no key, no value, or a value that is no YAML.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    items = list(overrides)
    if items and not any("=" in item for item in items[::2]):
        if len(items) % 2:
            raise ConfigError(f"Override {items[-1]!r} has no value; write {items[-1]}=VALUE.")
        items = [f"{key}={value}" for key, value in zip(items[::2], items[1::2], strict=True)]
    layers: list[dict[str, Any]] = []
    for item in items:
        key, equals, value = item.partition("=")
        path = re.sub(r"\[(\d+)\]", r".\1", key.strip()).split(".")
        if not equals or not all(path):
            raise ConfigError(f"Override {item!r} is not of the form section.key=value, for example run.max_epoch=3.")
        try:
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"Override {item!r}: the value is no YAML ({_first_line(error)}).") from error
        nested = parsed["value"]
        for name in reversed(path):
            nested = {name: nested}
        layers.append(nested)
    return label(merge(*layers), "the command line")


def merge(*layers: "DictConfig | Mapping[str, Any]") -> "DictConfig":
    """Layer configs over one another, the strongest last: mappings are merged, everything else is replaced.

    A mapping with the keys "0", "1" ... over a list reaches into the list's items.

    Raises: ConfigError when such a key is no index of the list.
    """
    from omegaconf import OmegaConf

    merged: Any = {}
    named: list[Layer] = []
    for layer in layers:
        plain = _plain(layer)
        merged = _overlay(merged, plain, "")
        named += _layers(layer)
    result = OmegaConf.create(merged)
    object.__setattr__(result, "_lavish_layers", named)
    return result


def label(config: "DictConfig | Mapping[str, Any]", name: str) -> "DictConfig":
    """Give the config with the name of where it came from, which errors of `check` tell."""
    from omegaconf import OmegaConf

    labelled = OmegaConf.create(_plain(config))
    object.__setattr__(labelled, "_lavish_layers", [(name, _plain(config))])
    return labelled


def check(config: "DictConfig | Mapping[str, Any]", schema: type[Schema], section: str = "") -> Schema:
    """Give the instance of the dataclass `schema` that the config describes; absent keys take the defaults.

    Fields may be bool, int, float, str, Path, Enum, Literal, unions of them, lists, tuples, dicts, and dataclasses of
    such fields. A whole number passes for a float, text for a Path or Enum; nothing else is converted. `section` is the
    dotted name of the config in messages.

    Raises: ConfigError that lists every unknown key, wrong type and absent mandatory key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        plain = OmegaConf.to_container(OmegaConf.create(_plain(config)), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = ".".join(part for part in (section, error.full_key) if part) or "The config"
        raise ConfigError(f"{key}: {_first_line(error)}.") from error
    layers = _layers(config)

    def source(key: str) -> str:
        path = key.split(".")
        return next((name for name, values in reversed(layers) if _holds(values, path)), "")

    return instantiate(plain, schema, section, source)  # type: ignore[arg-type]


def save(config: Any, path: str | Path) -> None:
    """Write a config (or a dataclass instance) as YAML with everything resolved, whole or not at all."""
    from omegaconf import OmegaConf

    values = asdict(config) if is_dataclass(config) and not isinstance(config, type) else _plain(config)
    write_text(OmegaConf.to_yaml(OmegaConf.create(values), resolve=True), Path(path))


def write_json(value: Any, path: str | Path) -> None:
    """Write a value as indented JSON, whole or not at all; half a character of a text is escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_text(text.encode("utf-8", "backslashreplace").decode("utf-8"), Path(path))


def write_text(text: str, path: Path) -> None:
    """Write into a temporary file of the same folder and rename it over `path`; the folder is made if it is absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(config: Any) -> Any:
    """Give dicts and lists, interpolations kept."""
    from omegaconf import Container, OmegaConf

    return OmegaConf.to_container(config if isinstance(config, Container) else OmegaConf.create(config), resolve=False)


def _layers(config: Any) -> list[Layer]:
    """Give the labelled layers that a config was merged from; a mapping or a copy made by OmegaConf has none."""
    from omegaconf import Container

    return vars(config).get("_lavish_layers", []) if isinstance(config, Container) else []


def _overlay(base: Any, layer: Any, key: str) -> Any:
    if not isinstance(layer, dict):
        return layer
    if isinstance(base, list) and layer and all(str(name).isdecimal() for name in layer):
        items = list(base)
        for name, value in layer.items():
            if int(name) >= len(items):
                raise ConfigError(f"{key}.{name}: the list has {len(items)} items, the last is {key}.{len(items) - 1}.")
            items[int(name)] = _overlay(items[int(name)], value, f"{key}.{name}")
        return items
    if not isinstance(base, dict):
        return layer
    merged = dict(base)
    for name, value in layer.items():
        merged[name] = _overlay(merged.get(name), value, f"{key}.{name}".lstrip("."))
    return merged


def _holds(values: Any, path: Sequence[str]) -> bool:
    for name in path:
        if isinstance(values, list) and name.isdecimal() and int(name) < len(values):
            values = values[int(name)]
        elif isinstance(values, dict) and name in values:
            values = values[name]
        else:
            return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


class _Arguments(Protocol):
    """The parsed arguments of a LAVIS script."""

    cfg_path: str
    options: list[str] | None


class Config:
    """The merged config of a LAVIS-shaped recipe: sections `model`, `preprocess`, `datasets` and `run`.

    `model.arch` with `model.model_type` picks the model's default YAML (`PRETRAINED_MODEL_CONFIG_DICT` of its class),
    each key of `datasets` its builder's (`DATASET_CONFIG_DICT`, by the section's `type`). Both are looked up after the
    overrides, so that `model.model_type=large_coco` on the command line brings the large model's defaults.
    """

    def __init__(
        self,
        source: "str | Path | Mapping[str, Any] | _Arguments",
        options: Iterable[str] = (),
        *,
        names: Registry = registry,
    ) -> None:
        """`source` is a YAML path, a mapping, or the arguments of a LAVIS script (`cfg_path` and `options`).

        Raises: ConfigError for an unknown section, model, model type or dataset.
        """
        from omegaconf import DictConfig

        if isinstance(source, (str, Path)):
            recipe = load_yaml(source)
        elif isinstance(source, Mapping):
            recipe = label(source, "the given mapping")
        else:
            recipe, options = load_yaml(source.cfg_path), [*(source.options or ()), *options]
        asked = merge(recipe, parse_overrides(options))
        for section in asked:
            if section not in SECTIONS:
                hint = did_you_mean(str(section), SECTIONS)
                raise ConfigError(f"Unknown section {section!r}.{hint} Sections: {', '.join(SECTIONS)}.")
            if asked[section] is not None and not isinstance(asked[section], DictConfig):
                raise ConfigError(f"{section}: {asked[section]!r} where keys and values are expected.")
        self.config = merge(*_model_defaults(asked, names), *_dataset_defaults(asked, names), asked)

    @property
    def model_cfg(self) -> "DictConfig":
        """The section `model`."""
        return self._section("model")

    @property
    def preprocess_cfg(self) -> "DictConfig":
        """The section `preprocess`."""
        return self._section("preprocess")

    @property
    def datasets_cfg(self) -> "DictConfig":
        """The section `datasets`, one key a dataset."""
        return self._section("datasets")

    @property
    def run_cfg(self) -> "DictConfig":
        """The section `run`."""
        return self._section("run")

    def _section(self, name: str) -> "DictConfig":
        from omegaconf import OmegaConf

        if name not in self.config or self.config[name] is None:
            self.config[name] = OmegaConf.create({})
        return self.config[name]

    def check(self, section: str, schema: type[Schema]) -> Schema:
        """Give the instance of the dataclass `schema` that a section describes; see the function `check`."""
        values = self._section(section)
        layers = [(name, layer.get(section)) for name, layer in _layers(self.config)]
        object.__setattr__(values, "_lavish_layers", layers)
        return check(values, schema, section)

    def get_config(self) -> "DictConfig":
        """Give the whole merged config."""
        return self.config

    def to_dict(self) -> dict[str, Any]:
        """Give the whole merged config as dicts and lists, interpolations kept."""
        return _plain(self.config)

    def pretty(self) -> str:
        """Give the whole merged config as YAML, for logging."""
        from omegaconf import OmegaConf

        return OmegaConf.to_yaml(self.config)


def _model_defaults(asked: "DictConfig", names: Registry) -> list["DictConfig"]:
    section = asked.get("model") or {}
    arch, model_type = section.get("arch"), section.get("model_type")
    if arch is None or model_type is None:
        return []
    owner = names.get_model_class(str(arch))
    # Networks alone, as the built-in ones are, have no default files.
    files = getattr(owner, "PRETRAINED_MODEL_CONFIG_DICT", {})
    path = _default_file(owner, files, model_type, f"model.model_type of {arch!r}")
    loaded = load_yaml(path)
    return [label({key: loaded[key] for key in ("model", "preprocess") if key in loaded}, str(path))]


def _dataset_defaults(asked: "DictConfig", names: Registry) -> list["DictConfig"]:
    found: list[DictConfig] = []
    for dataset, section in (asked.get("datasets") or {}).items():
        owner = names.get_builder_class(str(dataset))
        kind = (section or {}).get("type", "default")
        path = _default_file(owner, owner.DATASET_CONFIG_DICT, kind, f"datasets.{dataset}.type")
        values = (load_yaml(path).get("datasets") or {}).get(dataset)
        if values is None:
            raise ConfigError(f"{path}: the default config of dataset {dataset!r} has no section datasets.{dataset}.")
        found.append(label({"datasets": {dataset: values}}, str(path)))
    return found


def _default_file(owner: type, files: Mapping[str, str], name: str, key: str) -> Path:
    """Give the path of a default YAML of a class."""
    if name not in files:
        known = ", ".join(files) or "none"
        raise ConfigError(f"{key} is {name!r}.{did_you_mean(str(name), files)} Known: {known}.")
    return find_default(files[name], owner)


def find_default(path: str, owner: type) -> Path:
    """Give where a class's default YAML is: a relative path stands in lavish's package, else beside the class's module
    or in one of the two folders above it, else in the working folder.
    """
    module = sys.modules.get(owner.__module__)
    file = getattr(module, "__file__", None)  # a module of a notebook has none
    own = [] if file is None else list(Path(file).resolve().parents[:3])
    return next((place / path for place in (PACKAGE, *own, Path.cwd()) if (place / path).is_file()), PACKAGE / path)
