"""Names of a released Qwen v1, and of a LoRA on it, as the decoder of `lavish.nn.qwen` spells them.

Source: Qwen/Qwen-7B-Chat (index of its shards); adapters of WatchTower-Liu/VLM-learning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lavish.checkpoints.rules import Drop, Rename, Rule, Split
from lavish.common.errors import CheckpointError, ConfigError


def qwen_rules(source: str = "", target: str = "language_model.") -> tuple[Rule, ...]:
    """Give the rules from a released Qwen to `QwenDecoder` (at the prefix `target`) and a module `lm_head` beside it.

    `source` is what a larger checkpoint puts before the names. The gate of the MLP is w2, the linear branch w1.
    """
    block, layer = f"{source}transformer.h.*", f"{target}layers.*"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    qkv = ("q_proj", "k_proj", "v_proj")
    return (
        Drop(f"{block}.attn.masked_bias", why="a constant of the code, stored by older files"),
        Drop(f"{block}.attn.rotary_emb.inv_freq", why="computed from the rotary base"),
        Drop(f"{source}transformer.rotary_emb.inv_freq", why="computed from the rotary base"),
        Rename(f"{source}lm_head.weight", "lm_head.weight"),
        Rename(f"{source}transformer.wte.weight", f"{target}embed_tokens.weight"),
        Rename(f"{source}transformer.ln_f.weight", f"{target}norm.weight"),
        Rename(f"{block}.ln_1.weight", f"{layer}.input_layernorm.weight"),
        Rename(f"{block}.ln_2.weight", f"{layer}.post_attention_layernorm.weight"),
        Split(f"{block}.attn.c_attn.weight", tuple(f"{attention}.{name}.weight" for name in qkv)),
        Split(f"{block}.attn.c_attn.bias", tuple(f"{attention}.{name}.bias" for name in qkv)),
        Rename(f"{block}.attn.c_proj.weight", f"{attention}.o_proj.weight"),
        Rename(f"{block}.mlp.w1.weight", f"{mlp}.up_proj.weight"),
        Rename(f"{block}.mlp.w2.weight", f"{mlp}.gate_proj.weight"),
        Rename(f"{block}.mlp.c_proj.weight", f"{mlp}.down_proj.weight"),
    )


LORA_TARGETS = MappingProxyType(
    {
        "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.c_proj": ("self_attn.o_proj",),
        "mlp.w1": ("mlp.up_proj",),
        "mlp.w2": ("mlp.gate_proj",),
        "mlp.c_proj": ("mlp.down_proj",),
    }
)
"""What a LoRA may be on, and what that is here."""
_LORA = re.compile(r"(.*?\.)?transformer\.h\.(\d+)\.((?:attn|mlp)\.\w+)\.(lora_[AB])\.weight")
_PEFT = "base_model.model."


def native_lora(
    fields: Mapping[str, Any], tensors: Mapping[str, Any], target: str = "language_model."
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give a LoRA on the released modules as one for `QwenDecoder` (at the prefix `target`); one for ours as it is.

    That of the fused c_attn becomes three with the same lora_A and a third of lora_B each: the same sum.

    Args:
        fields: adapter_config.json. tensors: by PEFT's names, without the adapter's name.
    Raises:
        ConfigError: an adapter whose ranks differ by module, or with biases: their names could not be carried over.
        CheckpointError: a lora_B whose rows are no thirds.
    """
    if not any(_LORA.fullmatch(name) for name in tensors):
        return dict(fields), dict(tensors)
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform"):
        if fields.get(name):
            raise ConfigError(f"adapter_config.json: {name} is {fields[name]!r}; merge the adapter where it was made.")
    made: dict[str, Any] = {}
    modules: set[str] = set()
    for name, value in tensors.items():
        found = _LORA.fullmatch(name)
        if found is None or found[3] not in LORA_TARGETS:
            made[name] = value  # told as unexpected, by its own name
            continue
        ours = LORA_TARGETS[found[3]]
        modules.update(ours)
        if found[4] == "lora_B" and value.shape[0] % len(ours):
            raise CheckpointError(f"{name!r} has {value.shape[0]} rows, which are not q, k and v of one size.")
        share = value.shape[0] // len(ours)
        for index, module in enumerate(ours):
            part = value[index * share : (index + 1) * share] if found[4] == "lora_B" else value
            made[f"{_PEFT}{target}layers.{found[2]}.{module}.{found[4]}.weight"] = part
    # As a pattern, because a CLIP tower has a q_proj too.
    pattern = rf"{re.escape(target)}layers\.\d+\.({'|'.join(re.escape(module) for module in sorted(modules))})"
    # Its base is a path of the machine that trained it, which peft would look up on the hub when it saves.
    return {**fields, "target_modules": pattern, "base_model_name_or_path": None}, made


def released_lora(
    fields: Mapping[str, Any], tensors: Mapping[str, Any], target: str = "language_model."
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give a LoRA on our modules as one on the released ones: the way back of `native_lora`.

    Raises:
        ConfigError: q, k and v of a layer have not one lora_A, or one of them has no LoRA: no LoRA on c_attn says that.
    """
    made: dict[str, Any] = {}
    targets: set[str] = set()
    numbers = (re.search(rf"{re.escape(target)}layers\.(\d+)\.", name) for name in tensors)
    for layer in sorted({int(found[1]) for found in numbers if found}):
        for released, ours in LORA_TARGETS.items():
            names = [f"{_PEFT}{target}layers.{layer}.{module}.lora_{{}}.weight" for module in ours]
            downs, ups = ([tensors.get(name.format(letter)) for name in names] for letter in "AB")
            if all(value is None for value in downs):
                continue
            if any(value is None for value in (*downs, *ups)) or not all((value == downs[0]).all() for value in downs):
                raise ConfigError(
                    f"layer {layer}: {', '.join(ours)} have not one lora_A, as a LoRA on {released} has. Train with "
                    "tie_shared_lora, or save the adapter as PEFT does."
                )
            place = f"{_PEFT}transformer.h.{layer}.{released}"
            made[f"{place}.lora_A.weight"] = downs[0]
            made[f"{place}.lora_B.weight"] = ups[0] if len(ups) == 1 else _stacked(ups)
            targets.add(released.removeprefix("attn.").removeprefix("mlp."))
    return {**fields, "target_modules": sorted(targets)}, made


def _stacked(parts: list[Any]) -> Any:
    import torch  # only what writes needs it

    return torch.cat(parts)
