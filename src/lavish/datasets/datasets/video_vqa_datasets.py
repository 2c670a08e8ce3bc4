"""Questions about videos. Source: salesforce/LAVIS, lavis/datasets/datasets/video_vqa_datasets.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavish.common.errors import DataError, shown
from lavish.datasets.datasets.annotations import need, read_json
from lavish.datasets.datasets.multimodal_classification_datasets import MultimodalClassificationDataset
from lavish.datasets.datasets.videos import NUM_FRAMES, read_video


class VideoQADataset(MultimodalClassificationDataset):
    """Questions about videos: `video`, `text_input`, `answers` (a class), `question_id`, `instance_id`."""

    num_frames = NUM_FRAMES

    def _build_class_labels(self, ans_path: str | Path) -> None:
        labels = read_json(ans_path)
        if not isinstance(labels, dict) or not all(isinstance(value, int) for value in labels.values()):
            raise DataError(f"{ans_path}: holds {shown(labels)}; an object of answers and their numbers is expected.")
        self.class_labels = labels

    def _get_answer_label(self, answer: str) -> int:
        """Give the number of an answer; one that training does not know gets the number behind the last."""
        if not isinstance(answer, str):
            raise DataError(f"the field 'answer' is {shown(answer)}; a text is expected.")
        known = self.class_labels or {}
        return known.get(answer, len(known))

    def sample(self, index: int) -> dict[str, Any]:
        """Give one question about one video."""
        record = self.annotation[index]
        if self.class_labels is None:
            raise TypeError(f"{type(self).__name__} has no class_labels; its builder makes them of `ans2label`.")
        return {
            "video": read_video(self.vis_processor, self.path(need(record, "video")), self.num_frames),
            "text_input": self.processed_text(record, "question"),
            "answers": self._get_answer_label(need(record, "answer")),
            "question_id": need(record, "question_id"),
            "instance_id": record["instance_id"],
        }
