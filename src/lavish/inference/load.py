"""From a folder or hub id to a model that talks.

Order: resolve -> config.json -> family -> config -> network on the meta device -> stream the weights, strictly ->
processor. No code of a checkpoint is run, and nothing is fetched unless a hub id was named.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lavish.models as table
from lavish.checkpoints import deepspeed, hf, hub, lavis
from lavish.checkpoints.json_file import read_optional_object
from lavish.checkpoints.layouts import config_folder, read_config_json, read_weights
from lavish.checkpoints.loading import load_into
from lavish.checkpoints.placement import resolve_device, resolve_dtype
from lavish.checkpoints.release import Lora, Release
from lavish.checkpoints.tensor_map import TensorMap
from lavish.common.errors import CheckpointError, ConfigError, UnknownLayout, check_path, did_you_mean, shown
from lavish.inference import layer_split, packing
from lavish.inference.adapters import ADAPTER_CONFIG, apply_adapter, find_base, is_adapter
from lavish.inference.options import read_sampling_defaults
from lavish.inference.parallel import check_parallel, load_share, local_device, refuse_with_parallel, shared_seeds
from lavish.inference.quantization import (
    INT8,
    check_quantization,
    is_saved_int8,
    load_quantized,
    replace_by_int8,
    warn_if_slow,
)
from lavish.inference.register import register
from lavish.inference.vlm import VLM

logger = logging.getLogger(__name__)

POCKET = Path(__file__).resolve().parent.parent / "pocket"
"""The bundled model."""


def load(
    path_or_hub_id: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    quantization: str | None = None,
    quantize_vision: bool = False,
    pack: bool | str = False,
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    rope: str | None = None,
    revision: str | None = None,
    parallel: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    **pieces: Any,
) -> VLM:
    """Load a released model, or one that lavish saved, ready to talk.

    Args:
        path_or_hub_id: a folder, `org/name[@revision]`, or `modelscope:org/name`; None is the bundled pocket model.
        dtype: "auto" is what most weights are stored in, but float32 instead of float16 on a CPU, where float16 is
          unusably slow.
        device: "auto" is CUDA, else MPS, else CPU. A network too large for the first of several GPUs is split over them
          all, whole blocks each.
        quantization: "int8" (any device) or "nf4" (needs bitsandbytes); decoder layers only.
        quantize_vision: quantise the tower and the projector too.
        pack: put the weights into the CPU's own layout: the same values, read faster. Such a network cannot be trained,
          quantised, adapted or moved to a GPU; it is saved as any other. "auto": bfloat16 on a CPU, where it pays in
          every step; `lavish chat` and `lavish predict` ask for that.
        adapter: folder of a PEFT adapter to put on the network; it is not merged. On a quantised network it stays in
          float.
        base: where the base is, if `path_or_hub_id` is itself an adapter's folder; default: what its
          adapter_config.json says.
        tokenizer: folder or hub id of the tokenizer (CogVLM v1 has its own apart), or a tokenizer.
        config: fields that replace those of config.json, as a dict or a JSON or YAML file.
        rope: "reference" (the release's numbers) or "float32" for the rotary table of half-precision models; default
          as stored. CogVLM's and GLM-4V's have it.
        revision: of a hub id.
        parallel: "tensor" shares the network among the processes that torchrun started, on as many GPUs or on the CPU.
          All of them load, make the same calls one after the other, and get the same answers.
        device_map: "auto" splits the network over all GPUs and, if they are too small, the CPU; a dict says it for each
          block: names of modules (the longest that fits counts, "" is for the rest) -> a device, a GPU's number, or
          "disk".
        pieces: parts of a composite release that are elsewhere, by name: `llm=`, `vision_tower=` ...

    Raises:
        ConfigError: a wrong option, an unknown piece, a config that lacks a field or contradicts itself, or no such
          model.
        UnknownLayout: not a checkpoint, or of an architecture that lavish does not know.
        CheckpointError: weights that are absent, damaged, or of another shape or name than the config says.
    """
    _check_names(path_or_hub_id, adapter, base, tokenizer, revision)
    check_quantization(quantization, quantize_vision)
    check_parallel(parallel)
    target = resolve_device(device) if parallel is None else local_device(device)
    for name, value in pieces.items():
        _check_piece(name, value)
    folder, adapter = _folders(path_or_hub_id, adapter, base, revision, pieces)
    if (samples_of := sample_family(folder, pieces)) is not None:
        refused = {"quantization": quantization, "adapter": adapter, "parallel": parallel, "rope": rope, **pieces}
        refused |= {"device_map": device_map}
        return _load_samples(
            path_or_hub_id,
            folder,
            samples_of,
            dtype,
            target,
            config,
            tokenizer,
            {**refused, "pack": pack is True},
        )
    overrides = read_overrides(config, rope)
    release = open_release(folder, overrides, pieces)
    own = None if release.release is None else release.release.adapter
    if adapter is not None and isinstance(own, Lora):
        raise ConfigError(
            f"adapter= was given, and {folder} holds a LoRA of its own. Merge that first (lavish convert "
            "--merge-lora), or put the other one on the loaded network: vlm.load_adapter(path, name)."
        )
    worn = own if adapter is None else adapter
    weight_dtype = resolve_dtype(dtype, stored_dtype(release.tensors), target)
    if release.is_int8 and quantization is not None:
        raise ConfigError(f"{folder} was saved in int8 already; load it without quantization={quantization!r}.")
    is_quantized = release.is_int8 or quantization is not None
    if release.is_int8 or quantization == INT8:
        warn_if_slow(weight_dtype, target)
    if parallel is not None:
        refuse_with_parallel(is_quantized=is_quantized, has_adapter=worn is not None, pack=pack, device_map=device_map)
    blocks = None
    if parallel is None:
        how = {"device": device, "device_map": device_map, "is_quantized": is_quantized, "pack": pack}
        blocks = layer_split.plan_for(release.family, release.config, weight_dtype, **how)
    is_packed = packing.should_pack(
        pack if parallel is None and blocks is None else False,
        dtype=weight_dtype,
        device=target,
        is_quantized=is_quantized,
        has_adapter=worn is not None,
    )
    # Before the weights: a wrong tokenizer is found in a second, not after minutes of reading.
    processor = release.processor(tokenizer, is_overridden=bool(overrides))
    if parallel is not None:
        network = load_share(release.family, release.config, release.tensors, dtype=weight_dtype, device=target)
    elif blocks is not None:
        network = layer_split.load_split(release.family, release.config, release.tensors, blocks, dtype=weight_dtype)
    else:
        network = load_network(release, weight_dtype, target, quantization, quantize_vision)
    if worn is not None:
        found = worn if isinstance(worn, Lora) else Path(worn)
        network = apply_adapter(network, found, native=release.family.native_adapter)
        if release.release is not None and release.release.adapted is not None:
            release.release.adapted(network)
    if is_packed:
        packing.pack(network)
    if blocks is not None:
        layer_split.dispatch(network, blocks)
    register()
    new_seed = None if parallel is None else partial(shared_seeds(target).getrandbits, 62)
    return talking(path_or_hub_id, release, network, processor, new_seed)


def _check_names(path: Any, adapter: Any, base: Any, tokenizer: Any, revision: Any) -> None:
    for what, value in {"path_or_hub_id": path, "adapter": adapter, "base": base, "tokenizer": tokenizer}.items():
        if value is not None and not isinstance(value, PreTrainedTokenizerBase):
            check_path(value, what)
    if revision is not None and not isinstance(revision, str):
        raise ConfigError(f"revision must be a branch, tag or commit of a hub id, not {shown(revision)}.")


def _check_piece(name: str, value: Any) -> None:
    if name not in (known := known_pieces()):
        options = _options()
        raise ConfigError(
            f"lavish.load got {name!r}: no option, and no piece of a release.{did_you_mean(name, [*known, *options])} "
            f"Options: {', '.join(options)}. Pieces: {', '.join(known)}."
        )
    check_path(value, name)


def _options() -> list[str]:
    return [name for name, value in signature(load).parameters.items() if value.kind is value.KEYWORD_ONLY]


def known_pieces() -> tuple[str, ...]:
    """Names of the pieces of all families."""
    return tuple(dict.fromkeys(name for row in table.FAMILIES for name in row.pieces))


def read_fields(path: Path) -> dict[str, Any]:
    """Read config fields from a JSON or YAML file.

    Raises:
        ConfigError: no such file, or not a mapping.
    """
    from omegaconf import OmegaConf  # most loads do without it
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:  # ValueError: bytes that are no text
        raise ConfigError(f"config={shown(str(path))} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config={str(path)!r} holds a list; it needs fields with values.")
    return {str(name): value for name, value in content.items()}


def _folders(
    path: str | Path | None,
    adapter: str | Path | None,
    base: str | Path | None,
    revision: str | None,
    pieces: Iterable[str] = (),
) -> tuple[Path, Path | None]:
    """Give the folder of the network, and that of an adapter."""
    if revision is not None and (path is None or os.path.exists(path)):
        raise ConfigError(f"revision={revision!r} is of a hub id, and {str(path or 'the pocket model')!r} is on disk.")
    if path is None:
        if base is not None:
            raise ConfigError("base= was given without the adapter's folder: lavish.load(adapter_folder, base=...).")
        if not (POCKET / "config.json").is_file():
            raise CheckpointError(
                f"The bundled pocket model is not in this installation ({POCKET} has no config.json). "
                "Give the folder or hub id of a model: lavish.load('THUDM/cogvlm2-llama3-chat-19B')."
            )
        return POCKET, None if adapter is None else hub.resolve(adapter)
    folder = hub.resolve(path, revision=revision)
    if is_adapter(folder) and table.detect_composite(folder, pieces) is None:
        if adapter is not None:
            raise ConfigError(f"{folder} is itself an adapter, and adapter= names another; give base= and one adapter.")
        return find_base(folder) if base is None else hub.resolve(base), folder
    if base is not None and is_adapter(folder):
        family = table.detect_composite(folder, pieces)
        names = " and ".join(f"{name}=" for name in family.pieces) if family is not None else ""
        raise ConfigError(
            f"base= was given, but {folder} is what was trained of a release in pieces, its adapter one of them: leave "
            f"base= out and name the pieces that are not beside it with {names}."
        )
    if base is not None:
        raise ConfigError(f"base= was given, but {folder} is no adapter (no {ADAPTER_CONFIG}); use adapter= for one.")
    return folder, None if adapter is None else hub.resolve(adapter)


@dataclass(frozen=True)
class Opened:
    """A release before its weights are read."""

    path: Path
    """Its folder, or its file."""
    config_dict: dict[str, Any]
    """config.json as it is, or what stands for it."""
    family: table.Family
    config: Any
    """The family's config, with what the caller replaced."""
    tensors: TensorMap
    generation_config: dict[str, Any]
    sampling_defaults: dict[str, float]
    release: Release | None = None
    """Where it came in pieces."""

    def processor(self, tokenizer: Any, *, is_overridden: bool) -> Any:
        """Make the processor; `is_overridden`: the config has what the folder's own files do not."""
        make = self.family.processor_class
        if self.release is not None:
            if not isinstance(tokenizer, PreTrainedTokenizerBase):
                where = self.release.tokenizer if tokenizer is None else hub.resolve(tokenizer)
                tokenizer = self.release.load_tokenizer(where)
            return make.from_config(self.config, tokenizer)
        if not (self.path / "config.json").is_file():  # DeepSpeed's shards: the caller gave the config
            with TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps(self.config_dict), encoding="utf-8")
                return make.from_pretrained(folder, tokenizer=self.path if tokenizer is None else tokenizer)
        processor = make.from_pretrained(self.path, tokenizer=tokenizer)
        return make.from_config(self.config, processor.tokenizer) if is_overridden else processor

    @property
    def is_int8(self) -> bool:
        return is_saved_int8(self.config_dict)


