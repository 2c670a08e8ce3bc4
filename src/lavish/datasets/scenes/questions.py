"""Questions about a drawn scene, each with the one right answer, in English and Chinese.

Thirteen tasks: captions with and without boxes, attributes, counting, relations, existence, numbers, comparison,
grounding both ways, and being asked for what is not there. An answer follows from scene and question alone, so that
exact match is a fair score.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from lavish.common.errors import DataError, did_you_mean
from lavish.datasets.scenes import phrases
from lavish.datasets.scenes.phrases import (
    CANNOT_SEE,
    FORMS,
    RELATION,
    RELATION_WORD,
    WORDS,
    article,
    boxes_text,
    casual,
    phrase,
    plural,
)
from lavish.datasets.scenes.world import COLOURS, SHAPES, SIZES, Box, Item, Scene

TEMPLATES = ("chat", "vqa", "base")
TASK_WEIGHTS = {
    "caption": 2.0,
    "grounded_caption": 1.0,
    "count": 2.0,
    "colour": 2.0,
    "shape": 2.0,
    "size": 1.5,
    "relation": 3.0,
    "exists": 2.0,
    "number": 2.5,
    "comparison": 2.0,
    "absent": 1.5,
    "locate": 4.0,
    "describe": 3.0,
}
"""How often each task is drawn, relative to the others; a task that the scene has no question for is drawn again."""

RELATION_MARGIN = 0.12
"""Least distance of two centres along the asked axis, as a share of the picture."""
CASUAL_SHARE = 0.06
"""Share of questions written without capital and mark, as people type."""
_RELATION_SLOPE = 1.5  # the asked axis must be this much longer than the other, so that "where" has one answer
_BOX_JITTER = 4  # thousandths by which a box in a question may be off, either way
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its answer.

    `template` is the prompt form it is for: "chat" (sentences), "vqa" (a word or two) or "base" (grounding). `boxes`
    are those that the question or the answer is about, 0..1.
    """

    task: str
    language: str
    template: str
    question: str
    answer: str
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True, slots=True)
class Reference:
    """The attributes by which a phrase points at items; None is left unsaid."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None

    def matches(self, item: Item) -> bool:
        """Say whether the phrase is true of the item."""
        return (
            self.shape in (None, item.shape) and self.colour in (None, item.colour) and self.size in (None, item.size)
        )

    def text(self, language: str) -> str:
        """Give the phrase without article."""
        return phrase(language, self.shape, self.colour, self.size)


_ATTRIBUTES = ("shape", "colour", "size")
_BY_SHAPE = [("shape",), ("shape", "colour"), ("shape", "size"), _ATTRIBUTES]
_BY_OTHERS = [("colour",), ("size",), ("colour", "size")]


@dataclass(slots=True)
class _Asker:
    """One question in the making: the scene, the dice, and the language and template chosen for it."""

    scene: Scene
    dice: random.Random
    language: str = "en"
    template: str = "chat"

    # -- pieces

    def matching(self, reference: Reference) -> list[Item]:
        return [item for item in self.scene.items if reference.matches(item)]

    def refer(self, item: Item, subsets: Sequence[tuple[str, ...]] = _BY_SHAPE) -> Reference | None:
        """Give a phrase that is true of this item alone, as short as can be or now and then a fuller one."""
        unique = []
        for names in subsets:
            reference = Reference(**{name: getattr(item, name) for name in names})
            if len(self.matching(reference)) == 1:
                unique.append((len(names), reference))
        if not unique:
            return None
        if self.dice.random() < 0.2:
            return self.dice.choice(unique)[1]
        shortest = unique[0][0]
        return self.dice.choice([reference for length, reference in unique if length == shortest])

    def absent_reference(self, names: Sequence[str]) -> Reference | None:
        """Give a phrase with these attributes that nothing in the scene fits, but parts of which the scene may show."""
        pools = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}
        for _ in range(8):
            values = {}
            for name in names:
                near = self.some_item() if self.dice.random() < 0.65 else None
                values[name] = getattr(near, name) if near else self.dice.choice(pools[name])
            reference = Reference(**values)
            if not self.matching(reference):
                return reference
        return None

    def make(self, task: str, form: str, boxes: Sequence[Box] = (), **words: str) -> Question:
        """Fill a form; `words` are the values of its fields."""
        questions, chat, short = FORMS[task][form][self.language]
        question = self.dice.choice(questions).format(**words)
        answer = (chat if self.template == "chat" else short).format(**words)
        return Question(task, self.language, self.template, question, answer, tuple(boxes))

    def cannot_see(self, task: str, form: str, **words: str) -> Question:
        question = self.dice.choice(FORMS[task][form][self.language][0]).format(**words)
        return Question("absent", self.language, self.template, question, CANNOT_SEE[self.language])

    def some_item(self) -> Item | None:
        return self.dice.choice(self.scene.items) if self.scene.items else None

    # -- tasks: each gives a question, or None if the scene has none of this kind

    def caption(self) -> Question:
        question = self.dice.choice(phrases.CAPTION_QUESTIONS[self.language])
        return Question("caption", self.language, "chat", question, caption(self.scene, self.language))

    def grounded_caption(self) -> Question:
        question = self.dice.choice(phrases.GROUNDED_CAPTION_QUESTIONS[self.language])
        answer = caption(self.scene, self.language, boxes=True)
        boxes = tuple(item.box for item in in_reading_order(self.scene.items))
        if self.scene.number:
            boxes += (self.scene.number.box,)
        return Question("grounded_caption", self.language, self.dice.choice(("chat", "base")), question, answer, boxes)

    def count(self) -> Question | None:
        kind = self.dice.choices(("all", "shape", "colour", "both"), (25, 35, 25, 15))[0]
        if kind == "all":
            reference = Reference()
        else:
            reference = self._counted(kind)
        number = len(self.matching(reference))
        one = reference.text(self.language)
        if kind == "all" and self.dice.random() < 0.5:
            one = phrases.ANY_SHAPE[self.language]
        if self.language == "zh":
            return self.make("count", "count", a=one, n=str(number))
        noun = one if number == 1 else plural(one)
        are = "is" if number == 1 else "are"
        return self.make("count", "count", many=plural(one), are=are, n=str(number), noun=noun)

    def _counted(self, kind: str) -> Reference:
        """Choose what to count: any number that the scene has, equally often, and nothing one time in eight."""
        if self.scene.items and self.dice.random() < 0.875:
            present = Counter(
                (item.shape if kind != "colour" else None, item.colour if kind != "shape" else None)
                for item in self.scene.items
            )
            number = self.dice.choice(sorted(set(present.values())))
            return Reference(*self.dice.choice([key for key, times in present.items() if times == number]))
        names = ("shape", "colour") if kind == "both" else (kind,)
        return self.absent_reference(names) or Reference()

    def colour(self) -> Question | None:
        item = self.some_item()
        reference = item and self.refer(item, [("shape",), ("shape", "size"), ("size",)])
        if not item or not reference:
            return None
        return self.make("colour", "colour", [item.box], a=reference.text(self.language), colour=self.word(item.colour))

    def shape(self) -> Question | None:
        item = self.some_item()
        reference = item and self.refer(item, _BY_OTHERS)
        if not item or not reference:
            return None
        return self.make("shape", "shape", [item.box], a=reference.text(self.language), shape=self.word(item.shape))

    def size(self) -> Question | None:
        item = self.some_item()
        reference = item and self.refer(item, [("shape",), ("shape", "colour"), ("colour",)])
        if not item or not reference:
            return None
        return self.make("size", "size", [item.box], a=reference.text(self.language), size=self.word(item.size))

    def word(self, name: str) -> str:
        return WORDS[self.language][name]

    def relation(self) -> Question | None:
        pairs = [pair for pair in combinations(self.scene.items, 2) if direction(*pair)]
        if not pairs:
            return None
        first, second = self.dice.choice(pairs)
        if self.dice.random() < 0.5:
            first, second = second, first
        a, b = self.refer(first), self.refer(second)
        towards = direction(first, second)
        if not a or not b or not towards:
            return None
        form = self.dice.choices(("where", "yes", "no"), (2, 1, 1))[0]
        asked = _OPPOSITE[towards] if form == "no" else towards
        return self.make(
            "relation",
            form,
            [first.box, second.box],
            a=a.text(self.language),
            b=b.text(self.language),
            relation=RELATION[self.language][asked],
            word=RELATION_WORD[self.language][asked],
        )

    def exists(self) -> Question | None:
        item = self.some_item()
        if item is None:  # only "no" could be asked, which would unbalance the answers
            return None
        kinds = (("shape",), ("colour",), ("shape", "colour"), _ATTRIBUTES)
        names = self.dice.choices(kinds, (30, 20, 35, 15))[0]
        form = self.dice.choice(("yes", "no"))
        if form == "yes":
            reference = Reference(**{name: getattr(item, name) for name in names})
        else:
            reference = self.absent_reference(names)
            if reference is None:
                return None
        text = reference.text(self.language)
        return self.make("exists", form, [one.box for one in self.matching(reference)], a=text, one=article(text))

    def number(self) -> Question | None:
        number = self.scene.number
        if number is None:
            return self.make("number", "no") if self.dice.random() < 0.16 else None
        if self.dice.random() < 0.3:
            return self.make("number", "yes", [number.box])
        return self.make("number", "read", [number.box], n=number.text)

    def comparison(self) -> Question | None:
        return self._which() if self.dice.random() < 0.5 else self._more()

    def _which(self) -> Question | None:
        pairs = [pair for pair in combinations(self.scene.items, 2) if pair[0].size != pair[1].size]
        if not pairs:
            return None
        first, second = self.dice.sample(self.dice.choice(pairs), 2)
        without_size = [("shape",), ("shape", "colour"), ("colour",)]
        a, b = self.refer(first, without_size), self.refer(second, without_size)
        if not a or not b:
            return None
        form = self.dice.choice(("larger", "smaller"))
        first_wins = (SIZES.index(first.size) > SIZES.index(second.size)) == (form == "larger")
        words = {"a": a.text(self.language), "b": b.text(self.language)}
        return self.make("comparison", form, [first.box, second.box], **words, winner=words["a" if first_wins else "b"])

    def _more(self) -> Question | None:
        name = self.dice.choice(("shape", "colour"))
        counts = Counter(getattr(item, name) for item in self.scene.items)
        shown = sorted(counts) + self.dice.sample(
            [word for word in (SHAPES, COLOURS)[name == "colour"] if word not in counts], 1
        )
        form = self.dice.choice(("yes", "no"))
        pairs = [(a, b) for a in shown for b in shown if a != b and (counts[a] > counts[b]) == (form == "yes")]
        if not pairs:
            return None
        first, second = (Reference(**{name: word}).text(self.language) for word in self.dice.choice(pairs))
        if self.language == "zh":
            return self.make("comparison", form, a=first, b=second)
        return self.make("comparison", form, many=plural(first), fewer=plural(second))

    def absent(self) -> Question | None:
        kind = self.dice.choice(("colour", "shape", "size", "locate", "relation", "number"))
        if kind == "number":
            return None if self.scene.number else self.cannot_see("number", "read")
        names = {"shape": ("colour",)}.get(kind) or self.dice.choice((("shape",), ("shape", "colour")))
        reference = self.absent_reference(("shape",) if kind == "colour" else names)
        if reference is None:
            return None
        text = reference.text(self.language)
        if kind == "locate":
            self.template = self.dice.choice(TEMPLATES)
            return self.cannot_see("locate", "one", a=text)
        if kind == "relation":
            item = self.some_item()
            other = item and self.refer(item)
            if not other:
                return None
            a, b = self.dice.sample((text, other.text(self.language)), 2)
            return self.cannot_see("relation", "where", a=a, b=b)
        return self.cannot_see(kind, kind, a=text)

    def locate(self) -> Question | None:
        self.template = self.dice.choices(TEMPLATES, (40, 20, 40))[0]
        draw = self.dice.random()
        if self.scene.number and draw < 0.2:
            return self._located(phrases.NUMBER[self.language], [self.scene.number.box])
        item = self.some_item()
        if item is None:
            return None
        names = self.dice.choice((("shape",), ("colour",), ("shape", "colour")))
        group = Reference(**{name: getattr(item, name) for name in names})
        found = in_reading_order(self.matching(group))
        if len(found) > 1:
            text = group.text(self.language)
            boxes = [one.box for one in found]
            return self.make("locate", "many", boxes, a=text, many=plural(text), region=boxes_text(boxes))
        reference = self.refer(item, _BY_SHAPE if draw < 0.9 else _BY_OTHERS)
        return self._located(reference.text(self.language), [item.box]) if reference else None

    def _located(self, text: str, boxes: list[Box]) -> Question:
        return self.make("locate", "one", boxes, a=text, region=boxes_text(boxes))

    def describe(self) -> Question | None:
        self.template = self.dice.choices(TEMPLATES, (40, 30, 30))[0]
        number = self.scene.number
        if number and self.dice.random() < 0.25:
            return self.make("describe", "number", [number.box], n=number.text, region=self._near(number.box))
        item = self.some_item()
        if item is None:
            return None
        text = phrase(self.language, item.shape, item.colour, item.size)
        return self.make("describe", "item", [item.box], a=text, region=self._near(item.box))

    def _near(self, box: Box) -> str:
        """Write a box as a user would give it, a few thousandths off."""
        if self.dice.random() < 0.3:
            return boxes_text([box])
        x0, y0, x1, y1 = (edge + self.dice.randint(-_BOX_JITTER, _BOX_JITTER) / 1000 for edge in box)
        return boxes_text([(x0, y0, x1, y1)])


_TASKS: dict[str, Callable[[_Asker], Question | None]] = {name: getattr(_Asker, name) for name in TASK_WEIGHTS}


def in_reading_order(items: Sequence[Item]) -> list[Item]:
    """Sort items by their centres, left to right, then top to bottom."""
    return sorted(items, key=lambda item: item.centre)


def direction(first: Item, second: Item) -> str | None:
    """Say where the first item is as seen from the second, or None if no side is clear."""
    (x0, y0), (x1, y1) = first.centre, second.centre
    across, down = x0 - x1, y0 - y1
    if max(abs(across), abs(down)) < RELATION_MARGIN:
        return None
    if abs(across) >= _RELATION_SLOPE * abs(down):
        return "left" if across < 0 else "right"
    if abs(down) >= _RELATION_SLOPE * abs(across):
        return "above" if down < 0 else "below"
    return None


def caption(scene: Scene, language: str, *, boxes: bool = False) -> str:
    """Describe the whole scene: the items left to right, then the number, then the background.

    Args:
        boxes: write each thing's box after its phrase.
    """
    things = [
        (("a " if language == "en" else "一个") + phrase(language, item.shape, item.colour, item.size), item.box)
        for item in in_reading_order(scene.items)
    ]
    if scene.number:
        things.append((("the number " if language == "en" else "数字") + scene.number.text, scene.number.box))
    texts = [text + (boxes_text([box]) if boxes else "") for text, box in things]
    pattern = WORDS[language][scene.background.pattern]
    comma, last = (", ", " and ") if language == "en" else ("、", "和")
    listed = last.join(part for part in (comma.join(texts[:-1]), texts[-1]) if part) if texts else ""
    if language == "zh":
        return f"{pattern}背景上有{listed}。" if texts else f"{pattern}背景上什么也没有。"
    return f"{listed[0].upper()}{listed[1:]} on a {pattern} background." if texts else f"An empty {pattern} background."


def ask(
    scene: Scene,
    rng: np.random.Generator,
    n: int,
    *,
    task_weights: Mapping[str, float] | None = None,
    chinese_share: float = 0.35,
) -> list[Question]:
    """Draw `n` questions about the scene, different from one another as long as the scene has more to ask.

    Args:
        task_weights: how often each task is drawn; default `TASK_WEIGHTS`. Tasks left out are not asked.
        chinese_share: share of questions in Chinese, 0..1.

    Raises:
        DataError: a task is unknown, or the scene gives no question of the tasks asked for.
    """
    weights = TASK_WEIGHTS if task_weights is None else task_weights
    for name in weights:
        if name not in _TASKS:
            raise DataError(f"ask: there is no task {name!r}.{did_you_mean(name, _TASKS)} Tasks: {', '.join(_TASKS)}.")
    asker = _Asker(scene, random.Random(int(rng.integers(1 << 62))))
    dice, found, seen = asker.dice, [], set()
    names, shares = list(weights), list(weights.values())
    for attempt in range(60 * n + 60):
        if len(found) == n:
            return found
        asker.language = "zh" if dice.random() < chinese_share else "en"
        asker.template = dice.choice(("chat", "vqa"))
        question = _TASKS[dice.choices(names, shares)[0]](asker)
        if question is None:
            continue
        key = (question.template, question.question)
        if key in seen and attempt < 20 * n:
            continue
        seen.add(key)
        found.append(
            replace(question, question=casual(question.question)) if dice.random() < CASUAL_SHARE else question
        )
    if len(found) == n:
        return found
    raise DataError(
        f"ask: a scene with {len(scene.items)} items gives no question of the tasks {', '.join(weights)}; name more."
    )
