"""MiniGPT4-Qwen: EVA-ViT, `ln_vision`, Q-Former with learned queries, a linear layer, and Qwen v1.

image -> `vision_tower` (Blip2VisionModel, whose last norm is `ln_vision`) -> `qformer` (Blip2QFormerModel) with
`query_tokens` -> `projector` -> as many embeddings of the decoder as there are queries, in the place of the ids
`image_token_id`. Source: Coobiw/MPP-LLaVA, lavis/models/minigpt4qwen_models/minigpt4qwen.py.
Not here: the decoder (nn/qwen.py), prompts and pixels (processor.py), sampling (transformers' `generate`).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Blip2QFormerModel, Blip2VisionModel
from transformers import initialization as init

from lavish.common.errors import PromptError
from lavish.models.minigpt4_qwen.config import LN_VISION_EPS, MiniGPT4QwenConfig
from lavish.nn.image_steps import ImageStep
from lavish.nn.qwen import QwenDecoder
from lavish.nn.qwen_chat import QwenChatModel


class MiniGPT4QwenForConditionalGeneration(QwenChatModel):
    """The network. `input_ids` hold `num_query_tokens` ids `image_token_id` for each image.

    Positions are counted from each row's first real token, whatever `position_ids` say: transformers' generate passes
    its own. The NTK alpha of a request lies with its cache, never here.
    """

    config_class = MiniGPT4QwenConfig
    config: MiniGPT4QwenConfig
    _no_split_modules = ["Qwen2DecoderLayer", "Blip2EncoderLayer", "Blip2QFormerLayer", "Blip2VisionEmbeddings"]

    def __init__(self, config: MiniGPT4QwenConfig):
        super().__init__(config)
        self.vision_tower = Blip2VisionModel._from_config(config.vision)
        self.vision_tower.post_layernorm.eps = LN_VISION_EPS
        self.qformer = Blip2QFormerModel._from_config(config.qformer)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer.hidden_size))
        self.projector = nn.Linear(config.qformer.hidden_size, config.text.hidden_size)
        self.language_model = QwenDecoder(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.normal_(self.query_tokens, mean=0.0, std=self.config.initializer_range)

    def train(self, mode: bool = True) -> MiniGPT4QwenForConditionalGeneration:
        """As torch's, except: a tower or Q-Former without a trainable weight stays in eval mode (no dropout)."""
        super().train(mode)
        for part in (self.vision_tower, self.qformer):
            if mode and not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    # -- images --------------------------------------------------------------------------------------------------------

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Give what takes the place of each image's slots. (images, 3, S, S) -> (images, num_query_tokens, hidden)."""
        size = self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise PromptError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}; this model takes (images, 3, {size}, {size}):"
                " what the processor gives. Frames of a video are images, one after the other."
            )
        return self.projector(self._query(self._encode(pixel_values)))

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        weight = self.vision_tower.embeddings.patch_embedding.weight
        return self.vision_tower(
            pixel_values.to(pixel_values.device if weight.is_meta else weight.device),
            # The stored table is resized: its grid bicubic, its class row kept.
            interpolate_pos_encoding=self.config.image_size != self.config.vision.image_size,
        ).last_hidden_state  # (images, patches + 1, vision_hidden)

    def _query(self, vision_hidden_states: torch.Tensor) -> torch.Tensor:
        queries = self.query_tokens.expand(vision_hidden_states.shape[0], -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=vision_hidden_states).last_hidden_state

    def image_steps(self) -> tuple[ImageStep, ...]:
        """Give the steps of `get_image_features`."""
        return (
            ImageStep("tower", (self.vision_tower,), self._encode),
            ImageStep("qformer", (self.qformer, self.query_tokens), self._query),
            ImageStep("projector", (self.projector,), self.projector),
        )
