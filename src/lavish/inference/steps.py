"""The two passes of answering, CogVLM's: a prompt into the cache (prefill), and one more token a row (decode).

They go past `forward` to the decoder, because they know what it would have to find out each time: positions, routing,
and whether a mask is needed at all. A single sequence is decoded without a mask; nothing is stored on the network. The
other families' are in `decoder_steps.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from lavish.inference.cache import SliceCache
from lavish.models.cogvlm.model import CogVLMForCausalLM
from lavish.models.cogvlm.routing import ExpertRouting, position_ids_from


@dataclass(frozen=True)
class Prompt:
    """One encoded conversation, unpadded."""

    token_ids: list[int]
    token_type_ids: list[int]
    """1 for image slots, 0 for text."""
    pixel_values: torch.Tensor | None = None
    """(images, 3, height, width) in reading order, or None for a conversation without an image."""
    digests: tuple[str, ...] = ()
    """Hash of each image's pixels, in order."""

    def __len__(self) -> int:
        return len(self.token_ids)


class DecodeState:
    """What the decode steps of one batch need beside the cache: the next position of each row, where padding is, and
    what the rows had fixed at their prefill.
    """

    def __init__(
        self, positions: torch.Tensor, attention_mask: torch.Tensor | None, fixed: tuple[Any, ...] | None = None
    ):
        self.positions = positions  # (batch, 1)
        self.attention_mask = attention_mask  # (batch, keys), 0 or False on padding; None where no row is padded
        self.fixed = fixed  # one a row, or None where nothing is

    def grow_mask(self, num_keys: int) -> torch.Tensor | None:
        """Give the mask for `num_keys` keys, (batch, keys) with True = attend, also to all after the prompt."""
        mask = self.attention_mask
        if mask is None:
            return None
        if mask.shape[1] < num_keys:
            mask = self.attention_mask = torch.cat([mask, mask.new_ones(mask.shape[0], num_keys)], dim=1)
        return mask[:, :num_keys]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        self.positions = self.positions[rows]
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[rows]
        if self.fixed is not None:
            self.fixed = tuple(self.fixed[row] for row in rows.tolist())


class CogVLMSteps:
    """Prefill and decode of CogVLM and CogVLM2."""

    images_per_pass = 1
    """Images that go through the tower at once."""

    def __init__(self, network: CogVLMForCausalLM):
        self.network = network
        self.config = network.config
        self.num_layers = network.config.num_hidden_layers
        self.context_tokens = network.config.max_position_embeddings
        self.text_only = ExpertRouting.text_only()

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.network.model.embed_tokens.weight.device

    def request_state(self, num_tokens: int) -> None:
        """Give what is fixed for a request by its length: nothing."""

    @torch.inference_mode()
    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the tower. Shapes: (images, 3, height, width) -> (images, slots, hidden)."""
        return self.network.get_image_features(pixel_values)

    @torch.inference_mode()
    def prefill(
        self, prompts: Sequence[Prompt], features: torch.Tensor | None, cache: Cache, num_cached: int = 0
    ) -> tuple[torch.Tensor, DecodeState]:
        """Put prompts into the cache; rows of different lengths are padded on the left.

        `num_cached` tokens at the start of a SINGLE prompt are in the cache already; a part cached never ends inside
        an image. `features` are those of the images that are still to come, in the order of their rows. Shapes:
        features (images, slots, hidden) -> logits (batch, vocab) of the last token.
        """
        width = max(len(prompt) for prompt in prompts)
        pads = [width - len(prompt) for prompt in prompts]
        pad_id = self.config.pad_token_id or 0
        input_ids = self._tensor([[pad_id] * pad + prompt.token_ids for pad, prompt in zip(pads, prompts)])
        token_type_ids = self._tensor([[0] * pad + prompt.token_type_ids for pad, prompt in zip(pads, prompts)])
        attention_mask = None
        if any(pads):
            attention_mask = self._tensor([[0] * pad + [1] * len(prompt) for pad, prompt in zip(pads, prompts)])
        position_ids = position_ids_from(token_type_ids, attention_mask)
        new_ids, new_types = input_ids[:, num_cached:], token_type_ids[:, num_cached:]
        routing = self.text_only  # all that CogVLM2-Video has
        if not self.config.is_video:
            routing = ExpertRouting.from_token_type_ids(new_types, attention_mask)
        hidden_states = self.network.model(
            inputs_embeds=self.network.model.embed(new_ids, new_types, features),
            position_ids=position_ids[:, num_cached:],
            attention_mask=attention_mask,
            routing=routing,
            past_key_values=cache,
            is_last_only=True,
        )
        mask = None if attention_mask is None else attention_mask.bool()
        return self._logits(hidden_states), DecodeState(position_ids[:, -1:] + 1, mask)

    @torch.inference_mode()
    def decode(self, token_ids: Sequence[int], state: DecodeState, cache: SliceCache) -> torch.Tensor:
        """Feed one token a row. Shapes: -> logits (batch, vocab)."""
        decoder, mask = self.network.model, state.grow_mask(cache.get_seq_length() + 1)
        hidden_states = decoder(
            inputs_embeds=decoder.embed_tokens(self._tensor([[token_id] for token_id in token_ids])),
            position_ids=state.positions,
            attention_mask=None if mask is None else mask[:, None, None],
            routing=self.text_only,
            past_key_values=cache,
        )
        state.positions = state.positions + 1
        return self._logits(hidden_states)

    @torch.inference_mode()
    def select_rows(self, rows: Sequence[int], state: DecodeState, cache: SliceCache) -> None:
        """Keep these rows of the batch, in state and cache."""
        index = torch.tensor(rows, device=self.device)
        state.select_rows(index)
        cache.select_rows(index)

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.network.lm_head(hidden_states[:, -1]).float()

    def _tensor(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self.device)
