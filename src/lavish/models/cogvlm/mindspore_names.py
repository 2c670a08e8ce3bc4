"""CogVLM2's names in MindFormers' checkpoints, and the Hugging Face release's: one rule a line.

The image model keeps the release's experts; the video model, which has none for images, is named as MindFormers' Llama
is, its q, k and v apart. Source: mindspore-lab/mindformers (v1.5.0), mindformers/models/cogvlm2/convert_weight.py,
cogvlm2image_llm.py (what model parallelism cuts).
"""

from __future__ import annotations

from lavish.checkpoints.rules import Drop, Merge, Rename, Rule, reverse

FREQS = "llm_model.model.freqs_mgr.freqs"
LORA_PREFIX = "llm_model.pet_model.lora_model."
"""What stands for `llm_model.` in a video model that was converted for LoRA."""
_LAYER, _OURS = "llm_model.model.layers.*", "model.layers.*"
_BLOCK, _TOWER = "vision_encoder.blocks.*", "model.vision.transformer.layers.*"
_PATCH, _ADAPTER, _VISION = "model.vision.patch_embedding.", "mlp_adapter.", "model.vision."
INV_FREQ = f"{_OURS}.self_attn.rotary_emb.inv_freq"
CLS_TOKEN, POSITIONS = f"{_PATCH}cls_embedding", f"{_PATCH}position_embedding.weight"
QUERY_KEY_VALUE = f"{_OURS}.self_attn.language_expert_query_key_value.weight"
PROJECTIONS = tuple(f"{_LAYER}.attention.{name}.weight" for name in ("wq", "wk", "wv"))

