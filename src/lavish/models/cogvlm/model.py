"""CogVLM and CogVLM2: a decoder with two weight sets a layer, one for text tokens and one for image tokens, behind an EVA2-CLIP-E tower.

Source: CogVLM2 release, modeling_cogvlm.py and visual.py, read through a public copy; v1 by its SAT model (facts/cogvlm.md). Module names
are the released key names. Not here: prompts and pixels (processor.py), reading checkpoints, sampling (transformers' `generate`).

How the experts are run: the decoder keeps two streams of tokens, language and vision, through all layers. They meet in attention only, so a
layer costs one concatenation and no boolean index, and a decoding step has no vision stream at all.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from lavish.common.errors import ConfigError, PromptError
from lavish.models.cogvlm.config import CogVLMConfig
from lavish.nn.eva2_clip import EVA2CLIPModel

# -- which token is where ---------------------------------------------------------------------------------------------------------------


def vision_expert_mask(token_type_ids: torch.Tensor) -> torch.Tensor:
    """Say which tokens the image expert takes: those of type 1 whose successor has type 1.

    Trap: eoi, the last row of an image, goes to the language expert, because the mask looks one token ahead.
    Shapes: (batch, seq) -> (batch, seq), bool.
    """
    is_image = token_type_ids == 1
    successor = F.pad(is_image[:, 1:], (0, 1), value=False)
    return is_image & successor


def position_ids_from(token_type_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Give the rotary positions: bos 0, boi 1, all patches 2, eoi 3, the text after it 4, 5, ...

    Counted on the row without its padding, so that left padding does not shift it (the release counts from 1 there) and an image that ends a
    right-padded row keeps eoi at 3 (the release has 2). Padding gets the position of the token before it, or 0.

    Shapes: (batch, seq) -> (batch, seq), int64.
    """
    is_real = torch.ones_like(token_type_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    is_image = (token_type_ids == 1) & is_real
    before, after = F.pad(is_image[:, :-1], (1, 0), value=False), F.pad(is_image[:, 1:], (0, 1), value=False)
    is_inner = is_image & before & after  # boi and eoi are edges and count as text
    follows_inner = F.pad(is_inner[:, :-1], (1, 0), value=False)
    is_step = is_real & ~(is_inner & follows_inner)
    return (is_step.long().cumsum(dim=1) - 1).clamp(min=0)


@dataclass(frozen=True)
class ExpertRouting:
    """How a batch splits into the language and the vision stream: made once a forward, shared by all layers.

    Text only: the stream is the batch, flattened. Image runs at the same place in all rows: `segment` (start, stop) cuts the time axis.
    Otherwise: indices into the flattened batch, and `inverse`, which puts the two streams back into its order.
    """

    segment: tuple[int, int] | None = None
    language_index: torch.Tensor | None = None
    vision_index: torch.Tensor | None = None
    inverse: torch.Tensor | None = None

    @classmethod
    def text_only(cls) -> "ExpertRouting":
        """Everything through the language expert; looks at no mask. What a decoding step uses."""
        return cls()

    @classmethod
    def from_token_type_ids(
        cls, token_type_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> "ExpertRouting":
        """Read the token types, once, on the host. (batch, seq), 1 on the image slots; padding is never an image slot."""
        is_vision = vision_expert_mask(token_type_ids if attention_mask is None else token_type_ids * attention_mask)
        is_vision_host = is_vision.cpu()
        columns = is_vision_host[0].nonzero().flatten().tolist() if len(is_vision_host) else []
        if bool((is_vision_host == is_vision_host[:1]).all()):
            if not columns:
                return cls.text_only()
            start, stop = columns[0], columns[-1] + 1
            if len(columns) == stop - start:
                return cls(segment=(start, stop))
        flat = is_vision_host.flatten()
        language, vision = (~flat).nonzero().flatten(), flat.nonzero().flatten()
        inverse = torch.cat((language, vision)).argsort()
        return cls(None, *(index.to(token_type_ids.device) for index in (language, vision, inverse)))

    def to(self, device) -> "ExpertRouting":
        """The same routing with its indices on `device` (layers of one network may live on several)."""
        if self.inverse is None or self.inverse.device == torch.device(device):
            return self
        return ExpertRouting(
            None, self.language_index.to(device), self.vision_index.to(device), self.inverse.to(device)
        )

    def split(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cut a (batch, seq, ...) tensor into its language and vision streams, each (tokens, features)."""
        rows, seq = batch.shape[:2]
        if self.segment is not None:
            start, stop = self.segment
            stream = batch.transpose(0, 1).reshape(seq * rows, -1)  # time first: the cuts are contiguous for any batch
            before, vision, after = stream.split((start * rows, (stop - start) * rows, (seq - stop) * rows))
            return torch.cat((before, after)), vision
        stream = batch.reshape(rows * seq, -1)
        if self.inverse is None:
            return stream, None
        return stream.index_select(0, self.language_index), stream.index_select(0, self.vision_index)

    def merge(self, language: torch.Tensor, vision: torch.Tensor | None, rows: int) -> torch.Tensor:
        """Undo `split`: two streams into (batch, seq, features)."""
        if self.segment is not None:
            start, stop = self.segment
            before, after = language.split((start * rows, language.shape[0] - start * rows))
            stream = torch.cat((before, vision, after))
            return stream.view(-1, rows, stream.shape[-1]).transpose(0, 1)
        if self.inverse is None:
            return language.view(rows, -1, language.shape[-1])
        return torch.cat((language, vision)).index_select(0, self.inverse).view(rows, -1, language.shape[-1])


# -- rotary embedding -------------------------------------------------------------------------------------------------------------------


def reference_inv_freq(head_dim: int, base: float, dtype: torch.dtype) -> torch.Tensor:
    """Build `inv_freq` as the release does under a default dtype: each step in that dtype, not float32 cast at the end."""
    exponent = torch.arange(0, head_dim, 2, device="cpu").to(dtype) / head_dim
    return 1.0 / (base**exponent)


def rotary_table(position_ids: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give cos and sin, each (*position_ids.shape, head_dim / 2), with positions and angles in the dtype of `inv_freq`.

    Trap: that is the release's arithmetic. In bf16 position 257 equals 256; `rope="float32"` passes a float32 table.
    """
    angles = position_ids[..., None].to(inv_freq.dtype) * inv_freq
    return angles.cos(), angles.sin()


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn (batch, seq, heads, head_dim) by (batch, seq, 1, head_dim / 2): halves, not pairs; arithmetic in float32."""
    cos, sin = cos.float(), sin.float()
    first, second = states.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(states.dtype)


class RotaryEmbedding(nn.Module):
    """Holder of the release's persistent buffer `inv_freq`, one a layer; the table is made once a forward from the first."""

    inv_freq: torch.Tensor

    def __init__(self, head_dim: int, base: float):
        super().__init__()
        self.head_dim, self.base = head_dim, base
        self.register_buffer("inv_freq", reference_inv_freq(head_dim, base, torch.get_default_dtype()))


# -- decoder ----------------------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """Root mean square norm. Trap: the weight multiplies in float32 before the cast back (Llama's casts before)."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(hidden_states.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(hidden_states.dtype)


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
        is_causal: query and key count are equal and each query sees the keys up to its own; only with mask None.
    Shapes: query (batch, heads, q, head_dim), key and value (batch, kv_heads, k, head_dim) -> like query.
    """
    batch, heads, q_len, head_dim = query.shape
    kv_heads = key.shape[1]
    if implementation == "eager":
        return _attend_eager(query, key, value, mask, is_causal)
    if q_len == 1 and kv_heads != heads:  # decoding: the heads of a group become queries, and keys are read once
        grouped = query.view(batch, kv_heads, heads // kv_heads, head_dim)
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


class VisionExpertAttention(nn.Module):
    """Attention in which text and image tokens have projections of their own and see one another.

    Rows of the fused projection: q (heads), k (kv heads), v (kv heads), no interleaving. CogVLM2 has a bias on the image expert's only.
    """

    def __init__(self, config: CogVLMConfig, layer_idx: int):
        super().__init__()
        self.num_heads, self.head_dim, self.layer_idx = config.num_attention_heads, config.head_dim, layer_idx
        self.num_key_value_heads = config.num_key_value_heads or config.num_attention_heads
        hidden_size, out = config.hidden_size, (self.num_heads + 2 * self.num_key_value_heads) * config.head_dim
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope_theta)
        self.vision_expert_query_key_value = nn.Linear(hidden_size, out, bias=config.version == 2)
        self.vision_expert_dense = nn.Linear(hidden_size, hidden_size, bias=False)
        self.language_expert_query_key_value = nn.Linear(hidden_size, out, bias=False)
        self.language_expert_dense = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self, language, vision, routing, cos, sin, mask, is_causal, past_key_values, is_prefill, implementation
    ):
        fused = routing.merge(
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
            if not is_prefill:  # a prefill sees its own keys only, and not the empty rest of a static cache
                key, value = cached
        attended = attend(query, key, value, mask, is_causal, implementation)
        language, vision = routing.split(attended.transpose(1, 2))
        return self.language_expert_dense(language), None if vision is None else self.vision_expert_dense(vision)


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, no biases."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class VisionExpertMLP(nn.Module):
    """One MLP for each stream."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.language_mlp = MLP(hidden_size, intermediate_size)
        self.vision_mlp = MLP(hidden_size, intermediate_size)

    def forward(self, language: torch.Tensor, vision: torch.Tensor | None):
        return self.language_mlp(language), None if vision is None else self.vision_mlp(vision)


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm layer on two streams: language (tokens, hidden) and vision (tokens, hidden) or None."""

    def __init__(self, config: CogVLMConfig, layer_idx: int):
        super().__init__()
        self.self_attn = VisionExpertAttention(config, layer_idx)
        self.mlp = VisionExpertMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, language, vision, routing, cos, sin, mask, is_causal, past_key_values, is_prefill, implementation
    ):
        normed = (self.input_layernorm(language), None if vision is None else self.input_layernorm(vision))
        attended = self.self_attn(
            *normed, routing.to(language.device), cos, sin, mask, is_causal, past_key_values, is_prefill, implementation
        )
        language, vision = _add(language, attended[0]), _add(vision, attended[1])
        norm = self.post_attention_layernorm
        updates = self.mlp(norm(language), None if vision is None else norm(vision))
        return _add(language, updates[0]), _add(vision, updates[1])


def _add(stream, update):
    return None if stream is None else stream + update


class CogVLMModel(nn.Module):
    """Embedding, tower and decoder without the head. Takes explicit positions and routing; the public class derives them."""

    def __init__(self, config: CogVLMConfig):
        super().__init__()
        vision = config.vision_config
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vision = EVA2CLIPModel(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            num_channels=vision.num_channels,
            num_positions=vision.num_positions,
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_hidden_layers,
            num_attention_heads=vision.num_attention_heads,
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
        """Lay features (images, tokens, hidden) over the True slots of (batch, seq), row after row, without waiting for the device."""
        features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(is_image_slot[..., None], features)

    def rotary(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give cos and sin of the positions, (batch, seq, 1, head_dim / 2), by the config's `rope`."""
        inv_freq = self.layers[0].self_attn.rotary_emb.inv_freq
        if self.config.rope == "float32":
            exponent = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=inv_freq.device)
            inv_freq = 1.0 / (self.config.rope_theta ** (exponent / self.config.head_dim))
        cos, sin = rotary_table(position_ids, inv_freq)
        return cos[:, :, None], sin[:, :, None]

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        routing: ExpertRouting | None = None,
        past_key_values: Cache | None = None,
        all_hidden_states: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Run the decoder.

        Args:
            position_ids: (batch, seq) rotary positions, taken as they are.
            attention_mask: None (causal), (batch, past + seq) with 0 on padding (causal too), or a 4D mask (batch, 1, q, k) that stands
                alone: bool with True = attend, or additive.
            routing: None is `ExpertRouting.text_only()`.
            all_hidden_states: a list that gets the input of every layer and the output, for inspection.
        Shapes: (batch, seq, hidden) -> (batch, seq, hidden), after the final norm.
        """
        routing = routing or ExpertRouting.text_only()
        rows, seq = inputs_embeds.shape[:2]
        cos, sin = self.rotary(position_ids)
        mask, is_causal, is_prefill = self._mask(attention_mask, rows, seq, past_key_values, inputs_embeds.device)
        language, vision = routing.split(inputs_embeds)
        for layer in self.layers:
            if all_hidden_states is not None:
                all_hidden_states.append(routing.merge(language, vision, rows))
            language, vision = layer(
                language,
                vision,
                routing=routing,
                cos=cos,
                sin=sin,
                mask=mask,
                is_causal=is_causal,
                past_key_values=past_key_values,
                is_prefill=is_prefill,
                implementation=self.config._attn_implementation,
            )
        hidden_states = self.norm(routing.merge(language, vision, rows))
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
        keys = seq if is_prefill else past_key_values.get_mask_sizes(seq, 0)[0]
        query_index = torch.arange(seq, device=device)[:, None] + past
        key_index = torch.arange(keys, device=device)
        mask = (key_index <= query_index)[None, None]  # (1, 1, seq, keys)
        if attention_mask is not None:
            if isinstance(past, int) and attention_mask.shape != (rows, past + seq):
                raise PromptError(
                    f"attention_mask has the shape {tuple(attention_mask.shape)}; with {past} tokens in the cache and {seq} new ones it "
                    f"must be {(rows, past + seq)}: one column for every token seen so far."
                )
            real = F.pad(attention_mask != 0, (0, keys - attention_mask.shape[1]))[:, None, None]  # (rows, 1, 1, keys)
            mask = mask & (
                real | (key_index == query_index)
            )  # a padded query sees itself: no row without a key, no NaN
        return mask, False, is_prefill


# -- the public class -------------------------------------------------------------------------------------------------------------------


@dataclass
class CogVLMOutputWithPast(CausalLMOutputWithPast):
    """transformers' output, and what the next step needs.

    rope_deltas: (batch, 1), cache slots so far minus the next rotary position (an image takes num_image_tokens slots and 3 positions).
    """

    rope_deltas: torch.Tensor | None = None


class CogVLMForCausalLM(PreTrainedModel, GenerationMixin):
    """CogVLM or CogVLM2 with its head, by the config.

    Positions and expert routing follow from `token_type_ids` and `attention_mask` alone. `position_ids` is in the signature because
    transformers' `generate` and PEFT pass it, and is ignored: theirs counts every image slot and gives fluent, wrong text.
    """

    config: CogVLMConfig
    config_class = CogVLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "TransformerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _keys_to_ignore_on_load_missing = [r"rotary_emb\.inv_freq$"]  # v1 files may lack it: it is rebuilt

    def __init__(self, config: CogVLMConfig):
        super().__init__(config)
        self.model = CogVLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RotaryEmbedding):
            inv_freq = reference_inv_freq(module.head_dim, module.base, module.inv_freq.dtype)
            init.copy_(module.inv_freq, inv_freq.to(module.inv_freq.device))
        for name in ("boi", "eoi", "cls_embedding"):
            if name in module._parameters:
                init.normal_(module._parameters[name], mean=0.0, std=self.config.initializer_range)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Give the rows that replace an image's slots. (images, 3, S, S) -> (images, num_image_tokens, hidden)."""
        vision = self.model.vision
        pixel_values = pixel_values.to(vision.boi.device, vision.boi.dtype)
        return vision(pixel_values, self.config._attn_implementation)

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
    ) -> CogVLMOutputWithPast:
        """Run the network.

        Args:
            input_ids: (batch, seq); with a cache the new tokens only.
            attention_mask: (batch, past + seq), 0 on padding; None: no padding. A 4D mask of the decoder is taken as it is.
            token_type_ids: (batch, seq) or (batch, past + seq), 1 on the image slots; None: no image in these tokens.
            pixel_values: (images, 3, S, S), one image for each row that has image slots, in the order of the rows.
            position_ids: ignored, see the class.
            inputs_embeds: instead of `input_ids`; image features are laid over its slots too.
            image_features: (images, num_image_tokens, hidden) of `get_image_features`; the tower is skipped.
            labels: (batch, seq), -100 = ignore; shifted by one here. The loss is the mean over the label tokens of the batch.
            logits_to_keep: logits of the last so many columns only; 0: of all.
            rope_deltas: of the last output; None: read from the cache, where the last forward left them.
        Raises: PromptError if the image slots, their number and the images do not fit together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise PromptError("forward got both or none of input_ids and inputs_embeds; give exactly one.")
        if output_attentions:
            raise ConfigError(
                "output_attentions was asked; the attention weights of this network are never materialised."
            )
        tokens = input_ids if input_ids is not None else inputs_embeds
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past_key_values is not None and rope_deltas is None:
            rope_deltas = getattr(past_key_values, "rope_deltas", None)  # a cache that another model filled has none
        if tokens.shape[1] == 1 and past_key_values is not None:
            plan = _decode_plan(tokens, past, rope_deltas)
        else:
            plan = _prefill_plan(self.config, tokens, int(past), rope_deltas, attention_mask, token_type_ids)
            attention_mask = None if plan.is_unpadded else attention_mask
            image_features = self._features(plan, pixel_values, image_features)
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        if image_features is not None:
            inputs_embeds = self.model.place(inputs_embeds, plan.is_image_slot, image_features)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        all_hidden_states = [] if output_hidden_states else None
        hidden_states = self.model(
            inputs_embeds, plan.position_ids, attention_mask, plan.routing, past_key_values, all_hidden_states
        )
        if past_key_values is not None and plan.is_prefill:
            past_key_values.rope_deltas = plan.rope_deltas  # state of the call: it lives and dies with its cache
        logits = self.lm_head(hidden_states[:, -logits_to_keep:] if labels is None else hidden_states).float()
        output = CogVLMOutputWithPast(
            loss=None if labels is None else causal_loss(logits, labels),
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=None if all_hidden_states is None else tuple(all_hidden_states),
            rope_deltas=plan.rope_deltas,
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def _features(self, plan, pixel_values, image_features):
        """Give the features of the images whose slots are among these tokens, or None; checks that images and rows fit."""
        given = image_features if image_features is not None else pixel_values
        found = 0 if given is None else given.shape[0]
        if found != plan.num_image_rows:
            raise PromptError(
                f"{found} image(s) were given and {plan.num_image_rows} row(s) of the batch have image slots (token_type_ids 1); every "
                "such row takes exactly one image. Make the inputs with the processor's apply_chat_template."
            )
        if not plan.has_new_image:
            return None  # no image at all, or all of them are in the cache already
        if image_features is None:
            return self.get_image_features(pixel_values)
        expected = (plan.num_image_rows, self.config.num_image_tokens, self.config.hidden_size)
        if tuple(image_features.shape) != expected:
            raise PromptError(
                f"image_features has the shape {tuple(image_features.shape)}; these rows take {expected}: what get_image_features gives."
            )
        return image_features

    # -- generation: transformers' loop, with our positions ------------------------------------------------------------------------------

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        position_ids=None,
        token_type_ids=None,
        image_features=None,
        rope_deltas=None,
        **kwargs,  # the rest of transformers' generation arguments, passed on by name
    ):
        """As transformers', except: no position_ids, and a prefill gets whole token_type_ids and its plain 2D mask."""
        is_prefill = is_first_iteration or not kwargs.get("use_cache", True)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if is_prefill:
            model_inputs |= {
                "token_type_ids": token_type_ids,
                "image_features": image_features,
                "attention_mask": attention_mask,
            }
        return model_inputs | {"rope_deltas": rope_deltas}

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
        """No mask means no padding. Trap: transformers reads one off the pad id, which is also the image placeholder's."""
        return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1):
        """Keep the deltas with the call, and make generated tokens text: transformers repeats the last type, an eoi's if it ends the prompt."""
        token_type_ids = model_kwargs.pop("token_type_ids", None)
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        if token_type_ids is not None:
            model_kwargs["token_type_ids"] = F.pad(token_type_ids, (0, num_new_tokens), value=0)
        if model_kwargs.get("use_cache", True):
            model_kwargs["rope_deltas"] = outputs.rope_deltas
        return model_kwargs


