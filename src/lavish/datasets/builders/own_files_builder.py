"""Builders of data that people have: conversations for the chat families, phrases with boxes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavish.common.errors import ConfigError, DataError, did_you_mean, shown
from lavish.datasets.builders.base_dataset_builder import PROCESSORS, AnnotationFile, BaseDatasetBuilder, cache_root
from lavish.datasets.datasets.annotations import local_path
from lavish.datasets.formats.dataset import ConversationDataset, ConversationStream, ReferringDataset
from lavish.datasets.formats.opening import FORMATS


class OwnFilesBuilder(BaseDatasetBuilder):
    """Files that only the person knows: a relative path is looked up in the working folder before the cache."""

    @staticmethod
    def storage_path(place: str | Path) -> Path:
        """Give the path of a storage."""
        here = local_path(place, "storage")
        return here.absolute() if here.exists() or "{" in str(place) else BaseDatasetBuilder.storage_path(place)

    def check(self) -> None:
        """Check that there is a file at all."""
        super().check()
        if not self.splits():
            raise ConfigError(
                f"datasets.{self._name()} names no file: set build_info.annotations.train.storage (or val, test)."
            )

    def _check_file(self, file: AnnotationFile) -> None:
        root = cache_root()
        if file.url is None and not file.path.exists() and file.path.is_relative_to(root):
            raise DataError(
                f"{file.path.relative_to(root)}: the data {file.split!r} are not here; looked in {Path.cwd()} and in "
                f"the cache, {root}."
            )
        super()._check_file(file)


class ConversationsBuilder(OwnFilesBuilder):
    """`conversations`: files, folders or tar shards in any format of `lavish.datasets.formats`."""

    train_dataset_cls = ConversationDataset
    eval_dataset_cls = ConversationDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/conversations/defaults.yaml"}
    BUILD_INFO_KEYS = ("format", "prompt", "streaming")

    def check(self) -> None:
        """Check the format's name too, and that no processor is named: the model's own makes tensors of messages."""
        super().check()
        named = [kind for kind in PROCESSORS if self.config.get(kind)]
        if named:
            raise ConfigError(
                f"datasets.{self._name()}.{named[0]}: conversations go to the model's own processor as they are."
            )
        prompt = self.build_info.get("prompt")
        if prompt is not None and not isinstance(prompt, str):
            raise ConfigError(f"build_info.prompt is {shown(prompt)}; a text is expected.")
        name = self.build_info.get("format")
        if name is not None and name not in FORMATS:
            raise ConfigError(
                f"build_info.format is {shown(name)}.{did_you_mean(str(name), FORMATS)} Known: {', '.join(FORMATS)}."
            )
        if not isinstance(self.build_info.get("streaming", False), bool):
            raise ConfigError(f"build_info.streaming is {shown(self.build_info.get('streaming'))}; true or false.")

    def _check_file(self, file: AnnotationFile) -> None:
        if not file.path.is_dir() and "{" not in str(file.path):
            super()._check_file(file)

    def _class_of(self, split: str) -> Any:
        # Held-out samples are scored by number, so they are no stream.
        is_stream = split == "train" and self.build_info.get("streaming", False)
        return ConversationStream if is_stream else super()._class_of(split)

    def dataset_options(self, split: str) -> dict[str, Any]:
        """Give the format and the prompt."""
        return {name: self.build_info.get(name) for name in ("format", "prompt")}


class RefCOCOBuilder(OwnFilesBuilder):
    """`refcoco`: phrases and their boxes."""

    train_dataset_cls = ReferringDataset
    eval_dataset_cls = ReferringDataset
    DATASET_CONFIG_DICT = {"default": "configs/datasets/refcoco/defaults.yaml"}
