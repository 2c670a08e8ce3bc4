"""Builders of the drawn scenes: data sets without files, for proofs that a network learns and for trying a recipe out.

build_info:
  annotations: {train: {num_samples: 10000, seed: 1}, val: {num_samples: 500, seed: 2}}
  scene: {max_items: 1, shapes: [circle, square], image_size: 64}
  blank: true       # the same samples without what they show: how much can be told without looking
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from lavish.common import config as configs
from lavish.common.errors import ConfigError
from lavish.datasets.builders.base_dataset_builder import SPLITS, AnnotationFile, BaseDatasetBuilder
from lavish.datasets.scenes.drawn import (
    KINDS,
    DrawnCaptions,
    DrawnCaptionsEval,
    DrawnConversations,
    DrawnQuestions,
    DrawnQuestionsEval,
    Kind,
    SceneSettings,
    Stream,
)


@dataclass
class SplitSettings:
    """A section of `build_info.annotations`, in the place of files."""

    num_samples: int
    """Samples of the split."""
    seed: int
    """Sample i is a function of it and of i; every split has another one."""

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.seed < 0:
            raise ConfigError(
                f"num_samples is {self.num_samples} and seed {self.seed}; they are whole numbers, from 1 and from 0 on."
            )


@dataclass
class SplitsSettings:
    """The section `build_info.annotations`; null leaves a split out."""

    train: SplitSettings | None = None
    val: SplitSettings | None = None
    test: SplitSettings | None = None

    def __post_init__(self) -> None:
        seeds = [split.seed for split in (self.train, self.val, self.test) if split is not None]
        if len(set(seeds)) < len(seeds):
            raise ConfigError(f"the seeds are {seeds}; splits of one seed would hold the same pictures")


@dataclass
class DrawnSettings:
    """The section `build_info` of drawn scenes."""

    annotations: SplitsSettings = field(default_factory=SplitsSettings)
    scene: SceneSettings = field(default_factory=SceneSettings)
    blank: bool = False


@dataclass
class QuestionSettings(DrawnSettings):
    """The same where something is asked."""

    questions: list[Kind] = field(default_factory=lambda: list(KINDS))

    def __post_init__(self) -> None:
        if not self.questions:
            raise ConfigError(f"questions is empty; it names kinds of questions: {', '.join(KINDS)}.")


@dataclass
class ConversationSettings(QuestionSettings):
    """The same of conversations."""

    turns: int = 1
    prompt: str = "{question}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turns < 1:
            raise ConfigError(f"turns is {self.turns}; it must be at least 1.")
        if "{question}" not in self.prompt:
            raise ConfigError(f"prompt is {self.prompt!r}; it needs {{question}} where the question goes.")


class ScenesBuilder(BaseDatasetBuilder):
    """What the three share: settings instead of files."""

    settings_class: ClassVar[type[Any]] = DrawnSettings
    BUILD_INFO_KEYS = ("scene", "blank")

    @property
    def settings(self) -> Any:
        """The section `build_info`, checked.

        Raises:
            ConfigError: an unknown key or word, or a wrong value.
        """
        return configs.check(self.build_info, self.settings_class, f"datasets.{self._name()}.build_info")

    def check(self) -> None:
        """Check the whole config."""
        settings = self.settings
        super().check()
        if not any(asdict(settings.annotations).values()):
            raise ConfigError(
                f"datasets.{self._name()} has no split: set build_info.annotations.train to num_samples and seed."
            )

    def splits(self) -> list[str]:
        """Name the splits that have samples."""
        return [split for split in SPLITS if getattr(self.settings.annotations, split) is not None]

    def annotation_files(self, split: str | None = None) -> list[AnnotationFile]:
        """Give no file: all is drawn."""
        return []

    def visual_root(self) -> Path | None:
        """Give no folder."""
        return None

    def build_split(self, split: str) -> Any:
        """Give the dataset of one split."""
        settings, mode = self.settings, "train" if split == "train" else "eval"
        section: SplitSettings = getattr(settings.annotations, split)
        return self._class_of(split)(
            self.stream(section.seed),
            section.num_samples,
            vis_processor=self.vis_processors[mode],
            text_processor=self.text_processors[mode],
            **self.dataset_options(split),
        )

    def stream(self, seed: int) -> Stream:
        """Give the pictures of a seed."""
        return Stream(seed, self.settings.scene, self.settings.blank)


class ScenesCaptionBuilder(ScenesBuilder):
    """`scenes_caption`."""

    train_dataset_cls = DrawnCaptions
    eval_dataset_cls = DrawnCaptionsEval
    DATASET_CONFIG_DICT = {"default": "configs/datasets/scenes/caption.yaml"}


class ScenesVQABuilder(ScenesBuilder):
    """`scenes_vqa`."""

    train_dataset_cls = DrawnQuestions
    eval_dataset_cls = DrawnQuestionsEval
    settings_class = QuestionSettings
    BUILD_INFO_KEYS = (*ScenesBuilder.BUILD_INFO_KEYS, "questions")
    DATASET_CONFIG_DICT = {"default": "configs/datasets/scenes/vqa.yaml"}

    def stream(self, seed: int) -> Stream:
        """Give the kinds of questions too."""
        return replace(super().stream(seed), kinds=tuple(self.settings.questions))


class ScenesConversationsBuilder(ScenesVQABuilder):
    """`scenes_conversations`."""

    train_dataset_cls = DrawnConversations
    eval_dataset_cls = DrawnConversations
    settings_class = ConversationSettings
    BUILD_INFO_KEYS = (*ScenesVQABuilder.BUILD_INFO_KEYS, "turns", "prompt")
    DATASET_CONFIG_DICT = {"default": "configs/datasets/scenes/conversations.yaml"}

    def dataset_options(self, split: str) -> dict[str, Any]:
        """Give turns and prompt."""
        return {"turns": self.settings.turns, "prompt": self.settings.prompt}
