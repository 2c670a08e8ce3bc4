"""The released way of running CogVLM2's decoder on our weights, written anew from its description: the peer.

What it does as the release: every projection selects its tokens with a boolean mask and writes them into an empty
buffer with one; a float mask of (batch, 1, seq, seq) is made for every prompt and each layer looks whether it is a
plain triangle (then fused attention, else scores + mask in full); keys and values are repeated to all heads; the head
runs over every token, and its logits are cast to float32; every product is torch's own `F.linear`, as its `nn.Linear`
is (our layers take another way in float32). Not slower than the release where it need not be: the fused attention and
the rotary table are made by torch, and the rotation is ours.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from lavish.models.cogvlm.model import CogVLMForCausalLM, apply_rotary
from lavish.models.cogvlm.routing import position_ids_from, vision_expert_mask


@torch.inference_mode()
def prefill(
    network: CogVLMForCausalLM,
    input_ids: torch.Tensor,
    token_type_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    image_features: torch.Tensor,
    is_head_last_only: bool = False,
) -> torch.Tensor:
    """Run a prompt and keep its keys and values. (batch, seq) -> float32 logits (batch, seq or 1, vocab)."""
    model = network.model
    hidden_states = model.embed_tokens(input_ids)
    hidden_states = hidden_states.index_put([token_type_ids == 1], image_features.flatten(0, 1))
    position_ids = position_ids_from(token_type_ids, attention_mask)
    cos, sin = model.rotary(torch.arange(input_ids.shape[1], device=input_ids.device)[None])
    mask = additive_mask(attention_mask, hidden_states.dtype)
    cache = []
    for layer in model.layers:
        normed = rms_norm(layer.input_layernorm, hidden_states)
        int(position_ids.max())  # each layer of the release asks how long its rotary table must be
        update, keys_values = attention(
            layer.self_attn, normed, token_type_ids, cos[0][position_ids], sin[0][position_ids], mask
        )
        cache.append(keys_values)
        hidden_states = hidden_states + update
        normed = rms_norm(layer.post_attention_layernorm, hidden_states)
        hidden_states = hidden_states + mlp(layer.mlp, normed, token_type_ids)
    hidden_states = rms_norm(model.norm, hidden_states)
    return linear(network.lm_head, hidden_states[:, -1:] if is_head_last_only else hidden_states).float()


def rms_norm(norm, hidden_states):
    states = hidden_states.to(torch.float32)
    variance = states.pow(2).mean(-1, keepdim=True)
    return (norm.weight * (states * torch.rsqrt(variance + norm.eps))).to(hidden_states.dtype)


def additive_mask(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The causal mask and the padding's, summed, with the smallest number where nothing may be attended."""
    rows, seq = attention_mask.shape
    lowest, device = torch.finfo(dtype).min, attention_mask.device
    causal = torch.full((seq, seq), lowest, device=device)
    columns = torch.arange(seq, device=device)
    causal.masked_fill_(columns < (columns + 1).view(seq, 1), 0)
    inverted = 1.0 - attention_mask[:, None, None, :].expand(rows, 1, seq, seq).to(dtype)
    padding = inverted.masked_fill(inverted.to(torch.bool), lowest)
    return padding + causal.to(dtype)[None, None].expand(rows, 1, seq, seq)


def expert_masks(token_type_ids):
    is_vision = vision_expert_mask(token_type_ids)
    return is_vision, ~is_vision


def linear(layer, states):
    return F.linear(states, layer.weight, layer.bias)


def gated(layer, states):
    return linear(layer.down_proj, F.silu(linear(layer.gate_proj, states)) * linear(layer.up_proj, states))


def routed(product, vision_layer, language_layer, states, token_type_ids, width: int):
    is_vision, is_language = expert_masks(token_type_ids)
    output = torch.empty(*states.shape[:-1], width, dtype=states.dtype, device=states.device)
    output[is_vision] = product(vision_layer, states[is_vision])
    output[is_language] = product(language_layer, states[is_language])
    return output


def mlp(layer, hidden_states, token_type_ids):
    return routed(gated, layer.vision_mlp, layer.language_mlp, hidden_states, token_type_ids, hidden_states.shape[-1])


def attention(layer, hidden_states, token_type_ids, cos, sin, mask):
    rows, seq, hidden_size = hidden_states.shape
    heads, kv_heads, head_dim = layer.num_heads, layer.num_key_value_heads, layer.head_dim
    fused = routed(
        linear,
        layer.vision_expert_query_key_value,
        layer.language_expert_query_key_value,
        hidden_states,
        token_type_ids,
        (heads + 2 * kv_heads) * head_dim,
    )
    query, key, value = fused.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=2)
    query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    groups = heads // kv_heads
    wide_key, wide_value = (
        states.unsqueeze(2).expand(-1, -1, groups, -1, -1).contiguous().view(rows, heads, seq, head_dim)
        for states in (key, value)
    )
    context = attend(query, wide_key, wide_value, mask)
    context = context.transpose(1, 2).contiguous().reshape(rows, seq, hidden_size)
    update = routed(
        linear, layer.vision_expert_dense, layer.language_expert_dense, context, token_type_ids, hidden_size
    )
    return update, (key, value)


def attend(query, key, value, mask):
    is_open = mask == 0
    is_triangle = (is_open == torch.ones_like(is_open, dtype=torch.float).tril()).all()
    is_full = (is_open > 0).all()
    if is_full or is_triangle:
        return F.scaled_dot_product_attention(query, key, value, is_causal=not is_full)
    scores = torch.matmul(query / math.sqrt(query.shape[-1]), key.transpose(-1, -2)) + mask
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), value)
