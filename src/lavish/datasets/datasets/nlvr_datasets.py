"""NLVR2. Source: salesforce/LAVIS, lavis/datasets/datasets/nlvr_datasets.py."""

from __future__ import annotations

from typing import Any

import torch

from lavish.common.errors import DataError, shown
from lavish.datasets.datasets.annotations import need
from lavish.datasets.datasets.multimodal_classification_datasets import MultimodalClassificationDataset


class NLVRDataset(MultimodalClassificationDataset):
    """NLVR2, training: `image0`, `image1`, `text_input`, `label`, `instance_id`.

    In one of two cases the pictures change places, and with them the words left and right.
    """

    class_labels = {"False": 0, "True": 1}

    def sample(self, index: int) -> dict[str, Any]:
        """Give one sentence with its two pictures."""
        record = self.annotation[index]
        names = need(record, "images")
        if not isinstance(names, list) or len(names) != 2:
            raise DataError(f"images is {shown(names)}; two names of files are expected.")
        return self._flip(
            {
                "image0": self.picture(names[0]),
                "image1": self.picture(names[1]),
                "text_input": self.processed_text(record, "sentence"),
                "label": self.label({"label": str(need(record, "label"))}),
                "instance_id": record["instance_id"],
            }
        )

    @staticmethod
    def _flip(samples: dict[str, Any]) -> dict[str, Any]:
        if torch.rand(()) < 0.5:
            return samples
        sentence = samples["text_input"]
        sentence = sentence.replace("left", "\0").replace("right", "left").replace("\0", "right")
        return {**samples, "text_input": sentence, "image0": samples["image1"], "image1": samples["image0"]}


class NLVREvalDataset(NLVRDataset):
    """NLVR2, evaluation: the pictures stay in their places."""

    @staticmethod
    def _flip(samples: dict[str, Any]) -> dict[str, Any]:
        return samples
