"""GQA. Source: salesforce/LAVIS, lavis/datasets/datasets/gqa_datasets.py."""

from __future__ import annotations

from typing import Any

from lavish.datasets.datasets.vqa_datasets import VQADataset, VQAEvalDataset


class GQADataset(VQADataset):
    """GQA: one answer a question."""


class GQAEvalDataset(VQAEvalDataset):
    """GQA: also `answer`, None where it is hidden."""

    def sample(self, index: int) -> dict[str, Any]:
        """Give one question with its answer."""
        return {**super().sample(index), "answer": self.annotation[index].get("answer")}
