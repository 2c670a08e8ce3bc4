"""GLM-4V-9B: a GLM-4 decoder behind an EVA2-CLIP-E tower whose rows take the place of three tokens.

Source: modeling_chatglm.py of THUDM/glm-4v-9b, read through XuRui314/GLM4v-Finetune (modeling_chatglm.py), and
visual.py, read through huggingface/optimum-habana (optimum/habana/transformers/models/glm4v/visual.py). Module names
are the released key names. Not here: prompts and pixels (processor.py), reading checkpoints, sampling (transformers'
`generate`).

`input_ids` are expanded: an image is boi, as many pad ids as it has patches, eoi. Its slots are found by boi and eoi,
which user text cannot contain, and no mask is ever derived from the pad id, which stands in them.
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
from lavish.models.glm4v_9b import places
from lavish.models.glm4v_9b.config import ChatGLMConfig, check_released
from lavish.nn.eva2_clip import EVA2CLIPModel
from lavish.nn.generation import RopeDeltasGenerationMixin
from lavish.nn.image_steps import ImageStep
from lavish.nn.joined_rows import JoinedRows
from lavish.nn.linear import Linear
from lavish.nn.losses import joined_loss, logits_and_loss

# -- rotary embedding --------------------------------------------------------------------------------------------------


def inv_freq(head_dim: int, base: float, device: str | None = "cpu") -> torch.Tensor:
    """Give the float32 frequencies of the turning half of a head, (head_dim / 4,); `device` None is torch's default."""
    exponent = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=device) / (head_dim // 2)
    return 1.0 / (base**exponent)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the first half of each head's channels, in neighbouring pairs; the second half passes.

    Deviation from Llama's: pairs (0, 1), (2, 3) ..., not halves; rotate-half moves the logits by 6. The arithmetic is
    float32, also on the half-precision table of `rope="reference"`.

    Shapes: states (batch, seq, heads, head_dim), cos and sin (batch, seq, 1, head_dim / 4) -> like states.
    """
    cos, sin = cos.float(), sin.float()
    turning, passing = states.chunk(2, dim=-1)
    even, odd = turning.float().unflatten(-1, (-1, 2)).unbind(-1)  # each (batch, seq, heads, head_dim / 4)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned.to(states.dtype), passing), dim=-1)


class RotaryEmbedding(nn.Module):
    """Cos and sin of the positions. Holds the release's persistent buffer `inv_freq`, whose values nothing reads.

    Trap: the stored buffer has the dtype of the weights. The release makes its table from the config, in float32, and
    casts the table.
    """

    inv_freq: torch.Tensor

    def __init__(self, head_dim: int, base: float):
        super().__init__()
        self.head_dim, self.base = head_dim, base
        self.register_buffer("inv_freq", inv_freq(head_dim, base, device=None).to(torch.get_default_dtype()))

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Give cos and sin in `dtype`, each (batch, seq, 1, head_dim / 4)."""
        frequencies = inv_freq(self.head_dim, self.base).to(position_ids.device)
        angles = position_ids[..., None, None].float() * frequencies
        return angles.cos().to(dtype), angles.sin().to(dtype)


# -- decoder -----------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Root mean square norm. Trap: the weight multiplies in float32 before the cast back (Llama's casts before)."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(hidden_states.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(hidden_states.dtype)


@dataclass(frozen=True)
class Attending:
    """What the attention of every layer shares in one forward."""

    mask: torch.Tensor | None  # None, bool (True = attend) or additive, broadcastable to (batch, 1, q, k)
    is_causal: bool  # each query sees the keys up to its own; only with mask None and as many queries as keys
    is_prefill: bool
    implementation: str

    def to(self, device, **_) -> "Attending":
        """On another device; what accelerate's hooks call where the layers of one network live on several."""
        return self if self.mask is None else replace(self, mask=self.mask.to(device))


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attending: Attending) -> torch.Tensor:
    """Attend with grouped heads: key/value head j serves query heads j*g .. j*g+g-1.

    Shapes: query (batch, heads, q, head_dim), key and value (batch, kv_heads, k, head_dim) -> like query.
    """
    batch, heads, q_len, head_dim = query.shape
    kv_heads = key.shape[1]
    mask, is_causal = attending.mask, attending.is_causal
    if attending.implementation == "eager":
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


