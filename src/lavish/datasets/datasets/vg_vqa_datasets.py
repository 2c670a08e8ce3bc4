"""Questions of Visual Genome. Source: salesforce/LAVIS, lavis/datasets/datasets/vg_vqa_datasets.py."""

from __future__ import annotations

from typing import Any

from lavish.datasets.datasets.vqa_datasets import VQADataset


class VGVQADataset(VQADataset):
    """Visual Genome: one answer a question, with the weight 0.2 that LAVIS gives it beside VQAv2's."""

    def weighted(self, record: dict[str, Any]) -> tuple[list[str], list[float]]:
        """Give the one answer."""
        answers, _ = super().weighted(record)
        return answers, [0.2] * len(answers)
