"""Dialogues about drawn scenes in which something moves, on features in the form of AVSD's; no picture, no file.

Features are made of the scene's labels: each kind of feature tells some of them, by a fixed random projection, in every
frame, with noise. Earlier turns ask for other labels than the last one, and the caption tells none, so an answer can be
had from the features alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lavish.common.errors import ConfigError, DataError, did_you_mean
from lavish.datasets.datasets.avsd_dialogue_datasets import AVSDDialDataset, AVSDDialEvalDataset
from lavish.datasets.datasets.dialogue_datasets import DialogueDataset
from lavish.datasets.scenes.world import COLOURS, SHAPES, Words, sample_scene

DIRECTIONS = ("left", "right", "up", "down")
SOUNDS = ("music", "a voice", "rain", "nothing")
TELLS = {"i3d_flow": ("direction",), "i3d_rgb": ("shape", "colour"), "vggish": ("sound",)}
"""Feature -> labels that it tells."""
TURNS = {
    "shape": ("what shape is it ?", "it is a {}"),
    "colour": ("what color is it ?", "it is {}"),
    "direction": ("which way does it move ?", "it moves {}"),
    "sound": ("what do you hear ?", "i hear {}"),
}
"""Label -> question and answer."""
CAPTION, SUMMARY = "something moves over a {} wall .", "somebody watches it ."
PROJECTION_SEED = 20261120


@dataclass
class VideoSettings:
    """The section `build_info.video`: what the features are made of."""

    shapes: list[str] = field(default_factory=lambda: list(SHAPES))
    """Shapes that occur."""
    colours: list[str] = field(default_factory=lambda: list(COLOURS))
    """Colours that occur."""
    widths: dict[str, int] = field(default_factory=lambda: {"i3d_flow": 16, "i3d_rgb": 32, "vggish": 8})
    """Feature -> numbers a frame."""
    min_frames: int = 4
    """Frames of the shortest video."""
    max_frames: int = 8
    """And of the longest."""
    noise: float = 0.5
    """Standard deviation of the noise; a label alone has one of about 1."""

    def __post_init__(self) -> None:
        for name, width in self.widths.items():
            if name not in TELLS:
                raise ConfigError(
                    f"widths.{name}: no such feature.{did_you_mean(name, TELLS)} Known: {', '.join(TELLS)}."
                )
            if width < 1:
                raise ConfigError(f"widths.{name} is {width}; it must be at least 1.")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ConfigError(f"min_frames is {self.min_frames} and max_frames {self.max_frames}; 1 <= min <= max.")
        if not self.noise >= 0:
            raise ConfigError(f"noise is {self.noise}; it must be at least 0.")
        try:
            self.words()
        except DataError as error:
            raise ConfigError(str(error)) from error

    def words(self) -> Words:
        """Give the words that a scene is drawn from."""
        return Words(shapes=tuple(self.shapes), colours=tuple(self.colours))

    def values(self) -> dict[str, Sequence[str]]:
        """Give what each label may be."""
        return {"shape": self.shapes, "colour": self.colours, "direction": DIRECTIONS, "sound": SOUNDS}


@dataclass(frozen=True)
class VideoStream:
    """The videos of one split: video `i` is a function of (seed, i) alone."""

    seed: int
    settings: VideoSettings
    blank: bool = False
    """Features are noise alone, while all that is said stays: what can be told without looking."""

    def dialog(self, index: int) -> dict[str, Any]:
        """Give the dialogue about a video, as AVSD's files hold it: three of the four questions."""
        labels, rng = self.labels(index)
        asked = [list(TURNS)[at] for at in rng.permutation(len(TURNS))[:3]]
        turns = [{"question": TURNS[label][0], "answer": TURNS[label][1].format(labels[label])} for label in asked]
        return {
            "image_id": f"video{index}",
            "caption": CAPTION.format(labels["pattern"]),
            "summary": SUMMARY,
            "dialog": turns,
        }

    def labels(self, index: int) -> tuple[dict[str, str], np.random.Generator]:
        """Give what a video shows, and the random numbers for what is asked."""
        rng = np.random.default_rng([self.seed, index])
        scene = sample_scene(rng, max_items=1, number_probability=0.0, words=self.settings.words())
        while not scene.items:
            scene = sample_scene(rng, max_items=1, number_probability=0.0, words=self.settings.words())
        (item,) = scene.items
        found = {"shape": item.shape, "colour": item.colour, "pattern": scene.background.pattern}
        return {**found, "direction": DIRECTIONS[rng.integers(4)], "sound": SOUNDS[rng.integers(4)]}, rng

    def features(self, index: int, names: Sequence[str]) -> np.ndarray:
        """Give the features of those names, which `widths` has, side by side: float32 (frames, width)."""
        labels, _ = self.labels(index)
        rng = np.random.default_rng([self.seed, index, 1])
        num_frames = int(rng.integers(self.settings.min_frames, self.settings.max_frames + 1))
        return np.concatenate([self._feature(name, labels, num_frames, rng) for name in names], axis=1)

    def _feature(self, name: str, labels: Mapping[str, str], num_frames: int, rng: np.random.Generator) -> np.ndarray:
        width = self.settings.widths.get(name)
        if width is None:
            known = ", ".join(self.settings.widths)
            raise ConfigError(
                f"{name!r} is no drawn feature.{did_you_mean(name, self.settings.widths)} Known: {known}."
            )
        frames = self.settings.noise * rng.standard_normal((num_frames, width))
        if self.blank:
            return frames.astype(np.float32)
        projection = np.random.default_rng([PROJECTION_SEED, list(TELLS).index(name)])
        values = self.settings.values()
        for label in TELLS[name]:
            table = projection.standard_normal((len(values[label]), width))
            frames += table[list(values[label]).index(labels[label])]
        return frames.astype(np.float32)


class DrawnDialogues(AVSDDialDataset):
    """Training: as AVSD's, one sample a turn."""

    def __init__(self, stream: VideoStream, num_dialogues: int, vis_processor: Any, text_processor: Any) -> None:
        DialogueDataset.__init__(self, vis_processor, text_processor)
        self.stream = stream
        dialogs = (stream.dialog(index) for index in range(num_dialogues))
        records = [record for dialog in dialogs for record in self.samples_of(dialog)]
        self.add_annotation(f"drawn videos of seed {stream.seed}", records)
        self._add_instance_ids()

    def video(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Make the features that the processor names."""
        processor: Any = self.vis_processor
        names = (*processor.visual_ft, *processor.audio_ft)
        return processor.frames(self.stream.features(int(record["image_id"].removeprefix("video")), names))


class DrawnDialoguesEval(DrawnDialogues):
    """Evaluation: the last turn of each dialogue."""

    samples_of = staticmethod(AVSDDialEvalDataset.samples_of)
