"""What is shown of a sample beside its answer: the question, and the picture as it is in its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from lavish.common.media import open_image
from lavish.datasets.datasets.base_dataset import BaseDataset
from lavish.runners.evaluation_rows import Row

QUESTION_FIELDS = ("question", "text_input", "expression", "phrase")


def question_of(dataset: Any, row: Row) -> str | None:
    """Give the question of a row: of its record, else the last one of its conversation; None where it has none."""
    if "index" not in row:
        return None
    records = getattr(dataset, "annotation", None)  # data sets of one's own may keep none
    if isinstance(records, list) and len(records) == len(dataset):
        record = records[row["index"]]
        return next((record[name] for name in QUESTION_FIELDS if isinstance(record.get(name), str)), None)
    texts = [part["text"] for part in _said(dataset, row["index"]) if part["type"] == "text"]
    return texts[-1] if texts else None


def picture_of(dataset: Any, row: Row) -> Image.Image | None:
    """Open the picture of a row; None where it has none. From here on the data set gives pictures as they are.

    Raises:
        DataError, MediaError: it is gone, or cannot be opened.
    """
    if not isinstance(dataset, BaseDataset) or "index" not in row:
        return None
    dataset.set_processors(None, None)
    sample = dataset[row["index"]]
    found = sample.get("image") if isinstance(sample, Mapping) else None
    if found is None:
        found = next((part["image"] for part in _said(dataset, row["index"]) if part["type"] == "image"), None)
        return None if found is None else open_image(found)
    return found if isinstance(found, Image.Image) else None


def _said(dataset: Any, index: int) -> list[Mapping[str, Any]]:
    """Give the parts of what a conversation's user says; none of a sample that is no conversation."""
    sample = dataset[index] if isinstance(dataset, BaseDataset) else None
    if not isinstance(sample, Mapping):
        return []
    contents = [message["content"] for message in sample.get("messages", ()) if message["role"] == "user"]
    return [
        part
        for content in contents
        for part in ([{"type": "text", "text": content}] if isinstance(content, str) else content)
    ]
