"""Step 5: the model, a transformers class that is one of lavish's too."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lavish.common.registry import registry
from lavish.models.base_model import BaseModel


@registry.register_model("my_gpt_dialogue")
class MyGPTDialogue(GPT2LMHeadModel, BaseModel):
    """GPT-2 that reads the features of a video before the words, and predicts the next of either."""

    PRETRAINED_MODEL_CONFIG_DICT = {"base": str(Path(__file__).with_name("gpt_dialogue_base.yaml"))}

    def __init__(self, config, len_video_ft=4224):
        super().__init__(config)
        self.video_ff = nn.Linear(len_video_ft, config.n_embd)
        self.video_ff_out = nn.Linear(config.n_embd, len_video_ft)

    @classmethod
    def from_config(cls, cfg):
        """Make it of a recipe's section `model`."""
        sizes = {name: cfg[name] for name in ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions")}
        return cls(GPT2Config(**sizes), len_video_ft=cfg["len_video_ft"])

    def forward(self, samples):
        """Give the losses of a batch."""
        video = samples["video_fts"]
        embeds = torch.cat((self.video_ff(video), self.transformer.wte(samples["input_ids"])), dim=1)
        hidden = self.transformer(inputs_embeds=embeds, attention_mask=samples["attn_mask"]).last_hidden_state
        frames = video.shape[1]
        logits, labels = self.lm_head(hidden[:, frames:-1]), samples["labels"][:, 1:]
        loss_text = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        real = samples["attn_mask"][:, 1:frames, None].bool()
        error = (self.video_ff_out(hidden[:, : frames - 1]) - video[:, 1:]).square()
        loss_video = error.masked_select(real.expand_as(error)).mean()
        return {"loss": loss_text + loss_video, "loss_text": loss_text, "loss_video": loss_video}
