"""CogVLM v1 in the layout of SwissArmyTransformer (SAT): names both ways, reading and writing.

No tensor is transposed or permuted; how the ranks of model parallelism cut them is in `lavish.checkpoints.sat`, the
config and the prompts in `sat_config.py`, LoRA in `sat_lora.py`. A SAT checkpoint keeps one `inv_freq` for all layers
and no tokenizer. torch is imported where weights are touched.
Source: THUDM/CogVLM, utils/models/cogvlm_model.py, eva_clip_model.py, mixin.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavish.checkpoints import sat
from lavish.checkpoints.output import Output, TargetOptions, TargetPlan, TensorFile
from lavish.checkpoints.release import Release
from lavish.checkpoints.rules import matches, plan
from lavish.checkpoints.tensor_map import Stored, TensorMap
from lavish.checkpoints.torch_file import TorchZipFormat
from lavish.common.errors import (
    CheckpointError,
    ConfigError,
    UnexpectedKeys,
    UnknownLayout,
    did_you_mean,
)
from lavish.models.cogvlm import manifest
from lavish.models.cogvlm.sat_config import ROPE_THETA, choose_template, config_fields, context_note, sat_fields
from lavish.models.cogvlm.sat_lora import apart, read_lora
from lavish.models.cogvlm.sat_names import INV_FREQ, RULES, SHARED_INV_FREQ, TO_SAT, source_names

if TYPE_CHECKING:
    import torch

# -- reading -----------------------------------------------------------------------------------------------------------


def open_release(path: Path) -> Release:
    """Open a SAT checkpoint of CogVLM v1 as a release: config.json's fields, the release's names, LoRA apart.

    Raises:
        UnknownLayout, ConfigError: not of CogVLM v1.
        CheckpointError: as `lavish.checkpoints.sat.open_checkpoint`; weights of 4 bits, or names that no CogVLM has.
    """
    root = sat.find_root(path)
    if root is None:
        raise UnknownLayout(f"{path}: no SAT checkpoint of CogVLM; it has no {sat.CONFIG}.")
    where = str(root / sat.CONFIG)
    fields = config_fields(sat.read_config(root), where)  # what the model is comes before whether its files are whole
    opened = sat.open_checkpoint(path)
    name = root.resolve().name
    fields["template_version"], note = choose_template(fields, name)
    notes = {"template_version": note, "max_position_embeddings": context_note(fields["max_position_embeddings"])}
    if "grounding" in name.lower():
        fields["grounding"] = True  # an iteration's folder, and what this is converted to, have other names
    weights, matrices = apart(opened.tensors, opened.fields)
    tensors = TensorMap(root, from_sat(root, weights, fields["num_hidden_layers"]))
    lora = read_lora(root, opened, matrices, tensors) if matrices else None
    read_tokenizer = partial(_load_tokenizer, vocab_size=fields["vocab_size"])
    said = {field: note for field, note in notes.items() if note is not None}
    return Release(fields, tensors, root, read_tokenizer, adapter=lora, notes=said)


def _load_tokenizer(folder: Path, vocab_size: int) -> Any:
    from lavish.processors.tokenizers import load_tokenizer  # it needs transformers

    return load_tokenizer(folder, vocab_size=vocab_size)


def from_sat(where: Path, infos: Mapping[str, Stored], num_layers: int) -> dict[str, Stored]:
    """Give stored tensors under the release's names, the one `inv_freq` under that of every layer.

    Raises:
        UnexpectedKeys: a name that no rule knows.
    """
    places = plan(infos, RULES)
    unknown = [target for target, source in places.sources.items() if target == source]
    if unknown:
        hint = " P-tuning's prefix is not read." if any("ptuning" in name for name in unknown) else ""
        raise UnexpectedKeys(
            f"{where}: {len(unknown)} of {len(infos)} tensors have names that no CogVLM v1 has in SAT's layout, first "
            f"{unknown[0]!r}.{did_you_mean(unknown[0], source_names())}{hint}"
        )
    found = {target: infos[source] for target, source in places.sources.items()}
    first = INV_FREQ.replace("*", "0")
    if first in found:
        found |= {INV_FREQ.replace("*", str(index)): found[first] for index in range(1, num_layers)}
    return found


# -- writing -----------------------------------------------------------------------------------------------------------

ITERATION = "1"


def plan_target(fields: Mapping[str, Any], tensors: TensorMap, options: TargetOptions) -> TargetPlan:
    """Say how a CogVLM v1 under the release's names is written as a SAT checkpoint of `model_parallel` ranks.

    Raises:
        ConfigError: CogVLM2, or sizes that do not divide by the ranks.
        MissingKeys, UnexpectedKeys, ShapeMismatch: the tensors are not those that the config asks for.
        CheckpointError: layers with different `inv_freq`.
    """
    where, num_ranks = str(tensors.path), options.model_parallel
    made_fields = sat_fields(fields, where, num_ranks)
    sizes = manifest.read_sizes(fields, where)
    manifest.check_tensors(sizes, tensors, "CogVLM v1", "SAT's layout of CogVLM v1")
    _check_divides(made_fields, num_ranks)
    tables = [name for name in tensors if matches((INV_FREQ,), name)]
    _check_tables(tensors, tables)
    sources = plan((name for name in tensors if name not in tables), TO_SAT).sources
    if tables:
        table = options.take(SHARED_INV_FREQ, tensors, tensors.info(tables[0]), (tables[0],))
    else:
        table = _computed_inv_freq(sizes.head_dim, tensors, options)
    formula = f"1 / {ROPE_THETA:g}^(2j / {sizes.head_dim}); the source stores none"
    return TargetPlan(
        files=tuple(_file(sources, table, tensors, options, rank) for rank in range(num_ranks)),
        texts={sat.CONFIG: json.dumps(made_fields, indent=4).encode() + b"\n", sat.LATEST: ITERATION.encode()},
        dropped=tuple((name, "equal to layer 0's; SAT keeps one inv_freq for all layers") for name in tables[1:]),
        made=() if tables else ((SHARED_INV_FREQ, formula),),
    )


def _file(
    sources: Mapping[str, str], table: Output, tensors: TensorMap, options: TargetOptions, rank: int
) -> TensorFile:
    """Say what a rank's file holds: its shares, and `inv_freq`."""
    num_ranks = options.model_parallel
    outputs = [
        options.take(target, tensors, _share(target, tensors.info(source), rank, num_ranks), (source,))
        for target, source in sources.items()
    ]
    name = f"{ITERATION}/{sat.RANK_FILE.format(rank)}"
    return TensorFile(name, (*outputs, table), partial(TorchZipFormat, sat.WEIGHTS))


