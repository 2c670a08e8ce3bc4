"""CogVLM and CogVLM2: a decoder with one weight set for text and one for image tokens, behind an EVA2-CLIP-E tower.

Source: THUDM/cogvlm2-llama3-chat-19B, modeling_cogvlm.py and visual.py, read through the copy Niky-san/cogvlm2_surce;
v1 by its SAT model (THUDM/CogVLM, utils/models). Module names are the released key names. Not here: positions and
routing (routing.py), prompts and pixels (processor.py), reading checkpoints, sampling (transformers' `generate`).

How the experts are run: the decoder keeps two streams of tokens, language and vision, through all layers. They meet in
attention only, so a layer needs no boolean index, and a decoding step has no vision stream (CogVLM2-Video never has).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from lavish.common.errors import ConfigError, PromptError
from lavish.models.cogvlm.config import CogVLMConfig
from lavish.models.cogvlm.routing import (
    ExpertRouting,
    ForwardPlan,
    decode_plan,
    position_ids_from,
    prefill_plan,
    vision_expert_mask,
)
from lavish.nn.eva2_clip import EVA2CLIPModel
from lavish.nn.generation import RopeDeltasGenerationMixin
from lavish.nn.image_steps import ImageStep
from lavish.nn.joined_rows import JoinedRows
from lavish.nn.linear import Linear
from lavish.nn.losses import joined_loss, logits_and_loss

MANY_TOKENS = 64  # from here on a norm saves memory traffic, below it (a decoding step) it saves calls

__all__ = ["CogVLMForCausalLM", "CogVLMModel", "ExpertRouting", "position_ids_from", "vision_expert_mask"]


def _is_in_place_allowed() -> bool:
    """Whether results may be overwritten: no gradient is kept, and no compiler is there to fuse by itself. In eager
    mode on a CPU fresh memory costs up to ten times the arithmetic of these steps (page faults).
    """
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


# -- rotary embedding --------------------------------------------------------------------------------------------------


def reference_inv_freq(head_dim: int, base: float, dtype: torch.dtype) -> torch.Tensor:
    """Build `inv_freq` as the release does under a default dtype: each step in it, not float32 cast at the end."""
    exponent = torch.arange(0, head_dim, 2, device="cpu").to(dtype) / head_dim
    return 1.0 / (base**exponent)


def rotary_table(position_ids: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give cos and sin, each (*position_ids.shape, head_dim / 2): positions and angles in the dtype of `inv_freq`.

    Trap: that is the release's arithmetic. In bf16 position 257 equals 256; `rope="float32"` passes a float32 table.
    """
    angles = position_ids[..., None].to(inv_freq.dtype) * inv_freq
    return angles.cos(), angles.sin()


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn (batch, seq, heads, head_dim) by (batch, seq, 1, head_dim / 2): halves, not pairs; arithmetic in float32."""
    cos, sin = cos.float(), sin.float()
    first, second = states.float().chunk(2, dim=-1)
    if not _is_in_place_allowed():
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(states.dtype)
    turned = torch.empty(states.shape, dtype=torch.float32, device=states.device)
    low, high = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=high).addcmul_(first, sin)
    return turned.to(states.dtype)


class RotaryEmbedding(nn.Module):
    """Holder of the release's persistent buffer `inv_freq`, one a layer; a forward makes its table from the first."""

    inv_freq: torch.Tensor

    def __init__(self, head_dim: int, base: float):
        super().__init__()
        self.head_dim, self.base = head_dim, base
        inv_freq = reference_inv_freq(head_dim, base, torch.get_default_dtype())
        self.register_buffer("inv_freq", inv_freq.to(torch.get_default_device()))  # of a network on the meta device too


# -- decoder -----------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Root mean square norm. Trap: the weight multiplies in float32 before the cast back (Llama's casts before)."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states = hidden_states.float()
        if not _is_in_place_allowed() or states.shape[0] < MANY_TOKENS:
            return F.rms_norm(states, self.weight.shape, self.weight.float(), self.eps).to(hidden_states.dtype)
        mean_square = torch.linalg.vector_norm(states, dim=-1, keepdim=True).square_().div_(states.shape[-1])
        normed = states * mean_square.add_(self.eps).rsqrt_()  # the same without a full-size temporary
        return normed.mul_(self.weight.float()).to(hidden_states.dtype)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    implementation: str = "sdpa",
) -> torch.Tensor:
    """Attend with grouped heads: key/value head j serves query heads j*g .. j*g+g-1.

    Args:
        mask: None, bool (True = attend) or additive, broadcastable to (batch, 1, q, k).
        is_causal: each query sees the keys up to its own; only with mask None and as many queries as keys.
    Shapes: query (batch, heads, q, head_dim), key and value (batch, kv_heads, k, head_dim) -> like query.
    """
    batch, heads, q_len, head_dim = query.shape
    kv_heads = key.shape[1]
    if implementation == "eager":
        return _attend_eager(query, key, value, mask, is_causal)
    if q_len == 1 and kv_heads != heads:  # decoding: the heads of a group become queries, and keys are read once
        grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
        return F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask).view(batch, heads, 1, head_dim)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=kv_heads != heads
    )


