"""PEFT adapters on a loaded network: strict, and without running or unpickling anything of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lavish.checkpoints import hf, hub
from lavish.checkpoints.json_file import read_object
from lavish.common.errors import CheckpointError, ConfigError, MissingDependency, MissingKeys, UnexpectedKeys

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def find_base(folder: Path) -> Path:
    """Give the folder of the model that an adapter was trained on, as its adapter_config.json names it: a path, also
    one relative to the adapter's folder, or a hub id.

    Raises:
        ConfigError: it names none, or one that is not there.
    """
    path = folder / ADAPTER_CONFIG
    fields = read_object(path)
    name = fields.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{path}: names no base (base_model_name_or_path); name it with base=...")
    revision = fields.get("revision")
    for place in (folder / name, Path(name).expanduser()):
        if place.is_dir():
            return _checked_base(place.resolve(), folder)
    if name.startswith((".", "/", "~")) or not hub.is_id(name):
        raise ConfigError(
            f"{path}: its base {name!r} is not on this machine, neither there nor beside the adapter. Name the model "
            "that it was trained on with base=..."
        )
    return _checked_base(hub.resolve(name, revision=revision if isinstance(revision, str) else None), folder)


def _checked_base(base: Path, adapter: Path) -> Path:
    if is_adapter(base):
        raise ConfigError(f"{adapter / ADAPTER_CONFIG}: its base {base} is an adapter itself; give base=...")
    return base


def apply_adapter(network: PreTrainedModel, folder: Path, *, is_quantized: bool) -> Any:
    """Put a LoRA adapter on a network, and give the `PeftModel` around it, in evaluation mode.

    Raises:
        ConfigError: an adapter of another kind than LoRA, or on a quantised network.
        CheckpointError: its files are absent or damaged, or its tensors do not fit the network.
        MissingDependency: peft is not installed.
    """
    if is_quantized:
        raise ConfigError(
            "adapter= with quantization= is not possible: merge the adapter, save, and quantise the result."
        )
    try:
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    except ImportError as error:
        raise MissingDependency("adapter= needs peft, which is not installed: pip install 'lavish[train]'.") from error
    config = LoraConfig(**_lora_fields(folder, LoraConfig))
    weights = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder}: no adapter weights; looked for {' and '.join(ADAPTER_FILES)}.")
    tensors = hf.read(weights)
    try:
        model = get_peft_model(network, config)
    except ValueError as error:  # what peft raises when no layer has a name of target_modules
        raise ConfigError(f"{folder}: does not fit this network: {error}") from error
    expected, found = get_peft_model_state_dict(model), dict(tensors)
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise MissingKeys(
            f"{weights}: {len(missing)} of {len(expected)} adapter tensors are absent, first {missing[0]!r}."
        )
    if unexpected:
        raise UnexpectedKeys(f"{weights}: {len(unexpected)} tensors have no place, first {unexpected[0]!r}.")
    for name, value in found.items():
        if value.shape != expected[name].shape:
            raise CheckpointError(f"{weights}: {name!r} is {tuple(value.shape)}, not {tuple(expected[name].shape)}.")
    set_peft_model_state_dict(model, found)
    return model.eval()


def _lora_fields(folder: Path, lora_config: Any) -> dict[str, Any]:
    """Read adapter_config.json; a field that this peft lacks is refused where it says something."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {ADAPTER_CONFIG}; give the folder of a PEFT adapter.")
    fields = read_object(path)
    if fields.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type is {fields.get('peft_type')!r}; lavish loads LORA adapters.")
    unknown = [name for name, value in fields.items() if name not in lora_config.__dataclass_fields__ and value]
    if unknown:
        raise ConfigError(f"{path}: this peft does not know {unknown[0]!r}. Upgrade peft, or remove the field.")
    known = {name: value for name, value in fields.items() if name in lora_config.__dataclass_fields__}
    # auto_mapping names a class to import; the network is already here.
    return {name: value for name, value in known.items() if name not in ("auto_mapping", "inference_mode", "peft_type")}
