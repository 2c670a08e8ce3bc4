"""LoRA added to stored weights, tensor by tensor, and adapters as files.

The product is computed and added in float32 and rounded once, to the weight's dtype.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lavish.checkpoints.output import Output, TargetOptions, TargetPlan, safetensors_files
from lavish.checkpoints.release import Lora
from lavish.common.errors import CheckpointError, ConfigError, MissingKeys
from lavish.inference.adapters import ADAPTER_CONFIG, NativeAdapter, read_adapter

PREFIX = "base_model.model."
"""Before every name of an adapter's file."""
_LORA = re.compile(r"(.+)\.lora_([AB])\.weight")
_BEYOND = ("lora_embedding_", "lora_magnitude_vector", "lora_bias", ".lora_B.bias")
"""Parts of names that say more than a product of two matrices."""


@dataclass(frozen=True)
class Delta:
    """What an adapter does to one tensor: adds a product of two matrices, or takes its place."""

    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    scaling: float = 1.0
    replacement: torch.Tensor | None = None
    product: Callable[[], torch.Tensor] | None = None
    """Gives what is added, in float32; as the release does, it is cast to the weight's dtype first."""

    def added(self, output: Output, options: TargetOptions, whole: Callable[[], torch.Tensor]) -> Output:
        """Give the output that is written instead; `whole` gives the tensor as it is stored.

        Raises:
            CheckpointError: the matrices do not fit the weight.
        """
        if self.replacement is not None:
            if tuple(self.replacement.shape) != output.shape:
                raise CheckpointError(
                    f"{output.name!r} is {output.shape} and the adapter's is {tuple(self.replacement.shape)}."
                )
            value = self.replacement
            return replace(output, make=lambda: options.cast(output.name, value, output.dtype), release=_nothing)
        if self.product is not None:
            product = self.product

            def add() -> torch.Tensor:
                value = whole()
                return options.cast(output.name, value + product().to(value.dtype), output.dtype)

            return replace(output, make=add, release=_nothing)
        up, down = self.up, self.down
        if up is None or down is None:  # `deltas` makes no such one
            return output
        if (up.shape[0], down.shape[1]) != output.shape or up.shape[1] != down.shape[0]:
            raise CheckpointError(
                f"{output.name!r} is {output.shape} and the adapter's matrices are {tuple(up.shape)} and "
                f"{tuple(down.shape)}; it was trained on another model."
            )

        def make() -> torch.Tensor:
            value = whole().float()
            value.addmm_(up.float(), down.float(), alpha=self.scaling)
            return options.cast(output.name, value, output.dtype)

        return replace(output, make=make, release=_nothing)


def deltas(adapter: Path | Lora, native: NativeAdapter | None, names: Mapping[str, Any]) -> dict[str, Delta]:
    """Read an adapter as what it does to each tensor of a network, whose tensors are `names`.

    Raises:
        ConfigError: of another kind than plain LoRA.
        CheckpointError: a tensor that has no place in the network, or half a pair.
    """
    if isinstance(adapter, Lora):
        return {name: Delta(product=product) for name, product in adapter.deltas.items()}
    folder = adapter
    fields, tensors, _ = read_adapter(folder, native)
    where = folder / ADAPTER_CONFIG
    if fields.get("use_dora") or any(part in name for name in tensors for part in _BEYOND):
        raise ConfigError(
            f"{where}: this LoRA is more than products of two matrices (DoRA, embeddings or biases), and lavish merges "
            "those only. Merge it where it was trained: peft's merge_and_unload, then save."
        )
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    found: dict[str, Delta] = {}
    for name, value in tensors.items():
        plain = name.removeprefix(PREFIX)
        if match := _LORA.fullmatch(plain):
            pairs.setdefault(match[1], {})[match[2]] = value
        else:
            found[plain] = Delta(replacement=value)
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise MissingKeys(f"{folder}: {module!r} has lora_{next(iter(pair))} and not the other one of the pair.")
        found[f"{module}.weight"] = Delta(pair["A"], pair["B"], _scaling(fields, module))
    if strange := [name for name in found if name not in names]:
        raise CheckpointError(
            f"{folder}: {len(strange)} of the {len(found)} weights that it changes are not in the model, first "
            f"{strange[0]!r}; it was trained on another one."
        )
    return found


def plan_adapter(
    adapter: Path | Lora, native: NativeAdapter | None, options: TargetOptions, base: str | None
) -> TargetPlan:
    """Say how an adapter is written as a PEFT folder: safetensors, and adapter_config.json."""
    fields, tensors, _ = read_adapter(adapter, native)
    if base is not None:
        fields["base_model_name_or_path"] = base
    return adapter_plan(fields, tensors, options)


def adapter_plan(fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], options: TargetOptions) -> TargetPlan:
    """Say how fields and tensors under PEFT's names are written as a PEFT folder."""
    outputs: list[Output] = []
    for name, value in tensors.items():
        dtype = options.dtype_of(str(value.dtype).removeprefix("torch."))

        def make(name: str = name, value: torch.Tensor = value, dtype: str = dtype) -> torch.Tensor:
            return options.cast(name, value, dtype)

        outputs.append(Output(name, tuple(value.shape), dtype, make, (name,)))
    files, _ = safetensors_files(outputs, sum(output.nbytes for output in outputs) + 1, stem="adapter_model")
    text = json.dumps(fields, indent=2, sort_keys=True, default=sorted)  # the only values that JSON lacks are sets
    return TargetPlan(files, {ADAPTER_CONFIG: text.encode() + b"\n"})


def _scaling(fields: Mapping[str, Any], module: str) -> float:
    rank = _by_pattern(fields.get("rank_pattern"), module, fields.get("r", 8))
    alpha = _by_pattern(fields.get("alpha_pattern"), module, fields.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Give the value of the first pattern that a module's name ends in, as peft looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _nothing() -> None:
    """Have nothing to give back."""
