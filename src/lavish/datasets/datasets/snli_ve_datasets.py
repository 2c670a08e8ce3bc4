"""SNLI-VE. Source: salesforce/LAVIS, lavis/datasets/datasets/snli_ve_datasets.py."""

from __future__ import annotations

from typing import Any

from lavish.datasets.datasets.annotations import need
from lavish.datasets.datasets.multimodal_classification_datasets import MultimodalClassificationDataset


class SNLIVisualEntailmentDataset(MultimodalClassificationDataset):
    """SNLI-VE: `image`, `text_input`, `label`, `image_id`, `instance_id`."""

    class_labels = {"contradiction": 0, "neutral": 1, "entailment": 2}

    def sample(self, index: int) -> dict[str, Any]:
        """Give one picture with one sentence."""
        record = self.annotation[index]
        image_id = need(record, "image")
        return {
            "image": self.picture(f"{image_id}.jpg"),
            "text_input": self.processed_text(record, "sentence"),
            "label": self.label(record),
            "image_id": image_id,
            "instance_id": record["instance_id"],
        }


SNLIVisualEntialmentDataset = SNLIVisualEntailmentDataset
"""LAVIS's spelling."""
