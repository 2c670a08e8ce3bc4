"""Builders of the sets for pretraining: pictures with texts, of files or of tar shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavish.common.errors import ConfigError, DataError, shown
from lavish.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavish.datasets.datasets.image_text_pair_datasets import ImageTextPairDataset
from lavish.datasets.datasets.laion_dataset import LaionDataset
from lavish.datasets.datasets.tar_shards import expand


class ImageTextPairBuilder(BaseDatasetBuilder):
    """Pictures with texts; training only."""

    train_dataset_cls = ImageTextPairDataset


class VGCaptionBuilder(ImageTextPairBuilder):
    """`vg_caption`."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/vg/defaults_caption.yaml"}


class SBUCaptionBuilder(ImageTextPairBuilder):
    """`sbu_caption`."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/sbu_caption/defaults.yaml"}


class ConceptualCaption3MBuilder(ImageTextPairBuilder):
    """`conceptual_caption_3m`."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/conceptual_caption/defaults_3m.yaml"}


class ConceptualCaption12MBuilder(ImageTextPairBuilder):
    """`conceptual_caption_12m`."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/conceptual_caption/defaults_12m.yaml"}


class Laion2BMultiBuilder(BaseDatasetBuilder):
    """`laion2B_multi`: shards at `build_info.images.storage` (or `build_info.storage`, as LAVIS has it)."""

    train_dataset_cls = LaionDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/laion/defaults_2B_multi.yaml"}
    BUILD_INFO_KEYS = ("storage",)

    def splits(self) -> list[str]:
        """It is one stream."""
        return ["train"]

    def check(self) -> None:
        """Check that the first shard is here too."""
        super().check()
        if self._annotations():
            raise ConfigError(f"build_info.annotations: {self._name()} has none; its texts are in the shards.")
        first = expand(self.location())[0]
        if not Path(first).is_file():
            raise DataError(
                f"{first}: the shards of {self._name()} are not here, and lavish does not fetch them. Name yours: "
                "build_info.storage, such as laion/{00000..01743}.tar."
            )

    def location(self) -> str:
        """Give the path of the shards."""
        section = self.build_info.get(self.data_type)
        storage = self.build_info.get("storage") or (section.get("storage") if isinstance(section, Mapping) else None)
        if not isinstance(storage, str):
            raise ConfigError(f"build_info.storage is {shown(storage)}; a path of tar shards is expected.")
        return str(self.storage_path(storage))

    def _check_visual_root(self) -> None:
        """It may be a file here, and `check` looks for it."""

    def _download_vis(self) -> None:
        """Nothing is fetched; `check` has looked."""

    def build_split(self, split: str) -> Any:
        """Give the stream."""
        return LaionDataset(self.vis_processors["train"], self.text_processors["train"], self.location())
