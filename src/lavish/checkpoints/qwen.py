"""Names of a released Qwen v1, and of a LoRA on it, as the decoder of `lavish.nn.qwen` spells them.

Source: Qwen/Qwen-7B-Chat (index of its shards); adapters of WatchTower-Liu/VLM-learning.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lavish.checkpoints.json_file import read_object
from lavish.checkpoints.released import beside, in_folder
from lavish.checkpoints.rules import Drop, Rename, Rule, Split
from lavish.checkpoints.tensor_map import TensorMap
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


def released_config(text: Mapping[str, Any]) -> dict[str, Any]:
    """Give the config.json of a released Qwen for the `text_config` of one of ours: the way back of `read_qwen_config`.

    Raises:
        ConfigError: a size is absent.
    """
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "seq_length")
    if absent := [name for name in sizes if not isinstance(text.get(name), int)]:
        raise ConfigError(f"text_config lacks {absent[0]}, which a Qwen's config.json holds.")
    rope = text.get("rope_parameters")
    base = rope.get("rope_theta", 10000) if isinstance(rope, Mapping) else 10000
    return {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "model_type": "qwen",
        "tokenizer_class": "QWenTokenizer",
        **{name: text[name] for name in sizes},
        "intermediate_size": 2 * text["intermediate_size"],  # w1 and w2 together
        "kv_channels": text["hidden_size"] // text["num_attention_heads"],
        "layer_norm_epsilon": text.get("rms_norm_eps", 1e-6),
        "max_position_embeddings": text.get("max_position_embeddings", 8192),
        "initializer_range": text.get("initializer_range", 0.02),
        "rotary_emb_base": int(base) if float(base).is_integer() else base,
        "rotary_pct": 1.0,
        "use_dynamic_ntk": text.get("use_dynamic_ntk", True),
        "use_logn_attn": text.get("use_logn_attn", True),
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "no_bias": True,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_flash_attn": "auto",
        "bf16": False,
        "fp16": False,
        "fp32": False,
    }


RANK_FILE = "qwen.tiktoken"


def tokenizer_files(tensors: TensorMap, folder: str) -> tuple[dict[str, Path], dict[str, bytes]]:
    """Give a released tokenizer's files for a folder of the target: copies, and what is made of a tokenizer that
    lavish saved; both empty where the source has none.

    Raises:
        CheckpointError: a tokenizer.json that is no Qwen's.
    """
    if RANK_FILE in (found := beside(tensors, (RANK_FILE, "tokenizer_config.json"), ("", folder))):
        return in_folder(folder, found), {}
    saved = beside(tensors, ("tokenizer.json",))
    return {}, {f"{folder}/{RANK_FILE}": rank_file(path) for path in saved.values()}


def rank_file(path: Path) -> bytes:
    """Give the lines "base64 rank" for a tokenizer.json of byte pairs.

    Raises:
        CheckpointError: its ids do not begin with one for each byte sequence, in order.
    """
    model = read_object(path).get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    letters = _letters()
    ranks = sorted(vocab.items(), key=lambda item: item[1]) if isinstance(vocab, Mapping) else []
    if (
        not ranks
        or [rank for _, rank in ranks] != list(range(len(ranks)))
        or any(letter not in letters for token, _ in ranks for letter in token)
    ):
        raise CheckpointError(f"{path}: no tokenizer of byte pairs with ranks from 0 on, as a Qwen's; give its folder.")
    lines = (base64.b64encode(bytes(letters[letter] for letter in token)) + b" %d\n" % rank for token, rank in ranks)
    return b"".join(lines)


def _letters() -> dict[str, int]:
    """Give the byte that each letter of a byte-level vocabulary stands for: printable ones for themselves, the others
    in order for the letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
