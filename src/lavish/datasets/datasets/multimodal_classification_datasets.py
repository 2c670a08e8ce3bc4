"""One of several classes for a picture, a pair of them, or a video, with a text: SNLI-VE, NLVR2, video questions.

Source: salesforce/LAVIS, multimodal_classification_datasets.py, snli_ve_datasets.py, nlvr_datasets.py and
video_vqa_datasets.py of lavis/datasets/datasets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lavish.common.errors import DataError, did_you_mean, shown
from lavish.datasets.datasets.annotations import need, read_json
from lavish.datasets.datasets.base_dataset import BaseDataset
from lavish.datasets.datasets.videos import NUM_FRAMES, read_video


class MultimodalClassificationDataset(BaseDataset):
    """`class_labels` maps the names of the classes to their numbers."""

    class_labels: Mapping[str, int] | None = None

    def label(self, record: dict[str, Any], field: str = "label") -> int:
        """Give the number of a record's class.

        Raises:
            DataError: a class that is none; the nearest is suggested.
        """
        name, known = need(record, field), self.class_labels or {}
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise DataError(f"{field} {shown(name)} is no class.{hint} The classes are {', '.join(known)}.")
        return known[name]


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


class ImageFolderDataset(BaseDataset):
    """A folder for each class, pictures in it: `image`, `label`, `image_id`, `instance_id`; `classnames` on the set."""

    def __init__(
        self,
        vis_processor: Any = None,
        text_processor: Any = None,
        vis_root: str | Path | None = None,
        ann_paths: Sequence[str | Path] = (),
        classnames: Sequence[str] | None = None,
    ) -> None:
        """Classes are numbered by the sorted names of their folders; `classnames` replaces those for people.

        Raises:
            DataError: no folder of pictures, or another number of names than of folders.
        """
        super().__init__(vis_processor, text_processor, vis_root, ann_paths)
        root = Path(vis_root or "")
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; it holds a folder for each class, and pictures in those.")
        folders = sorted(path for path in root.iterdir() if path.is_dir())
        self.classnames = list(classnames) if classnames is not None else [folder.name for folder in folders]
        if len(self.classnames) != len(folders):
            raise DataError(f"{root}: {len(folders)} folders, and {len(self.classnames)} names of classes.")
        for label, folder in enumerate(folders):
            for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
                name = str(file.relative_to(root))
                self.annotation.append({"image": name, "label": label, "image_id": name})
        if not self.annotation:
            raise DataError(f"{root}: holds no pictures; it needs a folder for each class, and pictures in those.")
        self.sources = [(str(root), len(self.annotation))]
        self._add_instance_ids()

    def sample(self, index: int) -> dict[str, Any]:
        """Give one picture with its class."""
        record = self.annotation[index]
        return {"image": self.picture(record["image"]), **{key: record[key] for key in SAMPLE_KEYS}}


SAMPLE_KEYS = ("label", "image_id", "instance_id")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tif", ".tiff", ".webp")
