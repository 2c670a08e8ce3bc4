"""Drawn scenes as LAVIS's data sets: captions, questions, conversations about an easy world, without any file.

Sample `i` of a split is a function of (seed, i) alone; a picture is drawn when it is asked for. The world is small on
purpose (one shape, a few shapes and colours): a tiny network learns it from drawn weights in minutes. What is said is
simpler than what the pocket model is asked (`questions`): "a red circle", "what color is the shape?".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

from lavish.common.errors import ConfigError, DataError, shown
from lavish.datasets.datasets.base_dataset import BaseDataset
from lavish.datasets.datasets.caption_datasets import CaptionDataset, CaptionEvalDataset, number_images
from lavish.datasets.datasets.vqa_datasets import VQADataset, VQAEvalDataset
from lavish.datasets.scenes.world import Scene, Words, draw, sample_scene

Kind = Literal["colour", "shape"]
KINDS: tuple[Kind, ...] = ("colour", "shape")
"""Kinds of questions."""
NUM_ANNOTATORS = 10
"""As many give each answer, all the same: the official VQA accuracy wants at least three who agree."""
MAX_IMAGE_SIZE = 1024


@dataclass
class SceneSettings:
    """The section `build_info.scene`: what is drawn."""

    max_items: int = 1
    """Most shapes of a picture; there is always one at least."""
    number_probability: float = 0.0
    """How often a number, of which nothing is said, stands in the picture too."""
    shapes: list[str] = field(default_factory=lambda: ["circle", "square", "triangle", "cross"])
    """Shapes that occur."""
    colours: list[str] = field(default_factory=lambda: ["red", "yellow", "green", "blue"])
    """Colours that occur."""
    sizes: list[str] = field(default_factory=lambda: ["medium", "large"])
    """Sizes that occur."""
    patterns: list[str] = field(default_factory=lambda: ["plain"])
    """Backgrounds that occur."""
    image_size: int = 64
    """Side of the pictures in pixels."""

    def __post_init__(self) -> None:
        if self.max_items < 1:
            raise ConfigError(f"max_items is {self.max_items}; it must be at least 1.")
        if not 0 <= self.number_probability <= 1:
            raise ConfigError(f"number_probability is {self.number_probability}; it lies in 0..1.")
        if not 1 <= self.image_size <= MAX_IMAGE_SIZE:
            raise ConfigError(f"image_size is {self.image_size}; it lies in 1..{MAX_IMAGE_SIZE}.")
        try:
            self.words()
        except DataError as error:
            raise ConfigError(str(error)) from error

    def words(self) -> Words:
        """Give the words that a scene is drawn from."""
        return Words(tuple(self.shapes), tuple(self.colours), tuple(self.sizes), tuple(self.patterns))


@dataclass(frozen=True)
class Stream:
    """The pictures of one split."""

    seed: int
    settings: SceneSettings
    blank: bool = False
    """Pictures show the background alone, while everything that is said stays: what can be told without looking."""
    kinds: Sequence[Kind] = KINDS
    """Kinds of questions; of every scene one of them can be asked."""

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """Give a scene of which something can be asked, and the random numbers for what is asked."""
        rng = np.random.default_rng([self.seed, index])
        while True:
            scene = sample_scene(
                rng,
                max_items=self.settings.max_items,
                number_probability=self.settings.number_probability,
                words=self.settings.words(),
            )
            if self.questions(scene):
                return scene, rng

    def questions(self, scene: Scene) -> list[tuple[Kind, str, str]]:
        """Give what can be asked of a scene, of the kinds that are asked."""
        return [one for one in questions(scene) if one[0] in self.kinds]

    def picture(self, index: int) -> Image.Image:
        """Draw one."""
        scene, _ = self.scene(index)
        return draw(replace(scene, items=(), number=None) if self.blank else scene, self.settings.image_size)


def caption(scene: Scene) -> str:
    """Name the shapes from left to right: "a red circle and a blue square"."""
    items = sorted(scene.items, key=lambda item: item.centre)
    return " and ".join(f"{'an' if item.colour[0] in 'aeiou' else 'a'} {item.colour} {item.shape}" for item in items)


def questions(scene: Scene) -> list[tuple[Kind, str, str]]:
    """Give what can be asked of the scene: kind, question, answer; none where no shape can be told by its name."""
    if len(scene.items) == 1:
        (item,) = scene.items
        return [("colour", "what color is the shape?", item.colour), ("shape", "what shape is it?", item.shape)]
    shapes, colours = Counter(item.shape for item in scene.items), Counter(item.colour for item in scene.items)
    found: list[tuple[Kind, str, str]] = []
    for item in scene.items:
        if shapes[item.shape] == 1:
            found.append(("colour", f"what color is the {item.shape}?", item.colour))
        if colours[item.colour] == 1:
            found.append(("shape", f"what shape is the {item.colour} one?", item.shape))
    return found


class DrawnPictures(BaseDataset):
    """What the three share: records are made at once, pictures when they are asked for; `image` is a picture's name."""

    def __init__(self, stream: Stream, num_samples: int, vis_processor: Any = None, text_processor: Any = None) -> None:
        BaseDataset.__init__(self, vis_processor, text_processor)
        self.stream = stream
        records = ({"image": f"scene{index}", **self.record(index)} for index in range(num_samples))
        self.add_annotation(f"drawn scenes of seed {stream.seed}", records)
        self._add_instance_ids()

    def record(self, index: int) -> dict[str, Any]:
        """Give what is known of a sample, besides its picture."""
        raise NotImplementedError(f"{type(self).__name__} does not say what a record is; override record(index).")

    def picture(self, name: Any) -> Any:
        """Draw the picture of that name, and process it.

        Raises:
            DataError: no such name.
        """
        if not isinstance(name, str) or not re.fullmatch(r"scene\d+", name):
            raise DataError(f"{shown(name)} is no drawn picture; they are scene0, scene1 ...")
        return self.vis_processor(self.stream.picture(int(name.removeprefix("scene"))))


