"""Builders of the sets with classes: SNLI-VE, NLVR2, video questions, ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavish.common.errors import ConfigError, DataError, shown
from lavish.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavish.datasets.builders.video_frames import VideoFrames
from lavish.datasets.datasets.annotations import read_json
from lavish.datasets.datasets.imagefolder_dataset import ImageFolderDataset
from lavish.datasets.datasets.nlvr_datasets import NLVRDataset, NLVREvalDataset
from lavish.datasets.datasets.snli_ve_datasets import SNLIVisualEntailmentDataset
from lavish.datasets.datasets.video_vqa_datasets import VideoQADataset


class SNLIVisualEntailmentBuilder(BaseDatasetBuilder):
    """`snli_ve`."""

    train_dataset_cls = SNLIVisualEntailmentDataset
    eval_dataset_cls = SNLIVisualEntailmentDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/snli_ve/defaults.yaml"}


class NLVRBuilder(BaseDatasetBuilder):
    """`nlvr`."""

    train_dataset_cls = NLVRDataset
    eval_dataset_cls = NLVREvalDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/nlvr/defaults.yaml"}


class VideoQABuilder(VideoFrames, BaseDatasetBuilder):
    """Questions about videos; the answers' numbers come from the annotation file `ans2label`."""

    train_dataset_cls = VideoQADataset
    eval_dataset_cls = VideoQADataset
    BUILD_INFO_KEYS = (*VideoFrames.BUILD_INFO_KEYS, "instance_id_key")  # the latter is LAVIS's, which never reads it
    EXTRA_ANNOTATIONS = ("ans2label",)

    def check(self) -> None:
        """Check that the numbers of the answers are named too."""
        super().check()
        if not self.annotation_files("ans2label"):
            raise ConfigError("build_info.annotations.ans2label is missing: the JSON file of answers and numbers.")

    def build_split(self, split: str) -> Any:
        """Give the dataset of one split, which knows the classes."""
        dataset = super().build_split(split)
        dataset._build_class_labels(self.annotation_files("ans2label")[0].path)
        return dataset


class MSRVTTQABuilder(VideoQABuilder):
    """`msrvtt_qa`."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/msrvtt/defaults_qa.yaml"}


class MSVDQABuilder(VideoQABuilder):
    """`msvd_qa`."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/msvd/defaults_qa.yaml"}


class ImageNetBuilder(BaseDatasetBuilder):
    """`imagenet`: folders `train` and `val` of folders, no annotation files; the splits are `build_info.splits`."""

    train_dataset_cls = ImageFolderDataset
    eval_dataset_cls = ImageFolderDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/imagenet/defaults.yaml"}
    BUILD_INFO_KEYS = ("splits", "classnames")

    def splits(self) -> list[str]:
        """Name the splits that the config asks for."""
        names: Sequence[str] = self.build_info.get("splits") or []
        if isinstance(names, str) or not names or any(name not in ("train", "val") for name in names):
            raise ConfigError(f"build_info.splits is {shown(names)}; it is a list of train and val.")
        return list(names)

    def check(self) -> None:
        """Check that no annotation files are named, which would not be read."""
        super().check()
        if self._annotations():
            raise ConfigError("build_info.annotations: imagenet has none; its classes are the folders' names.")

    def split_root(self, split: str) -> Path:
        """Give the folder of one split."""
        root = self.visual_root()
        if root is None:
            raise ConfigError("build_info.images.storage is missing: the folder that holds train and val.")
        return root / split

    def dataset_options(self, split: str) -> dict[str, Any]:
        """Give the names of the classes."""
        return {"classnames": self.classnames()}

    def classnames(self) -> list[str] | None:
        """Read the names of the classes, if a file of them is given.

        Raises:
            DataError: no list of texts.
        """
        file = self.build_info.get("classnames")
        if file is None:
            return None
        if not isinstance(file, str):
            raise ConfigError(f"build_info.classnames is {shown(file)}; the path of a JSON file is expected.")
        names = read_json(self.storage_path(file))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{file}: holds {shown(names)}; a list of names is expected.")
        return names
