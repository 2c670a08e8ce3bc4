"""Builder of the drawn scenes with a colour that the pocket model never saw.

build_info:
  annotations:
    train: {num_samples: 2000, seed: 11, share: 0.5}                      # share of scenes that show the colour
    val: {num_samples: 500, seed: 12, share: 1.0, asked: new}
  new_colour: {name: pink, rgb: [245, 130, 190]}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lavish.common.errors import ConfigError, did_you_mean
from lavish.datasets.builders.scenes_builder import DrawnSettings, ScenesBuilder, SplitSettings, SplitsSettings
from lavish.datasets.scenes.new_colour import ALL, TASKS, Asked, NewColour, NewColourConversations, NewColourStream
from lavish.datasets.scenes.questions import TASK_WEIGHTS


@dataclass
class NewColourSplit(SplitSettings):
    """A section of `build_info.annotations`."""

    share: float = 0.5
    """Share of the scenes that show the new colour, 0..1."""
    asked: Asked = "any"
    """About those that show it: `new`, what is new in colour; `others`, what is not; `any`: as `tasks` weighs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share is {self.share}; it lies in 0..1.")


@dataclass
class NewColourSplits(SplitsSettings):
    """The section `build_info.annotations`; null leaves a split out."""

    train: NewColourSplit | None = None
    val: NewColourSplit | None = None
    test: NewColourSplit | None = None


@dataclass
class NewColourSettings(DrawnSettings):
    """The section `build_info`."""

    annotations: NewColourSplits = field(default_factory=NewColourSplits)
    new_colour: NewColour = field(default_factory=NewColour)
    template: Literal["chat", "vqa", "all"] = "vqa"
    """`vqa`: answers of a word or two; `chat`: sentences; `all`: each template's words are written out."""
    turns: int = 1
    """Most questions of a conversation."""
    tasks: dict[str, float] = field(default_factory=lambda: dict(TASKS))
    """How often each task is asked."""

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise ConfigError(f"turns is {self.turns}; it must be at least 1.")
        if self.turns > 1 and self.template == ALL:
            raise ConfigError(
                "turns are more than 1 and template is all; the turns of a conversation have one template."
            )
        for name, weight in self.tasks.items():
            if name not in TASK_WEIGHTS:
                known = ", ".join(TASK_WEIGHTS)
                raise ConfigError(f"tasks.{name} is no task.{did_you_mean(name, TASK_WEIGHTS)} Tasks: {known}.")
            if not weight >= 0:
                raise ConfigError(f"tasks.{name} is {weight}; it must be at least 0.")
        if not any(self.tasks.values()):
            raise ConfigError("tasks are all 0; one at least must be asked.")


class ScenesNewColourBuilder(ScenesBuilder):
    """`scenes_new_colour`."""

    train_dataset_cls = NewColourConversations
    eval_dataset_cls = NewColourConversations
    settings_class = NewColourSettings
    BUILD_INFO_KEYS = (*ScenesBuilder.BUILD_INFO_KEYS, "new_colour", "template", "turns", "tasks")
    DATASET_CONFIG_DICT = {"default": "configs/datasets/scenes/new_colour.yaml"}

    def build_split(self, split: str) -> Any:
        """Give the dataset of one split."""
        settings: NewColourSettings = self.settings
        section: NewColourSplit = getattr(settings.annotations, split)
        stream = NewColourStream(
            section.seed,
            settings.scene,
            settings.blank,
            new=settings.new_colour,
            share=section.share,
            asked=section.asked,
            template=settings.template,
            tasks=settings.tasks,
        )
        return NewColourConversations(stream, section.num_samples, turns=settings.turns)
