"""Builders of the caption sets."""

from __future__ import annotations

from lavish.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavish.datasets.datasets.caption_datasets import COCOCapDataset, COCOCapEvalDataset, NoCapsEvalDataset


class COCOCapBuilder(BaseDatasetBuilder):
    """`coco_caption`."""

    train_dataset_cls = COCOCapDataset
    eval_dataset_cls = COCOCapEvalDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/coco/defaults_cap.yaml"}


class NoCapsBuilder(BaseDatasetBuilder):
    """`nocaps`: evaluation only."""

    eval_dataset_cls = NoCapsEvalDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/nocaps/defaults.yaml"}
