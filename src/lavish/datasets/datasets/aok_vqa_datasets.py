"""A-OKVQA. Source: salesforce/LAVIS, lavis/datasets/datasets/aok_vqa_datasets.py."""

from __future__ import annotations

from typing import Any

from lavish.datasets.datasets.vqa_datasets import VQADataset, VQAEvalDataset


class AOKVQADataset(VQADataset):
    """A-OKVQA: the direct answers."""

    answer_field = "direct_answers"


class AOKVQAEvalDataset(VQAEvalDataset):
    """A-OKVQA: also `choices`, `correct_choice_idx` and `direct_answers`; None where the test split hides them."""

    def sample(self, index: int) -> dict[str, Any]:
        """Give one question with its choices."""
        record = self.annotation[index]
        return {
            **super().sample(index),
            "choices": record.get("choices"),
            "correct_choice_idx": record.get("correct_choice_idx"),
            "direct_answers": record.get("direct_answers"),
        }
