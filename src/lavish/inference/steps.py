"""The two passes of answering: prompts into the cache (prefill), and one more token a row (decode).

They go past `forward` to the decoder, because they know what it would have to find out each time: positions, and
whether a mask is needed at all. The network says what is its own (which ids are image slots, positions, what a request
fixes by its length); padding, the cache, the rows that are still going and the next positions are here. A single
sequence is decoded without a mask; nothing is stored on the network, so requests do not disturb each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
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


@runtime_checkable
class ChatNetwork(Protocol):
    """What a chat network offers beside a transformers `forward`, with a module `lm_head` and a config that has
    `num_hidden_layers`, `max_position_embeddings`, `pad_token_id` and `eos_token_id`.
    """

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Give all that takes the place of an image's slots, in order. (images, 3, H, W) -> (images, slots, hidden)."""
        ...

    def image_slots(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Tell which ids are image slots. (batch, seq) -> bool (batch, seq)."""
        ...

    def embed(self, input_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        """Embed ids; features (images, slots, hidden) fill the slots in reading order. -> (batch, seq, hidden)."""
        ...

    def position_ids_from(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Give the positions, (batch, seq), each row counted from its first real token."""
        ...

    def request_state(self, num_tokens: Sequence[int]) -> tuple[Any, ...] | None:
        """Give what is fixed for each row of a request by the number of its prompt tokens; None: nothing is."""
        ...

    def decode_hidden(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache,
        request_state: tuple[Any, ...] | None,
    ) -> torch.Tensor:
        """Run the decoder, final norm included. `attention_mask` is None (no padding, causal) or (batch, keys), 1 =
        attend, over the cached keys too. -> (batch, seq, hidden).
        """
        ...

    def get_input_embeddings(self) -> nn.Module:
        """Give the table of the ids, as transformers has it."""
        ...


class DecoderSteps:
    """Prefill and decode of a `ChatNetwork`."""

    images_per_pass = 8
    """Images that go through the tower at once."""

    def __init__(self, network: ChatNetwork | CogVLMForCausalLM):
        self.network: Any = network  # also an nn.Module with a config
        self.config = self.network.config
        self.num_layers = self.config.num_hidden_layers
        self.context_tokens = self.config.max_position_embeddings
        # Rows of the head that no token has; only a transformers network has a generation_config.
        generation_config = getattr(self.network, "generation_config", None)
        self._suppressed: list[int] = getattr(generation_config, "suppress_tokens", None) or []
        self._never: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.network.get_input_embeddings().weight.device

    def request_state(self, num_tokens: int) -> Any:
        """Give what is fixed for a single request by the number of its prompt tokens."""
        return self._fixed([num_tokens])

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
        an image. `features` are those of the images that are still to come, in reading order. Shapes: features
        (images, slots, hidden) -> logits (batch, vocab) of the last token.
        """
        width = max(len(prompt) for prompt in prompts)
        pads = [width - len(prompt) for prompt in prompts]
        pad_id = self.config.pad_token_id or 0
        input_ids = self._tensor([[pad_id] * pad + prompt.token_ids for pad, prompt in zip(pads, prompts)])
        mask = None
        if any(pads):
            mask = self._tensor([[0] * pad + [1] * len(prompt) for pad, prompt in zip(pads, prompts)])
        fixed = self._fixed([len(prompt) for prompt in prompts])
        hidden_states, position_ids = self._first(prompts, pads, input_ids, mask, features, cache, num_cached, fixed)
        state = DecodeState(position_ids[:, -1:] + 1, None if mask is None else mask.bool(), fixed)
        return self._logits(hidden_states), state

    @torch.inference_mode()
    def decode(self, token_ids: Sequence[int], state: DecodeState, cache: SliceCache) -> torch.Tensor:
        """Feed one token a row. Shapes: -> logits (batch, vocab)."""
        input_ids = self._tensor([[token_id] for token_id in token_ids])
        hidden_states = self._next(input_ids, state, state.grow_mask(cache.get_seq_length() + 1), cache)
        state.positions = state.positions + 1
        return self._logits(hidden_states)

    @torch.inference_mode()
    def select_rows(self, rows: Sequence[int], state: DecodeState, cache: SliceCache) -> None:
        """Keep these rows of the batch, in state and cache."""
        index = torch.tensor(rows, device=self.device)
        state.select_rows(index)
        cache.select_rows(index)

    def _fixed(self, num_tokens: Sequence[int]) -> Any:
        return self.network.request_state(num_tokens)

    def _first(self, prompts, pads, input_ids, mask, features, cache, num_cached, fixed):
        """Run the decoder on padded prompts: hidden states of what is not cached, and the positions of all."""
        position_ids = self.network.position_ids_from(input_ids, mask)
        hidden_states = self.network.decode_hidden(
            inputs_embeds=self.network.embed(input_ids[:, num_cached:], features),
            position_ids=position_ids[:, num_cached:],
            attention_mask=mask,
            past_key_values=cache,
            request_state=fixed,
        )
        return hidden_states, position_ids

    def _next(self, input_ids, state, mask, cache):
        """Run the decoder on one token a row."""
        # Past `embed`: a generated id is a word, also where it is the id of an image slot.
        return self.network.decode_hidden(
            inputs_embeds=self.network.get_input_embeddings()(input_ids),
            position_ids=state.positions,
            attention_mask=mask,
            past_key_values=cache,
            request_state=state.fixed,
        )

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = self.network.lm_head(hidden_states[:, -1]).float()
        if not self._suppressed:
            return logits
        if self._never is None or self._never.device != logits.device:
            never = torch.zeros(logits.shape[-1], dtype=torch.bool)
            never[self._suppressed] = True
            self._never = never.to(logits.device)
        return logits.masked_fill(self._never, -torch.inf)

    def _tensor(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self.device)


class CogVLMSteps(DecoderSteps):
    """Prefill and decode of CogVLM and CogVLM2, which is no `ChatNetwork`.

    Its image slots hold the pad id, so that types tell them and not ids; its decoder wants to know by them which expert
    a token goes to; and a prefill gives the last column alone, which saves the last layer's other queries.
    """

    images_per_pass = 1

    def __init__(self, network: CogVLMForCausalLM):
        super().__init__(network)
        self.text_only = ExpertRouting.text_only()

    def _fixed(self, num_tokens: Sequence[int]) -> None:
        """Nothing of a request is fixed at its prefill."""

    def _first(self, prompts, pads, input_ids, mask, features, cache, num_cached, fixed):
        types = self._tensor([[0] * pad + prompt.token_type_ids for pad, prompt in zip(pads, prompts)])
        position_ids = position_ids_from(types, mask)
        new_ids, new_types = input_ids[:, num_cached:], types[:, num_cached:]
        routing = self.text_only  # all that CogVLM2-Video has
        if not self.config.is_video:
            routing = ExpertRouting.from_token_type_ids(new_types, mask)
        hidden_states = self.network.model(
            inputs_embeds=self.network.model.embed(new_ids, new_types, features),
            position_ids=position_ids[:, num_cached:],
            attention_mask=mask,
            routing=routing,
            past_key_values=cache,
            is_last_only=True,
        )
        return hidden_states, position_ids

    def _next(self, input_ids, state, mask, cache):
        decoder = self.network.model
        return decoder(
            inputs_embeds=decoder.embed_tokens(input_ids),
            position_ids=state.positions,
            attention_mask=None if mask is None else mask[:, None, None],
            routing=self.text_only,
            past_key_values=cache,
        )


def slots_beyond_positions(network: Any, prompt: Prompt) -> int:
    """Give how many slots of a prompt take no position of their own: GLM-4V lays a picture's 1,600 patches on one, and
    its context is counted in positions. 0 for CogVLM, whose context is counted in slots.
    """
    if not isinstance(network, ChatNetwork):
        return 0
    position_ids = network.position_ids_from(torch.tensor([prompt.token_ids]), None)
    return len(prompt) - int(position_ids[0, -1]) - 1


def steps_for(network: nn.Module) -> CogVLMSteps | DecoderSteps:
    """Give the steps of a network.

    Raises:
        TypeError: it offers no `ChatNetwork`; says what it lacks.
    """
    if isinstance(network, CogVLMForCausalLM):
        return CogVLMSteps(network)
    if isinstance(network, ChatNetwork):
        return DecoderSteps(network)
    names = [name for name in vars(ChatNetwork) if not name.startswith("_")]
    lacking = ", ".join(name for name in names if not hasattr(network, name))
    raise TypeError(f"{type(network).__name__} is no network that answers as lavish's do: it lacks {lacking}.")
