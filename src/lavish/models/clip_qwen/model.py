"""CLIP + Qwen: a CLIP tower without its class row, a two-layer projector, and Qwen v1.

image -> `vision_tower` (CLIPVisionModel, all layers, no last norm) -> patches without the class row -> `projector` ->
as many embeddings of the decoder, in the place of the ids `image_token_id`.
Source: WatchTower-Liu/VLM-learning, model/model.py.
Not here: the decoder (nn/qwen.py), prompts and pixels (processor.py), sampling (transformers' `generate`).
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel
from transformers import initialization as init

from lavish.common.errors import PromptError
from lavish.models.clip_qwen.config import ClipQwenConfig
from lavish.nn.image_steps import ImageStep
from lavish.nn.qwen import QwenConfig, QwenDecoder, TransformersDecoder
from lavish.nn.qwen_chat import QwenChatModel

logger = logging.getLogger(__name__)


class ClipQwenForConditionalGeneration(QwenChatModel):
    """The network. `input_ids` hold one id `image_token_id` for each of an image's patches.

    The release holds one id and puts the patches in its place; here the slots are there from the start, so logits have
    a row for each id. Positions are counted from each row's first real token, whatever `position_ids` say. The NTK
    alpha of a request lies with its cache, never here.
    """

    config_class = ClipQwenConfig
    config: ClipQwenConfig
    _no_split_modules = ["Qwen2DecoderLayer", "CLIPEncoderLayer", "CLIPVisionEmbeddings"]

    def __init__(self, config: ClipQwenConfig):
        super().__init__(config)
        tower, hidden_size = config.tower, config.text.hidden_size
        if isinstance(tower, SiglipVisionConfig):
            self.vision_tower = SiglipVisionModel._from_config(tower)
        else:
            self.vision_tower = CLIPVisionModel._from_config(tower)
            self.vision_tower.set_submodule("post_layernorm", nn.Identity())  # the class row's, which nothing reads
        self.projector = nn.Sequential(
            nn.Linear(tower.hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        is_qwen = isinstance(config.text, QwenConfig)
        self.language_model = QwenDecoder(config.text) if is_qwen else TransformersDecoder(config.text)
        self.lm_head = nn.Linear(hidden_size, config.text.vocab_size, bias=False)
        self.post_init()
        if self.generation_config is not None:
            self.generation_config.repetition_penalty = config.repetition_penalty
            if config.num_token_ids is not None and config.num_token_ids < config.vocab_size:
                # Rows of the head that no token has: drawn, they could not be decoded.
                self.generation_config.suppress_tokens = list(range(config.num_token_ids, config.vocab_size))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and any(module is linear for linear in (self.projector[0], self.projector[2])):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.bias)

    def train(self, mode: bool = True) -> ClipQwenForConditionalGeneration:
        """As torch's, except: a tower without a trainable weight stays in eval mode."""
        super().train(mode)
        if mode and not any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            self.vision_tower.eval()
        return self

    # -- images --------------------------------------------------------------------------------------------------------

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Give what takes the place of each image's slots. (images, 3, S, S) -> (images, patches, hidden)."""
        size = self.config.tower.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise PromptError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}; this model takes (images, 3, {size}, {size}):"
                " what the processor gives."
            )
        return self._project(self._encode(pixel_values))

    def _encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        weight = self.vision_tower.embeddings.patch_embedding.weight
        pixel_values = pixel_values.to(pixel_values.device if weight.is_meta else weight.device)
        vision_hidden_states = self.vision_tower(pixel_values).last_hidden_state
        if isinstance(self.vision_tower, CLIPVisionModel):
            vision_hidden_states = vision_hidden_states[:, 1:]  # without the class row, which a SigLIP does not have
        return vision_hidden_states

    def _project(self, vision_hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = next(self.projector.parameters()).dtype  # which may train in float32
        return self.projector(vision_hidden_states.to(dtype))

    def image_steps(self) -> tuple[ImageStep, ...]:
        """Give the steps of `get_image_features`."""
        return (
            ImageStep("tower", (self.vision_tower,), self._encode),
            ImageStep("projector", (self.projector,), self._project),
        )


TRAINABLE = ("projector.", ".lora_A.", ".lora_B.")
"""What the release trains: parts of parameter names."""


def freeze(network: nn.Module) -> list[str]:
    """Make the projector and whatever LoRA is on the network trainable, in float32, and nothing else; gives the names.

    Trap: in bfloat16 a step of 3e-5 leaves about 70 % of N(0, 0.02) weights where they were.
    """
    names: list[str] = []
    for name, parameter in network.named_parameters():
        is_trainable = any(part in name for part in TRAINABLE)
        parameter.requires_grad_(is_trainable)
        if is_trainable:
            parameter.data = parameter.data.float()
            names.append(name)
    logger.info("trainable: %d parameters in %s", len(names), ", ".join(names))
    return names