def _attend_eager(query, key, value, mask, is_causal):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:  # the smallest finite number: a row without a key gives no NaN
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype) @ value


@dataclass(frozen=True)
class Attending:
    """What the attention of every layer shares in one forward."""

    routing: ExpertRouting
    mask: torch.Tensor | None
    is_causal: bool
    is_prefill: bool
    implementation: str

    def to(self, device, **_) -> "Attending":
        """On another device; what accelerate's hooks call where the layers of one network live on several."""
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, routing=self.routing.to(device), mask=mask)


class VisionExpertAttention(nn.Module):
    """Attention in which text and image tokens have projections of their own and see one another.

    Rows of a fused projection: q (heads), k, v (kv heads), not interleaved. CogVLM2's image expert alone has a bias.
    """

    def __init__(self, config: CogVLMConfig, layer_idx: int):
        super().__init__()
        self.num_heads, self.head_dim, self.layer_idx = config.num_attention_heads, config.head_dim, layer_idx
        self.num_key_value_heads = config.num_key_value_heads or config.num_attention_heads
        hidden_size, out = config.hidden_size, (self.num_heads + 2 * self.num_key_value_heads) * config.head_dim
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rotary_base)
        if not config.is_video:
            self.vision_expert_query_key_value = Linear(hidden_size, out, bias=config.version == 2)
            self.vision_expert_dense = Linear(hidden_size, hidden_size, bias=False)
        self.language_expert_query_key_value = Linear(hidden_size, out, bias=False)
        self.language_expert_dense = Linear(hidden_size, hidden_size, bias=False)

    def forward(self, language, vision, cos, sin, attending: Attending, past_key_values, is_last_only: bool):
        """Give what both streams add to their residuals; with `is_last_only` the last column's, and no vision."""
        fused = attending.routing.merge(
            self.language_expert_query_key_value(language),
            None if vision is None else self.vision_expert_query_key_value(vision),
            rows=cos.shape[0],
        )  # (batch, seq, (heads + 2 kv) * head_dim)
        fused = fused.unflatten(-1, (-1, self.head_dim))
        turned, value = fused.split((self.num_heads + self.num_key_value_heads, self.num_key_value_heads), dim=2)
        turned = apply_rotary(turned, cos, sin)
        query, key = turned.split((self.num_heads, self.num_key_value_heads), dim=2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if past_key_values is not None:
            cached = past_key_values.update(key, value, self.layer_idx)
            if not attending.is_prefill:  # a prefill sees its own keys only, not the empty rest of a static cache
                key, value = cached
        mask, is_causal = attending.mask, attending.is_causal
        if is_last_only:  # the last query sees all keys that its mask leaves
            query, is_causal = query[:, :, -1:], False
            mask = mask if mask is None else mask[:, :, -1:]
        attended = attend(query, key, value, mask, is_causal, attending.implementation).transpose(1, 2)
        if is_last_only:
            return self.language_expert_dense(attended.flatten(2).squeeze(1)), None
        language, vision = attending.routing.split(attended)
        return self.language_expert_dense(language), None if vision is None else self.vision_expert_dense(vision)


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = F.silu(self.gate_proj(hidden_states)), self.up_proj(hidden_states)
        return self.down_proj(gate.mul_(up) if _is_in_place_allowed() else gate * up)


class VisionExpertMLP(nn.Module):
    """One MLP a stream."""

    def __init__(self, config: CogVLMConfig):
        super().__init__()
        self.language_mlp = MLP(config.hidden_size, config.intermediate_size)
        if not config.is_video:
            self.vision_mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, language: torch.Tensor, vision: torch.Tensor | None):
        return self.language_mlp(language), None if vision is None else self.vision_mlp(vision)


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm layer on two streams: language (tokens, hidden) and vision (tokens, hidden) or None."""

    def __init__(self, config: CogVLMConfig, layer_idx: int):
        super().__init__()
        self.self_attn = VisionExpertAttention(config, layer_idx)
        self.mlp = VisionExpertMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, language, vision, cos, sin, attending: Attending, past_key_values=None, is_last_only=False):
        norm = self.input_layernorm
        normed = norm(language), vision if vision is None else norm(vision)
        updates = self.self_attn(*normed, cos, sin, attending, past_key_values, is_last_only)
        if is_last_only:
            language, vision = attending.routing.last(language, rows=cos.shape[0]), None
        language, vision = language + updates[0], vision if vision is None else vision + updates[1]
        norm = self.post_attention_layernorm
        updates = self.mlp(norm(language), vision if vision is None else norm(vision))
        return language + updates[0], vision if vision is None else vision + updates[1]


class CogVLMModel(nn.Module):
    """Embedding, tower and decoder without the head. Takes explicit positions and routing."""

    def __init__(self, config: CogVLMConfig):
        super().__init__()
        vision = config.tower
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vision = EVA2CLIPModel(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            num_channels=vision.in_channels,
            num_positions=vision.num_patches + 1,
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_hidden_layers,
            num_attention_heads=vision.num_heads,
            intermediate_size=vision.intermediate_size,
            layer_norm_eps=vision.layer_norm_eps,
            out_size=config.hidden_size,
            projector_intermediate_size=config.intermediate_size,
            merge_size=vision.hidden_size if config.version == 2 else None,
        )

    def embed(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed the ids and lay the image features over the slots of type 1, row after row.

        Trap: slots are found by type only; the placeholder id is the pad id. (batch, seq) -> (batch, seq, hidden).
        """
        inputs_embeds = self.embed_tokens(input_ids)
        if image_features is None or token_type_ids is None:
            return inputs_embeds
        return self.place(inputs_embeds, token_type_ids == 1, image_features)

    @staticmethod
    def place(inputs_embeds: torch.Tensor, is_image_slot: torch.Tensor, image_features: torch.Tensor) -> torch.Tensor:
        """Lay features (images, tokens, hidden) over the True slots of (batch, seq) without waiting for the device."""
        features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(is_image_slot[..., None], features)

    def rotary(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give cos and sin of the positions, (batch, seq, 1, head_dim / 2), by the config's `rope`."""
        inv_freq = self.get_buffer("layers.0.self_attn.rotary_emb.inv_freq")
        if self.config.rope == "float32":
            exponent = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=inv_freq.device)
            inv_freq = 1.0 / (self.config.rotary_base ** (exponent / self.config.head_dim))
        cos, sin = rotary_table(position_ids.to(inv_freq.device), inv_freq)
        return cos[:, :, None], sin[:, :, None]

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        routing: ExpertRouting | None = None,
        past_key_values: Cache | None = None,
        all_hidden_states: list[torch.Tensor] | None = None,
        is_last_only: bool = False,
    ) -> torch.Tensor:
        """Run the decoder.

        Args:
            position_ids: (batch, seq) rotary positions, taken as they are.
            attention_mask: None (causal); (batch, past + seq), 0 on padding (causal too); or a 4D mask (batch, 1, q, k)
                that stands alone: bool with True = attend, or additive.
            routing: None is `ExpertRouting.text_only()`.
            all_hidden_states: a list that gets the input of every layer and the output, for inspection.
            is_last_only: give the last column only, and leave out what nothing reads any more: the last layer's other
                queries and its image expert.
        Shapes: (batch, seq, hidden) -> (batch, seq or 1, hidden), after the final norm.
        """
        routing = routing or ExpertRouting.text_only()
        rows, seq = inputs_embeds.shape[:2]
        cos, sin = self.rotary(position_ids)
        mask, is_causal, is_prefill = self._mask(attention_mask, rows, seq, past_key_values, inputs_embeds.device)
        attending = Attending(routing, mask, is_causal, is_prefill, self.config._attn_implementation or "sdpa")
        is_last_only = is_last_only and seq > 1
        language, vision = routing.split(inputs_embeds)
        for index, layer in enumerate(self.layers):
            if all_hidden_states is not None:
                all_hidden_states.append(routing.to(language.device).merge(language, vision, rows))
            language, vision = layer(
                language,
                vision,
                cos=cos,
                sin=sin,
                attending=attending,
                past_key_values=past_key_values,
                is_last_only=is_last_only and index == len(self.layers) - 1,
            )
        if is_last_only:
            return self.norm(language[:, None])
        hidden_states = self.norm(routing.to(language.device).merge(language, vision, rows))
        if all_hidden_states is not None:
            all_hidden_states.append(hidden_states)
        return hidden_states

    def _mask(self, attention_mask, rows, seq, past_key_values, device):
        """Give (mask or None, is_causal, is_prefill); no mask is made where causality alone says it all."""
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if seq > 1:
            past = int(past)  # a static cache counts on the device: the one wait of a prefill
        is_prefill = isinstance(past, int) and past == 0
        if attention_mask is not None and attention_mask.ndim == 4:
            return attention_mask, False, is_prefill and attention_mask.shape[-1] == seq
        is_static = past_key_values is not None and past_key_values.is_compileable
        if attention_mask is None and (is_prefill or (seq == 1 and not is_static)):
            return None, seq > 1, is_prefill
        keys = seq if past_key_values is None or is_prefill else past_key_values.get_mask_sizes(seq, 0)[0]
        query_index = torch.arange(seq, device=device)[:, None] + past
        key_index = torch.arange(keys, device=device)
        mask = (key_index <= query_index)[None, None]  # (1, 1, seq, keys)
        if attention_mask is not None:
            if isinstance(past, int) and attention_mask.shape != (rows, past + seq):
                raise PromptError(
                    f"attention_mask has the shape {tuple(attention_mask.shape)}; with {past} tokens in the cache and "
                    f"{seq} new ones it must be {(rows, past + seq)}: one column for every token seen so far."
                )
            real = F.pad(attention_mask != 0, (0, keys - attention_mask.shape[1]))[:, None, None]
            mask = mask & (real | (key_index == query_index))  # a padded query sees itself: no NaN on any backend
        return mask, False, is_prefill


