"""GPTDialogue: transformers' GPT-2 behind the features of a video, with a second head that foretells the next frame.

Source: salesforce/LAVIS, lavis/models/gpt_models/gpt_dialogue.py; module names are its key names. The shipped class
cannot be built (its bases are in the wrong order), so the numbers are those of the order that its tutorial prints. Not
here: ids and batches (processor.py), reading checkpoints (weights.py), sampling (transformers' `generate`).

A sequence is the frames, then the text. Both are padded, so padding may stand in the middle of a row: positions count
real columns only, and a sample gives the same numbers alone and in a batch. `compat="lavis"` gives the release's.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, GPT2Model
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel

from lavish.common.errors import ConfigError, PromptError
from lavish.models.gpt_dialogue.config import GPTDialogueConfig

COMPATS = (None, "lavis")


def position_ids_from(attention_mask: torch.Tensor) -> torch.Tensor:
    """Count each row's real columns from 0; padding gets the position before it, or 0.

    Trap: LAVIS counts padded frames too, so that the text of a sample moves with the longest video of its batch.
    Shapes: (batch, frames + seq) -> the same, int64.
    """
    return ((attention_mask != 0).long().cumsum(dim=1) - 1).clamp(min=0)


@dataclass
class GPTDialogueOutput(CausalLMOutputWithPast):
    """transformers' output, and the parts of the loss."""

    lm_loss: torch.Tensor | None = None
    """Mean cross entropy of the answers' tokens."""
    video_loss: torch.Tensor | None = None
    """Mean square error of the foretold frames."""


