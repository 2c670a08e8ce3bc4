"""Pictures with texts for pretraining: Visual Genome, SBU, Conceptual Captions.

Source: salesforce/LAVIS, lavis/datasets/datasets/image_text_pair_datasets.py.
"""

from __future__ import annotations

from typing import Any

from lavish.datasets.datasets.annotations import need
from lavish.datasets.datasets.base_dataset import BaseDataset


class ImageTextPairDataset(BaseDataset):
    """Training: `image`, `text_input`."""

    def sample(self, index: int) -> dict[str, Any]:
        """Give one picture with its text."""
        record = self.annotation[index]
        return {"image": self.picture(need(record, "image")), "text_input": self.processed_text(record, "caption")}
