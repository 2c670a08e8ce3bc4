"""From a LAVIS file or a transformers folder to network and processor.

Sizes of a LAVIS file come from the model type's YAML. As soon as a caller or a file beside it gives fields (a config,
LAVIS's med_config.json), the sizes that the tensors tell count before the YAML's; head counts are in no file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import BlipConfig, PreTrainedTokenizerBase

from lavish.checkpoints import deepspeed, lavis
from lavish.checkpoints.json_file import read_object, read_optional_object
from lavish.checkpoints.layouts import config_folder, read_weights
from lavish.checkpoints.loading import load_into
from lavish.checkpoints.rules import Rule
from lavish.checkpoints.tensor_map import TensorMap
from lavish.common.errors import CheckpointError, ConfigError
from lavish.models.blip.config import (
    ARCHITECTURES,
    SECTIONS,
    TOP_LEVEL,
    SpecialIds,
    architecture_in,
    check_fields,
    image_size_of,
    lavis_config,
    layered,
    read_config,
    read_med_config,
    tower_of,
)
from lavish.models.blip.model import NETWORKS, resize_positions
from lavish.models.blip.processor import BlipProcessor, fetch_vocabulary, find_tokenizer, load_tokenizer
from lavish.models.blip.weights import architecture_of, complete, rules_for, stored_sizes

logger = logging.getLogger(__name__)

CONFIG, MED_CONFIG = "config.json", "med_config.json"
PREFIX = "network."
"""Before the names in the `state_dict` of a registered model."""
BERT_IDS = SpecialIds(bos_token_id=30522, sep_token_id=102, pad_token_id=0)
"""Of bert-base-uncased with `[DEC]` and `[ENC]`; where no tokenizer is at hand and none is needed."""


@dataclass(frozen=True)
class Wanted:
    """What a caller asks for besides the path."""

    architecture: str | None = None
    """transformers' name; None: what the file is."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """Config fields of the model type's YAML."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Config fields of the caller, over all others."""
    base_texts: Mapping[str, Any] = field(default_factory=dict)
    """`prompt` and `max_txt_len` of the model type's YAML."""
    given_texts: Mapping[str, Any] = field(default_factory=dict)
    """The same of the caller."""
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None
    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"


def open_network(path: str | Path, wanted: Wanted) -> tuple[Any, BlipProcessor]:
    """Load weights with all that belongs to them.

    Raises:
        CheckpointError: weights or tokenizer are absent, damaged, of another model, or do not fit the config.
        ConfigError: fields that are wrong or contradict the file.
    """
    path = Path(path)
    if _is_transformers(path):
        folder = config_folder(path)
        tensors = read_weights(path)
        config = read_config(read_object(folder / CONFIG), str(folder / CONFIG), **wanted.given)
        architecture = _checked(architecture_in(config), wanted.architecture, path)
        tokenizer = load_tokenizer(folder if wanted.tokenizer is None else wanted.tokenizer)
        processor = BlipProcessor.from_folder(config, folder, tokenizer, wanted.base_texts, wanted.given_texts)
    else:
        tensors = _read_file(path)
        architecture = wanted.architecture or architecture_of(tensors, str(path))
        _check_kind(tensors, architecture)
        tokenizer = _tokenizer(_folder_of(tensors), wanted.tokenizer)
        config = _config_of_file(tensors, architecture, _ids(tokenizer), wanted)
        processor = BlipProcessor.from_config(config, tokenizer, **{**wanted.base_texts, **wanted.given_texts})
    return _load(tensors, config, architecture, wanted), processor


def _check_kind(tensors: TensorMap, architecture: str) -> None:
    """Refuse captions by a decoder that learnt to answer; all other wrong pairs lack tensors."""
    if architecture == "BlipForConditionalGeneration":
        found = architecture_of(tensors, str(tensors.path))
        if found == "BlipForQuestionAnswering":
            raise CheckpointError(
                f"{tensors.path}: holds a text_encoder and a text_decoder without the projections of a pretrained "
                "file, so it is a blip_vqa, whose decoder writes answers and no captions. Load it as 'blip_vqa'."
            )


def tell(path: str | Path) -> tuple[str, int]:
    """Tell transformers' name of the network that a path holds, and the width of its tower, from names and shapes.

    Raises:
        CheckpointError: no BLIP, or a damaged file.
    """
    path = Path(path)
    if _is_transformers(path):
        tensors = read_weights(path)
        config = read_config(read_object(config_folder(path) / CONFIG), str(config_folder(path) / CONFIG))
        architecture = architecture_in(config)
    else:
        tensors = _read_file(path)
        architecture = architecture_of(tensors, str(path))
    sizes = stored_sizes(tensors, rules_for(architecture, tensors))
    return architecture, sizes["vision_config"].get("hidden_size", 0)


def outline(path: Path | None, architecture: str, wanted: Wanted) -> tuple[Any, TensorMap | None, tuple[Rule, ...]]:
    """Give the network of a path without weights, on the meta device, the tensors of its files and the rules between
    them; nothing is fetched. Without a path: the network of the model type.

    Raises: as `open_network` before the first weight is read.
    """
    tensors = None
    if path is None:
        fields = layered(wanted.base, check_fields(wanted.given, "config"))
        config = lavis_config(fields, BERT_IDS, architecture, "config")
    elif _is_transformers(path):
        folder = config_folder(path)
        tensors = read_weights(path, allow_absent=True)
        config = read_config(read_object(folder / CONFIG), str(folder / CONFIG), **wanted.given)
    else:
        tensors = _read_file(path)
        folder = find_tokenizer(_folder_of(tensors))
        ids = BERT_IDS if folder is None else _ids(load_tokenizer(folder))
        config = _config_of_file(tensors, architecture, ids, wanted)
    if tensors is None:
        return _on_meta(config, architecture), None, ()
    rules = rules_for(architecture, tensors)
    _take_stored_grid(config, tensors, rules)
    return _on_meta(config, architecture), tensors, rules


