"""Builders of the instruction sets of MiniGPT4-Qwen and MPP-Qwen; training only.

Source: Coobiw/MPP-LLaVA, lavis/datasets/builders/minigpt4qwen_builder.py.
"""

from __future__ import annotations

from typing import Any

from lavish.common.errors import ConfigError, shown
from lavish.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavish.datasets.datasets.instruction_datasets import MAX_FRAMES, InstructionDataset, VideoInstructionDataset


class InstructionBuilder(BaseDatasetBuilder):
    """Instructions about pictures."""

    train_dataset_cls = InstructionDataset


class Minigpt4InstructionBuilder(InstructionBuilder):
    """`minigpt4_instruction`."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/minigpt4_instruction/defaults_instruction.yaml"}


class LlavaInstructionBuilder(InstructionBuilder):
    """`llava_instruction`."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/llava_instruction/defaults_instruction.yaml"}


class LlavaPretrainBuilder(InstructionBuilder):
    """`llava_pretrain`."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/llava_pretrain/defaults.yaml"}


class LlavaInstruct100kBuilder(InstructionBuilder):
    """`llava_instruct_100k`."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/llava_instruct_100k/defaults.yaml"}


class LlavaInstruct156kBuilder(InstructionBuilder):
    """`llava_instruct_156k`."""

    DATASET_CONFIG_DICT = {"default": "configs/datasets/llava_instruct_156k/defaults.yaml"}


class VideoChatGPT100kBuilder(BaseDatasetBuilder):
    """`videochatgpt_100k`; `build_info.max_frames` says how many frames a clip has at most."""

    train_dataset_cls = VideoInstructionDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/videochatgpt_100k/defaults.yaml"}
    BUILD_INFO_KEYS = ("max_frames",)

    def check(self) -> None:
        """Check the number of frames too."""
        super().check()
        count = self.build_info.get("max_frames", MAX_FRAMES)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"build_info.max_frames is {shown(count)}; a whole number above 0 is expected.")

    def dataset_options(self, split: str) -> dict[str, Any]:
        """Give the number of frames."""
        return {"max_frames": self.build_info.get("max_frames", MAX_FRAMES)}
