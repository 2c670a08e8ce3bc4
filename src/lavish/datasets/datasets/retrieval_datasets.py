"""Pictures or videos and the texts that belong to them: COCO, Flickr30k, MSRVTT, DiDeMo.

Source: salesforce/LAVIS, lavis/datasets/datasets/retrieval_datasets.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavish.common.errors import DataError, shown
from lavish.datasets.datasets.annotations import need
from lavish.datasets.datasets.base_dataset import BaseDataset
from lavish.datasets.datasets.caption_datasets import CaptionDataset
from lavish.datasets.datasets.videos import NUM_FRAMES, read_video


class RetrievalDataset(CaptionDataset):
    """Training: `image`, `text_input`, `image_id`, `instance_id`; pictures numbered as they first appear."""

    field = "image"

    def sample(self, index: int) -> dict[str, Any]:
        """Give one picture with one text."""
        record = self.annotation[index]
        return {
            self.field: self.visual(record),
            "text_input": self.processed_text(record, "caption"),
            "image_id": self.number(record),
            "instance_id": record["instance_id"],
        }

    def number(self, record: dict[str, Any]) -> int:
        """Give the running number of a record's picture."""
        return self.img_ids[record["image_id"]]

    def visual(self, record: dict[str, Any]) -> Any:
        """Give the processed picture."""
        return self.picture(need(record, "image"))


class RetrievalEvalDataset(BaseDataset):
    """Evaluation: `image`, `index`; on the set `text`, `image`, `txt2img`, `img2txt` say what belongs together."""

    field = "image"

    def __init__(
        self,
        vis_processor: Any = None,
        text_processor: Any = None,
        vis_root: str | Path | None = None,
        ann_paths: Sequence[str | Path] = (),
    ) -> None:
        super().__init__(vis_processor, text_processor, vis_root, ann_paths)
        self.text: list[Any] = []
        self.image: list[str] = []
        self.txt2img: dict[int, int] = {}
        self.img2txt: dict[int, list[int]] = {}
        for index, record in enumerate(self.annotation):
            captions = self.captions(index, record)
            self.image.append(record[self.field])
            self.img2txt[index] = list(range(len(self.text), len(self.text) + len(captions)))
            self.txt2img.update(dict.fromkeys(self.img2txt[index], index))
            self.text += [self.text_processor(caption) for caption in captions]

    def captions(self, index: int, record: dict[str, Any]) -> list[str]:
        """Give the texts of a record, one or several.

        Raises:
            DataError: it has none, or names no file; says the row.
        """
        given = record.get("caption")
        captions = [given] if isinstance(given, str) else given
        if not isinstance(captions, list) or not captions or not all(isinstance(one, str) for one in captions):
            raise DataError(f"{self.where(index)}: caption is {shown(given)}; one or several texts are expected.")
        if not isinstance(record.get(self.field), str):
            raise DataError(f"{self.where(index)}: {self.field} is {shown(record.get(self.field))}; a file's name.")
        return captions

    def sample(self, index: int) -> dict[str, Any]:
        """Give one picture."""
        return {self.field: self.visual(self.annotation[index]), "index": index}

    def visual(self, record: dict[str, Any]) -> Any:
        """Give the processed picture."""
        return self.picture(record["image"])


class VideoRetrievalDataset(RetrievalDataset):
    """Training on videos: `video`, `text_input`, `image_id`, `instance_id`."""

    field = "video"
    num_frames = NUM_FRAMES

    def numbers(self) -> dict[Any, int]:
        """Give the running number of each video, told by its file."""
        names = dict.fromkeys(str(record.get("video")) for record in self.annotation)
        return {name: number for number, name in enumerate(names)}

    def number(self, record: dict[str, Any]) -> int:
        """Give the running number of a record's video."""
        return self.img_ids[str(record.get("video"))]

    def visual(self, record: dict[str, Any]) -> Any:
        """Give the processed video."""
        return read_video(self.vis_processor, self.path(need(record, "video")), self.num_frames)


class VideoRetrievalEvalDataset(RetrievalEvalDataset):
    """Evaluation on videos: `video`, `index`."""

    field = "video"
    num_frames = NUM_FRAMES

    def visual(self, record: dict[str, Any]) -> Any:
        """Give the processed video."""
        return read_video(self.vis_processor, self.path(record["video"]), self.num_frames)