# -- the public class --------------------------------------------------------------------------------------------------


@dataclass
class CogVLMOutputWithPast(CausalLMOutputWithPast):
    """transformers' output, and what the next step needs."""

    rope_deltas: torch.Tensor | None = None
    """(batch, 1), cache slots so far minus the next position: an image takes `num_image_tokens` slots, 3 positions."""


class CogVLMForCausalLM(PreTrainedModel, RopeDeltasGenerationMixin):
    """CogVLM or CogVLM2 with its head, by the config.

    Positions and expert routing follow from `token_type_ids` and `attention_mask` alone. `position_ids` is in the
    signature because PEFT and transformers' `generate` pass it, and is ignored: theirs counts every image slot and
    gives fluent, wrong text.
    """

    config: CogVLMConfig
    config_class = CogVLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "TransformerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _keys_to_ignore_on_load_missing = [r"rotary_emb\.inv_freq$"]  # weights.py says why

    def __init__(self, config: CogVLMConfig):
        super().__init__(config)
        self.model = CogVLMModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RotaryEmbedding):
            inv_freq = reference_inv_freq(module.head_dim, module.base, module.inv_freq.dtype)
            init.copy_(module.inv_freq, inv_freq.to(module.inv_freq.device))
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("boi", "eoi", "cls_embedding"):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Give the rows that replace an image's slots. (images, 3, S, S) -> (images, num_image_tokens, hidden)."""
        vision = self.model.vision
        device = pixel_values.device if vision.boi.is_meta else vision.boi.device  # meta: offloaded, accelerate moves
        return vision(pixel_values.to(device, vision.boi.dtype), self.config._attn_implementation or "sdpa")

    def image_steps(self) -> tuple[ImageStep, ...]:
        """Give the steps of `get_image_features`."""
        return self.model.vision.image_steps(self.config._attn_implementation or "sdpa")

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        rope_deltas: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> CogVLMOutputWithPast | tuple:
        """Run the network.

        Args:
            input_ids: (batch, seq); with a cache the new tokens only.
            attention_mask: (batch, past + seq), 0 on padding; None: no padding. A 4D mask goes to the decoder as it is.
            token_type_ids: (batch, seq) or (batch, past + seq), 1 on the image slots; None: no image in these tokens.
            pixel_values: (images, 3, S, S), one for each row that has image slots (of a video its frames), row by row.
            position_ids: ignored, see the class.
            inputs_embeds: instead of `input_ids`; image features are laid over its slots too.
            image_features: (images, num_image_tokens, hidden) of `get_image_features`; the tower is skipped.
            labels: (batch, seq), -100 = ignore; shifted by one here. The loss is the mean over label tokens.
            logits_to_keep: logits of the last so many columns only; 0: of all. With labels all; NO_LOGITS: none.
            rope_deltas: of the last output; None: read from the cache, where the last forward left them.
        Raises: PromptError if the image slots, their number and the images do not fit together.
        """
        if output_attentions:
            raise ConfigError("output_attentions was asked; this network never holds its attention weights.")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        plan = self._plan(input_ids, inputs_embeds, past_key_values, rope_deltas, attention_mask, token_type_ids)
        hidden_states = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        image_features = self._features(plan, pixel_values, image_features)
        if image_features is not None and plan.is_image_slot is not None:
            hidden_states = self.model.place(hidden_states, plan.is_image_slot, image_features)
        all_hidden_states = [] if output_hidden_states else None
        hidden_states = self.model(
            hidden_states,
            plan.position_ids,
            None if plan.is_unpadded else attention_mask,
            plan.routing,
            past_key_values,
            all_hidden_states,
            is_last_only=logits_to_keep == 1 and labels is None and not output_hidden_states,
        )
        if past_key_values is not None and plan.is_prefill:
            # State of the call: it lives and dies with its cache, never on the module.
            past_key_values.rope_deltas = plan.rope_deltas  # pyright: ignore[reportAttributeAccessIssue]
        logits, loss = logits_and_loss(self.lm_head, hidden_states, labels, logits_to_keep)
        output = CogVLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=None if all_hidden_states is None else tuple(all_hidden_states),
            rope_deltas=plan.rope_deltas,
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def joined_loss(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Give the loss of a batch for training, `forward`'s arguments, its rows joined (`nn/joined_rows.py`)."""
        mask, types = inputs["attention_mask"], inputs["token_type_ids"]
        rows = JoinedRows.of(mask)
        plan = self._plan(inputs["input_ids"], None, None, None, mask, types)
        hidden_states = self.model.embed_tokens(inputs["input_ids"])
        features = self._features(plan, inputs.get("pixel_values"), inputs.get("image_features"))
        if features is not None and plan.is_image_slot is not None:
            hidden_states = self.model.place(hidden_states, plan.is_image_slot, features)
        # A conversation ends with words, so no image of one looks like the beginning of the next one's.
        routing = ExpertRouting.from_token_type_ids(rows.join(types), (rows.segments >= 0).long())
        hidden_states = self.model(rows.join(hidden_states), rows.join(plan.position_ids), rows.mask, routing)
        return joined_loss(self.lm_head, hidden_states, rows, inputs["labels"])

    def _plan(self, input_ids, inputs_embeds, past_key_values, rope_deltas, attention_mask, token_type_ids):
        """Say where these tokens stand; one token after a cache is planned without looking at types or mask."""
        if (input_ids is None) == (inputs_embeds is None):
            raise PromptError("forward got both or none of input_ids and inputs_embeds; give exactly one.")
        tokens = input_ids if input_ids is not None else inputs_embeds
        if past_key_values is None:
            return prefill_plan(self.config, tokens, 0, None, attention_mask, token_type_ids)
        past = past_key_values.get_seq_length()
        if rope_deltas is None:
            rope_deltas = getattr(past_key_values, "rope_deltas", None)  # a cache that we did not fill has none
        if tokens.shape[1] == 1:
            return decode_plan(tokens, past, rope_deltas)
        return prefill_plan(self.config, tokens, int(past), rope_deltas, attention_mask, token_type_ids)

    def _features(self, plan: ForwardPlan, pixel_values, image_features):
        """Give the features of the images among these tokens, or None; checks that images and rows fit."""
        if not plan.is_prefill:
            return None
        given = image_features if image_features is not None else pixel_values
        found = 0 if given is None else given.shape[0]
        if found != plan.num_images:
            raise PromptError(
                f"{found} image(s) were given and {plan.num_images} row(s) or frame(s) of the batch have image slots "
                "(token_type_ids 1). Make the inputs with the processor's apply_chat_template."
            )
        if not plan.has_new_image:
            return None  # no image at all, or all of them are in the cache already
        if image_features is None:
            return self.get_image_features(pixel_values)
        expected = (plan.num_images, self.config.num_image_tokens, self.config.hidden_size)
        if tuple(image_features.shape) != expected:
            raise PromptError(
                f"image_features has the shape {tuple(image_features.shape)}; these rows take {expected}: what "
                "get_image_features gives."
            )
        return image_features
