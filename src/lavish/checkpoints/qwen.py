"""Names of a released Qwen v1, and of a LoRA on it, as the decoder of `lavish.nn.qwen` spells them.

Source: Qwen/Qwen-7B-Chat (index of its shards); adapters of WatchTower-Liu/VLM-learning.
"""

from __future__ import annotations

from lavish.checkpoints.rules import Drop, Rename, Rule, Split


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
