"""Captions of COCO and nocaps. Source: salesforce/LAVIS, lavis/datasets/datasets/coco_caption_datasets.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lavish.common.errors import DataError, shown
from lavish.datasets.datasets.annotations import need
from lavish.datasets.datasets.caption_datasets import CaptionDataset, CaptionEvalDataset

COCOCapDataset = CaptionDataset


class COCOCapEvalDataset(CaptionEvalDataset):
    """COCO: `image_id` is the number at the end of the file's name, as COCO's own annotations have it."""

    def image_id(self, record: dict[str, Any]) -> int:
        """Read the number off `val2014/COCO_val2014_000000184613.jpg`."""
        # Trap: LAVIS strips the characters of ".jpg" from both ends instead of the suffix.
        number = re.search(r"(\d+)$", Path(str(need(record, "image"))).stem)
        if number is None:
            raise DataError(f"image is {shown(record['image'])}; the name of a COCO picture ends with its number.")
        return int(number[1])


class NoCapsEvalDataset(CaptionEvalDataset):
    """nocaps: `image_id` is the field `img_id`."""

    def image_id(self, record: dict[str, Any]) -> Any:
        """Give the id that the nocaps server knows."""
        return need(record, "img_id")
