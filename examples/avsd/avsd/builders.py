"""Step 3: the builder, by which a recipe names the data."""

from pathlib import Path

from avsd.datasets import MyAVSDDataset, MyAVSDEvalDataset
from lavish.common.registry import registry
from lavish.datasets.builders.base_dataset_builder import BaseDatasetBuilder


@registry.register_builder("my_avsd_dialogue")
class MyAVSDBuilder(BaseDatasetBuilder):
    """`my_avsd_dialogue`."""

    train_dataset_cls = MyAVSDDataset
    eval_dataset_cls = MyAVSDEvalDataset
    DATASET_CONFIG_DICT = {"default": str(Path(__file__).with_name("defaults_dial.yaml"))}
