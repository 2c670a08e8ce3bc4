"""Builders of the retrieval sets."""

from __future__ import annotations

from lavish.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavish.datasets.builders.video_frames import VideoFrames
from lavish.datasets.datasets import retrieval_datasets as datasets


class COCORetrievalBuilder(BaseDatasetBuilder):
    """`coco_retrieval`."""

    train_dataset_cls = datasets.RetrievalDataset
    eval_dataset_cls = datasets.RetrievalEvalDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/coco/defaults_ret.yaml"}


class Flickr30kBuilder(COCORetrievalBuilder):
    """`flickr30k`."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/flickr30k/defaults.yaml"}


class MSRVTTRetrievalBuilder(VideoFrames, BaseDatasetBuilder):
    """`msrvtt_retrieval`."""

    train_dataset_cls = datasets.VideoRetrievalDataset
    eval_dataset_cls = datasets.VideoRetrievalEvalDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/msrvtt/defaults_ret.yaml"}


class DiDeMoRetrievalBuilder(MSRVTTRetrievalBuilder):
    """`didemo_retrieval`."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/didemo/defaults_ret.yaml"}
