"""transformers' `generate` for networks that count positions themselves and whose pad id is no padding.

These classes stand between the networks and transformers' mixin because the families need the very same hooks; what a
prefill is and where its tokens stand remains the network's. Not here: lavish's own decoding (`lavish.inference`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationMixin


class PlainMaskGenerationMixin(GenerationMixin):
    """`generate` in which no mask is no padding."""

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
        """Trap: transformers reads a mask off the pad id, which stands in the slots of images or ends an answer."""
        return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)


class RopeDeltasGenerationMixin(PlainMaskGenerationMixin):
    """`generate` for a forward that gives `rope_deltas`: how far the positions of its rows are behind their slots."""

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
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
        **kwargs: Any,  # the rest of transformers' generation arguments, passed on by name
    ):
        """As transformers', except: no position_ids, and a prefill gets whole token_type_ids and its plain 2D mask."""
        model_inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            model_inputs["attention_mask"] = attention_mask
            model_inputs["token_type_ids"] = token_type_ids
            model_inputs["image_features"] = image_features
        return model_inputs | {"rope_deltas": rope_deltas}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1):
        """Keep the deltas with the call, and make new tokens text.

        Trap: transformers repeats the last type, which is that of an image where the prompt ends with one.
        """
        token_type_ids = model_kwargs.pop("token_type_ids", None)
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        if token_type_ids is not None:
            model_kwargs["token_type_ids"] = F.pad(token_type_ids, (0, num_new_tokens), value=0)
        if model_kwargs.get("use_cache", True):
            model_kwargs["rope_deltas"] = outputs["rope_deltas"]
        return model_kwargs
