"""A small chat network on transformers' Qwen2 with the interface of `ChatNetwork`, and a processor for it: what the
tests of the generic steps look at, apart from any family.

An image is three slots of the id 3 and stands at one position; texts are digits, one token each. A request whose prompt
is longer than 40 tokens has another rotary base, as Qwen's dynamic NTK would.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature, Qwen2Config, Qwen2Model

SLOTS, SLOT_ID, VOCAB = 3, 3, 24
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


class ToyChatNetwork(nn.Module):
    """Qwen2 with a linear tower."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Qwen2Config(**SIZES, attn_implementation="sdpa")
        self.model = Qwen2Model(self.config)
        self.tower = nn.Linear(3 * 2 * 2, SLOTS * 32)
        self.lm_head = nn.Linear(32, VOCAB, bias=False)
        self.states: list[Any] = []

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.tower(pixel_values.flatten(1)).unflatten(1, (SLOTS, 32))

    def image_slots(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids == SLOT_ID

    def embed(self, input_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        embeds = self.model.embed_tokens(input_ids)
        slots = self.image_slots(input_ids)
        found = 0 if image_features is None else image_features.shape[0]
        assert int(slots.sum()) == SLOTS * found
        return embeds if image_features is None else embeds.masked_scatter(slots[..., None], image_features)

    def position_ids_from(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        slots = self.image_slots(input_ids)
        starts = slots & ((torch.cumsum(slots, 1) - 1) % SLOTS == 0)
        return (torch.cumsum(real * ((~slots) | starts), 1) - 1).clamp(min=0)

    def request_state(self, num_tokens: Sequence[int]) -> tuple[float, ...]:
        return tuple(3.0 if number > 40 else 1.0 for number in num_tokens)

    def decode_hidden(self, inputs_embeds, position_ids, attention_mask, past_key_values, request_state):
        self.states.append(request_state)
        scale = torch.tensor(request_state)[:, None, None]
        return self.model(
            inputs_embeds=inputs_embeds * scale,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        ).last_hidden_state

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens


def make_network() -> ToyChatNetwork:
    """Draw the matrices wide enough for mistakes to show."""
    network = ToyChatNetwork().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5, generator=generator)
    return network


class ToyProcessor:
    """Content is a string of digits, or a list of strings and pictures (tensors) in any order."""

    num_image_tokens = SLOTS

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **_: Any) -> BatchFeature:
        ids, pictures = [4], []
        for message in messages:
            content = message["content"]
            for part in [content] if isinstance(content, str) else content:
                if isinstance(part, torch.Tensor):
                    ids += [SLOT_ID] * SLOTS
                    pictures.append(part)
                else:
                    ids += [10 + int(digit) for digit in part]
            ids.append(5 if message["role"] == "user" else 6)
        data: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        data["token_type_ids"] = (data["input_ids"] == SLOT_ID).long()
        if pictures:
            data["pixel_values"] = torch.stack(pictures)
        return BatchFeature(data)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(str(i - 10) if i >= 10 else "" for i in ids)
