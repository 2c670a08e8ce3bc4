"""Which ids are an image's and where each token stands: GLM-4V's rules for slots and positions.

Apart from model.py because nothing here has weights. Source: modeling_chatglm.py of THUDM/glm-4v-9b, read through
XuRui314/GLM4v-Finetune (modeling_chatglm.py).
"""

import torch
import torch.nn.functional as F

from lavish.common.errors import PromptError
from lavish.models.glm4v_9b.config import ChatGLMConfig


def image_slots(config: ChatGLMConfig, input_ids: torch.Tensor) -> torch.Tensor:
    """Say which ids are slots of an image: from a boi to the eoi that stands `num_image_tokens` - 1 later.

    A boi without its eoi there (one that the network generated) is a token like any other.
    Shapes: (batch, seq) -> (batch, seq), bool.
    """
    length, seq = config.num_image_tokens, input_ids.shape[1]
    ends_here = F.pad(input_ids[:, length - 1 :] == config.eoi_token_id, (0, min(length - 1, seq)))
    starts = ((input_ids == config.boi_token_id) & ends_here).long()
    stops = F.pad(starts, (length, 0))[:, :seq]
    return (starts - stops).cumsum(dim=1) > 0


def position_ids_from(
    config: ChatGLMConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Give the rotary positions: boi p, all patches p + 1, eoi p + 2, the text after it p + 3.

    Counted on the row without its padding; padding gets the position before it, or 0.
    Trap: counting every slot (as vLLM does) moves the logits by 5.
    Shapes: (batch, seq) -> (batch, seq), int64.
    """
    is_real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    is_edge = (input_ids == config.boi_token_id) | (input_ids == config.eoi_token_id)
    is_patch = image_slots(config, input_ids) & ~is_edge
    follows_patch = F.pad(is_patch[:, :-1], (1, 0), value=False)
    is_step = is_real & ~(is_patch & follows_patch)
    return (is_step.long().cumsum(dim=1) - 1).clamp(min=0)


def text_positions(tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Give the positions of embeddings, (batch, seq): they say nothing of images, so each is a token."""
    is_real = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    if attention_mask is not None:
        is_real = (attention_mask != 0).long()
    return (is_real.cumsum(dim=1) - 1).clamp(min=0)


def check_images(config: ChatGLMConfig, input_ids: torch.Tensor, is_slot: torch.Tensor, num_images: int) -> None:
    """Check that there are as many images as runs of slots, and none that was not expanded.

    Raises: PromptError: with both numbers.
    """
    length = config.num_image_tokens
    bare = (input_ids[:, :-2] == config.boi_token_id) & (input_ids[:, 2:] == config.eoi_token_id)
    num_slots, num_bare = torch.stack((is_slot.sum(), bare.sum() * (length != 3))).tolist()
    if num_bare:
        raise PromptError(
            f"input_ids hold {num_bare} image(s) as three ids (boi, one id, eoi), as the release's tokenizer writes "
            f"them; here an image is expanded to {length}: boi, {length - 2} pad ids, eoi. Make the inputs with the "
            "processor's apply_chat_template."
        )
    if num_slots != num_images * length:
        raise PromptError(
            f"{num_images} image(s) were given and input_ids have slots for {num_slots // length} ({length} ids each, "
            "from boi to eoi). Make the inputs with the processor's apply_chat_template."
        )


def check_length(config: ChatGLMConfig, position_ids: torch.Tensor, past) -> None:
    """Check that the positions stay within `seq_length`; they are looked at only where there are more slots.

    Raises: PromptError: with the last position and the limit.
    """
    most = config.max_position_embeddings
    if isinstance(past, torch.Tensor) or past + position_ids.shape[1] <= most:
        return
    last = int(position_ids.max())
    if last >= most:
        raise PromptError(
            f"The prompt reaches position {last} and this model has {most} (seq_length; an image takes three). Shorten "
            "the conversation."
        )
