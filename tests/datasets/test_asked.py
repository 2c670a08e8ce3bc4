"""Questions and captions of one's own to evaluate on, in the forms that people have them."""

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lavish.common.errors import ConfigError, DataError
from lavish.common.registry import registry
from lavish.datasets.formats.choices import asked_of, with_pictures
from lavish.datasets.formats.opening import open_data

NAMES = ("a.png", "b.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for at, name in enumerate(NAMES):
        Image.new("RGB", (12 + at, 9), "red").save(tmp_path / "images" / name)
    return tmp_path


def build(name: str, file: Path, split: str = "val", **info: Any) -> Any:
    config = {
        "data_type": "images",
        "build_info": {"annotations": {split: {"storage": str(file)}}, "images": {}, **info},
    }
    return registry.get_builder_class(name)(config).build_datasets()[split]


def write(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


# -- choices


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"choices": ["cat", "dog"], "correct_choice_idx": 1}, 1),  # A-OKVQA
        ({"choices": ["cat", "dog"], "answer": 0}, 0),  # ScienceQA
        ({"A": "cat", "B": "dog", "C": "nan", "D": "", "answer": "B"}, 1),  # MMBench
        ({"options": {"A": "cat", "B": "dog"}, "answer": "(b)"}, 1),
        ({"choices": ["cat", "dog"], "answer": "dog"}, 1),
        ({"choices": ["B", "A"], "answer": "A"}, 1),  # its words come first
        ({"choices": [2, 3], "answer": "1"}, 1),
        ({"choices": ["cat", "dog"]}, None),
        ({"choices": ["cat", "dog"], "answer": ""}, None),
    ],
)
def test_forms_of_choices(row: dict[str, Any], right: int | None) -> None:
    asked = asked_of({"question": "Which?", **row})
    assert asked.right == right
    assert len(asked.choices) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["cat"]}, "2 to 26 texts"),
        ({"choices": ["cat"] * 27}, "2 to 26 texts"),
        ({"choices": ["cat", " "]}, "2 to 26 texts"),
        ({"choices": "cat, dog"}, "a list of texts, or columns"),
        ({"choices": ["cat", "dog"], "answer": "C"}, "the right choice is 'C'; one of cat, dog"),
        ({"choices": ["cat", "dog"], "answer": 2}, "the right choice is 2"),
        ({"choices": ["cat", "dog"], "answer": True}, "the right choice is True"),
        ({"choices": ["cat", "dog"], "question": " "}, "question is ' '"),
    ],
)
def test_wrong_choices(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        asked_of({"question": "Which?", **row})


def test_hint_and_category() -> None:
    asked = asked_of({"question": "Which?", "hint": "Look.", "category": "", "subject": "pets", "A": "x", "B": "y"})
    assert (asked.question, asked.category) == ("Look.\nWhich?", "pets")


def mmbench(path: Path) -> Path:
    """Write MMBench's form: a picture in base64, and a second row that names the first one's."""
    data = io.BytesIO()
    Image.effect_noise((40, 30), 90).save(data, "PNG")
    row = {"index": "7", "question": "Which?", "hint": "nan", "A": "cat", "B": "dog", "C": "", "answer": "B"}
    first = row | {"category": "pets", "image": base64.b64encode(data.getvalue()).decode()}
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(first), delimiter="\t")
        table.writeheader()
        table.writerows([first, first | {"index": "1000007", "image": "7", "answer": "A"}])
    return path


def test_mmbench(folder: Path) -> None:
    dataset = build("questions", mmbench(folder / "mmbench.tsv"))
    first, second = dataset[0], dataset[1]
    assert first["image"].size == second["image"].size == (40, 30)
    assert (first["text_input"], first["question_id"], first["category"]) == ("Which?", "7", "pets")
    assert [one["correct_choice_idx"] for one in (first, second)] == [1, 0]
    assert first["choices"] == ["cat", "dog"]


def test_texts_that_are_no_pictures_stay() -> None:
    rows = [{"index": 1, "image": "a" * 300 + "!"}, {"index": 2, "image": "9"}, {"index": 3}]
    assert with_pictures(rows) == rows


