"""PEFT adapters on a loaded network: strict, and without running or unpickling anything of theirs.

Several may be on one network, one of them active; `VLM` has the calls that switch them.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lavish.checkpoints import hf, hub
from lavish.checkpoints.json_file import read_object
from lavish.checkpoints.release import Lora
from lavish.common.errors import (
    CheckpointError,
    ConfigError,
    MissingDependency,
    MissingKeys,
    UnexpectedKeys,
    shown,
)
from lavish.inference.parallel import GatheredLinear, RowwiseLinear
from lavish.nn.int8 import Int8Linear
from lavish.nn.packed import PackedLinear

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
DEFAULT_NAME = "default"
PLAIN_STARTS = ("gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base alone; `pissa`, `olora`, `corda` and `loftq` do not."""

NativeAdapter = Callable[[dict[str, Any], dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]]
"""From the fields and tensors of an adapter as it was released to those that fit lavish's modules."""


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


def apply_adapter(
    network: Any, adapter: Path | Lora, *, name: str = DEFAULT_NAME, native: NativeAdapter | None = None
) -> Any:
    """Put a LoRA adapter on a network, or one more on a `PeftModel`, and give the `PeftModel`, in evaluation mode.

    `adapter` is a folder, or what a release holds in the files of its weights. With a name that is taken or tensors
    that do not fit, the network is left as it was.

    Raises:
        ConfigError: an adapter of another kind than LoRA or for another family, a name that is taken, or a network
            that takes none (packed, or a share of one); on a quantised one, an adapter that reads the base's weights.
        CheckpointError: its files are absent or damaged, or its tensors do not fit the network.
        MissingDependency: peft is not installed.
    """
    _check_network(network)
    try:
        from peft import LoraConfig, PeftModel
    except ImportError as error:
        raise MissingDependency("adapter= needs peft, which is not installed: pip install 'lavish[train]'.") from error
    if not isinstance(name, str) or not name or "." in name:
        raise ConfigError(f"An adapter's name must be a text without a dot, not {shown(name)}.")
    folder = adapter.path if isinstance(adapter, Lora) else adapter
    fields, found, weights = read_adapter(adapter, native)
    config = LoraConfig(**_lora_fields(folder, fields, LoraConfig))
    if is_quantized(network):
        _check_plain(folder, fields)
        config._register_custom_module(layers_over_quantized())
    is_first = not isinstance(network, PeftModel)
    trainable = _trainable(network)
    if not is_first and name in network.peft_config:
        raise ConfigError(f"An adapter {name!r} is on the network already; give the new one another name.")
    try:
        model = _with_layers(network, config, name)
    except ValueError as error:  # what peft raises when no layer has a name of target_modules
        _set_trainable(network, trainable)
        raise ConfigError(
            f"{folder}: does not fit this {_called(network)}, so it is of another family or size: {error}"
        ) from error
    try:
        _fill(model, name, found, weights)
    except CheckpointError:
        if is_first:
            _set_trainable(model.unload(), trainable)
        else:
            model.delete_adapter(name)
        raise
    if is_first:
        vars(model)["trainable_in_base"] = trainable  # kept with what it is true of, until it is unloaded
    # For whoever saves it; not before, peft would look for that model's config on the hub.
    model.peft_config[name].base_model_name_or_path = fields.get("base_model_name_or_path")
    return model.eval()


def _with_layers(network: Any, config: Any, name: str) -> Any:
    """Give the `PeftModel` of a network, or the one that it is, with the layers of one more adapter."""
    from peft import PeftModel, get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type .*Int8Linear")  # `layers_over_quantized` knows it
        # peft 0.21 asks transformers 5.23 whether activations are checkpointed under the attribute's old name; the
        # answer is right, and the user can do nothing about the question.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        if not isinstance(network, PeftModel):
            return get_peft_model(network, config, adapter_name=name)
        network.add_adapter(name, config)
        return network


