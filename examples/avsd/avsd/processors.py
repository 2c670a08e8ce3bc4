"""Step 4: the processors of videos (stored features) and of dialogues."""

import os

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from lavish.common.registry import registry
from lavish.processors.base_processor import BaseProcessor

SPECIAL = ["<eos>", "<speaker1>", "<speaker2>", "<cap>", "<pad>"]


@registry.register_processor("my_video_ft")
class MyVideoProcessor(BaseProcessor):
    """Features of a video: `<root>/<feature>/<image_id>.npy`, one row a frame, side by side."""

    def __init__(self, visual_ft=("i3d_rgb",), audio_ft=("vggish",)):
        self.names = [*visual_ft, *audio_ft]

    def __call__(self, ft_root, vname):
        arrays = [np.load(os.path.join(ft_root, name, f"{vname}.npy")) for name in self.names]
        shortest = min(len(array) for array in arrays)
        return torch.from_numpy(np.concatenate([array[:shortest] for array in arrays], axis=1)).float()

    @classmethod
    def from_config(cls, cfg=None):
        """Make it of a recipe's section."""
        cfg = cfg or {}
        return cls(cfg.get("visual_ft", ("i3d_rgb",)), cfg.get("audio_ft", ("vggish",)))

    def padding(self, seq):
        """Stack videos of different lengths."""
        return pad_sequence(seq, batch_first=True, padding_value=1.0)

    def get_attention_mask(self, seq):
        """Give 1 on frames and 0 on padding."""
        return pad_sequence([torch.ones(len(one), dtype=torch.long) for one in seq], batch_first=True)


@registry.register_processor("my_dialogue")
class MyDialogueProcessor(BaseProcessor):
    """Caption, history, question and answer as ids; the answer alone is learnt."""

    def __init__(self, tokenizer="gpt2", max_turns=3):
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
        self.max_turns = max_turns
        self.eos, self.pad = self.tokenizer.convert_tokens_to_ids(["<eos>", "<pad>"])

    def __call__(self, ann):
        turns = [*ann["dialog"][-self.max_turns :], {"question": ann["question"], "answer": ann["answer"]}]
        segments = [f"{ann['caption']} {ann['summary']}"]
        segments += [text for turn in turns for text in (turn["question"], turn["answer"])]
        encoded = [[*self.tokenizer.encode(text, add_special_tokens=False), self.eos] for text in segments]
        before = [token for segment in encoded[:-1] for token in segment]
        return {
            "input_ids": torch.tensor([*before, *encoded[-1]]),
            "labels": torch.tensor([-100] * len(before) + encoded[-1]),
        }

    @classmethod
    def from_config(cls, cfg=None):
        """Make it of a recipe's section."""
        cfg = cfg or {}
        return cls(cfg.get("tokenizer", "gpt2"), cfg.get("max_turns", 3))

    def padding(self, seq, padding_value=None):
        """Stack texts of different lengths."""
        return pad_sequence(seq, batch_first=True, padding_value=self.pad if padding_value is None else padding_value)

    def get_attention_mask(self, seq):
        """Give 1 on texts and 0 on padding."""
        return pad_sequence([torch.ones(len(one), dtype=torch.long) for one in seq], batch_first=True)