class Captioned(DrawnPictures):
    """Records with `image_id` and `caption`."""

    def record(self, index: int) -> dict[str, Any]:
        """Give the caption."""
        return {"image_id": index, "caption": caption(self.stream.scene(index)[0])}


class DrawnCaptions(Captioned, CaptionDataset):
    """Training: `image`, `text_input`, `image_id`."""

    def __init__(self, stream: Stream, num_samples: int, **processors: Any) -> None:
        super().__init__(stream, num_samples, **processors)
        self.img_ids = number_images(self)


class DrawnCaptionsEval(Captioned, CaptionEvalDataset):
    """Evaluation: `image`, `image_id`, `instance_id`; the records hold the captions."""


class Asked(DrawnPictures):
    """Records with one question a picture: `question`, `question_id`, `answer`."""

    turns: int = 1

    def record(self, index: int) -> dict[str, Any]:
        """Give the question with its answer."""
        _, question, answer = self.asked(index)[0]
        return {"question": question, "question_id": index, "answer": [answer] * NUM_ANNOTATORS}

    def asked(self, index: int) -> list[tuple[Kind, str, str]]:
        """Choose what is asked of a picture: `turns` questions, or as many as there are."""
        scene, rng = self.stream.scene(index)
        possible = self.stream.questions(scene)
        chosen = rng.permutation(len(possible))[: self.turns]
        return [possible[at] for at in chosen]


class DrawnQuestions(Asked, VQADataset):
    """Training: `image`, `text_input`, `answers`, `weights`."""


class DrawnQuestionsEval(Asked, VQAEvalDataset):
    """Evaluation: `image`, `text_input`, `question_id`, `instance_id`; `answer_list` has the words of the world."""

    coco_fmt_qust_file = coco_fmt_anno_file = None

    def __init__(self, stream: Stream, num_samples: int, **processors: Any) -> None:
        super().__init__(stream, num_samples, **processors)
        words = stream.settings.words()
        known = {"colour": words.colours, "shape": words.shapes}
        self.answer_list = [word for kind in KINDS if kind in stream.kinds for word in known[kind]]


class DrawnConversations(Asked):
    """Training and evaluation of chat models: `messages`, `id`, and for the task `vqa` the first question by itself.

    `image` is a picture as it is, which the model's own processor takes; in a batch all are lists.
    """

    def __init__(
        self, stream: Stream, num_samples: int, turns: int = 1, prompt: str = "{question}", **processors: Any
    ) -> None:
        self.turns, self.prompt = turns, prompt
        super().__init__(stream, num_samples, **processors)

    def record(self, index: int) -> dict[str, Any]:
        """Give the questions with their answers; the first question as those of `scenes_vqa`."""
        turns = [(question, answer) for _, question, answer in self.asked(index)]
        question, answer = turns[0]
        return {"question": question, "question_id": index, "answer": [answer] * NUM_ANNOTATORS, "turns": turns}

    def sample(self, index: int) -> dict[str, Any]:
        """Give one conversation."""
        record = self.annotation[index]
        image = self.picture(record["image"])
        messages: list[dict[str, Any]] = []
        for question, answer in record["turns"]:
            content: list[dict[str, Any]] = [{"type": "text", "text": self.prompt.replace("{question}", question)}]
            if not messages:
                content.insert(0, {"type": "image", "image": image})
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return {
            "messages": messages,
            "id": record["image"],
            "image": image,
            "text_input": record["question"],
            "question_id": record["question_id"],
            "instance_id": record["instance_id"],
        }