def read_adapter(adapter: Path | Lora, native: NativeAdapter | None) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Read an adapter's fields and tensors, by the names of our modules where `native` leads to them, and the file.

    Raises:
        ConfigError: no LoRA, or wrong fields. CheckpointError: its files are absent or damaged.
    """
    if isinstance(adapter, Lora):
        return dict(adapter.fields), {output.name: output.make() for output in adapter.tensors}, adapter.path
    fields = read_fields(adapter)
    weights = next((adapter / file for file in ADAPTER_FILES if (adapter / file).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{adapter}: no adapter weights; looked for {' and '.join(ADAPTER_FILES)}.")
    found: dict[str, Any] = dict(hf.read(weights))
    if native is not None:
        fields, found = native(fields, found)
    check_fields(adapter, fields, found)
    return fields, found, weights


def take_off(model: Any, merged: str | None = None) -> Any:
    """Give the network of a `PeftModel` without adapters, `merged` added to its weights.

    peft freezes every weight of the base when it puts the first adapter on; here they learn again as they did before.
    """
    network = model.unload() if merged is None else model.merge_and_unload(adapter_names=[merged])
    # A PeftModel that the caller made does not say how its base was before.
    if (trainable := getattr(model, "trainable_in_base", None)) is not None:
        _set_trainable(network, trainable)
    return network


def _trainable(network: nn.Module) -> frozenset[str]:
    return frozenset(name for name, weight in network.named_parameters() if weight.requires_grad)


def _set_trainable(network: nn.Module, names: frozenset[str]) -> None:
    for name, weight in network.named_parameters():
        weight.requires_grad_(name in names)


def _fill(model: Any, name: str, found: dict[str, Any], weights: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    expected = get_peft_model_state_dict(model, adapter_name=name)
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if found and expected.keys().isdisjoint(found):
        raise MissingKeys(
            f"{weights}: none of its {len(found)} tensors (first {unexpected[0]!r}) has a place in this "
            f"{_called(model)}, whose first is {missing[0]!r}; so it is of another family or size."
        )
    if missing:
        raise MissingKeys(
            f"{weights}: {len(missing)} of {len(expected)} adapter tensors are absent, first {missing[0]!r}."
        )
    if unexpected:
        raise UnexpectedKeys(f"{weights}: {len(unexpected)} tensors have no place, first {unexpected[0]!r}.")
    for key, value in found.items():
        if value.shape != expected[key].shape:
            raise CheckpointError(f"{weights}: {key!r} is {tuple(value.shape)}, not {tuple(expected[key].shape)}.")
    set_peft_model_state_dict(model, found, adapter_name=name)


def _called(network: Any) -> str:
    inner = network.get_base_model() if hasattr(network, "get_base_model") else network  # a PeftModel has it
    return type(inner).__name__


def is_quantized(network: nn.Module) -> bool:
    """Tell whether a network has int8 or nf4 layers; adapters lie on them in float, and cannot be merged into them."""
    bitsandbytes = sys.modules.get("bitsandbytes")  # without it there is no nf4 layer
    kinds = (Int8Linear,) if bitsandbytes is None else (Int8Linear, bitsandbytes.nn.Linear4bit)
    return any(isinstance(layer, kinds) for layer in network.modules())


def layers_over_quantized() -> dict[type[nn.Module], Any]:
    """Give peft's layer for each kind of quantised layer; it knows Linear4bit only in networks that transformers
    quantised."""
    from peft.tuners import lora

    layers: dict[type[nn.Module], Any] = {Int8Linear: lora.Linear}
    if (bitsandbytes := sys.modules.get("bitsandbytes")) is not None:
        layers[bitsandbytes.nn.Linear4bit] = lora.Linear4bit
    return layers


def check_fields(folder: Path, fields: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse fields of a wrong type or beyond the stored tensors, and beginnings that change the base's weights."""
    where = folder / ADAPTER_CONFIG
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start not in PLAIN_STARTS:
        raise ConfigError(
            f"{where}: init_lora_weights {shown(start)} changes the weights of the base, and this LoRA counts from the "
            "changed ones. Convert it to a plain one where it was trained (peft: save_pretrained with "
            "path_initial_model_for_weight_conversion=)."
        )
    targets = fields.get("target_modules")
    is_list = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if targets is not None and not isinstance(targets, str) and not is_list:
        raise ConfigError(f"{where}: target_modules is {shown(targets)}; it is a pattern or a list of names.")
    stored = max(
        (value.shape[0] for key, value in found.items() if "lora_A" in key or "lora_embedding_A" in key), default=0
    )
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = fields.get(name) or {}
        if not isinstance(patterns, Mapping):
            raise ConfigError(f"{where}: {name} is {shown(patterns)}; it gives numbers by the names of modules.")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{where}: {name} holds {shown(pattern)}, which is no pattern: {error}.") from error
    ranks = {"r": fields.get("r", 8), **(fields.get("rank_pattern") or {})}
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ConfigError(f"{where}: the rank {name!r} is {shown(rank)}; it is a whole number above 0.")
    if stored and max(ranks.values()) > stored:
        raise CheckpointError(
            f"{where}: has a rank of {max(ranks.values())} and the largest that is stored is {stored}; the two files "
            "are not of one adapter."
        )


def _check_plain(folder: Path, fields: Mapping[str, Any]) -> None:
    """Refuse adapters that read or change the weights that they lie on."""
    if fields.get("use_dora"):
        raise ConfigError(
            f"{folder / ADAPTER_CONFIG}: use_dora reads the weights of the base, which are quantised. Merge the "
            "adapter into the float base, save, and quantise the result."
        )


def _check_network(network: nn.Module) -> None:
    """Refuse networks whose layers peft does not know."""
    for layer in network.modules():
        if isinstance(layer, PackedLinear):
            raise ConfigError("A packed network takes no adapter; load it without pack=.")
        if isinstance(layer, RowwiseLinear | GatheredLinear):
            raise ConfigError("A network that several processes share takes no adapter; merge it into its base first.")


def read_fields(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json.

    Raises:
        CheckpointError: it is not there.
        ConfigError: an adapter of another kind than LoRA.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {ADAPTER_CONFIG}; give the folder of a PEFT adapter.")
    fields = read_object(path)
    if fields.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type is {fields.get('peft_type')!r}; lavish loads LORA adapters.")
    return fields


def _lora_fields(folder: Path, fields: dict[str, Any], lora_config: Any) -> dict[str, Any]:
    """Give what LoraConfig takes; a field that this peft lacks is refused where it says something."""
    unknown = [name for name, value in fields.items() if name not in lora_config.__dataclass_fields__ and value]
    if unknown:
        raise ConfigError(
            f"{folder / ADAPTER_CONFIG}: this peft does not know {unknown[0]!r}. Upgrade peft, or remove the field."
        )
    known = {name: value for name, value in fields.items() if name in lora_config.__dataclass_fields__}
    # auto_mapping names a class to import; the network is already here, and peft warns of a base of another name.
    left_out = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type")
    return {name: value for name, value in known.items() if name not in left_out}
