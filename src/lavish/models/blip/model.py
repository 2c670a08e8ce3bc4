"""BLIP's networks: transformers' classes with the few places cured where they compute something else than LAVIS.

- cross-attention takes its mask (transformers 5.23 hands it to an argument that is not read)
- `generate` leaves the caller's ids alone, and does not attend the padding of a question
- stochastic depth in the tower while training, which transformers' tower lacks
- a picture size other than the file's: positions are resized once, after loading

Names, `state_dict` and config stay transformers', so a saved folder loads there too. Source: salesforce/LAVIS,
lavis/models/blip_models/*.py and med.py for the losses and the ranking.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BlipConfig
from transformers.models.blip import modeling_blip as blip
from transformers.models.blip.modeling_blip_text import BlipTextAttention, BlipTextLMHeadModel, BlipTextModel

from lavish.common.errors import ConfigError
from lavish.models.blip.config import text_of

IGNORE_INDEX = -100


class CrossAttention(BlipTextAttention):
    """Cross-attention whose mask reaches the scores.

    transformers 5.23 passes it as `attention_mask`, and BlipTextSelfAttention reads `encoder_attention_mask` when there
    are encoder states: padding of a question was attended, and VQA losses and ranks were wrong.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the parent's; `attention_mask` is the additive mask over the encoder states."""
        context, probabilities = self.self(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        return self.output(context, hidden_states), probabilities


class StochasticDepthLayer(blip.BlipEncoderLayer):
    """A block of the tower that leaves out each of its two branches for some samples while training.

    Source: timm 0.4.12, DropPath: what is kept is divided by the share that is kept.
    """

    def __init__(self, config: Any, rate: float) -> None:
        super().__init__(config)
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(images, tokens, hidden) -> the same."""
        attended, _ = self.self_attn(hidden_states=self.layer_norm1(hidden_states), **kwargs)
        hidden_states = self._dropped(attended) + hidden_states
        return self._dropped(self.mlp(self.layer_norm2(hidden_states))) + hidden_states

    def _dropped(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return branch
        keep = 1.0 - self.rate
        is_kept = torch.rand(len(branch), 1, 1, device=branch.device) < keep
        return branch / keep * is_kept.to(branch.dtype)


def mask_cross_attention(text_model: BlipTextModel) -> None:
    """Put `CrossAttention` into each layer, before weights are loaded."""
    for index, layer in enumerate(text_model.encoder.layer):
        layer.crossattention = CrossAttention(text_model.config, is_cross_attention=True, layer_idx=index)


def drop_paths(tower: blip.BlipVisionModel) -> None:
    """Put stochastic depth into the tower where the config has a rate: from 0 in the first block up to it."""
    # A transformers folder has no such field.
    last_rate = getattr(tower.config, "drop_path_rate", 0.0)
    if not last_rate:
        return
    count = len(tower.encoder.layers)
    rates = torch.linspace(0, last_rate, count, device="cpu").tolist()
    tower.encoder.layers = nn.ModuleList(StochasticDepthLayer(tower.config, rate) for rate in rates)


@torch.no_grad()
def resize_positions(tower: blip.BlipVisionModel, image_size: int) -> None:
    """Bring the tower to another picture size: the grid of its positions is resized bicubic, the class row kept.

    Raises:
        ConfigError: the size is no multiple of the patches'.
    """
    embeddings = tower.embeddings
    patch_size = cast(int, embeddings.patch_size)  # read_config and lavis_config let no pair of numbers through
    if image_size % patch_size:
        raise ConfigError(f"image_size {image_size} is no multiple of the patch size {patch_size}.")
    table = embeddings.position_embedding
    old, new = round((table.shape[1] - 1) ** 0.5), image_size // patch_size
    if old != new:
        grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
        resized = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
        rows = resized.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)  # (1, patches, hidden)
        positions = torch.cat([table[:, :1], rows], dim=1)
        embeddings.position_embedding = nn.Parameter(positions, requires_grad=table.requires_grad)
    embeddings.image_size = tower.config.image_size = image_size
    embeddings.num_patches, embeddings.num_positions = new**2, new**2 + 1


class BlipForConditionalGeneration(blip.BlipForConditionalGeneration):
    """Captions: a tower and a text decoder over its states."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        drop_paths(self.vision_model)
        mask_cross_attention(self.text_decoder.bert)
        self.post_init()

    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, pixel_values: torch.Tensor, input_ids: Any = None, attention_mask: Any = None, **options: Any
    ) -> Any:
        """As transformers', on a copy of `input_ids`: theirs overwrites the first id of the caller's tensor."""
        if isinstance(input_ids, torch.Tensor):
            input_ids = input_ids.clone()
        return super().generate(pixel_values, input_ids=input_ids, attention_mask=attention_mask, **options)


class BlipForQuestionAnswering(blip.BlipForQuestionAnswering):
    """Visual question answering: a question encoder over the tower's states, an answer decoder over the question's."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        drop_paths(self.vision_model)
        mask_cross_attention(self.text_encoder)
        mask_cross_attention(self.text_decoder.bert)
        self.post_init()

    def question_states(
        self, image_embeds: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Read questions (first id `[ENC]`) with their pictures: (batch, seq, hidden)."""
        output = self.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=image_embeds, return_dict=True
        )
        return output.last_hidden_state

    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **options: Any,
    ) -> Any:
        """As transformers', but the padding of a question is not attended, so that a batch equals single runs."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        with torch.no_grad():
            images = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
            states = self.question_states(images.last_hidden_state, input_ids, attention_mask)
        text = text_of(self.config)
        # The `self` of transformers' `generate` is a protocol of more attributes than any network declares.
        return cast(Any, self.text_decoder).generate(
            input_ids=input_ids.new_full((len(input_ids), 1), cast(int, text.bos_token_id)),
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            encoder_hidden_states=states,
            encoder_attention_mask=attention_mask,
            **options,
        )


class BlipForImageTextRetrieval(blip.BlipForImageTextRetrieval):
    """Features of pictures and texts, their similarity, and (where the file has its head) whether they match."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        drop_paths(self.vision_model)
        mask_cross_attention(self.text_encoder)
        self.post_init()

    def text_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read texts alone (first id `[CLS]`) or with pictures (first id `[ENC]`): (batch, seq, hidden)."""
        output = self.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=image_embeds, return_dict=True
        )
        return output.last_hidden_state


def caption_labels(input_ids: torch.Tensor, attention_mask: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """Give what a caption trains: its ids, without padding and without the prompt's positions."""
    labels = input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
    labels[:, :prompt_length] = IGNORE_INDEX
    return labels


def answer_losses(
    decoder: BlipTextLMHeadModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    states: torch.Tensor,
    states_mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score answers (first id `[DEC]`), each over its row of question states.

    Shapes: ids and masks (answers, seq), states (answers, keys, hidden). Gives the label-smoothed loss summed over each
    answer's tokens, `[SEP]` included, (answers), and the logits (answers, seq, vocabulary).
    """
    output = decoder(
        input_ids=input_ids,
        attention_mask=attention_mask,
        encoder_hidden_states=states,
        encoder_attention_mask=states_mask,
        labels=input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX),
        reduction="none",
    )
    return output.loss, output.logits


NETWORKS: dict[str, type[Any]] = {
    "BlipForConditionalGeneration": BlipForConditionalGeneration,
    "BlipForQuestionAnswering": BlipForQuestionAnswering,
    "BlipForImageTextRetrieval": BlipForImageTextRetrieval,
}
"""transformers' name of an architecture -> our class."""
