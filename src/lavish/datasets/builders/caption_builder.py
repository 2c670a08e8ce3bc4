"""Builders of the caption sets."""

from __future__ import annotations

from lavish.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavish.datasets.builders.video_frames import VideoFrames
from lavish.datasets.datasets.coco_caption_datasets import COCOCapDataset, COCOCapEvalDataset, NoCapsEvalDataset
from lavish.datasets.datasets.video_caption_datasets import VideoCaptionDataset, VideoCaptionEvalDataset


class COCOCapBuilder(BaseDatasetBuilder):
    """`coco_caption`."""

    train_dataset_cls = COCOCapDataset
    eval_dataset_cls = COCOCapEvalDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/coco/defaults_cap.yaml"}


class NoCapsBuilder(BaseDatasetBuilder):
    """`nocaps`: evaluation only."""

    eval_dataset_cls = NoCapsEvalDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/nocaps/defaults.yaml"}


class VideoCaptionBuilder(VideoFrames, BaseDatasetBuilder):
    """Captions of videos."""

    train_dataset_cls = VideoCaptionDataset
    eval_dataset_cls = VideoCaptionEvalDataset


class MSRVTTCapBuilder(VideoCaptionBuilder):
    """`msrvtt_caption`."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/msrvtt/defaults_cap.yaml"}


class MSVDCapBuilder(VideoCaptionBuilder):
    """`msvd_caption`."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/msvd/defaults_cap.yaml"}


class VATEXCapBuilder(VideoCaptionBuilder):
    """`vatex_caption`."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/vatex/defaults_cap.yaml"}
