"""The LoRA of CogVLM's SAT fine-tuning, as a PEFT adapter or added to the weights.

Source: THUDM/SwissArmyTransformer, sat/model/finetune/lora2.py; THUDM/CogVLM, finetune_demo/finetune_cogvlm_demo.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavish.checkpoints import sat
from lavish.checkpoints.output import Output, TargetOptions
from lavish.checkpoints.release import Lora
from lavish.checkpoints.rules import plan
from lavish.checkpoints.tensor_map import Stored, TensorMap
from lavish.common.errors import CheckpointError, MissingKeys, ShapeMismatch, shown
from lavish.models.cogvlm.sat_names import RULES

if TYPE_CHECKING:
    import torch

_ORIGINAL, _MATRIX = ".original.", re.compile(r"(.+)\.matrix_([AB])\.(\d)")
LORA_ALPHA = 1
"""Of lora2.py, which the release never changes: the scaling is 1 / rank."""


def apart(tensors: TensorMap, fields: Mapping[str, Any]) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """Give the weights under their plain names, and the matrices of the LoRA.

    Raises:
        CheckpointError: the weights below the LoRA are packed in 4 bits.
    """
    packed = [
        name
        for name, info in tensors.infos.items()
        if info.dtype in ("uint8", "int8") or "quant_state" in name or name.endswith((".absmax", ".quant_map"))
    ]
    if packed:
        raise CheckpointError(
            f"{tensors.path}: {packed[0]!r} and {len(packed) - 1} others are weights packed in 4 bits (use_qlora is "
            f"{shown(fields.get('use_qlora', False))}), which only the bitsandbytes that packed them can unpack. Take "
            "the LoRA's matrices to the unpacked release: merge them there with SAT (utils/merge_model.py without "
            "--use_qlora), and give the result."
        )
    matrices = {name: info for name, info in tensors.infos.items() if _MATRIX.fullmatch(name)}
    weights = {name.replace(_ORIGINAL, "."): info for name, info in tensors.infos.items() if name not in matrices}
    if len(weights) + len(matrices) != len(tensors):
        twice = next(name for name in tensors if _ORIGINAL in name and name.replace(_ORIGINAL, ".") in tensors)
        raise CheckpointError(f"{tensors.path}: holds {twice!r} beside the weight that it is the original of.")
    return weights, matrices


def read_lora(root: Path, opened: sat.SatCheckpoint, matrices: Mapping[str, Stored], tensors: TensorMap) -> Lora:
    """Give the LoRA as a PEFT adapter.

    One pair for each of query, key and value becomes one pair of thrice the rank: A laid together, B on a diagonal of
    blocks, alpha thrice as large, so that the scaling and the product are the same.

    Raises:
        CheckpointError: a pair is not whole, its shapes do not fit its weight, or the rank is not the config's.
    """
    places: dict[str, dict[tuple[str, int], Stored]] = {}
    for name, info in matrices.items():
        if (found := _MATRIX.fullmatch(name)) is not None:
            weight = next(iter(plan([f"{found[1]}.weight"], RULES).sources))
            places.setdefault(weight, {})[found[2], int(found[3])] = info
    pairs = {weight: _pairs(root, weight, found, tensors) for weight, found in places.items()}
    ranks = {pair[0].shape[0] for found in pairs.values() for pair in found}
    rank = opened.fields.get("lora_rank", min(ranks))
    if ranks != {rank}:
        raise CheckpointError(
            f"{root}: its LoRA has rank {', '.join(map(str, sorted(ranks)))} and {sat.CONFIG} says lora_rank "
            f"{shown(rank)}, which its scaling comes from. The two are not of one checkpoint."
        )
    scaling = LORA_ALPHA / rank
    return Lora(
        root,
        _adapter_fields(pairs, rank, tensors),
        tuple(output for weight, found in pairs.items() for output in _adapter(weight, found, opened.tensors)),
        {weight: partial(_delta, opened.tensors, found, scaling) for weight, found in pairs.items()},
    )


_Pairs = tuple[tuple[Stored, Stored], ...]


def _pairs(root: Path, weight: str, found: Mapping[tuple[str, int], Stored], tensors: TensorMap) -> _Pairs:
    """Give A and B of each block of a weight, checked against it."""
    count = max(index for _, index in found) + 1
    absent = [f"matrix_{kind}.{index}" for index in range(count) for kind in "AB" if (kind, index) not in found]
    if weight not in tensors:
        raise MissingKeys(f"{root}: has a LoRA for {weight!r} and no such weight.")
    if absent:
        raise MissingKeys(f"{root}: the LoRA of {weight!r} has no {absent[0]}; the file is not whole.")
    shape = tensors.info(weight).shape
    rows, columns = shape if len(shape) == 2 else (0, 0)
    pairs = tuple((found["A", index], found["B", index]) for index in range(count))
    for first, second in pairs:
        shapes = (first.shape, second.shape)
        rank = first.shape[0] if first.shape else 0
        if not rank or not rows or rows % count or shapes != ((rank, columns), (rows // count, rank)):
            raise ShapeMismatch(
                f"{root}: the LoRA of {weight!r}, which is {shape}, has matrices of {shapes[0]} and "
                f"{shapes[1]} for each of {count} parts; they do not fit."
            )
    return pairs


def _adapter_fields(pairs: Mapping[str, _Pairs], rank: int, tensors: TensorMap) -> dict[str, Any]:
    """Give the adapter_config.json."""
    modules = [weight.removesuffix(".weight") for weight in pairs]
    kinds = sorted({module.rpartition(".")[2] for module in modules})
    every = {name.removesuffix(".weight") for name in tensors if name.endswith(tuple(f".{k}.weight" for k in kinds))}
    largest = max(map(len, pairs.values()))
    smaller = {
        weight.removesuffix(".weight").rpartition(".")[2]: len(found)
        for weight, found in pairs.items()
        if len(found) < largest
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": largest * rank,
        "lora_alpha": largest * LORA_ALPHA,
        "rank_pattern": {kind: count * rank for kind, count in smaller.items()},
        "alpha_pattern": {kind: count * LORA_ALPHA for kind, count in smaller.items()},
        "target_modules": kinds if set(modules) == every else sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "base_model_name_or_path": None,
    }


def _adapter(weight: str, pairs: _Pairs, tensors: TensorMap) -> tuple[Output, Output]:
    """Say what PEFT's two matrices of a weight are made of."""
    module = f"base_model.model.{weight.removesuffix('.weight')}"
    stacked = sat.laid_together([first for first, _ in pairs], 0)
    last = [second for _, second in pairs]
    shape = (sum(part.shape[0] for part in last), sum(part.shape[1] for part in last))

    def diagonal() -> torch.Tensor:
        import torch

        return torch.block_diag(*(tensors.assemble(part) for part in last))

    return (
        TargetOptions().take(f"{module}.lora_A.weight", tensors, stacked, (weight,)),
        Output(f"{module}.lora_B.weight", shape, last[0].dtype, diagonal, (weight,)),
    )


def _delta(tensors: TensorMap, pairs: _Pairs, scaling: float) -> torch.Tensor:
    """Give what the LoRA adds to a weight, in float32."""
    import torch

    products = [tensors.assemble(last).float() @ tensors.assemble(first).float() for first, last in pairs]
    return torch.cat(products) * scaling
