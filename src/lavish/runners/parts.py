"""What learns in a model and what it takes, by part."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from torch import nn


@dataclass
class Part:
    """One part of the model."""

    trained: int = 0
    """Parameters that learn."""
    frozen: int = 0
    """Parameters that do not."""
    weight_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0


def parts_of(model: nn.Module, optimizer: str) -> dict[str, Part]:
    """Count parameters and bytes by part; a tied weight counts once. AdamW keeps two numbers a weight, Muon one."""
    parts: dict[str, Part] = defaultdict(Part)
    for name, weight in model.named_parameters():
        part = parts[part_name(name)]
        size = weight.numel() * weight.element_size()
        part.weight_bytes += size + _scale_bytes(weight)
        if weight.requires_grad:
            part.trained += weight.numel()
            part.gradient_bytes += size
            part.optimizer_bytes += size * (1 if optimizer == "muon" and weight.ndim == 2 else 2)
        else:
            part.frozen += weight.numel()
    return dict(parts)


def _scale_bytes(weight: nn.Parameter) -> int:
    """Give what lies beside a matrix in nf4: the scales of its blocks, and theirs."""
    state, size = getattr(weight, "quant_state", None), 0  # bitsandbytes alone has it
    while state is not None:
        size += sum(one.nbytes for one in (state.absmax, state.code) if one is not None)
        state = state.state2
    return size


def part_name(name: str) -> str:
    """Give the part that a weight is of: the first name that tells one, and whether it is an adapter's."""
    bare = re.sub(r"^(?:network\.)?(?:base_model\.model\.)?(?:(?:model|transformer)\.(?=\w+\.))?", "", name)
    first, _, rest = bare.partition(".")
    if first == "vision" and rest:
        first = f"vision.{rest.partition('.')[0]}"
    return f"{first} (LoRA)" if ".lora_" in name else first
