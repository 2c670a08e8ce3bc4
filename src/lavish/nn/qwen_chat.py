"""What the networks around a Qwen v1 decoder share: image features in the place of ids, forward, generation.

The class stands between those networks and transformers' because they differ in nothing but where features come from:
CLIP + Qwen and MiniGPT4-Qwen say `get_image_features`. Not here: the decoder (qwen.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lavish.common.errors import ConfigError, PromptError
from lavish.nn.generation import PlainMaskGenerationMixin
from lavish.nn.joined_rows import JoinedRows
from lavish.nn.losses import joined_loss
from lavish.nn.qwen import (
    QwenConfig,
    QwenDecoder,
    TransformersDecoder,
    causal_output,
    fill_slots,
    positions_from_mask,
    request_alphas,
)


class QwenChatConfig(PreTrainedConfig):
    """What generation and inference ask of a config stands in the decoder's, `text_config`."""

    @property
    def text(self) -> QwenConfig:
        """`text_config`, which is a config as soon as this one is made."""
        return cast(QwenConfig, cast(Any, self).text_config)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table."""
        return self.text.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the decoder."""
        return self.text.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the decoder."""
        return self.text.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """Heads of the decoder."""
        return self.text.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """As many as heads, but for a decoder that is no Qwen of the first generation."""
        return self.text.num_attention_heads if isinstance(self.text, QwenConfig) else self.text.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """Width of a head of the decoder."""
        return self.text.head_dim or self.text.hidden_size // self.text.num_attention_heads

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of context; an image takes `num_image_tokens` of them."""
        return self.text.max_position_embeddings

    def get_text_config(self, decoder=None, encoder=None):
        """As transformers': the decoder's config, whose sizes a cache is made with."""
        return self.text


class QwenChatModel(PreTrainedModel, PlainMaskGenerationMixin):
    """Decoder and head behind image features, which fill the slots of the ids `image_token_id`.

    Positions are counted from each row's first real token, whatever `position_ids` say: transformers' generate passes
    its own. The NTK alpha of a request lies with its cache, never here.
    """

    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values"]
    _can_compile_fullgraph = False

    get_image_features: Any  # the family's: (images, 3, S, S) -> (images, slots, hidden)
    language_model: QwenDecoder | TransformersDecoder
    lm_head: nn.Linear

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        if isinstance(self.language_model, TransformersDecoder):
            self.language_model.model.set_input_embeddings(value)
        else:
            self.language_model.set_submodule("embed_tokens", value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def image_slots(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Tell the image slots: user text never becomes their id. (batch, seq) -> bool (batch, seq)."""
        return input_ids == self.config.image_token_id

    def embed(self, input_ids: torch.Tensor, image_features: torch.Tensor | None = None) -> torch.Tensor:
        """Embed the ids, the features (images, slots, hidden) over their slots in reading order.

        Shapes: (batch, seq) -> (batch, seq, hidden).
        Raises:
            PromptError: another number of slots than of features.
        """
        inputs_embeds = self.language_model.embed_tokens(input_ids)
        return fill_slots(inputs_embeds, self.image_slots(input_ids), image_features)

    # -- the decoder, as inference runs it -----------------------------------------------------------------------------

    def position_ids_from(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Count each row from its first real token. (batch, seq) -> (batch, seq)."""
        return positions_from_mask(input_ids, attention_mask)

    def request_state(self, num_tokens: Sequence[int]) -> tuple[float, ...] | None:
        """Give the NTK alpha of each row by the tokens of its prompt; decode steps keep it."""
        return request_alphas(self.config.text, num_tokens)

    def decode_hidden(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        request_state: tuple[float, ...] | None,
    ) -> torch.Tensor:
        """Run the decoder, final norm included. (batch, seq, hidden) -> (batch, seq, hidden)."""
        return self.language_model(inputs_embeds, position_ids, attention_mask, past_key_values, request_state)

    # -- the public forward --------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        token_type_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Run the network.

        Args:
            input_ids: (batch, seq); with a cache the new tokens only.
            attention_mask: (batch, past + seq), 0 on padding; None: no padding.
            pixel_values: (images, 3, S, S), in the reading order of the slots over the rows.
            position_ids: ignored, see the class.
            inputs_embeds: instead of `input_ids`, images included.
            image_features: of `get_image_features`; the tower is skipped.
            labels: (batch, seq), -100 = ignore; shifted by one here. The loss is the mean over label tokens.
            logits_to_keep: logits of the last so many columns only; 0: of all.
            token_type_ids: ignored: the ids tell the slots.
            output_hidden_states, output_attentions: what PEFT passes on; the decoder keeps neither.
        Raises:
            PromptError: slots and images do not fit together.
            ConfigError: states or attention weights were asked.
        """
        if output_hidden_states or output_attentions:
            raise ConfigError(
                "output_hidden_states or output_attentions was asked, and this network keeps neither; put a forward "
                "hook on language_model.layers."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise PromptError("forward got both or none of input_ids and inputs_embeds; give exactly one.")
        if inputs_embeds is None:
            inputs_embeds = self._embed_new(input_ids, pixel_values, image_features, past_key_values)
        elif pixel_values is not None or image_features is not None:
            raise PromptError("inputs_embeds hold their images already; leave pixel_values and image_features out.")
        output = causal_output(
            self.language_model,
            self.lm_head,
            inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=not self.training if use_cache is None else use_cache,
            logits_to_keep=logits_to_keep,
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def joined_loss(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Give the loss of a batch for training, `forward`'s arguments, its rows joined (`nn/joined_rows.py`).

        Raises:
            ConfigError: a decoder of transformers: it makes its masks its own way, by its attention's kind.
        """
        if isinstance(self.language_model, TransformersDecoder):
            kind = type(self.language_model.model).__name__
            raise ConfigError(
                f"model.packing: {kind} of transformers makes its own masks (windows, its attention's kind), so that "
                "joined rows cannot be promised to be exact; leave the key out, or use run.group_by_length."
            )
        rows = JoinedRows.of(inputs["attention_mask"])
        embedded = self._embed_new(inputs["input_ids"], inputs.get("pixel_values"), inputs.get("image_features"), None)
        positions = rows.join(self.position_ids_from(inputs["input_ids"], inputs["attention_mask"]))
        hidden_states = self.language_model(rows.join(embedded), positions, rows.mask)
        return joined_loss(self.lm_head, hidden_states, rows, inputs["labels"])

    def _embed_new(self, input_ids, pixel_values, image_features, past_key_values) -> torch.Tensor:
        """Embed the ids, with the images that are not in the cache already."""
        if pixel_values is not None and image_features is not None:
            raise PromptError("forward got pixel_values and image_features; give one of them.")
        is_prefill = past_key_values is None or int(past_key_values.get_seq_length()) == 0
        if not is_prefill and input_ids.shape[1] == 1:
            return self.language_model.embed_tokens(input_ids)  # a generated id is a word, whatever it is
        if image_features is None and pixel_values is not None:
            image_features = self.get_image_features(pixel_values)
        return self.embed(input_ids, image_features)

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids,
        attention_mask=None,
        pixel_values=None,
        image_features=None,
        is_first_iteration=False,
        **kwargs: Any,  # the rest of transformers' generation arguments, passed on by name
    ):
        """As transformers', except: the mask stays the plain one of all tokens so far, and images go with the prefill
        only (with every step where there is no cache).
        """
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, attention_mask=attention_mask, is_first_iteration=is_first_iteration, **kwargs
        )
        inputs["attention_mask"] = attention_mask
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs |= {"pixel_values": pixel_values, "image_features": image_features}
        return inputs
