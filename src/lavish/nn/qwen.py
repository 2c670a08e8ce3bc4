"""The decoder of Qwen's first generation (Qwen-1.8B, 7B, 14B and their Chat models) on transformers' Qwen2 layers.

What Qwen2 does not have is written here: rotation in float32, dynamic NTK (a larger rotary base for a request whose
prompt is longer than the model was trained on) and logn (late queries are scaled up). What a request fixes, its NTK
alpha a row, is an argument or lies with its cache, never on the module.
Source: Qwen/Qwen-7B-Chat, modeling_qwen.py and configuration_qwen.py, as kept by WatchTower-Liu/VLM-learning.
Not here: the release's own 8-bit cache, its flash attention switches, and dropout, which no release uses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModel, Cache, DynamicCache, PreTrainedConfig, Qwen2Config
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

from lavish.common.errors import ConfigError, PromptError, shown
from lavish.nn.losses import logits_and_loss

# -- config ------------------------------------------------------------------------------------------------------------


class QwenConfig(Qwen2Config):
    """Sizes of a Qwen v1 decoder in the standard names; `intermediate_size` is the true width, half of the release's.

    `read_qwen_config` makes it of a released config.json.
    """

    model_type = "qwen_v1"

    seq_length: int = 2048  # trained length in tokens; beyond it alpha and logn change something
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.head_dim = self.hidden_size // self.num_attention_heads

    @property
    def rotary_base(self) -> float:
        """The base of the rotation for requests up to `seq_length`."""
        return float(cast(dict, self.rope_parameters)["rope_theta"])


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "seq_length")
"""What a released config.json must say: the release's class has other defaults for most of them, and none for the
last."""
FIXED = {
    "rotary_pct": (1.0, "only a rotation of the whole head was released"),
    "scale_attn_weights": (True, "attention is scaled by 1/sqrt(head width)"),
    "no_bias": (True, "only c_attn has a bias"),
    "tie_word_embeddings": (False, "the family has a head of its own"),
    "attn_dropout_prob": (0.0, "this decoder has no dropout"),
    "emb_dropout_prob": (0.0, "this decoder has no dropout"),
}


def read_qwen_config(fields: Mapping[str, Any], where: str) -> QwenConfig:
    """Make the config of a released config.json (`model_type` qwen).

    Raises:
        ConfigError: a size is absent or wrong, or the release is of a kind that this decoder does not compute.
    """
    if fields.get("model_type") not in (None, "qwen"):
        raise ConfigError(
            f"{where}: model_type is {shown(fields['model_type'])}; a Qwen of the first generation says 'qwen'. Give "
            "the folder of Qwen-7B-Chat, Qwen-1_8B-Chat or Qwen-14B-Chat."
        )
    absent = [name for name in SIZES if name not in fields]
    if absent:
        raise ConfigError(
            f"{where}: lacks {', '.join(absent)}, which a Qwen config.json holds. Fetch the release's file again."
        )
    for name in SIZES:
        value = fields[name]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise ConfigError(f"{where}: {name} is {shown(value)} and must be a whole number above 0.")
    for name, (expected, why) in FIXED.items():
        if fields.get(name, expected) != expected:
            raise ConfigError(f"{where}: {name} is {shown(fields[name])} and must be {expected!r} ({why}).")
    for name in ("use_dynamic_ntk", "use_logn_attn"):
        if not isinstance(fields.get(name, True), bool):
            raise ConfigError(f"{where}: {name} is {shown(fields[name])} and must be true or false.")
    hidden_size, heads = fields["hidden_size"], fields["num_attention_heads"]
    kv_channels = fields.get("kv_channels", 128)
    if kv_channels * heads != hidden_size:
        raise ConfigError(
            f"{where}: kv_channels {shown(kv_channels)} x {heads} heads is not hidden_size {hidden_size}; they are "
            "equal in every Qwen release."
        )
    if kv_channels % 2 or fields["intermediate_size"] % 2:
        raise ConfigError(
            f"{where}: kv_channels {kv_channels} and intermediate_size {fields['intermediate_size']} must be even: the "
            "rotation pairs the halves of a head, and the size counts w1 and w2 together."
        )
    try:
        return _config(fields)
    except (StrictDataclassError, TypeError, ValueError) as error:  # a field of another type
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error


def _config(fields: Mapping[str, Any]) -> QwenConfig:
    heads = fields["num_attention_heads"]
    return QwenConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        intermediate_size=fields["intermediate_size"] // 2,
        num_hidden_layers=fields["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=fields.get("max_position_embeddings", 8192),
        rms_norm_eps=fields.get("layer_norm_epsilon", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": float(fields.get("rotary_emb_base", 10000))},
        initializer_range=fields.get("initializer_range", 0.02),
        seq_length=fields["seq_length"],
        use_dynamic_ntk=fields.get("use_dynamic_ntk", True),
        use_logn_attn=fields.get("use_logn_attn", True),
    )


# -- positions ---------------------------------------------------------------------------------------------------------


def ntk_alpha(num_tokens: int, seq_length: int) -> float:
    """Give the factor of the rotary base for a prompt of so many tokens: 1 up to `seq_length`, 3 to twice that, 7..."""
    if num_tokens <= seq_length:
        return 1.0
    return float(2 ** math.ceil(math.log2(num_tokens / seq_length) + 1) - 1)


def request_alphas(config: PreTrainedConfig, num_tokens: Sequence[int]) -> tuple[float, ...] | None:
    """Give the alpha of each row by the real tokens of its prompt; decode steps keep it. None: the config has no NTK.

    Trap: computed again while decoding it would change when the length passes `seq_length`, and the text with it.
    """
    if not isinstance(config, QwenConfig) or not config.use_dynamic_ntk:  # a decoder of transformers has none
        return None
    return tuple(ntk_alpha(number, config.seq_length) for number in num_tokens)


def positions_from_mask(tokens: torch.Tensor, attention_mask: torch.Tensor | None, past: int = 0) -> torch.Tensor:
    """Count each row from its first real token.

    Shapes: tokens (batch, seq[, hidden]), attention_mask (batch, past + seq) -> (batch, seq).
    """
    rows, seq = tokens.shape[:2]
    if attention_mask is None:
        return torch.arange(past, past + seq, device=tokens.device).expand(rows, seq)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -seq:]


def rotary_tables(
    config: QwenConfig, position_ids: torch.Tensor, alphas: Sequence[float] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give cos and sin in float32. Shapes: position_ids (batch, seq) -> (batch, 1, seq, head_dim)."""
    dim = config.hidden_size // config.num_attention_heads
    device = position_ids.device
    exponents = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    bases = [config.rotary_base * alpha ** (dim / (dim - 2)) for alpha in alphas or (1.0,)]
    if len(set(bases)) == 1:
        inv_freq = (1.0 / bases[0] ** exponents)[None]
    else:
        inv_freq = 1.0 / torch.tensor(bases, device=device, dtype=torch.float32)[:, None] ** exponents
    angles = position_ids[..., None].float() * inv_freq[:, None]  # (batch, seq, head_dim / 2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def logn_scale(config: QwenConfig, position_ids: torch.Tensor) -> torch.Tensor:
    """Give the factor of each query: log(i) / log(seq_length) at the i-th token (from 1) beyond `seq_length`, else 1.

    Shapes: (batch, seq) -> (batch, 1, seq, 1), float32.
    """
    scale = torch.log((position_ids + 1).float()) / math.log(config.seq_length)
    return torch.where(position_ids >= config.seq_length, scale, 1.0)[:, None, :, None]


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs (x[j], x[j + d/2]) in float32 and give them in their own dtype. Shapes: (batch, heads, seq, d)."""
    turned = states.float()
    first, second = turned.chunk(2, dim=-1)
    return (turned * cos + torch.cat([-second, first], dim=-1) * sin).to(states.dtype)


# -- decoder -----------------------------------------------------------------------------------------------------------


class QwenAttention(nn.Module):
    """Causal attention of all heads, with the names of Qwen2's. The keys are cached after the rotation."""

    def __init__(self, config: QwenConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        size = config.hidden_size
        self.num_heads = self.num_key_value_heads = config.num_attention_heads
        self.head_dim = size // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(size, size) for _ in range(3))
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(  # the arguments are what Qwen2DecoderLayer passes on
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        query_scale: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
    ) -> tuple[torch.Tensor, None]:
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (batch, heads, seq, head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if query_scale is not None:
            query = query * query_scale.to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if self.config._attn_implementation == "eager":
            scores = (query @ key.transpose(-1, -2) * self.head_dim**-0.5).float()
            if attention_mask is not None:
                scores = scores.masked_fill(~attention_mask, torch.finfo(torch.float32).min)
            attended = scores.softmax(-1).to(value.dtype) @ value
        else:
            is_causal = attention_mask is None and query.shape[2] > 1
            attended = F.scaled_dot_product_attention(query, key, value, attention_mask, is_causal=is_causal)
        return self.o_proj(attended.transpose(1, 2).flatten(2)), None


class QwenDecoder(nn.Module):
    """Embedding table, layers and final norm. Attention is torch's, unless the config asks for "eager"."""

    def __init__(self, config: QwenConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen2DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        for index, layer in enumerate(self.layers):
            layer.self_attn = QwenAttention(config, index)
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        alphas: Sequence[float] | None = None,
    ) -> torch.Tensor:
        """Run the layers.

        Args:
            inputs_embeds: (batch, seq, hidden).
            position_ids: (batch, seq), counted from each row's first real token.
            attention_mask: None (nothing is padded, causal), (batch, keys) with 1 on real tokens, the cached ones
                included, or a boolean (batch, 1, seq or 1, keys) that says all.
            alphas: of `request_alphas`, one a row, the prefill's in every step; None: 1.
        Shapes: -> (batch, seq, hidden), after the final norm.
        """
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        mask = self._mask(attention_mask, inputs_embeds, past_key_values, past)
        position_embeddings = rotary_tables(self.config, position_ids, None if self.training else alphas)
        query_scale = None
        if self.config.use_logn_attn and not self.training and past + inputs_embeds.shape[1] > self.config.seq_length:
            query_scale = logn_scale(self.config, position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                query_scale=query_scale,
            )
        return self.norm(hidden_states)

    def _mask(
        self, attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, past_key_values: Cache | None, past: int
    ) -> torch.Tensor | None:
        """Give what each query may look at, boolean (batch, 1, seq, keys); None where causality alone says it all."""
        if attention_mask is not None and attention_mask.ndim == 4:
            return attention_mask
        rows, seq = inputs_embeds.shape[:2]
        is_static = past_key_values is not None and past_key_values.is_compileable
        is_eager = self.config._attn_implementation == "eager"
        if attention_mask is None and not is_static and (seq == 1 or (past == 0 and not is_eager)):
            return None
        keys = past + seq if past_key_values is None else past_key_values.get_mask_sizes(seq, 0)[0]
        query_index = torch.arange(past, past + seq, device=inputs_embeds.device)[:, None]
        key_index = torch.arange(keys, device=inputs_embeds.device)
        mask = (key_index <= query_index)[None, None]
        if attention_mask is None:
            return mask
        if attention_mask.shape != (rows, past + seq):
            raise PromptError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}; with {past} tokens in the cache and "
                f"{seq} new ones it must be {(rows, past + seq)}: one column for every token seen so far."
            )
        real = F.pad(attention_mask != 0, (0, keys - past - seq))[:, None, None]
        return mask & (real | (key_index == query_index))  # a padded query sees itself: no NaN on any backend