def new_network(architecture: str, wanted: Wanted) -> tuple[Any, BlipProcessor]:
    """Make a network with drawn weights: LAVIS's `load_finetuned: False, load_pretrained: False`."""
    tokenizer = load_tokenizer(fetch_vocabulary() if wanted.tokenizer is None else wanted.tokenizer)
    fields = layered(wanted.base, check_fields(wanted.given, "config"))
    config = lavis_config(fields, _ids(tokenizer), architecture, "config")
    processor = BlipProcessor.from_config(config, tokenizer, **{**wanted.base_texts, **wanted.given_texts})
    return NETWORKS[architecture](config).to(device=wanted.device, dtype=wanted.dtype), processor


def _folder_of(tensors: TensorMap) -> Path:
    """Give the folder that a file lies in, or that shards are."""
    return tensors.path if tensors.path.is_dir() else tensors.path.parent


def _is_transformers(path: Path) -> bool:
    """Whether a folder's config.json is of its weights; beside a `.pth` file it only adds fields."""
    if path.is_file() and not deepspeed.is_run(path):
        return False
    return (config_folder(path) / CONFIG).is_file() and not any(path.glob(f"*{lavis.SUFFIX}"))


def _read_file(path: Path) -> TensorMap:
    """Read a single file, LAVIS's or what a run of lavish saved of a whole registered model: `network.` goes."""
    if path.suffix == ".safetensors" or deepspeed.is_run(path):
        tensors = read_weights(path)
    else:
        tensors = lavis.read(path)
    if all(name.startswith(PREFIX) for name in tensors):
        return TensorMap(tensors.path, {name.removeprefix(PREFIX): info for name, info in tensors.infos.items()})
    return tensors


def _checked(found: str, asked: str | None, path: Path) -> str:
    if asked not in (None, found):
        names = {network: name for name, network in ARCHITECTURES.items()}
        raise CheckpointError(f"{path}: is a {found}, and {names[asked]!r} was asked; load it as {names[found]!r}.")
    return found


def _tokenizer(folder: Path, given: str | Path | PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    return load_tokenizer(given if given is not None else find_tokenizer(folder) or fetch_vocabulary())


def _ids(tokenizer: PreTrainedTokenizerBase) -> Any:
    return BlipProcessor(tokenizer).special_ids


def _config_of_file(tensors: TensorMap, architecture: str, ids: SpecialIds, wanted: Wanted) -> BlipConfig:
    beside = _beside(_folder_of(tensors))
    given = layered(beside, check_fields(wanted.given, "config"))
    sizes = stored_sizes(tensors, rules_for(architecture, tensors)) if given else {}
    where = str(tensors.path)
    for section in SECTIONS:
        width, heads = sizes.get(section, {}).get("hidden_size"), "num_attention_heads"
        if width not in (None, wanted.base[section]["hidden_size"]) and heads not in given.get(section, {}):
            raise ConfigError(
                f"{where}: the tensors of {section} are {width} wide and those of this model type "
                f"{wanted.base[section]['hidden_size']}; no file tells how many heads share them. Give "
                f"config={{{section!r}: {{{heads!r}: ...}}}}, or another model type."
            )
    fields = layered(wanted.base, sizes, given)
    if "encoder_hidden_size" not in given.get("text_config", {}):
        fields["text_config"].pop("encoder_hidden_size", None)  # the tower's width, by its config
    return lavis_config(fields, ids, architecture, where)


def _beside(folder: Path) -> dict[str, Any]:
    """Give the config fields that lie beside a LAVIS file: a config.json, else LAVIS's med_config.json."""
    config = read_optional_object(folder / CONFIG)
    if any(name in config for name in SECTIONS):
        return check_fields({name: config[name] for name in TOP_LEVEL if name in config}, str(folder / CONFIG))
    med = read_med_config(read_optional_object(folder / MED_CONFIG))
    return {"text_config": med} if med else {}


def _load(tensors: TensorMap, config: BlipConfig, architecture: str, wanted: Wanted) -> Any:
    rules = rules_for(architecture, tensors)
    image_size = image_size_of(config)
    stored = _take_stored_grid(config, tensors, rules)
    network = _on_meta(config, architecture)
    absent = load_into(network, tensors, dtype=wanted.dtype, device=wanted.device, rules=rules)
    complete(network, absent)
    if stored != image_size:
        logger.info("%s: positions of %d px are resized to %d px", tensors.path, stored, image_size)
        resize_positions(network.vision_model, image_size)
    config.dtype = wanted.dtype
    return network.eval()


def _take_stored_grid(config: BlipConfig, tensors: TensorMap, rules: tuple[Rule, ...]) -> int:
    """Set the picture size to that of the file's positions, and give it: the network is built for the grid of the file,
    and resized once its positions are read."""
    stored = stored_sizes(tensors, rules)["vision_config"].get("image_size", image_size_of(config))
    tower_of(config).image_size = stored
    return stored


def _on_meta(config: BlipConfig, architecture: str) -> Any:
    with torch.device("meta"):
        return NETWORKS[architecture](config)
