"""Conversations about drawn scenes in which a colour occurs that the pocket model's world does not have.

In a share of the scenes the items of one colour are painted anew, and questions and answers say the new name in the
place of the old. Every old colour is replaced equally often, so the picture alone tells what is right. The other scenes
are those that the pocket model knows, which keeps it from forgetting them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from lavish.common.errors import ConfigError, DataError, shown
from lavish.datasets.scenes.drawn import DrawnConversations, Stream
from lavish.datasets.scenes.phrases import WORDS, article
from lavish.datasets.scenes.questions import TASK_WEIGHTS, Question, ask
from lavish.datasets.scenes.score import CAPTION_TASKS
from lavish.datasets.scenes.world import Rgb, Scene, sample_scene
from lavish.models.cogvlm.processor import TEMPLATES

Asked = Literal["any", "new", "others"]
TASKS = {name: 0.2 if name in CAPTION_TASKS else 1.0 for name in TASK_WEIGHTS} | {"colour": 8.0}
"""How often each task is asked, as of `questions.ask`: colours often, and seldom captions, whose tokens are many."""
JITTER = 10
"""Levels of 255 by which the new colour varies either way, as the old ones do."""
ALL = "all"
NUM_TRIES = 500
"""Scenes that are drawn for one of which the wanted can be asked."""
_NAME = re.compile(r"[a-z]+")


@dataclass
class NewColour:
    """The section `build_info.new_colour`."""

    name: str = "pink"
    """One English word that names nothing of the world yet."""
    rgb: list[int] = field(default_factory=lambda: [245, 130, 190])
    """Its levels, 0..255."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name in WORDS["en"]:
            raise ConfigError(f"name is {shown(self.name)}; it is one word in small letters that names nothing yet.")
        if len(self.rgb) != 3 or not all(0 <= level <= 255 for level in self.rgb):
            raise ConfigError(f"rgb is {shown(self.rgb)}; it holds three levels from 0 to 255.")

    def paint(self, scene: Scene, old: str, dice: random.Random) -> Scene:
        """Paint the items of a colour anew."""
        red, green, blue = (min(255, max(0, level + dice.randint(-JITTER, JITTER))) for level in self.rgb)
        rgb: Rgb = (red, green, blue)
        return replace(
            scene, items=tuple(replace(item, rgb=rgb) if item.colour == old else item for item in scene.items)
        )

    def rename(self, text: str, old: str) -> str:
        """Say the new name in the place of the old, with the article that goes before it."""
        with_article = rf"\b([Aa])n? {old}\b"
        text = re.sub(with_article, lambda found: f"{found[1]}{article(self.name)[1:]} {self.name}", text)
        return re.sub(rf"\b{old}\b", self.name, text)


@dataclass(frozen=True, kw_only=True)
class NewColourStream(Stream):
    """The scenes of one split, and what is asked about them."""

    new: NewColour
    share: float = 0.5
    """Share of the scenes that show the new colour."""
    asked: Asked = "any"
    """About those that show it: `new`, what is new in colour; `others`, what is not; `any`: as `tasks` weighs."""
    template: str = "vqa"
    """`vqa`: answers of a word or two; `chat`: sentences; `all`: both and boxes, see `NewColourConversations`."""
    tasks: Mapping[str, float] = field(default_factory=lambda: TASKS)

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """Give a scene as it is painted."""
        scene, _, rng = self.talk(index)
        return scene, rng

    def talk(self, index: int) -> tuple[Scene, list[Question], np.random.Generator]:
        """Give a scene as it is painted, with questions about it.

        Raises:
            DataError: no scene was drawn of which the wanted can be asked.
        """
        rng = np.random.default_rng([self.seed, index])
        dice = random.Random(int(rng.integers(1 << 62)))
        is_new = dice.random() < self.share
        for _ in range(NUM_TRIES):
            scene = sample_scene(
                rng,
                max_items=self.settings.max_items,
                number_probability=self.settings.number_probability,
                words=self.settings.words(),
            )
            questions: list[Question] = []
            if not is_new:
                questions = self._ask(scene, rng, task_weights=self.tasks)
            elif scene.items:
                old = dice.choice(scene.items).colour
                questions = self._ask_about(scene, old, rng)
                scene = self.new.paint(scene, old, dice)
            if questions:
                return scene, questions, rng
        raise DataError(
            f"none of {NUM_TRIES} scenes gives a question of the template {self.template!r} (asked: {self.asked}); "
            "allow more items, or name more tasks."
        )

    def _ask(self, scene: Scene, rng: np.random.Generator, **options: Any) -> list[Question]:
        try:
            questions = ask(scene, rng, 12, **options)
        except DataError:  # the scene has nothing of which the tasks could ask
            return []
        return [one for one in questions if self.template in (ALL, one.template)]

    def _ask_about(self, scene: Scene, old: str, rng: np.random.Generator) -> list[Question]:
        tasks = self.tasks if self.asked == "any" else {"colour": 1.0}
        questions = self._ask(scene, rng, task_weights=tasks, chinese_share=0.0)
        if self.asked != "any":
            is_old = re.compile(rf"\b{old}\b")
            questions = [one for one in questions if bool(is_old.search(one.answer)) == (self.asked == "new")]
        return [
            replace(one, question=self.new.rename(one.question, old), answer=self.new.rename(one.answer, old))
            for one in questions
        ]


class NewColourConversations(DrawnConversations):
    """Training and evaluation of chat models, as `scenes_conversations`.

    With the template `all` each question stands between the words of its own template, as the pocket model reads it: a
    model that is trained with `chat_template: base`, which adds none, learns all templates at once.
    """

    stream: NewColourStream

    def asked(self, index: int) -> list[tuple[Any, str, str]]:
        """Give the first `turns` of the questions of a scene: task, question, answer."""
        _, questions, _ = self.stream.talk(index)
        return [(one.task, self._written(one), one.answer) for one in questions[: self.turns]]

    def _written(self, one: Question) -> str:
        return TEMPLATES[one.template].format(one.question) if self.stream.template == ALL else one.question
