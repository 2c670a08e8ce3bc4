"""Questions about pictures. Source: salesforce/LAVIS, lavis/datasets/datasets/vqa_datasets.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lavish.common.errors import DataError, shown
from lavish.datasets.datasets.annotations import need, read_annotations, read_json
from lavish.datasets.datasets.base_dataset import BaseDataset, present, stack


class VQADataset(BaseDataset):
    """Training: `image`, `text_input`, `answers` (each once) and `weights` (its share of the annotators)."""

    answer_field = "answer"

    def sample(self, index: int) -> dict[str, Any]:
        """Give one question with its answers."""
        record = self.annotation[index]
        answers, weights = self.weighted(record)
        return {
            "image": self.picture(image_name(record)),
            "text_input": self.processed_text(record, "question"),
            "answers": answers,
            "weights": weights,
        }

    def weighted(self, record: dict[str, Any]) -> tuple[list[str], list[float]]:
        """Give the different answers and the share of annotators that gave each."""
        given = need(record, self.answer_field)
        answers = [given] if isinstance(given, str) else given
        if not isinstance(answers, list) or not answers or not all(isinstance(one, str) for one in answers):
            raise DataError(f"the field {self.answer_field!r} is {shown(given)}; a list of answers is expected.")
        counts = Counter(answers)
        return list(counts), [count / len(answers) for count in counts.values()]

    def collater(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Make a batch: the answers of all questions one after the other, with `weight`, and `n_answers` a question.

        Trap: LAVIS gives `weight` as a list, and BLIP's forward then fails.
        """
        kept = present(samples)
        return {
            "image": stack("image", [sample["image"] for sample in kept]),
            "text_input": [sample["text_input"] for sample in kept],
            "answer": [answer for sample in kept for answer in sample["answers"]],
            "weight": torch.tensor([weight for sample in kept for weight in sample["weights"]], dtype=torch.float32),
            "n_answers": torch.tensor([len(sample["answers"]) for sample in kept]),
        }


class VQAEvalDataset(BaseDataset):
    """Evaluation: `image`, `text_input`, `question_id`, `instance_id`.

    Of `ann_paths` the first is the questions; then, where there are such files, the `answer_list` to choose from, and
    the questions and annotations in COCO's form, by which official VQA accuracy is computed.
    """

    def __init__(
        self,
        vis_processor: Any = None,
        text_processor: Any = None,
        vis_root: str | Path | None = None,
        ann_paths: Sequence[str | Path] = (),
    ) -> None:
        super().__init__(vis_processor, text_processor, vis_root)
        paths = [str(path) for path in ann_paths]
        if not paths:
            raise DataError(f"{type(self).__name__} needs the file of the questions: ann_paths is empty.")
        self.add_annotation(paths[0], read_annotations(paths[0]))
        self.answer_list = answer_list(paths[1]) if len(paths) > 1 else None
        coco_format = (*paths[2:4], None, None)
        # Trap: LAVIS tells the two by their order alone, and one of its configs has them in the other one.
        if "annotations" in Path(coco_format[0] or "").name and "questions" in Path(coco_format[1] or "").name:
            coco_format = (coco_format[1], coco_format[0])
        self.coco_fmt_qust_file, self.coco_fmt_anno_file = coco_format[:2]
        self._add_instance_ids()

    def sample(self, index: int) -> dict[str, Any]:
        """Give one question."""
        record = self.annotation[index]
        return {
            "image": self.picture(image_name(record)),
            "text_input": self.processed_text(record, "question"),
            "question_id": question_id(record),
            "instance_id": record["instance_id"],
        }


def image_name(record: dict[str, Any]) -> Any:
    """Give the picture's file: `image`, or `imageId` of GQA's own files."""
    return f"{record['imageId']}.jpg" if "imageId" in record and "image" not in record else need(record, "image")


def question_id(record: dict[str, Any]) -> Any:
    """Give the question's id: `question_id`, or the key of GQA's own files."""
    return record["sample_id"] if "sample_id" in record and "question_id" not in record else need(record, "question_id")


def answer_list(path: str) -> list[str]:
    """Read the answers to choose from.

    Raises:
        DataError: no list of texts.
    """
    answers = read_json(path)
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) for one in answers):
        raise DataError(f"{path}: holds {shown(answers)}; a list of answers is expected.")
    return answers