def open_release(path: Path, overrides: dict[str, Any], pieces: Mapping[str, str | Path]) -> Opened:
    """Find out what a folder or file is, and read its config and the headers of its weights.

    Raises: as `load`, before the first weight is read.
    """
    family = find_composite(path, pieces)
    if family is None:
        return _open_folder(path, overrides, pieces)
    _check_pieces(pieces, family)
    release = family.open_release(path, {name: hub.resolve(value) for name, value in pieces.items()})
    for name, note in release.notes.items():
        if name not in overrides:
            logger.warning("%s: %s", path, note)
    _check_rope(overrides, family)
    config = family.read_config(release.fields, str(path), **overrides)
    sampling_defaults = read_sampling_defaults(release.generation_config, f"{path}: generation_config.json")
    return Opened(
        path=path,
        config_dict=release.fields,
        family=family,
        config=config,
        tensors=release.tensors,
        generation_config=release.generation_config,
        sampling_defaults=sampling_defaults,
        release=release,
    )


def find_composite(path: Path, pieces: Iterable[str]) -> table.Family | None:
    """Give the family of a release in pieces, of a single `.pth` file, or of DeepSpeed's shards without a config.json;
    None where a config.json says what it is, or nothing does."""
    family = table.detect_composite(path, pieces)
    if family is None and deepspeed.is_run(path):
        is_described = (config_folder(path) / "config.json").is_file()
        return None if is_described else table.detect_by_keys(read_weights(path))
    file = _single_file(path) if family is None else None
    if file is not None:
        family = table.detect_by_keys(lavis.read(file))
        if family is None:
            known = sorted({mark for row in table.FAMILIES for mark in row.key_marks})
            raise UnknownLayout(
                f"{file}: its tensors are of no model that lavish reads from a single file; it knows names that begin "
                f"with {', '.join(known) or 'nothing'}. Give the folder that holds config.json and the weights."
            )
    return family