def _share(target: str, info: Stored, rank: int, num_ranks: int) -> Stored:
    cut = sat.cut_of(target) if num_ranks > 1 else None
    is_small = target in sat.VOCABULARY and info.shape[0] < sat.LEAST_CUT_VOCABULARY
    return info if cut is None or is_small else sat.share(info, cut, rank, num_ranks)


def _check_divides(fields: Mapping[str, Any], num_ranks: int) -> None:
    """Check that the heads of both transformers, the vocabulary and the MLPs divide by the ranks."""
    if num_ranks < 1:
        raise ConfigError(f"model_parallel is {num_ranks}; it is a number from 1, in the releases 1, 2, 4 or 8.")
    vocabulary = {} if fields["vocab_size"] < sat.LEAST_CUT_VOCABULARY else {"vocab_size": fields["vocab_size"]}
    widths = vocabulary | {
        f"{prefix}{name}": table[name]
        for prefix, table in (("", fields), ("eva_args.", fields["eva_args"]))
        for name in ("num_attention_heads", "inner_hidden_size")
    }
    if odd := [f"{name} {value}" for name, value in widths.items() if value % num_ranks]:
        fits = [str(size) for size in (2, 4, 8) if not any(value % size for value in widths.values())]
        raise ConfigError(
            f"--model-parallel {num_ranks} does not divide {' and '.join(odd)}; this model can be cut into "
            f"{', '.join(fits) or 'no shares'}{' shares' if fits else ''}."
        )


def _check_tables(tensors: TensorMap, names: Iterable[str]) -> None:
    """Check that the layers have the same `inv_freq`: SAT keeps one."""
    import torch

    first: torch.Tensor | None = None
    for name in names:
        if first is None:
            first = tensors[name]
        elif not torch.equal(tensors[name], first):
            raise CheckpointError(
                f"{tensors.path}: {name!r} differs from layer 0's, and SAT keeps one inv_freq for all layers. In every "
                "CogVLM they are equal: the checkpoint is damaged, or of another model."
            )


def _computed_inv_freq(head_dim: int, tensors: TensorMap, options: TargetOptions) -> Output:
    """Say that the table is computed, in the dtype of the weights, as the release builds it."""
    dtype = options.dtype_of(tensors.info("lm_head.weight").dtype)

    def make() -> torch.Tensor:
        import torch

        from lavish.models.cogvlm.model import reference_inv_freq

        return reference_inv_freq(head_dim, ROPE_THETA, getattr(torch, dtype))

    return Output(SHARED_INV_FREQ, (head_dim // 2,), dtype, make)
