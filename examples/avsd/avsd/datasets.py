"""Step 2: the data sets. Training has a sample for each turn, evaluation one for each dialogue, its last turn."""

import json

import torch

from lavish.datasets.datasets.base_dataset import BaseDataset


class MyAVSDDataset(BaseDataset):
    """Turns with their history, and the features of the video."""

    def __init__(self, vis_processor, text_processor, vis_root, ann_paths):
        super().__init__(vis_processor, text_processor, vis_root)
        self.annotation = []
        for path in ann_paths:
            with open(path, encoding="utf-8") as file:
                for dialog in json.load(file)["dialogs"]:
                    self.annotation += self.turns(dialog)
        self._add_instance_ids()

    def turns(self, dialog):
        """Give one record a turn."""
        return [{**dialog, "dialog": dialog["dialog"][:at], **turn} for at, turn in enumerate(dialog["dialog"])]

    def __getitem__(self, index):
        ann = self.annotation[index]
        sample = self.text_processor(ann)
        sample["video_fts"] = self.vis_processor(self.vis_root, ann["image_id"])
        sample["instance_id"] = ann["instance_id"]
        return sample

    def collater(self, samples):
        """Pad texts and videos; the mask says what is no padding."""
        text, video = self.text_processor, self.vis_processor
        ids = [sample["input_ids"] for sample in samples]
        features = [sample["video_fts"] for sample in samples]
        return {
            "input_ids": text.padding(ids),
            "labels": text.padding([sample["labels"] for sample in samples], -100),
            "video_fts": video.padding(features),
            "attn_mask": torch.cat((video.get_attention_mask(features), text.get_attention_mask(ids)), dim=1),
            "instance_id": [sample["instance_id"] for sample in samples],
        }


class MyAVSDEvalDataset(MyAVSDDataset):
    """The last turn of each dialogue."""

    def turns(self, dialog):
        """Give the record of the last turn."""
        return super().turns(dialog)[-1:]
