"""A colour that the pocket model never saw: what is painted, what is said, and which of it each split asks."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from lavish.common.config import Config
from lavish.common.errors import ConfigError, DataError
from lavish.common.registry import registry
from lavish.datasets.scenes.new_colour import NewColour, NewColourConversations
from lavish.datasets.scenes.questions import ask
from lavish.datasets.scenes.tokenizer import build_tokenizer
from lavish.datasets.scenes.world import COLOURS, sample_scene

PINK = np.array([245, 130, 190])
SPLITS = {
    "train": {"num_samples": 30, "seed": 1, "share": 0.5},
    "val": {"num_samples": 8, "seed": 2, "share": 1.0, "asked": "new"},
    "test": {"num_samples": 8, "seed": 3, "share": 1.0, "asked": "others"},
}


def build(**info: Any) -> dict[str, NewColourConversations]:
    config = Config({"datasets": {"scenes_new_colour": {"build_info": {"annotations": SPLITS, **info}}}})
    builder = registry.get_builder_class("scenes_new_colour")
    return builder(config.datasets_cfg.scenes_new_colour).build_datasets()


def shows_pink(dataset: NewColourConversations, index: int) -> bool:
    far = np.abs(np.asarray(dataset.stream.picture(index)).astype(int) - PINK).max(axis=-1)
    return bool((far <= 30).sum() >= 40)


def test_what_is_shown_is_what_is_said() -> None:
    data = build()
    for index, record in enumerate(data["val"].annotation):
        assert record["answer"] == ["pink"] * 10
        assert shows_pink(data["val"], index)
    for index, record in enumerate(data["test"].annotation):
        assert record["answer"][0] in COLOURS
        assert shows_pink(data["test"], index)
    train = data["train"]
    shown = [shows_pink(train, index) for index in range(len(train))]
    assert 0.25 < np.mean(shown) < 0.75
    said = ["pink" in f"{record['question']} {record['answer'][0]}" for record in train.annotation]
    assert not any(word and not picture for word, picture in zip(said, shown, strict=True))
    blank = build(blank=True)
    assert train.annotation == blank["train"].annotation, "a function of seed and index"
    assert not any(shows_pink(blank["val"], index) for index in range(3))


def test_every_old_colour_is_replaced() -> None:
    """Else the word that is absent, and not the picture, would tell."""
    stream = build()["val"].stream
    replaced = Counter[str]()
    for index in range(50):
        scene, _, _ = stream.talk(index)
        replaced.update(item.colour for item in scene.items if np.abs(np.array(item.rgb) - PINK).max() <= 10)
    assert set(replaced) == set(COLOURS)


def test_names_are_written_in_the_place_of_the_old() -> None:
    colour = NewColour()
    assert colour.rename("Is there an orange star?", "orange") == "Is there a pink star?"
    assert colour.rename("An orange star.", "orange") == "A pink star."
    assert NewColour("indigo", [75, 0, 130]).rename("A red cross, a red heart", "red") == (
        "An indigo cross, an indigo heart"
    )
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = sample_scene(rng)
        for one in ask(scene, rng, 5, chinese_share=0.0) if scene.items else []:
            old = scene.items[0].colour
            assert old not in colour.rename(f"{one.question} {one.answer}", old).lower().split()
            painted = colour.paint(scene, old, random.Random(0))
            assert [item.box for item in painted.items] == [item.box for item in scene.items]


def test_the_name_can_be_written() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(" pink", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == " pink"
    assert len(ids) == 5, "bytes: no token of the bundled vocabulary spells it"


def test_templates() -> None:
    written = build(template="all")["train"]
    ends = Counter(record["question"].rpartition(" ")[2] for record in written.annotation)
    assert ends["Answer:"] > 0
    assert ends["answer:"] > 0
    assert sum(ends.values()) > ends["Answer:"] + ends["answer:"], "some are of the grounding template, without words"
    spoken = build(template="chat", turns=3)["train"]
    assert max(len(spoken[index]["messages"]) for index in range(20)) == 6
    assert all(record["answer"][0][-1] in ".。]" for record in spoken.annotation if record["answer"][0].isascii())


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"new_colour": {"name": "red"}}, "names nothing yet"),
        ({"new_colour": {"name": "hot pink"}}, "one word in small letters"),
        ({"new_colour": {"rgb": [1, 2]}}, "three levels"),
        ({"template": "base"}, "'base' is not one of chat, vqa, all"),
        ({"template": "all", "turns": 2}, "have one template"),
        ({"turns": 0}, "turns is 0"),
        ({"tasks": {"color": 1}}, "tasks.color is no task. Did you mean 'colour'"),
        ({"tasks": {"colour": -1}}, "tasks.colour is -1"),
        ({"annotations": {"train": {"share": 2}}}, "share is 2"),
        ({"annotations": {"train": {"asked": "old"}}}, "'old' is not one of any, new, others"),
        ({"colour": "pink"}, "build_info.colour.*unknown key"),
    ],
)
def test_wrong_settings(info: dict[str, Any], message: str) -> None:
    config = Config({"datasets": {"scenes_new_colour": {"build_info": info}}})
    with pytest.raises(ConfigError, match=message):
        registry.get_builder_class("scenes_new_colour")(config.datasets_cfg.scenes_new_colour).check()


def test_a_question_that_no_scene_gives() -> None:
    alone = {"max_items": 1, "number_probability": 0.0}
    with pytest.raises(DataError, match="none of 500 scenes gives a question"):
        build(scene=alone, annotations={**SPLITS, "train": None, "val": None})