class GPTDialogueLMHeadModel(GPT2PreTrainedModel, GenerationMixin):
    """GPT-2 with `video_ff`, which makes a frame an embedding, and `video_ff_out`, which makes it a frame again."""

    config: GPTDialogueConfig
    config_class = GPTDialogueConfig
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPTDialogueConfig):
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.video_ff = nn.Linear(config.len_video_ft, config.n_embd)
        self.video_ff_out = nn.Linear(config.n_embd, config.len_video_ft)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        video_fts: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        compat: str | None = None,
    ) -> GPTDialogueOutput | tuple:
        """Run the network.

        Args:
            input_ids: (batch, seq), the text; with a cache the new tokens only.
            attention_mask: (batch, past + frames + seq), 0 on padding, which may stand anywhere; None: no padding.
            token_type_ids: (batch, frames + seq), ids of special tokens, embedded and added; None: none is added.
            video_fts: (batch, frames, len_video_ft), padded on the right; None: text alone.
            position_ids: ignored: transformers' `generate` passes them, and its own do not count the frames.
            labels: (batch, frames + seq); negative ids are ignored (LAVIS writes -1, transformers -100). None: no text
                loss. The video loss is there whenever there are frames, unless `logits_to_keep` cuts the output.
            logits_to_keep: logits of the last so many columns only; 0, and with labels: of all.
            compat: "lavis": positions count padded columns, and padded frames are targets of the video loss.
        Raises:
            ConfigError: an unknown `compat`.
            PromptError: features of another width, shapes that do not fit, or more positions than the network has.
        """
        if compat not in COMPATS:
            raise ConfigError(f"compat={compat!r} is unknown; use None or 'lavis'.")
        if input_ids is None:
            raise PromptError("forward needs input_ids, the text of the dialogue; the frames are video_fts.")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        inputs_embeds = self.transformer.wte(input_ids)
        num_frames = 0
        if video_fts is not None:
            self._check_features(video_fts, rows=input_ids.shape[0])
            num_frames = video_fts.shape[1]
            frames = self.video_ff(video_fts.to(inputs_embeds.device, inputs_embeds.dtype))
            inputs_embeds = torch.cat((frames, inputs_embeds), dim=1)  # (batch, frames + seq, hidden)
        seq = inputs_embeds.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape[0], past + seq, dtype=torch.long, device=inputs_embeds.device)
        _check_shape("attention_mask", attention_mask, (input_ids.shape[0], past + seq))
        for name, given in (("token_type_ids", token_type_ids), ("labels", labels)):
            if given is not None:
                _check_shape(name, given, (input_ids.shape[0], seq))
        is_plain = compat == "lavis"
        positions = torch.ones_like(attention_mask) if is_plain else attention_mask
        position_ids = position_ids_from(positions)[:, past:]
        self._check_length(position_ids, past + seq)

        hidden_states = self.transformer(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask.long(),
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        ).last_hidden_state
        logits = self.lm_head(hidden_states if labels is not None else hidden_states[:, -logits_to_keep:])
        lm_loss = None if labels is None else text_loss(logits, labels)
        video_loss = None
        if video_fts is not None and logits_to_keep == 0:
            is_real = torch.ones_like(attention_mask) if is_plain else attention_mask
            foretold = self.video_ff_out(hidden_states[:, :num_frames])
            video_loss = frame_loss(foretold, video_fts, is_real[:, :num_frames])
        parts = [part for part in (lm_loss, video_loss) if part is not None]
        output = GPTDialogueOutput(
            loss=torch.stack(parts).sum() if parts else None,
            logits=logits,
            past_key_values=past_key_values,
            lm_loss=lm_loss,
            video_loss=video_loss,
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def _check_features(self, video_fts: torch.Tensor, rows: int) -> None:
        width = self.config.len_video_ft
        if video_fts.ndim != 3 or video_fts.shape[0] != rows or not video_fts.shape[1]:
            raise PromptError(
                f"video_fts has the shape {tuple(video_fts.shape)}; {rows} dialogue(s) take ({rows}, frames, {width})."
            )
        if video_fts.shape[2] != width:
            raise PromptError(
                f"video_fts is {video_fts.shape[2]} wide and this network takes {width} (len_video_ft). Name the "
                "features that it was trained on: visual_ft and audio_ft of the processor, in their order."
            )

    def _check_length(self, position_ids: torch.Tensor, num_columns: int) -> None:
        """Padding takes no position, so only a batch with more columns than positions has to be looked at."""
        limit = self.config.n_positions
        if num_columns <= limit:
            return
        needed = int(position_ids.max()) + 1
        if needed > limit:
            raise PromptError(
                f"A sample of {needed} positions (frames and tokens) was given and this network has {limit}. Take "
                "fewer turns or frames, or collate with too_long='cut'."
            )

    # -- generation: transformers' loop --------------------------------------------------------------------------------

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        video_fts=None,
        use_cache=True,
        is_first_iteration=False,
        **kwargs,  # the rest of transformers' generation arguments: positions and how many logits, which are known here
    ):
        """Give a prefill everything, and a later step its new tokens: the frames are in the cache then.

        Trap: `input_ids` is shorter than cache, mask and types by the frames, so nothing is cut by its length.
        """
        is_prefill = is_first_iteration or not use_cache
        num_new = input_ids.shape[1] if is_prefill or next_sequence_length is None else next_sequence_length
        return {
            "input_ids": input_ids[:, -num_new:],
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids if is_prefill or token_type_ids is None else token_type_ids[:, -num_new:],
            "video_fts": video_fts if is_prefill else None,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
        """No mask is no padding; it has a column for each frame too."""
        video_fts = model_kwargs.get("video_fts")
        columns = inputs_tensor.shape[1] + (0 if video_fts is None else video_fts.shape[1])
        return torch.ones(inputs_tensor.shape[0], columns, dtype=torch.long, device=inputs_tensor.device)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1):
        """Make new tokens the answerer's. Trap: transformers repeats the last type, which is the questioner's."""
        token_type_ids = model_kwargs.pop("token_type_ids", None)
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        if token_type_ids is not None:
            answerer = self.config.special_ids["<speaker2>"]
            model_kwargs["token_type_ids"] = F.pad(token_type_ids, (0, num_new_tokens), value=answerer)
        return model_kwargs


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, int]) -> None:
    if tuple(tensor.shape) != expected:
        raise PromptError(
            f"{name} has the shape {tuple(tensor.shape)}; with frames, text and cache it must be {expected}."
        )


def text_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Give the mean next-token cross entropy over the labels that are not negative; 0 where there is none."""
    targets = labels[:, 1:].to(logits.device)
    targets = targets.masked_fill(targets < 0, -100)
    loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum")
    return loss / (targets != -100).sum().clamp(min=1)


def frame_loss(foretold: torch.Tensor, video_fts: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    """Give the mean square error of each real frame but the first; 0 where there is none.

    Trap: LAVIS also compares with padded frames, so a batch's loss depends on its longest video.
    Shapes: foretold and video_fts (batch, frames, len_video_ft), is_real (batch, frames).
    """
    targets = video_fts[:, 1:].to(foretold.device, torch.float32)
    is_target = (is_real[:, 1:] != 0).to(foretold.device)[..., None]  # (batch, frames - 1, 1)
    error = (foretold[:, :-1].float() - targets).square().masked_fill(~is_target, 0.0)
    return error.sum() / (is_target.sum() * targets.shape[2]).clamp(min=1)
