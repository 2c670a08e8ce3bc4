"""CogVLM2 (image and video) in MindFormers' checkpoints: reading and writing under the release's names.

What the files are is in `lavish.checkpoints.mindspore`, the names in `mindspore_names.py`, the sizes in
`mindspore_config.py`. Values keep their bits, no tensor is transposed. The stored rotary table is never used:
MindFormers keeps it in the dtype of the weights, positions included. Source: mindspore-lab/mindformers (v1.5.0),
mindformers/models/cogvlm2/convert_weight.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavish.checkpoints import hf, mindspore
from lavish.checkpoints.json_file import read_optional_object
from lavish.checkpoints.mindspore import STRATEGY_FOLDER, Layout
from lavish.checkpoints.mindspore_format import MindSporeFormat, encode_strategy
from lavish.checkpoints.output import Output, TargetOptions, TargetPlan, TensorFile
from lavish.checkpoints.release import Release
from lavish.checkpoints.rules import matches, plan, reasons
from lavish.checkpoints.sat import laid_together
from lavish.checkpoints.tensor_map import Stored, TensorMap, reshaped, view
from lavish.common.errors import (
    CheckpointError,
    ConfigError,
    ShapeMismatch,
    UnexpectedKeys,
    UnknownLayout,
    did_you_mean,
)
from lavish.models.cogvlm import manifest
from lavish.models.cogvlm.mindspore_config import ROPE_THETA, config_fields
from lavish.models.cogvlm.mindspore_names import (
    CLS_TOKEN,
    CUTS,
    EXTRAS,
    FREQS,
    IMAGE_RULES,
    INV_FREQ,
    LORA_MARK,
    LORA_PREFIX,
    OPTIMIZER,
    POSITIONS,
    TO_IMAGE,
    TO_VIDEO,
    VIDEO_RULES,
    source_names,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

GENERATION = "generation_config.json"
SMALL_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", GENERATION)

# -- reading -----------------------------------------------------------------------------------------------------------


def open_release(path: Path, *, verify: bool = True) -> Release:
    """Open a checkpoint of MindFormers, a file or a run's folder of ranks, as a release.

    The sizes come from a config.json beside it, else from the tensors, as far as they say them. The rotary table is
    float32's: `rope="reference"` asks for the table in half precision. `verify`: as `mindspore.read`.

    Raises:
        UnknownLayout: not of CogVLM2.
        CheckpointError: as `lavish.checkpoints.mindspore.read`; a LoRA, or names that no CogVLM2 has.
        ConfigError: a config.json beside it that is of another model.
    """
    stored = mindspore.read(path, verify=verify).infos
    infos = from_mindspore(path, stored)
    folder = path if path.is_dir() else path.parent
    fields = config_fields(path, infos, stored.get(FREQS) or stored.get(_with_lora(FREQS)))
    vocab_size = infos["model.embed_tokens.weight"].shape[0] if "model.embed_tokens.weight" in infos else None
    read_tokenizer = partial(_load_tokenizer, vocab_size=vocab_size)
    return Release(fields, TensorMap(path, infos), folder, read_tokenizer, read_optional_object(folder / GENERATION))


def _load_tokenizer(place: Path, vocab_size: int | None) -> Any:
    from lavish.processors.tokenizers import load_tokenizer  # it needs transformers

    return load_tokenizer(place if place.is_dir() else place.parent, vocab_size=vocab_size)


def from_mindspore(where: Path, infos: Mapping[str, Stored]) -> dict[str, Stored]:
    """Give the tensors of a checkpoint under the release's names and in its shapes.

    What a training run saved beside the weights, and the rotary table, are left out.

    Raises:
        UnknownLayout: not of CogVLM2.
        UnexpectedKeys: a name that no rule knows.
        CheckpointError: a LoRA, or a q, k or v without the others.
    """
    weights = _without_extras(where, infos)
    rules = IMAGE_RULES if _is_image(where, weights) else VIDEO_RULES
    places = plan(weights, rules)
    unknown = [target for target, source in places.sources.items() if target == source]
    if unknown:
        raise UnexpectedKeys(
            f"{where}: {len(unknown)} of {len(weights)} parameters have names that no CogVLM2 of MindFormers has, "
            f"first {unknown[0]!r}.{did_you_mean(unknown[0], source_names())}"
        )
    found: dict[str, Stored] = {}
    for target, source in places.sources.items():
        info = weights[source]
        if target in places.joined:
            parts = [weights[name] for name in places.joined[target].names if name is not None]
            _check_projections(where, source, parts)
            info = laid_together(parts, 0)
        if target in (CLS_TOKEN, POSITIONS):
            info = _without_first(where, source, info)
        found[target] = info
    return found


def _without_extras(where: Path, infos: Mapping[str, Stored]) -> dict[str, Stored]:
    """Give the weights by the names that they have without a LoRA's prefix."""
    left_out = [name for name in infos if name in EXTRAS or name.startswith(OPTIMIZER)]
    if left_out:
        logger.info("%s: %d entries of a training run are not read, first %r", where, len(left_out), left_out[0])
    weights = {name: info for name, info in infos.items() if name not in left_out}
    if lora := [name for name in weights if LORA_MARK in name]:
        raise CheckpointError(
            f"{where}: holds a LoRA of MindFormers ({len(lora)} parameters, first {lora[0]!r}), which lavish does not "
            "merge. Merge it in MindFormers (mindformers/tools/transform_ckpt_lora.py), and give what it writes."
        )
    prefixed = [name for name in weights if name.startswith(LORA_PREFIX)]
    if not prefixed:
        return weights
    plain = [name for name in weights if name.startswith("llm_model.") and name not in prefixed]
    if plain and prefixed != [_with_lora(FREQS)]:
        raise CheckpointError(
            f"{where}: {len(prefixed)} parameters begin with {LORA_PREFIX!r} (first {prefixed[0]!r}) and {len(plain)} "
            f"with 'llm_model.' (first {plain[0]!r}): two conversions in one file. Convert the release again."
        )
    if plain:
        logger.warning(
            "%s: converted with --modal image --sft lora, which renames the rotary table alone; it is not used anyway.",
            where,
        )
    renamed = {name: "llm_model." + name.removeprefix(LORA_PREFIX) for name in prefixed}
    return {renamed.get(name, name): info for name, info in weights.items()}


