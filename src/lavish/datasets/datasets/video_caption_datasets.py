"""Videos with captions: MSRVTT, MSVD, VATEX.

Source: salesforce/LAVIS, lavis/datasets/datasets/video_caption_datasets.py.
"""

from __future__ import annotations

from typing import Any

from lavish.datasets.datasets.annotations import need
from lavish.datasets.datasets.base_dataset import BaseDataset
from lavish.datasets.datasets.caption_datasets import CaptionDataset
from lavish.datasets.datasets.videos import NUM_FRAMES, read_video


class VideoCaptionDataset(CaptionDataset):
    """Training: `video`, `text_input`, `image_id` (the video's running number)."""

    num_frames = NUM_FRAMES

    def sample(self, index: int) -> dict[str, Any]:
        """Give one video with one caption."""
        record = self.annotation[index]
        return {
            "video": read_video(self.vis_processor, self.path(need(record, "video")), self.num_frames),
            "text_input": self.processed_text(record, "caption"),
            "image_id": self.img_ids[record["image_id"]],
        }


class VideoCaptionEvalDataset(BaseDataset):
    """Evaluation: `video`, `image_id`, `instance_id`."""

    num_frames = NUM_FRAMES

    def sample(self, index: int) -> dict[str, Any]:
        """Give one video."""
        record = self.annotation[index]
        return {
            "video": read_video(self.vis_processor, self.path(need(record, "video")), self.num_frames),
            "image_id": need(record, "image_id"),
            "instance_id": record["instance_id"],
        }