class SelfAttention(nn.Module):
    """Grouped-query attention with one fused projection: rows are q (heads), k, v (kv heads each), not interleaved."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.num_heads, self.head_dim, self.layer_idx = config.num_attention_heads, config.head_dim, layer_idx
        self.num_key_value_heads = config.num_key_value_heads
        out = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.query_key_value = Linear(config.hidden_size, out, bias=True)
        # heads * head_dim need not be the hidden size.
        self.dense = Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, hidden_states, cos, sin, attending: Attending, past_key_values: Cache | None) -> torch.Tensor:
        fused = self.query_key_value(hidden_states).unflatten(-1, (-1, self.head_dim))
        turned, value = fused.split((self.num_heads + self.num_key_value_heads, self.num_key_value_heads), dim=2)
        turned = apply_rotary(turned, cos, sin)
        query, key = turned.split((self.num_heads, self.num_key_value_heads), dim=2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if past_key_values is not None:
            cached = past_key_values.update(key, value, self.layer_idx)
            if not attending.is_prefill:  # a prefill sees its own keys only, not the empty rest of a static cache
                key, value = cached
        return self.dense(attend(query, key, value, attending).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """`down(silu(u[:F]) * u[F:])` with `u` from one fused projection, no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.dense_h_to_4h = Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.dense_4h_to_h = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)  # each (batch, seq, intermediate)
        return self.dense_4h_to_h(F.silu(gate) * up)


class DecoderLayer(GradientCheckpointingLayer):
    """Plain pre-norm layer: (batch, seq, hidden) -> the same."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_states, cos, sin, attending: Attending, past_key_values: Cache | None = None):
        attended = self.self_attention(self.input_layernorm(hidden_states), cos, sin, attending, past_key_values)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Encoder(nn.Module):
    """The decoder's layers and its final norm, under the name that the release gives them."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Embedding(nn.Module):
    """Holder of the word embeddings, under the name that the release gives them."""

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size)


class ChatGLMModel(nn.Module):
    """Embedding, tower, decoder and head. Takes explicit positions."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        vision = config.tower
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.rotary_pos_emb = RotaryEmbedding(config.head_dim, config.rotary_base)
        self.encoder = Encoder(config)
        self.output_layer = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.vision = EVA2CLIPModel(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            num_channels=vision.in_channels,
            num_positions=(vision.image_size // vision.patch_size) ** 2 + 1,
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_hidden_layers,
            num_attention_heads=vision.num_heads,
            intermediate_size=vision.intermediate_size,
            layer_norm_eps=vision.layer_norm_eps,
            out_size=config.hidden_size,
            projector_intermediate_size=config.intermediate_size,
            merge_size=config.hidden_size,
            scaling_factor=float(vision.scaling_factor),
        )

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        all_hidden_states: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run the decoder.

        Args:
            position_ids: (batch, seq) rotary positions, taken as they are.
            attention_mask: None (causal); (batch, past + seq), 0 on padding (causal too); or a 4D mask (batch, 1, q, k)
                that stands alone: bool with True = attend, or additive.
            all_hidden_states: a list that gets the input of every layer and the output, for inspection.
        Shapes: (batch, seq, hidden) -> the same, after the final norm.
        """
        dtype = torch.float32 if self.config.rope == "float32" else inputs_embeds.dtype
        cos, sin = self.rotary_pos_emb(position_ids, dtype)
        mask, is_causal, is_prefill = _mask(attention_mask, inputs_embeds, past_key_values)
        attending = Attending(mask, is_causal, is_prefill, self.config._attn_implementation or "sdpa")
        hidden_states = inputs_embeds
        for layer in self.encoder.layers:
            if all_hidden_states is not None:
                all_hidden_states.append(hidden_states)
            hidden_states = layer(hidden_states, cos=cos, sin=sin, attending=attending, past_key_values=past_key_values)
        hidden_states = self.encoder.final_layernorm(hidden_states)
        if all_hidden_states is not None:
            all_hidden_states.append(hidden_states)
        return hidden_states


def _mask(attention_mask, inputs_embeds, past_key_values):
    """Give (mask or None, is_causal, is_prefill); no mask is made where causality alone says it all."""
    rows, seq = inputs_embeds.shape[:2]
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
    query_index = torch.arange(seq, device=inputs_embeds.device)[:, None] + past
    key_index = torch.arange(keys, device=inputs_embeds.device)
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
class ChatGLMOutputWithPast(CausalLMOutputWithPast):
    """transformers' output, and what the next step needs."""

    rope_deltas: torch.Tensor | None = None
    """(batch, 1), cache slots so far minus the next position: an image takes `num_image_tokens` slots, 3 positions."""