def _single_file(path: Path) -> Path | None:
    """Give the `.pth` file that `path` is, or that a folder without weights of another layout holds."""
    if path.is_file():
        return path if path.suffix in hf.PICKLE_SUFFIXES else None
    chosen = lavis.chosen_of(sorted(file.name for file in path.glob(f"*{lavis.SUFFIX}")))
    is_other = any((path / name).exists() for name in hf.WEIGHT_FILES)
    return None if chosen is None or is_other else path / chosen


def sample_family(path: Path, pieces: Iterable[str]) -> table.Family | None:
    """Give the family of a path if it is one of no chat networks."""
    family = find_composite(path, pieces)
    if family is None and (config_folder(path) / "config.json").is_file():
        fields = read_config_json(config_folder(path))
        family = next(
            (row for row in table.FAMILIES if row.opener and row.model_type == fields.get("model_type")), None
        )
    return family if family is not None and family.opener is not None else None


def _open_folder(path: Path, overrides: dict[str, Any], pieces: Iterable[str]) -> Opened:
    folder = config_folder(path)
    if deepspeed.is_run(path) and not (folder / "config.json").is_file():
        config_dict, overrides = _config_of_shards(path, overrides), {}
    else:
        config_dict = read_config_json(folder)
    family = table.detect_family(config_dict, str(folder / "config.json"))
    _check_pieces(pieces, family, is_whole=True)
    _check_rope(overrides, family)
    config = family.read_config(config_dict, str(folder / "config.json"), **overrides)
    answering = folder / "generation_config.json"
    generation_config = read_optional_object(answering)
    sampling_defaults = read_sampling_defaults(generation_config, str(answering))
    tensors = read_weights(path)
    family.check_version(config, tensors, str(folder))
    return Opened(folder, config_dict, family, config, tensors, generation_config, sampling_defaults)