def _with_lora(name: str) -> str:
    return LORA_PREFIX + name.removeprefix("llm_model.")


def _is_image(where: Path, names: Mapping[str, Stored]) -> bool:
    if any("vision_expert_" in name for name in names):
        return True
    if any(name.endswith(".attention.wq.weight") for name in names):
        return False
    first = next(iter(names), None)
    raise UnknownLayout(
        f"{where}: no CogVLM2 of MindFormers: neither an image expert (vision_expert_...) nor the video model's "
        f"attention.wq is in it; it holds {len(names)} parameters, first {first!r}. Of MindSpore's files lavish reads "
        "those of CogVLM2."
    )


def _check_projections(where: Path, source: str, parts: Sequence[Stored]) -> None:
    if len({part.shape[1:] for part in parts}) > 1 or len({part.dtype for part in parts}) > 1 or not parts[0].shape:
        shapes = ", ".join(f"{part.dtype} {part.shape}" for part in parts)
        raise ShapeMismatch(f"{where}: {source!r} and its keys and values do not fit each other: {shapes}.")


def _without_first(where: Path, source: str, info: Stored) -> Stored:
    if len(info.shape) != 3 or info.shape[0] != 1:
        raise ShapeMismatch(f"{where}: {source!r} is of shape {info.shape} and should be of 1 x rows x width.")
    return reshaped(info, info.shape[1:])


# -- writing -----------------------------------------------------------------------------------------------------------


def plan_target(fields: Mapping[str, Any], tensors: TensorMap, options: TargetOptions) -> TargetPlan:
    """Say how a CogVLM2 under the release's names is written as MindFormers has it: one file, or `model_parallel` ranks
    with their strategy.

    Raises:
        ConfigError: CogVLM v1, or a number of ranks that does not fit.
        MissingKeys, UnexpectedKeys, ShapeMismatch: the tensors are not those that the config asks for.
    """
    where = str(tensors.path)
    sizes = manifest.read_sizes(fields, where)
    if sizes.version == 1:
        raise ConfigError(
            f"{where}: a CogVLM v1, which MindFormers never had; it has CogVLM2 alone. Layouts that hold it: hf, sat."
        )
    manifest.check_tensors(sizes, tensors, "CogVLM2", "MindFormers' CogVLM2")
    kept, dropped, made = _targets(sizes, float(fields.get("rope_theta") or ROPE_THETA), tensors, options)
    name = f"cogvlm2_{'video' if sizes.is_video else 'image'}"
    texts = {"config.json": json.dumps(_released(fields), indent=2).encode() + b"\n"}
    if options.model_parallel == 1:
        outputs = tuple(_output(target, tensors, options, *kept[target]) for target in kept)
        files: tuple[TensorFile, ...] = (TensorFile(f"{name}.ckpt", outputs, MindSporeFormat),)
    else:
        files, strategy = _ranks(sizes, tensors, options, kept)
        texts |= {f"{STRATEGY_FOLDER}/ckpt_strategy_rank_{r}.ckpt": strategy for r in range(options.model_parallel)}
    return TargetPlan(files, texts, _small_files(tensors.path), tuple(dropped), tuple(made))


def _small_files(path: Path) -> dict[str, Path]:
    """Find what else a model needs beside its weights: the tokenizer, and how it answers."""
    folder = path if path.is_dir() else path.parent
    return {name: hf.inside(folder, name) for name in SMALL_FILES if (folder / name).is_file()}


_Kept = dict[str, tuple[Stored | Output, str]]
"""Name to write -> what is stored (or computed), and the name that it comes from."""