class Glm4v9bForCausalLM(PreTrainedModel, RopeDeltasGenerationMixin):
    """GLM-4V-9B with its head.

    Positions follow from `input_ids` and `attention_mask` alone. `position_ids` is in the signature because PEFT and
    transformers' `generate` pass it, and is read with `inputs_embeds` only: theirs counts every image slot and gives
    fluent, wrong text.
    """

    config: ChatGLMConfig
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "TransformerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _keys_to_ignore_on_load_missing = [r"rotary_pos_emb\.inv_freq$"]  # weights.py says why

    def __init__(self, config: ChatGLMConfig):
        check_released(config)
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    @property
    def lm_head(self) -> nn.Module:
        """The head, which the release calls `transformer.output_layer`."""
        return self.transformer.output_layer

    def get_input_embeddings(self) -> nn.Module:
        """Give the word embeddings."""
        return self.transformer.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.transformer.embedding.word_embeddings = value  # pyright: ignore[reportAttributeAccessIssue]

    def get_output_embeddings(self) -> nn.Module:
        """Give the head."""
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.transformer.output_layer = new_embeddings  # pyright: ignore[reportAttributeAccessIssue]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, inv_freq(module.head_dim, module.base).to(module.inv_freq.device))
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("boi", "eoi", "cls_embedding"):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)

    # -- the parts that lavish.inference calls one by one --------------------------------------------------------------

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Give the rows that replace an image's slots, boi and eoi included, already divided by `scaling_factor`.

        Shapes: (images, 3, S, S) -> (images, num_image_tokens, hidden).
        """
        vision = self.transformer.vision
        device = pixel_values.device if vision.boi.is_meta else vision.boi.device  # meta: offloaded, accelerate moves
        return vision(pixel_values.to(device, vision.boi.dtype), self.config._attn_implementation or "sdpa")

    def image_steps(self) -> tuple[ImageStep, ...]:
        """Give the steps of `get_image_features`."""
        return self.transformer.vision.image_steps(self.config._attn_implementation or "sdpa")

    def image_slots(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Say which ids are slots of an image, boi and eoi included. (batch, seq) -> (batch, seq), bool."""
        return places.image_slots(self.config, input_ids)

    def embed(self, input_ids: torch.Tensor, image_features: torch.Tensor | None = None) -> torch.Tensor:
        """Embed the ids and lay the image features over the slots, row after row.

        All of an image's word embeddings are replaced, those of boi and eoi too.
        Shapes: (batch, seq) and (images, num_image_tokens, hidden) -> (batch, seq, hidden).

        Raises: PromptError: another number of images than of runs of slots.
        """
        inputs_embeds = self.transformer.embedding.word_embeddings(input_ids)
        if image_features is None and input_ids.shape[1] < 3:
            return inputs_embeds  # a decoding step: too short for an image, and nothing waits for the device
        is_slot = self.image_slots(input_ids)
        places.check_images(self.config, input_ids, is_slot, 0 if image_features is None else image_features.shape[0])
        if image_features is None:
            return inputs_embeds
        expected = (image_features.shape[0], self.config.num_image_tokens, inputs_embeds.shape[-1])
        if tuple(image_features.shape) != expected:
            raise PromptError(
                f"image_features has the shape {tuple(image_features.shape)}; these images take {expected}: what "
                "get_image_features gives."
            )
        features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(is_slot[..., None], features)

    def position_ids_from(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Give the rotary positions; all patches of an image share one. (batch, seq) -> (batch, seq), int64."""
        return places.position_ids_from(self.config, input_ids, attention_mask)

    def request_state(self, num_tokens) -> None:
        """Nothing of a request is fixed at its prefill in this family."""
        return None

    def decode_hidden(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        request_state: None = None,
    ) -> torch.Tensor:
        """Run the decoder alone, final norm included; `ChatGLMModel.forward` says what the arguments are."""
        return self.transformer(inputs_embeds, position_ids, attention_mask, past_key_values)

    # -- transformers' interface --------------------------------------------------------------------------------------

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
    ) -> ChatGLMOutputWithPast | tuple:
        """Run the network.

        Args:
            input_ids: (batch, seq), expanded; with a cache the new tokens only.
            attention_mask: (batch, past + seq), 0 on padding; None: no padding. A 4D mask goes to the decoder as it is.
            token_type_ids: ignored; the processor gives them, and the slots are found by their ids.
            pixel_values: (images, 3, S, S), in the order of the slots, row after row.
            position_ids: (batch, seq), read with `inputs_embeds` only, see the class.
            inputs_embeds: instead of `input_ids`; image features must be in it already.
            image_features: (images, num_image_tokens, hidden) of `get_image_features`; the tower is skipped.
            labels: (batch, seq), -100 = ignore; shifted by one here. The loss is the mean over label tokens.
            logits_to_keep: logits of the last so many columns only; 0: of all. With labels all; NO_LOGITS: none.
            rope_deltas: of the last output; None: read from the cache, where the last forward left them.
        Raises: PromptError if images and slots, or shapes, do not fit, or the positions pass `seq_length`.
        """
        if output_attentions:
            raise ConfigError("output_attentions was asked; this network never holds its attention weights.")
        if (input_ids is None) == (inputs_embeds is None):
            raise PromptError("forward got both or none of input_ids and inputs_embeds; give exactly one.")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        tokens = input_ids if input_ids is not None else inputs_embeds
        positions = self._positions(input_ids, tokens, position_ids, attention_mask, past_key_values, rope_deltas)
        hidden_states = inputs_embeds
        if input_ids is not None:
            hidden_states = self._embed_new(input_ids, pixel_values, image_features, past_key_values)
        all_hidden_states = [] if output_hidden_states else None
        hidden_states = self.transformer(hidden_states, positions, attention_mask, past_key_values, all_hidden_states)
        slots = positions.shape[1] if past_key_values is None else past_key_values.get_seq_length()
        deltas = slots - 1 - positions[:, -1:]
        if past_key_values is not None and rope_deltas is None:
            # State of the call: it lives and dies with its cache, never on the module.
            past_key_values.rope_deltas = deltas  # pyright: ignore[reportAttributeAccessIssue]
        logits, loss = logits_and_loss(self.lm_head, hidden_states, labels, logits_to_keep)
        output = ChatGLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=None if all_hidden_states is None else tuple(all_hidden_states),
            rope_deltas=deltas,
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def _positions(self, input_ids, tokens, position_ids, attention_mask, past_key_values, rope_deltas):
        """Say where these tokens stand: counted from the start, or from where the cache ends."""
        rows, seq = tokens.shape[:2]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if seq > 1:
            past = int(past)  # a static cache counts on the device: the one wait of a prefill
        is_first = isinstance(past, int) and past == 0
        mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        if mask is not None and not isinstance(past, torch.Tensor) and mask.shape != (rows, past + seq):
            raise PromptError(
                f"attention_mask has the shape {tuple(mask.shape)}; {seq} tokens in {rows} rows after {past} cached "
                f"ones take {(rows, past + seq)}."
            )
        if input_ids is None and position_ids is not None:
            positions = position_ids.expand(rows, seq)
        else:
            whole_mask = mask if is_first else None
            if input_ids is None:
                positions = places.text_positions(tokens, whole_mask)
            else:
                positions = self.position_ids_from(input_ids, whole_mask)
            if not is_first:
                if rope_deltas is None:
                    rope_deltas = getattr(past_key_values, "rope_deltas", None)  # a cache that we did not fill has none
                positions = positions + past - _checked_deltas(rope_deltas, rows, tokens.device)
        places.check_length(self.config, positions, past)
        return positions

    def joined_loss(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Give the loss of a batch for training, `forward`'s arguments, its rows joined (`nn/joined_rows.py`)."""
        mask, input_ids = inputs["attention_mask"], inputs["input_ids"]
        rows = JoinedRows.of(mask)
        embedded = self._embed_new(input_ids, inputs.get("pixel_values"), inputs.get("image_features"), None)
        positions = rows.join(self.position_ids_from(input_ids, mask))
        hidden_states = self.transformer(rows.join(embedded), positions, rows.mask)
        return joined_loss(self.lm_head, hidden_states, rows, inputs["labels"])

    def _embed_new(self, input_ids, pixel_values, image_features, past_key_values):
        """Embed new tokens; pictures that come again with a later step are in the cache already."""
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if input_ids.shape[1] == 1 and not (isinstance(past, int) and past == 0):
            return self.transformer.embedding.word_embeddings(input_ids)
        if image_features is None and pixel_values is not None:
            # Before the tower runs.
            places.check_images(self.config, input_ids, self.image_slots(input_ids), len(pixel_values))
            image_features = self.get_image_features(pixel_values)
        return self.embed(input_ids, image_features)


def _checked_deltas(rope_deltas: torch.Tensor | None, rows: int, device) -> torch.Tensor:
    if rope_deltas is None:
        return torch.zeros(rows, 1, dtype=torch.long, device=device)
    if rope_deltas.shape[0] != rows:
        raise PromptError(
            f"{rows} rows were given and the cache holds the positions of {rope_deltas.shape[0]}. Pass the rope_deltas "
            "of the rows, repeated or selected like the cache."
        )
    return rope_deltas.to(device)
