"""AVSD: dialogues about videos, on stored features.

Source: salesforce/LAVIS, lavis/datasets/datasets/avsd_dialogue_datasets.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lavish.common.errors import ConfigError, DataError
from lavish.datasets.datasets.annotations import need
from lavish.datasets.datasets.base_dataset import present
from lavish.datasets.datasets.dialogue_datasets import DialogueDataset, DialogueEvalDataset
from lavish.processors.gpt_processors import IGNORED_LABEL, GPTDialogueTextProcessor, GPTVideoFeatureProcessor


class AVSDDialDataset(DialogueDataset):
    """AVSD: the ids of a dialogue, the features of its video, `image_id` and `instance_id`."""

    def sample(self, index: int) -> dict[str, Any]:
        """Give one turn, with the features of its video."""
        record = self.annotation[index]
        video = self.video(record)
        return {
            **self.text_processor(record),
            "video_fts": video["video_fts"],
            "video_token_type_ids": video["token_type_ids"],
            "image_id": record["image_id"],
            "instance_id": record["instance_id"],
        }

    def video(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Read the features of a record: `video_fts` and `token_type_ids`."""
        return self.vis_processor(self.vis_root, need(record, "image_id"))  # pyright: ignore[reportCallIssue] - of features

    def collater(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Make a batch: `input_ids`, `token_type_ids`, `labels`, `video_fts`, `attn_mask`, video before text.

        Traps of LAVIS: labels are padded with <pad>, which is then learnt, and a frame of ones is taken for padding.
        Here labels are padded with -1 and the masks follow the lengths.

        Shapes: input_ids (batch, seq), video_fts (batch, frames, width), the others (batch, frames + seq).
        Raises:
            ConfigError: other processors than `gpt_video_ft` and `gpt_dialogue`, which know the padding.
            DataError: features of different widths.
        """
        vision, text = self.vis_processor, self.text_processor
        if not isinstance(vision, GPTVideoFeatureProcessor) or not isinstance(text, GPTDialogueTextProcessor):
            raise ConfigError(
                "avsd_dialogue needs the processors gpt_video_ft and gpt_dialogue: name them in vis_processor and "
                f"text_processor; these are {type(vision).__name__} and {type(text).__name__}."
            )
        kept = present(samples)
        widths = {int(sample["video_fts"].shape[1]) for sample in kept}
        if len(widths) > 1:
            raise DataError(f"The features of a batch are {sorted(widths)} wide; one width is expected.")
        column = {key: [sample[key] for sample in kept] for key in kept[0]}
        video_mask = vision.get_attention_mask(column["video_fts"])
        types = vision.padding(column["video_token_type_ids"], text.special_ids["<pad>"])
        video_labels = torch.full(video_mask.shape, IGNORED_LABEL)
        return {
            "input_ids": text.padding(column["input_ids"]),
            "token_type_ids": torch.cat((types, text.padding(column["token_type_ids"])), dim=1),
            "labels": torch.cat((video_labels, text.padding(column["labels"], IGNORED_LABEL)), dim=1),
            "video_fts": vision.padding(column["video_fts"]),
            "attn_mask": torch.cat((video_mask, text.get_attention_mask(column["input_ids"])), dim=1),
        }


class AVSDDialEvalDataset(AVSDDialDataset):
    """AVSD, evaluation: the last turn of each dialogue."""

    samples_of = staticmethod(DialogueEvalDataset.samples_of)