class TransformersDecoder(nn.Module):
    """Any decoder of transformers in the place of Qwen's: the same forward, without alphas."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.model = AutoModel.from_config(config)
        rotary = getattr(self.model, "rotary_emb", None)  # a decoder with learned positions has none
        if rotary is not None:
            # Its table is in no file: it is made here, also while the weights are still to come.
            with torch.device("cpu"):
                self.model.set_submodule("rotary_emb", type(rotary)(config=config))

    @property
    def embed_tokens(self) -> nn.Module:
        """The embedding table."""
        return self.model.get_input_embeddings()

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        alphas: None = None,
    ) -> torch.Tensor:
        """Run the layers: (batch, seq, hidden) -> (batch, seq, hidden), after the final norm."""
        return self.model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        ).last_hidden_state


# -- what networks with this decoder share -----------------------------------------------------------------------------


def fill_slots(inputs_embeds: torch.Tensor, is_slot: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
    """Lay features over the slots in reading order.

    Shapes: inputs_embeds (batch, seq, hidden), is_slot (batch, seq) bool, image_features (images, slots, hidden).
    Raises:
        PromptError: another number of slots than of feature rows.
    """
    found, given = (
        int(is_slot.sum()),
        0 if image_features is None else image_features.shape[0] * image_features.shape[1],
    )
    if found != given:
        images = 0 if image_features is None else image_features.shape[0]
        raise PromptError(
            f"input_ids hold {found} image slots and {images} image(s) were given, which fill {given}. Make the inputs "
            "with the processor's apply_chat_template."
        )
    if image_features is None:
        return inputs_embeds
    rows = image_features.flatten(0, 1).to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(is_slot[..., None].to(inputs_embeds.device), rows)


def causal_output(
    decoder: QwenDecoder | TransformersDecoder,
    lm_head: nn.Module,
    inputs_embeds: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    alphas: Sequence[float] | None = None,
    labels: torch.Tensor | None = None,
    use_cache: bool = False,
    logits_to_keep: int = 0,
) -> CausalLMOutputWithPast:
    """Run decoder and head as a transformers `forward` does.

    The alphas of a request lie with its cache from the prefill on: two requests at once do not disturb each other.
    `alphas` replaces them. The loss is the mean over label tokens, in float32.
    """
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache()
    past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    rows, seq = inputs_embeds.shape[:2]
    if alphas is None and not decoder.training:
        kept = None if past == 0 else getattr(past_key_values, "alphas", None)  # a cache that others filled has none
        alphas = kept or request_alphas(decoder.config, _num_tokens(attention_mask, rows, past + seq))
    if past_key_values is not None and past == 0:
        past_key_values.alphas = alphas  # pyright: ignore[reportAttributeAccessIssue]
    plain = attention_mask is not None and attention_mask.ndim == 2
    position_ids = positions_from_mask(inputs_embeds, attention_mask if plain else None, past)
    hidden_states = decoder(inputs_embeds, position_ids, attention_mask, past_key_values, alphas)
    logits, loss = logits_and_loss(lm_head, hidden_states, labels, logits_to_keep)
    return CausalLMOutputWithPast(
        loss=loss,
        logits=logits,
        past_key_values=past_key_values,
    )


def _num_tokens(attention_mask: torch.Tensor | None, rows: int, num_keys: int) -> list[int]:
    if attention_mask is None or attention_mask.ndim != 2:
        return [num_keys] * rows
    return attention_mask.sum(-1).tolist()
