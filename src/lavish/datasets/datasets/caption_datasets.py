"""Pictures with captions. Source: salesforce/LAVIS, lavis/datasets/datasets/caption_datasets.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavish.common.errors import DataError, shown
from lavish.datasets.datasets.annotations import need
from lavish.datasets.datasets.base_dataset import BaseDataset


class CaptionDataset(BaseDataset):
    """Training: `image`, `text_input`, `image_id`; one sample a caption, pictures numbered as they first appear."""

    def __init__(
        self,
        vis_processor: Any = None,
        text_processor: Any = None,
        vis_root: str | Path | None = None,
        ann_paths: Sequence[str | Path] = (),
    ) -> None:
        super().__init__(vis_processor, text_processor, vis_root, ann_paths)
        self.img_ids = self.numbers()

    def numbers(self) -> dict[Any, int]:
        """Give the running number of each picture."""
        return number_images(self)

    def sample(self, index: int) -> dict[str, Any]:
        """Give one picture with one caption."""
        record = self.annotation[index]
        return {
            "image": self.picture(need(record, "image")),
            "text_input": self.processed_text(record, "caption"),
            "image_id": self.img_ids[record["image_id"]],
        }


class CaptionEvalDataset(BaseDataset):
    """Evaluation: `image`, `image_id`, `instance_id`."""

    def sample(self, index: int) -> dict[str, Any]:
        """Give one picture."""
        record = self.annotation[index]
        return {
            "image": self.picture(need(record, "image")),
            "image_id": self.image_id(record),
            "instance_id": record["instance_id"],
        }

    def image_id(self, record: dict[str, Any]) -> Any:
        """Give the id under which a caption is scored."""
        return need(record, "image_id")


def number_images(dataset: BaseDataset) -> dict[Any, int]:
    """Give the running number of each `image_id`, in the order of first appearance.

    Raises:
        DataError: a record has none; says the row.
    """
    numbers: dict[Any, int] = {}
    for index, record in enumerate(dataset.annotation):
        if not isinstance(record.get("image_id"), str | int):
            raise DataError(f"{dataset.where(index)}: image_id is {shown(record.get('image_id'))}; an id is expected.")
        numbers.setdefault(record["image_id"], len(numbers))
    return numbers