def causal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy over the label tokens of the batch; 0 where there is none. (batch, seq, vocab), (batch, seq)."""
    targets = labels[:, 1:].to(logits.device)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss / (targets != -100).sum().clamp(min=1)


@dataclass(frozen=True)
class _Plan:
    """What one forward needs to know about its tokens."""

    position_ids: torch.Tensor
    routing: ExpertRouting
    rope_deltas: torch.Tensor  # (batch, 1)
    is_prefill: bool = False
    is_unpadded: bool = False  # causality alone hides every padded key
    is_image_slot: torch.Tensor | None = None  # (batch, seq), bool
    num_image_rows: int = 0
    has_new_image: bool = False


def _decode_plan(tokens: torch.Tensor, past, rope_deltas: torch.Tensor | None) -> _Plan:
    """Plan one new token a row: text, at the next position. Looks at no mask and does not wait for the device."""
    if rope_deltas is None:
        rope_deltas = torch.zeros(tokens.shape[0], 1, dtype=torch.long, device=tokens.device)
    elif rope_deltas.shape[0] != tokens.shape[0]:
        raise PromptError(
            f"{tokens.shape[0]} rows were given and the cache holds the positions of {rope_deltas.shape[0]}. Pass the rope_deltas of the "
            "rows, repeated or selected like the cache."
        )
    elif isinstance(past, int) and past == 0:
        rope_deltas = torch.zeros_like(rope_deltas)  # a cache that was reset
    return _Plan(past - rope_deltas, ExpertRouting.text_only(), rope_deltas)


def _prefill_plan(config, tokens, past: int, rope_deltas, attention_mask, token_type_ids) -> _Plan:
    """Plan the first forward of a prompt, or several tokens after a cached prefix. Reads types and mask on the host, once."""
    rows, seq = tokens.shape[:2]
    if token_type_ids is None:
        token_type_ids = torch.zeros(rows, seq, dtype=torch.long, device=tokens.device)
    if tuple(token_type_ids.shape) not in ((rows, seq), (rows, past + seq)):
        raise PromptError(
            f"token_type_ids has the shape {tuple(token_type_ids.shape)}; {seq} tokens in {rows} rows after {past} cached ones take "
            f"{(rows, seq)} or {(rows, past + seq)}."
        )
    is_padding_known = attention_mask is not None and attention_mask.ndim == 2
    mask = attention_mask if is_padding_known else torch.ones(rows, past + seq, dtype=torch.long, device=tokens.device)
    if tuple(mask.shape) != (rows, past + seq):
        raise PromptError(
            f"attention_mask has the shape {tuple(mask.shape)}; {seq} tokens in {rows} rows after {past} cached ones take "
            f"{(rows, past + seq)}: one column for every token so far."
        )
    is_real, is_whole = mask != 0, token_type_ids.shape[1] == past + seq
    types = token_type_ids * (is_real if is_whole else is_real[:, past:])
    types_host, real_host = torch.stack((F.pad(types, (past + seq - types.shape[1], 0)), is_real.to(types.dtype))).cpu()
    num_image_rows = _check_image_slots(types_host, config.num_image_tokens)
    has_new_image = bool(types_host[:, past:].any())
    if has_new_image and is_whole and past and bool((types_host[:, past - 1] * types_host[:, past]).any()):
        raise PromptError(
            f"the cache ends inside an image (after {past} tokens). Crop it before the image or after it."
        )
    if is_whole:
        position_ids = position_ids_from(types, is_real)[:, past:]
    else:
        start = past if rope_deltas is None else past - rope_deltas
        position_ids = position_ids_from(types, is_real[:, past:]) + start
    types = types[:, -seq:]
    return _Plan(
        position_ids,
        ExpertRouting.from_token_type_ids(types) if has_new_image else ExpertRouting.text_only(),
        rope_deltas=past + seq - 1 - position_ids[:, -1:],
        is_prefill=True,
        is_unpadded=is_padding_known and _causality_hides_padding(real_host, past),
        is_image_slot=types == 1,
        num_image_rows=num_image_rows,
        has_new_image=has_new_image,
    )


def _causality_hides_padding(real_host: torch.Tensor, past: int) -> bool:
    """Whether no padded column stands before a real one; with a cache: whether there is no padding at all."""
    if past:
        return bool(real_host.all())
    return bool((real_host[:, 1:] <= real_host[:, :-1]).all())


def _check_image_slots(types_host: torch.Tensor, num_image_tokens: int) -> int:
    """Count the rows that have an image; each may have one run of slots, of the length that the tower gives."""
    is_image = types_host == 1
    starts = (is_image & ~F.pad(is_image[:, :-1], (1, 0), value=False)).sum(dim=1).tolist()
    slots = is_image.sum(dim=1).tolist()
    for row, (num_runs, num_slots) in enumerate(zip(starts, slots, strict=True)):
        if num_runs > 1:
            raise PromptError(
                f"row {row} has {num_runs} images (runs of token_type_ids 1); this family takes at most one image in a conversation."
            )
        if num_runs and num_slots != num_image_tokens:
            raise PromptError(
                f"row {row} has {num_slots} image slots (token_type_ids 1); an image of this model takes {num_image_tokens}: boi, "
                f"{num_image_tokens - 2} patches, eoi. Make the inputs with the processor of the same checkpoint."
            )
    return sum(1 for num_runs in starts if num_runs)
