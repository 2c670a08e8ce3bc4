"""CogVLM v1's names in SAT's layout, and the Hugging Face release's: one rule a line.

Source: THUDM/CogVLM, utils/models/cogvlm_model.py, eva_clip_model.py, mixin.py (names of the modules).
"""

from lavish.checkpoints.rules import Drop, Rename, Rule, reverse

_LAYER, _OURS = "transformer.layers.*", "model.layers.*"
_EVA, _TOWER = "mixins.eva.vit_model.", "model.vision."
_EVA_LAYER, _TOWER_LAYER = f"{_EVA}transformer.layers.*", f"{_TOWER}transformer.layers.*"
SHARED_INV_FREQ = "mixins.rotary.rotary_emb.inv_freq"
INV_FREQ = f"{_OURS}.self_attn.rotary_emb.inv_freq"

RULES: tuple[Rule, ...] = (
    Rename("transformer.word_embeddings.weight", "model.embed_tokens.weight"),
    Rename("transformer.final_layernorm.weight", "model.norm.weight"),
    Rename("mixins.lm.lm_head.weight", "lm_head.weight"),
    # decoder
    Rename(f"{_LAYER}.input_layernorm.weight", f"{_OURS}.input_layernorm.weight"),
    Rename(f"{_LAYER}.post_attention_layernorm.weight", f"{_OURS}.post_attention_layernorm.weight"),
    Rename(f"{_LAYER}.attention.query_key_value.weight", f"{_OURS}.self_attn.language_expert_query_key_value.weight"),
    Rename(f"{_LAYER}.attention.dense.weight", f"{_OURS}.self_attn.language_expert_dense.weight"),
    Rename(
        "mixins.rotary.vision_query_key_value_list.*.weight",
        f"{_OURS}.self_attn.vision_expert_query_key_value.weight",
    ),
    Rename("mixins.rotary.vision_dense_list.*.weight", f"{_OURS}.self_attn.vision_expert_dense.weight"),
    Rename("mixins.mlp.gate_proj.*.weight", f"{_OURS}.mlp.language_mlp.gate_proj.weight"),
    Rename(f"{_LAYER}.mlp.dense_h_to_4h.weight", f"{_OURS}.mlp.language_mlp.up_proj.weight"),
    Rename(f"{_LAYER}.mlp.dense_4h_to_h.weight", f"{_OURS}.mlp.language_mlp.down_proj.weight"),
    Rename("mixins.mlp.vision_gate_proj.*.weight", f"{_OURS}.mlp.vision_mlp.gate_proj.weight"),
    Rename("mixins.mlp.vision_dense_h_to_4h_list.*.weight", f"{_OURS}.mlp.vision_mlp.up_proj.weight"),
    Rename("mixins.mlp.vision_dense_4h_to_h_list.*.weight", f"{_OURS}.mlp.vision_mlp.down_proj.weight"),
    # One for all layers: `from_sat` and `plan_target` copy and gather the others.
    Rename(SHARED_INV_FREQ, INV_FREQ.replace("*", "0")),
    # projector
    Rename("mixins.eva.boi", f"{_TOWER}boi"),
    Rename("mixins.eva.eoi", f"{_TOWER}eoi"),
    Rename("mixins.eva.linear_proj.*.*", f"{_TOWER}linear_proj.*.*"),
    # tower
    Rename(f"{_EVA}mixins.patch_embedding.proj.*", f"{_TOWER}patch_embedding.proj.*"),
    Rename(f"{_EVA}transformer.word_embeddings.weight", f"{_TOWER}patch_embedding.cls_embedding"),
    Rename(f"{_EVA}transformer.position_embeddings.weight", f"{_TOWER}patch_embedding.position_embedding.weight"),
    Rename(f"{_EVA_LAYER}.input_layernorm.*", f"{_TOWER_LAYER}.input_layernorm.*"),
    Rename(f"{_EVA_LAYER}.post_attention_layernorm.*", f"{_TOWER_LAYER}.post_attention_layernorm.*"),
    Rename(f"{_EVA_LAYER}.attention.query_key_value.*", f"{_TOWER_LAYER}.attention.query_key_value.*"),
    Rename(f"{_EVA_LAYER}.attention.dense.*", f"{_TOWER_LAYER}.attention.dense.*"),
    Rename(f"{_EVA_LAYER}.mlp.dense_h_to_4h.*", f"{_TOWER_LAYER}.mlp.fc1.*"),
    Rename(f"{_EVA_LAYER}.mlp.dense_4h_to_h.*", f"{_TOWER_LAYER}.mlp.fc2.*"),
)
"""From SAT's names to the Hugging Face release's."""
TO_SAT: tuple[Rule, ...] = (*reverse(RULES), Drop(INV_FREQ, why="SAT keeps one inv_freq for all layers"))
"""Back; of the layers' `inv_freq`, which are equal, the first one's name goes over."""


def source_names() -> list[str]:
    """Give SAT's names as far as they are of one tensor each."""
    return [rule.source for rule in RULES if isinstance(rule, Rename) and "*" not in rule.source]
