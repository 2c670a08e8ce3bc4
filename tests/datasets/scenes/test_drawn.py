"""Drawn scenes as data sets of the zoo: no files, the same samples every time, held-out splits, blank pictures."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from lavish.common.config import Config
from lavish.common.errors import ConfigError, DataError
from lavish.common.registry import registry
from lavish.datasets.scenes.drawn import KINDS, Stream, caption, questions
from lavish.tasks.metrics.vqa import accuracy

NAMES = ("scenes_caption", "scenes_vqa", "scenes_conversations")
SPLITS = {"train": {"num_samples": 40, "seed": 1}, "val": {"num_samples": 12, "seed": 2}, "test": None}


def build(name: str, **info: Any) -> dict[str, Any]:
    config = Config({"datasets": {name: {"build_info": {"annotations": SPLITS, **info}}}})
    return registry.get_builder_class(name)(config.datasets_cfg[name]).build_datasets()


def pixels(dataset: Any, index: int) -> np.ndarray:
    return np.asarray(dataset[index]["image"])


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_functions_of_seed_and_index(name: str) -> None:
    first, second = build(name), build(name)
    assert {split: len(dataset) for split, dataset in first.items()} == {"train": 40, "val": 12}
    train, again = first["train"], pickle.loads(pickle.dumps(second["train"]))
    assert train.annotation == again.annotation
    assert (pixels(train, 7) == pixels(again, 7)).all()
    assert pixels(train, 7).shape == (64, 64, 3)
    assert (pixels(train, 7) != pixels(first["val"], 7)).any(), "another stream"
    assert train.where(3) == "drawn scenes of seed 1, row 4"
    assert [record["instance_id"] for record in train.annotation[:2]] == ["0", "1"]
    with pytest.raises(DataError, match=r"'a\.png' is no drawn picture"):
        train.picture("a.png")


def test_captions() -> None:
    datasets = build("scenes_caption", scene={"max_items": 2})
    train, val = datasets["train"], datasets["val"]
    texts = [record["caption"] for record in train.annotation]
    assert {text.count(" and ") for text in texts} == {0, 1}
    assert set(train[3]) == {"image", "text_input", "image_id"}
    assert set(val[3]) == {"image", "image_id", "instance_id"}
    assert train[3]["text_input"] == texts[3]
    batch = train.collater([train[0], train[1]])
    assert batch["image_id"] == [0, 1]
    stream = Stream(5, train.stream.settings)
    for index in range(40):
        scene, _ = stream.scene(index)
        places = [item.centre[0] for item in scene.items]
        named = [part.split()[1:] for part in caption(scene).split(" and ")]
        inorder = sorted(zip(places, scene.items, strict=True), key=lambda pair: pair[0])
        assert named == [[item.colour, item.shape] for _, item in inorder]


def test_questions() -> None:
    datasets = build("scenes_vqa")
    train, val = datasets["train"], datasets["val"]
    assert {record["question"] for record in train.annotation} == {"what color is the shape?", "what shape is it?"}
    batch = train.collater([train[0], train[1]])
    assert batch["n_answers"].tolist() == [1, 1]
    torch.testing.assert_close(batch["weight"], torch.ones(2), rtol=0, atol=0)
    assert set(val[0]) == {"image", "text_input", "question_id", "instance_id"}
    assert val.answer_list == ["red", "yellow", "green", "blue", "circle", "square", "triangle", "cross"]
    assert all(accuracy(one["answer"][0], one["answer"]) == 1.0 for one in val.annotation)
    colours = build("scenes_vqa", questions=["colour"], scene={"colours": ["purple", "orange"]})
    assert colours["val"].answer_list == ["purple", "orange"]
    assert {one["question"] for one in colours["train"].annotation} == {"what color is the shape?"}


def test_questions_name_one_shape_only() -> None:
    stream = Stream(3, build("scenes_vqa", scene={"max_items": 3})["train"].stream.settings)
    seen = set()
    for index in range(60):
        scene, _ = stream.scene(index)
        for kind, question, answer in questions(scene):
            seen.add((kind, len(scene.items) > 1))
            if len(scene.items) > 1:
                field, other = ("shape", "colour") if kind == "colour" else ("colour", "shape")
                named = [item for item in scene.items if getattr(item, field) in question.split(" the ")[1].rstrip("?")]
                assert [getattr(item, other) for item in named] == [answer]
    assert seen == {(kind, several) for kind in KINDS for several in (False, True)}


def test_conversations() -> None:
    datasets = build("scenes_conversations", turns=2, prompt="Tell me: {question}")
    sample = datasets["train"][4]
    messages = sample["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"][0]["image"] is sample["image"]
    assert messages[0]["content"][1]["text"] == f"Tell me: {sample['text_input']}"
    assert len(messages[2]["content"]) == 1, "the picture stands in the first turn"
    record = datasets["train"].annotation[4]
    assert record["answer"] == [messages[1]["content"]] * 10
    assert len({question for question, _ in record["turns"]}) == 2
    batch = datasets["val"].collater([datasets["val"][0], datasets["val"][1]])
    assert batch["question_id"] == [0, 1]
    assert len(batch["messages"]) == 2


@pytest.mark.parametrize("name", NAMES)
def test_blank_pictures(name: str) -> None:
    """What is said stays, what is shown goes: without noise and jitter the pictures would all be alike."""
    seen, blank = build(name)["val"], build(name, blank=True)["val"]
    assert seen.annotation == blank.annotation
    for index in range(6):
        spread = pixels(blank, index).astype(int).reshape(-1, 3)
        assert np.ptp(spread, axis=0).max() < 90, "the background and its noise"
        assert np.ptp(pixels(seen, index).astype(int).reshape(-1, 3), axis=0).max() > 90
        corner = (slice(0, 2), slice(0, 2))
        assert (pixels(blank, index)[corner] == pixels(seen, index)[corner]).all()


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"blnak": True}, "build_info.blnak.*unknown key. Did you mean 'blank'"),
        ({"scene": {"shapes": ["cirle"]}}, "shapes: 'cirle' is not drawn. Did you mean 'circle'"),
        ({"scene": {"colours": []}}, r"colours is \[\]; it names one or more"),
        ({"scene": {"max_items": 0}}, "max_items is 0"),
        ({"scene": {"image_size": 0}}, "image_size is 0"),
        ({"scene": {"number_probability": 2}}, "number_probability is 2"),
        ({"questions": ["color"]}, "'color' is not one of colour, shape"),
        ({"questions": []}, "questions is empty"),
        ({"turns": 0}, "turns is 0"),
        ({"prompt": "What?"}, "needs {question}"),
        ({"annotations": {"train": {"seed": 2}}}, r"the seeds are \[2, 2\]; splits of one seed"),
        ({"annotations": {"train": {"num_samples": 0}}}, "num_samples is 0"),
        ({"annotations": {"train": {"storage": "a.json"}}}, "annotations.train.storage.*unknown key"),
        ({"annotations": {"train": None, "val": None}}, "has no split"),
        ({"images": {"storage": "a"}}, "build_info.images.*unknown key"),
    ],
)
def test_wrong_settings(info: dict[str, Any], message: str) -> None:
    info = {**info, "annotations": {"test": None, **info.get("annotations", {})}}
    config = Config({"datasets": {"scenes_conversations": {"build_info": info}}})
    with pytest.raises(ConfigError, match=message):
        registry.get_builder_class("scenes_conversations")(config.datasets_cfg.scenes_conversations).check()
