"""Builder of dialogues about drawn videos, in the form of AVSD: features without files.

build_info:
  annotations: {train: {num_samples: 2000, seed: 21}, val: {num_samples: 500, seed: 22}}     # dialogues of three turns
  video: {shapes: [circle, square], widths: {i3d_rgb: 32}}
  blank: true       # the same dialogues on noise: how much can be told without looking
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lavish.common.errors import ConfigError
from lavish.datasets.builders.scenes_builder import ScenesBuilder, SplitSettings, SplitsSettings
from lavish.datasets.scenes.dialogues import DrawnDialogues, DrawnDialoguesEval, VideoSettings, VideoStream
from lavish.processors.gpt_processors import GPTVideoFeatureProcessor


@dataclass
class DialogueSettings:
    """The section `build_info`."""

    annotations: SplitsSettings = field(default_factory=SplitsSettings)
    video: VideoSettings = field(default_factory=VideoSettings)
    blank: bool = False


class ScenesDialogueBuilder(ScenesBuilder):
    """`scenes_dialogue`."""

    train_dataset_cls = DrawnDialogues
    eval_dataset_cls = DrawnDialoguesEval
    settings_class = DialogueSettings
    BUILD_INFO_KEYS = ("video", "blank")
    DATASET_CONFIG_DICT = {"default": "configs/datasets/scenes/dialogue.yaml"}

    def check(self) -> None:
        """Check the whole config, and that the features that the processors name are drawn."""
        super().check()
        widths = self.settings.video.widths
        for mode, processor in self.vis_processors.items():
            if not isinstance(processor, GPTVideoFeatureProcessor):
                raise ConfigError(
                    f"datasets.{self._name()}.vis_processor.{mode} is {type(processor).__name__}; it is gpt_video_ft."
                )
            absent = [name for name in (*processor.visual_ft, *processor.audio_ft) if name not in widths]
            if absent:
                raise ConfigError(
                    f"datasets.{self._name()}.vis_processor.{mode} names the feature {absent[0]!r}, which is not "
                    f"drawn; those of build_info.video.widths are {', '.join(widths)}."
                )

    def build_split(self, split: str) -> Any:
        """Give the dataset of one split."""
        settings, mode = self.settings, "train" if split == "train" else "eval"
        section: SplitSettings = getattr(settings.annotations, split)
        return self._class_of(split)(
            VideoStream(section.seed, settings.video, settings.blank),
            section.num_samples,
            vis_processor=self.vis_processors[mode],
            text_processor=self.text_processors[mode],
        )
