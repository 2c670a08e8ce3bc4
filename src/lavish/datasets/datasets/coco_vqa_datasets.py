"""VQAv2 and OK-VQA. Source: salesforce/LAVIS, lavis/datasets/datasets/coco_vqa_datasets.py."""

from __future__ import annotations

from lavish.datasets.datasets.vqa_datasets import VQADataset, VQAEvalDataset

COCOVQADataset, COCOVQAEvalDataset = VQADataset, VQAEvalDataset
