"""Builders of the sets of questions about pictures."""

from __future__ import annotations

from lavish.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavish.datasets.datasets.aok_vqa_datasets import AOKVQADataset, AOKVQAEvalDataset
from lavish.datasets.datasets.coco_vqa_datasets import COCOVQADataset, COCOVQAEvalDataset
from lavish.datasets.datasets.gqa_datasets import GQADataset, GQAEvalDataset
from lavish.datasets.datasets.vg_vqa_datasets import VGVQADataset


class COCOVQABuilder(BaseDatasetBuilder):
    """`coco_vqa`; the type `eval` has the validation split alone."""

    train_dataset_cls = COCOVQADataset
    eval_dataset_cls = COCOVQAEvalDataset
    DATASET_CONFIG_DICT = {
        "default": "configs/datasets/coco/defaults_vqa.yaml",
        "eval": "configs/datasets/coco/eval_vqa.yaml",
    }


class OKVQABuilder(COCOVQABuilder):
    """`ok_vqa`."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/okvqa/defaults.yaml"}


class AOKVQABuilder(BaseDatasetBuilder):
    """`aok_vqa`."""

    train_dataset_cls = AOKVQADataset
    eval_dataset_cls = AOKVQAEvalDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/aokvqa/defaults.yaml"}


class GQABuilder(BaseDatasetBuilder):
    """`gqa`."""

    train_dataset_cls = GQADataset
    eval_dataset_cls = GQAEvalDataset
    DATASET_CONFIG_DICT = {
        "default": "configs/datasets/gqa/defaults.yaml",
        "balanced_val": "configs/datasets/gqa/balanced_val.yaml",
        "balanced_testdev": "configs/datasets/gqa/balanced_testdev.yaml",
    }


class VGVQABuilder(BaseDatasetBuilder):
    """`vg_vqa`: training only."""

    train_dataset_cls = VGVQADataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/vg/defaults_vqa.yaml"}