def test_a_letter_is_learnt(folder: Path) -> None:
    """The same file trains a chat model: the choices are shown as an evaluation shows them."""
    row = {"id": 4, "image": "a.png", "question": "Which {choices}?", "choices": ["cat", "dog"], "answer": 1}
    source = open_data(write(folder / "rows.json", [row, {**row, "answer": None}]))
    assert source.format == "multiple_choice"
    (_, sample), (_, hidden) = source.samples()
    asked, answered = sample["messages"]
    assert asked["content"][1]["text"] == (
        "Which {choices}?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    )
    assert answered["content"] == "B"
    assert "right choice is hidden" in str(hidden)
    direct = {**row, "direct_answers": ["dog"] * 10, "correct_choice_idx": 1}
    assert open_data(write(folder / "direct.json", [direct])).format == "vqa"  # A-OKVQA's training rows


# -- questions without choices, captions


def test_questions(folder: Path) -> None:
    rows = [
        {"image": "a.png", "question": "What?", "answer": "red", "id": "x"},
        {"image": "b.png", "question": "Why?", "answer": ["a", "b"]},
    ]
    dataset = build("questions", write(folder / "rows.json", rows))
    assert [dataset[at]["question_id"] for at in (0, 1)] == ["x", 1]
    assert dataset[1]["image"].size == (13, 9)
    assert dataset[0]["choices"] is None
    assert [one["answer"] for one in dataset.annotation] == ["red", ["a", "b"]]
    write(folder / "rows.json", [rows[0], {**rows[1], "question": ""}])
    with pytest.raises(DataError, match=r"rows\.json, row 2: question is ''"):
        build("questions", folder / "rows.json")
    write(folder / "rows.json", [rows[0], {**rows[1], "image": ["a.png", "b.png"]}])
    with pytest.raises(DataError, match=r"row 2: names 2 pictures or videos; one picture is expected"):
        build("questions", folder / "rows.json")[1]
    with pytest.raises(ConfigError, match=r"is to evaluate on; to train .* conversations"):
        build("questions", folder / "rows.json", "train")
    with pytest.raises(ConfigError, match=r"build_info\.format is 'vqaa'\. Did you mean 'vqa'"):
        build("questions", folder / "rows.json", format="vqaa")


def test_a_conversation_of_one_turn_is_a_question(folder: Path) -> None:
    """What was held out of a training is scored as it is, in whatever form."""
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    dataset = build("questions", write(folder / "rows.json", [{"id": "x", "messages": turns}]))
    assert (dataset[0]["text_input"], dataset[0]["question_id"]) == ("What?", "x")
    assert dataset[0]["image"].size == (12, 9)
    assert dataset.annotation[0]["answer"] == "red"
    said = [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "so"}]
    dataset = build("questions", write(folder / "llava.json", [{"image": "b.png", "conversations": said}]))
    assert (dataset[0]["text_input"], dataset.annotation[0]["answer"]) == ("Why?", "so")
    with pytest.raises(DataError, match=r"row 1: a conversation of 4 messages; .* image_text_pretrain"):
        build("questions", write(folder / "rows.json", [{"messages": turns * 2}]))
    blind = [{"role": "user", "content": "What?"}, turns[1]]
    with pytest.raises(DataError, match=r"row 1: names 0 pictures"):
        build("questions", write(folder / "rows.json", [{"messages": blind}]))


def test_captions(folder: Path) -> None:
    """Rows of one picture are one sample, whose references they all are."""
    rows = [{"image": "a.png", "caption": "red"}, {"image": "b.png", "caption": ["blue", "b"]}]
    dataset = build("captions", write(folder / "rows.json", [*rows, {"image": "a.png", "caption": "a red thing"}]))
    assert [one["caption"] for one in dataset.annotation] == [["red", "a red thing"], ["blue", "b"]]
    assert [dataset[at]["image_id"] for at in (0, 1)] == ["a.png", "b.png"]
    coco = {"images": [{"id": 9, "file_name": "a.png"}], "annotations": [{"id": 1, "image_id": 9, "caption": "c"}] * 2}
    dataset = build("captions", write(folder / "captions.json", coco))
    assert [one["caption"] for one in dataset.annotation] == [["c", "c"]]
    write(folder / "rows.json", [{"image": "a.png", "caption": [1]}])
    with pytest.raises(DataError, match=r"row 1: caption is \[1\]"):
        build("captions", folder / "rows.json")


def test_any_field_may_stand_in_a_row(folder: Path) -> None:
    row = {"image": "a.png", "question": "What?", "answer": "red", "fault": "none"}
    assert build("questions", write(folder / "rows.json", [row]))[0]["text_input"] == "What?"
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n{\n3")
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: no JSON"):
        build("questions", folder / "rows.jsonl")
    with pytest.raises(DataError, match=r"rows\.json, row 2: 3 where an object is expected"):
        build("questions", write(folder / "rows.json", [row, 3]))
