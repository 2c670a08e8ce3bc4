"""One of several classes for what is seen and a text.

Source: salesforce/LAVIS, lavis/datasets/datasets/multimodal_classification_datasets.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavish.common.errors import DataError, did_you_mean, shown
from lavish.datasets.datasets.annotations import need
from lavish.datasets.datasets.base_dataset import BaseDataset


class MultimodalClassificationDataset(BaseDataset):
    """`class_labels` maps the names of the classes to their numbers."""

    class_labels: Mapping[str, int] | None = None

    def label(self, record: dict[str, Any], field: str = "label") -> int:
        """Give the number of a record's class.

        Raises:
            DataError: a class that is none; the nearest is suggested.
        """
        name, known = need(record, field), self.class_labels or {}
        if not isinstance(name, str) or name not in known:
            hint = did_you_mean(str(name), known)
            raise DataError(f"{field} {shown(name)} is no class.{hint} The classes are {', '.join(known)}.")
        return known[name]