_COMMON: tuple[Rule, ...] = (
    Rename("llm_model.lm_head.weight", "lm_head.weight"),
    Rename("llm_model.model.tok_embeddings.embedding_weight", "model.embed_tokens.weight"),
    Rename("llm_model.model.norm_out.weight", "model.norm.weight"),
    Drop(FREQS, why="the rotary table, often in bf16; computed from the rotary base instead"),
    # tower; the two embeddings have one dimension more
    Rename("vision_encoder.cls_token", CLS_TOKEN),
    Rename("vision_encoder.pos_embed", POSITIONS),
    Rename("vision_encoder.patch_embed.proj.*", f"{_PATCH}proj.*"),
    Rename(f"{_BLOCK}.attn.qkv.*", f"{_TOWER}.attention.query_key_value.*"),
    Rename(f"{_BLOCK}.attn.proj.*", f"{_TOWER}.attention.dense.*"),
    Rename(f"{_BLOCK}.norm1.gamma", f"{_TOWER}.input_layernorm.weight"),
    Rename(f"{_BLOCK}.norm1.beta", f"{_TOWER}.input_layernorm.bias"),
    Rename(f"{_BLOCK}.norm2.gamma", f"{_TOWER}.post_attention_layernorm.weight"),
    Rename(f"{_BLOCK}.norm2.beta", f"{_TOWER}.post_attention_layernorm.bias"),
    Rename(f"{_BLOCK}.mlp.fc1.*", f"{_TOWER}.mlp.fc1.*"),
    Rename(f"{_BLOCK}.mlp.fc2.*", f"{_TOWER}.mlp.fc2.*"),
    # projector
    Rename(f"{_ADAPTER}boi", f"{_VISION}boi"),
    Rename(f"{_ADAPTER}eoi", f"{_VISION}eoi"),
    Rename(f"{_ADAPTER}conv.*", f"{_VISION}conv.*"),
    Rename(f"{_ADAPTER}linear_proj.norm1.gamma", f"{_VISION}linear_proj.norm1.weight"),
    Rename(f"{_ADAPTER}linear_proj.norm1.beta", f"{_VISION}linear_proj.norm1.bias"),
    Rename(f"{_ADAPTER}linear_proj.*.weight", f"{_VISION}linear_proj.*.weight"),
)
IMAGE_RULES: tuple[Rule, ...] = (
    *_COMMON,
    Rename(f"{_LAYER}.mlp.*.w1.weight", f"{_OURS}.mlp.*.gate_proj.weight"),
    Rename(f"{_LAYER}.mlp.*.w3.weight", f"{_OURS}.mlp.*.up_proj.weight"),
    Rename(f"{_LAYER}.mlp.*.w2.weight", f"{_OURS}.mlp.*.down_proj.weight"),
    Rename(f"{_LAYER}.input_layernorm.weight", f"{_OURS}.input_layernorm.weight"),
    Rename(f"{_LAYER}.post_attention_layernorm.weight", f"{_OURS}.post_attention_layernorm.weight"),
    Rename(f"{_LAYER}.self_attn.*.*", f"{_OURS}.self_attn.*.*"),  # q, k and v stay in one matrix
)
"""From MindFormers' names of the image model to the release's."""
VIDEO_RULES: tuple[Rule, ...] = (
    *_COMMON,
    Merge(PROJECTIONS, QUERY_KEY_VALUE),  # their lengths differ: `from_mindspore` and `plan_target` take the config's
    Rename(f"{_LAYER}.attention.wo.weight", f"{_OURS}.self_attn.language_expert_dense.weight"),
    Rename(f"{_LAYER}.feed_forward.w1.weight", f"{_OURS}.mlp.language_mlp.gate_proj.weight"),
    Rename(f"{_LAYER}.feed_forward.w3.weight", f"{_OURS}.mlp.language_mlp.up_proj.weight"),
    Rename(f"{_LAYER}.feed_forward.w2.weight", f"{_OURS}.mlp.language_mlp.down_proj.weight"),
    Rename(f"{_LAYER}.attention_norm.weight", f"{_OURS}.input_layernorm.weight"),
    Rename(f"{_LAYER}.ffn_norm.weight", f"{_OURS}.post_attention_layernorm.weight"),
)
"""From those of the video model."""
_TO_FREQS: tuple[Rule, ...] = (
    Rename(INV_FREQ.replace("*", "0"), FREQS),
    Drop(INV_FREQ, why="equal to layer 0's; MindFormers keeps one table for all layers"),
)
TO_IMAGE: tuple[Rule, ...] = (*_TO_FREQS, *reverse(IMAGE_RULES))
TO_VIDEO: tuple[Rule, ...] = (*_TO_FREQS, *reverse(VIDEO_RULES))
"""Back."""

CUTS: dict[str, int] = {
    "llm_model.lm_head.weight": 0,
    "llm_model.model.tok_embeddings.embedding_weight": 0,
    f"{_LAYER}.self_attn.language_expert_query_key_value.weight": 0,
    f"{_LAYER}.self_attn.vision_expert_query_key_value.weight": 0,
    f"{_LAYER}.self_attn.vision_expert_query_key_value.bias": 0,
    f"{_LAYER}.self_attn.language_expert_dense.weight": 1,
    f"{_LAYER}.self_attn.vision_expert_dense.weight": 1,
}
"""Axis along which model parallelism cuts a tensor of the image model; the others are whole in each rank.

Trap: the rows of q, k and v are cut as they follow each other, not by heads: a rank's part of one is no attention."""

EXTRAS = ("epoch_num", "step_num", "learning_rate", "global_step", "loss_scale", "scale_sense", "current_iterator_step")
OPTIMIZER = ("adam_m.", "adam_v.", "moment1.", "moment2.", "accu_grads.")
"""What a training run saves beside the weights: whole names, and beginnings of names."""
LORA_MARK = "mindpet_delta_lora"


def source_names() -> list[str]:
    """Give MindFormers' names as far as they are of one tensor each."""
    rules = {*IMAGE_RULES, *VIDEO_RULES}
    return sorted(rule.source for rule in rules if isinstance(rule, Rename) and "*" not in rule.source)