def _targets(
    sizes: manifest.Sizes, rope_theta: float, tensors: TensorMap, options: TargetOptions
) -> tuple[_Kept, list[tuple[str, str]], list[tuple[str, str]]]:
    """Give what is written, in the order of MindFormers' converter; what is not; and what is computed."""
    rules = TO_VIDEO if sizes.is_video else TO_IMAGE
    places = plan(sorted(tensors), rules)
    query, key = sizes.hidden_size, sizes.num_key_value_heads * sizes.head_dim
    spans = ((0, query), (query, query + key), (query + key, query + 2 * key))
    kept: _Kept = {}
    for target, source in places.sources.items():
        info = tensors.info(source)
        if target in places.parts:
            info = view(info, 0, *spans[places.parts[target].index])
        if source in (CLS_TOKEN, POSITIONS):
            info = reshaped(info, (1, *info.shape))
        kept[target] = (info, source)
    made: list[tuple[str, str]] = []
    if FREQS in kept:
        kept[FREQS] = (_common_freqs(tensors, options), kept[FREQS][1])
    else:
        kept[FREQS] = (_computed_freqs(sizes.head_dim, rope_theta, tensors, options), "")
        made.append((FREQS, f"1 / {rope_theta:g}^(2j / {sizes.head_dim}); the source stores none"))
    return kept, reasons(places, rules), made


def _output(target: str, tensors: TensorMap, options: TargetOptions, info: Stored | Output, source: str) -> Output:
    return info if isinstance(info, Output) else options.take(target, tensors, info, (source,))


def _ranks(
    sizes: manifest.Sizes, tensors: TensorMap, options: TargetOptions, kept: _Kept
) -> tuple[tuple[TensorFile, ...], bytes]:
    """Cut what is written into ranks; gives their files and the strategy."""
    num_ranks = options.model_parallel
    _check_ranks(sizes, num_ranks)
    layouts: dict[str, Layout] = {}
    files: list[TensorFile] = []
    for rank in range(num_ranks):
        outputs: list[Output] = []
        for target, (info, source) in sorted(kept.items()):
            axis = next((axis for pattern, axis in CUTS.items() if matches((pattern,), target)), None)
            layouts[target] = Layout((num_ranks,), tuple(0 if a == axis else -1 for a in range(len(info.shape))))
            if axis is not None and not isinstance(info, Output):
                part = info.shape[axis] // num_ranks
                info = view(info, axis, rank * part, (rank + 1) * part)
            outputs.append(_output(target, tensors, options, info, source))
        files.append(TensorFile(f"rank_{rank}/checkpoint_{rank}.ckpt", tuple(outputs), MindSporeFormat))
    return tuple(files), encode_strategy(layouts)


def _check_ranks(sizes: manifest.Sizes, num_ranks: int) -> None:
    if sizes.is_video:
        raise ConfigError(
            f"--model-parallel {num_ranks}: how MindFormers cuts the video model is not known; write it as one file, "
            "which MindFormers cuts itself (--auto_trans_ckpt True)."
        )
    fused = sizes.hidden_size + 2 * sizes.num_key_value_heads * sizes.head_dim
    widths = {"vocab_size": sizes.vocab_size, "hidden_size": sizes.hidden_size, "rows of q, k and v": fused}
    widths["num_attention_heads"] = sizes.num_attention_heads
    if num_ranks < 1 or (odd := [f"{name} {value}" for name, value in widths.items() if value % num_ranks]):
        what = " and ".join(odd) if num_ranks > 0 else "anything"
        raise ConfigError(f"--model-parallel {num_ranks} does not divide {what}; 1, 2, 4 or 8 do for the release.")


def _released(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Give the fields without what lavish adds for itself; how the table is made is the reader's choice."""
    return {name: value for name, value in fields.items() if name not in ("rope", "auto_map")}


def _common_freqs(tensors: TensorMap, options: TargetOptions) -> Output:
    """Say that layer 0's table goes over, once it was seen that those of the other layers are the same."""
    tables = sorted(name for name in tensors if matches((INV_FREQ,), name))
    source = INV_FREQ.replace("*", "0")
    info = tensors.info(source)
    dtype = options.dtype_of(info.dtype)

    def make() -> torch.Tensor:
        import torch

        first = tensors.assemble(info)
        if differing := [name for name in tables if not torch.equal(tensors.assemble(tensors.info(name)), first)]:
            raise CheckpointError(
                f"{tensors.path}: {differing[0]!r} differs from layer 0's, and MindFormers keeps one table for all "
                "layers. In every CogVLM2 they are equal: the checkpoint is damaged, or of another model."
            )
        return options.cast(FREQS, first, dtype)

    return Output(FREQS, info.shape, dtype, make, (source,))


def _computed_freqs(head_dim: int, rope_theta: float, tensors: TensorMap, options: TargetOptions) -> Output:
    """Say that the table is computed in float32 and cast to the dtype of the weights."""
    dtype = options.dtype_of(tensors.info("lm_head.weight").dtype)

    def make() -> torch.Tensor:
        import torch

        from lavish.models.cogvlm.model import reference_inv_freq

        return reference_inv_freq(head_dim, rope_theta, torch.float32).to(getattr(torch, dtype))

    return Output(FREQS, (head_dim // 2,), dtype, make)
