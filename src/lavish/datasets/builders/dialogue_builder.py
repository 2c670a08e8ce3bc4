"""Builder of the dialogues about videos."""

from __future__ import annotations

from lavish.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavish.datasets.datasets.avsd_dialogue_datasets import AVSDDialDataset, AVSDDialEvalDataset


class AVSDDialBuilder(BaseDatasetBuilder):
    """`avsd_dialogue`."""

    train_dataset_cls = AVSDDialDataset
    eval_dataset_cls = AVSDDialEvalDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/avsd/defaults_dial.yaml"}
