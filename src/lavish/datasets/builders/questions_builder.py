"""Builders of data of one's own to evaluate on: questions about pictures, captions."""

from __future__ import annotations

from typing import Any

from lavish.common.errors import ConfigError, did_you_mean, shown
from lavish.datasets.builders.own_files_builder import OwnFilesBuilder
from lavish.datasets.formats.asked import CaptionedDataset, QuestionDataset
from lavish.datasets.formats.opening import FORMATS


class QuestionsBuilder(OwnFilesBuilder):
    """`questions`: rows of questions, with choices or without; to train on such a file use `conversations`."""

    eval_dataset_cls = QuestionDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/questions/defaults.yaml"}
    BUILD_INFO_KEYS = ("format",)

    def check(self) -> None:
        """Check the format's name, and that nobody wants to train on it."""
        name = self.build_info.get("format")
        if name is not None and name not in FORMATS:
            raise ConfigError(
                f"build_info.format is {shown(name)}.{did_you_mean(str(name), FORMATS)} Known: {', '.join(FORMATS)}."
            )
        if "train" in self.splits():
            raise ConfigError(
                f"datasets.{self._name()} is to evaluate on; to train on the same file use the data set conversations."
            )
        super().check()

    def dataset_options(self, split: str) -> dict[str, Any]:
        """Give the format."""
        return {"format": self.build_info.get("format")}


class CaptionsBuilder(QuestionsBuilder):
    """`captions`: pictures with their captions."""

    eval_dataset_cls = CaptionedDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/captions/defaults.yaml"}