def _config_of_shards(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Give the whole config of DeepSpeed's shards, which hold none.

    Raises:
        ConfigError: it was not given either.
    """
    if "architectures" in given or "model_type" in given:
        return given
    raise ConfigError(
        f"{path}: DeepSpeed's shards hold no config. Put the network's config.json beside {deepspeed.LATEST!r}, or "
        "give it: config=... (the file, or its fields with 'architectures')."
    )


def _check_pieces(pieces: Iterable[str], family: table.Family, *, is_whole: bool = False) -> None:
    """Refuse a keyword that is no piece of the family, and every piece of a release that `is_whole`."""
    options = _options()
    known = () if is_whole else family.pieces
    for name in pieces:
        if name in known:
            continue
        if is_whole and name in family.pieces:
            raise ConfigError(f"{name}= was given, but the folder has a config.json: it holds all pieces already.")
        what = f"has the pieces {', '.join(known)}" if known else "is one network without pieces"
        raise ConfigError(
            f"lavish.load got {name!r}: no option, and the family {family.name!r} {what}."
            f"{did_you_mean(name, [*known, *options])} Options: {', '.join(options)}."
        )


def _check_rope(overrides: Mapping[str, Any], family: table.Family) -> None:
    if "rope" in overrides and "rope" not in family.config_class.__dataclass_fields__:
        known = [row.name for row in table.FAMILIES if "rope" in row.config_class.__dataclass_fields__]
        raise ConfigError(
            f"rope={shown(overrides['rope'])} was given, and the family {family.name!r} has one rotary table only; "
            f"rope= is an option of {' and '.join(known)}. Leave it out."
        )


def read_overrides(config: Mapping[str, Any] | str | Path | None, rope: str | None = None) -> dict[str, Any]:
    """Give the config fields that the caller replaces.

    Raises:
        ConfigError: a file that cannot be read, or no mapping.
    """
    if isinstance(config, str | Path):
        check_path(config, "config")
        config = read_fields(Path(config))
    if config is not None and not isinstance(config, Mapping):
        raise ConfigError(f"config= must be a dict of fields or a JSON or YAML file, not {type(config).__name__}.")
    fields = {str(name): value for name, value in (config or {}).items()}
    return fields if rope is None else {**fields, "rope": rope}


def stored_dtype(tensors: TensorMap) -> torch.dtype:
    """Give the float dtype that holds the most elements."""
    elements: Counter[torch.dtype] = Counter()
    for name in tensors:
        shape, dtype = tensors.meta(name)
        if dtype.is_floating_point:
            elements[dtype] += torch.Size(shape).numel()
    return elements.most_common(1)[0][0] if elements else torch.float32


def load_network(
    release: Opened,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None,
    quantize_vision: bool = False,
) -> PreTrainedModel:
    """Make the network of a release and read its weights; a projector that is in no file starts random."""
    family, config, tensors = release.family, release.config, release.tensors
    is_untrained = release.release is not None and release.release.is_untrained
    rules = (*family.rules, *(family.untrained_rules if is_untrained else ()))
    with torch.device("meta"):
        network = family.model_class(config)
    if quantization is not None:
        left = load_quantized(
            network,
            tensors,
            quantization,
            dtype=dtype,
            device=device,
            rules=rules,
            quantize_vision=quantize_vision,
        )
    else:
        if release.is_int8:
            saved = release.config_dict["quantization_config"]
            replace_by_int8(network, dtype, quantize_vision=bool(saved.get("quantize_vision")))
        left = load_into(network, tensors, dtype=dtype, device=device, rules=rules)
    if is_untrained:
        family.start_projector(network, dtype, device)
        left = [name for name in left if not name.startswith("projector.")]
    family.complete(network, left)
    config.dtype = dtype
    return network.eval()


def _load_samples(
    name: Any,
    path: Path,
    family: table.Family,
    dtype: str | torch.dtype,
    device: torch.device,
    config: Any,
    tokenizer: Any,
    refused: Mapping[str, Any],
) -> VLM:
    """Load a model that captions, answers or embeds; `refused` are options that it does not take."""
    from lavish.inference.sample_model import SampleModel  # chat models do without it

    if given := [option for option, value in refused.items() if value not in (None, False)]:
        raise ConfigError(f"{path} is a model of the family {family.name!r}, which takes no {given[0]}=.")
    weight_dtype = resolve_dtype(dtype, torch.float32, device)
    fields = read_overrides(config)
    samples = family.open_samples(path, config=fields or None, tokenizer=tokenizer)
    return SampleModel(samples.to(device=device, dtype=weight_dtype).eval(), name=str(name))


def talking(
    path: str | Path | None, release: Opened, network: Any, processor: Any, new_seed: Callable[[], int] | None = None
) -> VLM:
    """Put the parts together, with what the folder says about answering."""
    return VLM(
        network,
        processor,
        name=str(path or "pocket"),
        grounding=_is_grounding(path, release.path, release.config_dict),
        eos_token_ids=_eos_token_ids(release.generation_config, release.config),
        sampling_defaults=release.sampling_defaults,
        new_seed=new_seed,
        native_adapter=release.family.native_adapter,
    )


def _eos_token_ids(generation_config: Mapping[str, Any], config: Any) -> list[int]:
    """Give what ends an answer: the ids of generation_config.json and of the config."""
    found: list[int] = []
    for value in (generation_config.get("eos_token_id"), config.eos_token_id):
        found += value if isinstance(value, list) else [] if value is None else [value]
    if wrong := [value for value in found if isinstance(value, bool) or not isinstance(value, int)]:
        raise ConfigError(
            f"eos_token_id of config.json or generation_config.json holds {wrong[0]!r}; it is a token's number, or a "
            "list of them. Fetch the files again."
        )
    return list(dict.fromkeys(found))


def _is_grounding(path: str | Path | None, folder: Path, config: Mapping[str, Any]) -> bool:
    """Tell whether answers hold boxes: by the checkpoint's name, or because its config says so (the pocket model)."""
    if isinstance(config.get("grounding"), bool):
        return config["grounding"]
    return any("grounding" in Path(str(name)).name.lower() for name in (path or "", folder))
