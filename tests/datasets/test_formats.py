"""The forms of data that people have: found out, read into messages, told by row where they are wrong."""

import base64
import contextlib
import csv
import io
import json
import os
import pickle
import random
import resource
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zoo_files
from PIL import Image
from video_clip import clip

from lavish.common.errors import ConfigError, DataError, MissingDependency, OutputError
from lavish.datasets.formats import tables
from lavish.datasets.formats.checking import check_data
from lavish.datasets.formats.opening import FORMATS, open_data
from lavish.datasets.formats.page import look_at, page
from lavish.datasets.formats.writing import write_data

Q, A = "What colour?", "Red."


def picture(folder: Path, *names: str) -> Path:
    return zoo_files.pictures(folder, names or ("a.png",))


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, rows: Any) -> Path:
    """Write rows by the suffix of the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        cells = [{name: one if isinstance(one, str) else json.dumps(one) for name, one in row.items()} for row in rows]
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(cells[0]))
            table.writeheader()
            table.writerows(cells)
        return path
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


def samples(source: Any) -> list[dict[str, Any]]:
    """Give the samples of data without a fault."""
    found = [sample for _, sample in source.samples()]
    assert not [sample for sample in found if isinstance(sample, DataError)], found
    return found


def flat(sample: dict[str, Any]) -> list[str]:
    """Write messages in short: `user: [a.png] What colour?`."""
    lines = []
    for message in sample["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        words = [
            part["text"] if part["type"] == "text" else f"[{Path(str(part[part['type']])).name}]" for part in parts
        ]
        lines.append(f"{message['role']}: {' '.join(words)}")
    return lines


def said(question: Any = Q, answer: Any = A) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def spoken(question: Any, answer: Any = A) -> list[dict[str, Any]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


ONE = [f"user: [a.png] {Q}", f"assistant: {A}"]
ROWS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "messages with parts": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": Q}]},
                {"role": "assistant", "content": A},
            ]
        },
        ONE,
    ),
    "the form of OpenAI": (
        "messages",
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.png"}},
                        {"type": "text", "text": Q},
                    ],
                },
                {"role": "assistant", "content": A},
            ]
        },
        ["system: Be short.", *ONE],
    ),
    "pictures beside the messages": (
        "messages",
        {
            "images": ["a.png"],
            "messages": [{"role": "user", "content": f"<image>\n{Q}"}, {"role": "assistant", "content": A}],
        },
        ONE,
    ),
    "a picture beside messages without a place": (
        "messages",
        {"image": "a.png", "messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]},
        ONE,
    ),
    "parts that are places for pictures beside them": (
        "messages",
        {
            "images": ["a.png", "b.png"],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image"},
                        {"type": "text", "text": "and"},
                        {"type": "image"},
                        {"type": "text", "text": Q},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": A}]},
            ],
        },
        [f"user: [a.png] and [b.png] {Q}", f"assistant: {A}"],
    ),
    "the conversations of CogVLM2's demo": (
        "messages",
        {"image": "a.png", "conversations": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]},
        ONE,
    ),
    "a picture of a message, as GLM-4's demo has it": (
        "messages",
        {"messages": [{"role": "user", "image": "a.png", "content": Q}, {"role": "assistant", "content": A}]},
        ONE,
    ),
    "ms-swift": (
        "swift",
        {"system": "Be short.", "query": "Sure?", "response": "Yes.", "history": [[Q, A]], "images": ["a.png"]},
        ["system: Be short.", *ONE, "user: Sure?", "assistant: Yes."],
    ),
    "LLaVA": (
        "llava",
        {
            "id": "000",
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{Q}"},
                {"from": "gpt", "value": A},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "Yes."},
            ],
        },
        [*ONE, "user: Sure?", "assistant: Yes."],
    ),
    "LLaVA with the picture last": (
        "llava",
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": f"{Q}\n<image>"}, {"from": "gpt", "value": A}],
        },
        [f"user: {Q} [a.png]", f"assistant: {A}"],
    ),
    "LLaVA with two pictures and a video": (
        "llava",
        {
            "image": ["a.png", "b.png"],
            "video": "v.mp4",
            "conversations": [
                {"from": "human", "value": f"<image><image>\n{Q}"},
                {"from": "gpt", "value": A},
                {"from": "human", "value": "<video>And here?"},
                {"from": "gpt", "value": A},
            ],
        },
        [f"user: [a.png] [b.png] {Q}", f"assistant: {A}", "user: [v.mp4] And here?", f"assistant: {A}"],
    ),
    "ShareGPT": (
        "sharegpt",
        {"system": "Be short.", "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
        ["system: Be short.", f"user: {Q}", f"assistant: {A}"],
    ),
    "The Cauldron": (
        "cauldron",
        {"images": ["a.png"], "texts": [{"user": Q, "assistant": A, "source": "x"}]},
        ONE,
    ),
    "MiniGPT4-Qwen": (
        "minigpt4_qwen",
        {"image": "a.png", "instruction": f"<Img><ImageHere></Img> {Q}", "output": A},
        [f"user: [a.png]  {Q}", f"assistant: {A}"],
    ),
    "MiniGPT4-Qwen in turns": (
        "minigpt4_qwen",
        {"image": "a.png", "instruction": [f"<ImageHere>{Q}", "Sure?"], "output": [A, "Yes."]},
        [*ONE, "user: Sure?", "assistant: Yes."],
    ),
    "MPP-Qwen's video": (
        "minigpt4_qwen",
        {"video": "v.mp4", "instruction": f"<Img><ImageHere></Img>{Q}", "output": A},
        [f"user: [v.mp4] {Q}", f"assistant: {A}"],
    ),
    "Alpaca": (
        "minigpt4_qwen",
        {"instruction": "Translate.", "input": "rot", "output": "red"},
        ["user: Translate.\nrot", "assistant: red"],
    ),
    "a caption": (
        "captions",
        {"image": "a.png", "caption": [" A red square. ", "Red."]},
        ["user: [a.png] Describe this image.", "assistant: A red square."],
    ),
    "a question of LAVIS": (
        "vqa",
        {"image": "a.png", "question": Q, "answer": ["dark", "Red.", "Red."], "question_id": 7},
        ONE,
    ),
    "a question with choices": (
        "multiple_choice",
        {"image": "a.png", "question": Q, "choices": ["Blue.", A], "answer": 1, "question_id": 8},
        [
            f"user: [a.png] {Q}\nA. Blue.\nB. {A}\nAnswer with the option's letter from the given choices directly.",
            "assistant: B",
        ],
    ),
    "RefCOCO": (
        "refcoco",
        {"image": "a.png", "expression": "the dog", "bbox": [2, 4, 10, 8], "width": 20, "height": 16},
        ["user: [a.png] Where is the dog? answer in [[x0,y0,x1,y1]] format.", "assistant: [[100,250,600,750]]"],
    ),
    "RefCOCO with corners": (
        "refcoco",
        {"image": "a.png", "sent": "it", "box": [0, 0, 10, 16], "width": 20, "height": 16},
        ["user: [a.png] Where is it? answer in [[x0,y0,x1,y1]] format.", "assistant: [[000,000,500,999]]"],
    ),
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, suffix: str, tmp_path: Path) -> None:
    kind, row, lines = ROWS[name]
    picture(tmp_path, "a.png", "b.png")
    if "v.mp4" in str(row):
        (tmp_path / "v.mp4").write_bytes(clip(3))
    source = open_data(write(tmp_path / f"rows{suffix}", [row]))
    assert source.format == kind
    assert (len(source), source.is_stream) == (1, False)
    (sample,) = samples(source)
    assert flat(sample) == lines
    first = "row 2" if suffix == ".csv" else "row 1"
    assert sample["id"] == str(row.get("id", row.get("question_id", f"rows{suffix}, {first}")))
    assert check_data(source).is_good


def test_the_conversations_of_glm4v_fixture() -> None:
    """Rows that are lists of messages."""
    folder = Path(__file__).resolve().parents[1] / "fixtures" / "glm4v" / "open" / "inputs"
    source = open_data(folder / "finetune.json")
    assert source.format == "messages"
    first, second = samples(source)
    assert flat(first)[0] == "user: [img0.png] 图片中的动物是什么？"
    assert flat(second) == ["user: How many objects are there?", "assistant: There are 3 objects."]
    assert check_data(source).is_good


def test_boxes_are_kept_for_evaluation(tmp_path: Path) -> None:
    picture(tmp_path)
    (sample,) = samples(open_data(write(tmp_path / "rows.json", [ROWS["RefCOCO"][1]])))
    assert sample["box"] == (0.1, 0.25, 0.6, 0.75)


def test_tables_of_text(tmp_path: Path) -> None:
    picture(tmp_path / "images")
    (tmp_path / "rows.csv").write_text("image,caption\na.png,One\nb.png,Two\n")
    source = open_data(tmp_path / "rows.csv")
    found = dict(source.samples())
    assert flat(found["rows.csv, row 2"])[1] == "assistant: One"
    assert "'b.png' is missing; looked in" in str(found["rows.csv, row 3"]), "the head is row 1"


def test_a_picture_in_a_cell(tmp_path: Path) -> None:
    """Python's own csv stops at 131,072 characters."""
    stream = io.BytesIO()
    Image.effect_noise((400, 400), 90).save(stream, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    assert len(url) > 150_000
    source = open_data(write(tmp_path / "rows.csv", [{"image": url, "caption": A}]))
    assert check_data(source).is_good
    assert csv.field_size_limit() == 131_072, "that of others stays"


def test_the_folder_of_the_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere")
    path = write(tmp_path / "rows.json", [ROWS["LLaVA"][1]])
    assert "is missing; looked in" in str(dict(open_data(path).samples())["rows.json, row 1"])
    assert flat(samples(open_data(path, images=tmp_path / "elsewhere"))[0])[0] == f"user: [a.png] {Q}"
    with pytest.raises(DataError, match="nowhere: no such folder of pictures"):
        open_data(path, images=tmp_path / "nowhere")


def test_prompts(tmp_path: Path) -> None:
    picture(tmp_path)
    ask = {"captions": "Say what you see.", "vqa": "{question} Shortly.", "refcoco": "Find {expr}."}
    said = {"captions": "Say what you see.", "vqa": f"{Q} Shortly.", "refcoco": "Find the dog."}
    for name in ("a caption", "a question of LAVIS", "RefCOCO"):
        kind, row, _ = ROWS[name]
        (sample,) = samples(open_data(write(tmp_path / "rows.json", [row]), prompt=ask[kind]))
        assert flat(sample)[0] == f"user: [a.png] {said[kind]}"
        if kind != "captions":
            (told,) = dict(open_data(tmp_path / "rows.json", prompt="Nothing.").samples()).values()
            assert "has no {" in str(told)


def test_coco_captions(tmp_path: Path) -> None:
    picture(tmp_path / "val2014", "COCO_val2014_000000000042.jpg")
    loaded = {
        "info": {},
        "images": [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}],
        "annotations": [{"id": 1, "image_id": 42, "caption": A}, {"id": 2, "image_id": 43, "caption": A}],
    }
    source = open_data(write(tmp_path / "captions_val2014.json", loaded))
    good, bad = source.samples()
    assert source.format == "coco_captions"
    assert flat(good[1])[1] == f"assistant: {A}"
    assert bad[0] == "captions_val2014.json, annotation 2"
    assert "its image_id 43 is none of the images" in str(bad[1])


@pytest.mark.parametrize("named", ["questions", "annotations"])
def test_coco_vqa(named: str, tmp_path: Path) -> None:
    picture(tmp_path / "val2014", "COCO_val2014_000000000042.jpg")
    questions = {
        "data_subtype": "val2014",
        "questions": [{"question_id": 420, "image_id": 42, "question": Q}, {"question_id": 421, "image_id": 42}],
    }
    answers = [{"answer": "Red.", "answer_id": 1}, {"answer": "Red.", "answer_id": 2}, {"answer": "no", "answer_id": 3}]
    paths = {
        "questions": tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json",
        "annotations": tmp_path / "v2_mscoco_val2014_annotations.json",
    }
    write(paths["questions"], questions)
    with pytest.raises(
        DataError, match=r"the answers is not beside it; it is called v2_mscoco_val2014_annotations\.json"
    ):
        open_data(paths["questions"])
    write(paths["annotations"], {"annotations": [{"question_id": 420, "answers": answers}]})
    source = open_data(paths[named])
    assert source.format == "coco_vqa"
    good, bad = source.samples()
    assert flat(good[1]) == [f"user: [COCO_val2014_000000000042.jpg] {Q}", "assistant: Red."]
    assert good[1]["id"] == "420"
    assert "question is None" in str(bad[1])


@pytest.mark.parametrize("named", ["questions", "annotations"])
def test_the_file_of_a_pair_that_is_wrong_is_named(named: str, tmp_path: Path) -> None:
    questions = write(tmp_path / "questions.json", {"questions": [{"question_id": 1}]})
    annotations = write(tmp_path / "annotations.json", {"annotations": [{"question_id": 1, "answers": []}, 3]})
    with pytest.raises(DataError, match=r"annotations\.json, annotation 2: 3 where an object is expected"):
        open_data({"questions": questions, "annotations": annotations}[named])


def test_mdetr(tmp_path: Path) -> None:
    picture(tmp_path, "x.jpg")
    loaded = {
        "images": [{"id": 5, "file_name": "x.jpg", "width": 20, "height": 16, "caption": "the dog"}],
        "annotations": [{"image_id": 5, "bbox": [2, 4, 10, 8]}],
    }
    source = open_data(write(tmp_path / "finetune_refcoco_val.json", loaded))
    assert source.format == "coco_refcoco"
    assert flat(samples(source)[0])[1] == "assistant: [[100,250,600,750]]"


def test_minigpt4(tmp_path: Path) -> None:
    picture(tmp_path / "image", "2.jpg")
    source = open_data(write(tmp_path / "filter_cap.json", {"annotations": [{"image_id": "2", "caption": A}]}))
    assert source.format == "minigpt4"
    assert flat(samples(source)[0]) == ["user: [2.jpg] Describe this image.", f"assistant: {A}"]


def test_cogvlm_folders(tmp_path: Path) -> None:
    picture(tmp_path / "images", "1.jpg", "2.png")
    conversations = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
    write(tmp_path / "labels_en/1.json", {"conversations": conversations})
    write(tmp_path / "labels_zh/2.json", {"captions": [{"role": "caption", "content": "红色"}]})
    write(tmp_path / "labels_zh/3.json", {"conversations": conversations})
    write(tmp_path / "labels_zh/4.json", {"other": 1})
    source = open_data(tmp_path)
    assert source.format == "cogvlm_sft"
    found = dict(source.samples())
    assert flat(found["labels_en/1.json"]) == [f"user: [1.jpg] {Q}", f"assistant: {A}"]
    assert flat(found["labels_zh/2.json"]) == ["user: [2.png] Describe this image.", "assistant: 红色"]
    assert found["labels_zh/2.json"]["id"] == "labels_zh/2"
    assert "'3.jpg' is missing" in str(found["labels_zh/3.json"])
    assert "conversations or captions is expected" in str(found["labels_zh/4.json"])
    report = check_data(source)
    assert (report.num_rows, report.num_bad) == (4, 2)


def test_captchas(tmp_path: Path) -> None:
    picture(tmp_path, "AB12.jpg", "XY.9.png")
    source = open_data(tmp_path)
    assert source.format == "named_images"
    assert [flat(sample) for sample in samples(source)] == [
        ["user: [AB12.jpg] CAPTCHA:", "assistant: AB12"],
        ["user: [XY.9.png] CAPTCHA:", "assistant: XY"],
    ]


@pytest.mark.parametrize("name", ["named", "sft", "map", "rows.json", "a.tar", "saved"])
def test_relative_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are typed: the data lie below the working folder."""
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "named", "a.png")
    picture(tmp_path / "sft" / "images", "1.png")
    write(tmp_path / "sft" / "labels" / "1.json", {"conversations": said()})
    picture(tmp_path / "map" / "pix", "x.png")
    write(tmp_path / "map" / "image_map.json", {"x": {"image_file": "x.png", "ID": 1, "path": "pix/"}})
    write(tmp_path / "map" / "captions.json", {"1": {"q": f"{Q}<|extra_0|>", "a": [A]}})
    picture(tmp_path / "images", "a.png")
    write(tmp_path / "rows.json", [ROWS["LLaVA"][1]])
    tar(tmp_path / "a.tar", {"x.json": json.dumps(ROWS["LLaVA"][1]).encode()})
    write(tmp_path / "saved" / "labels_en" / "b.json", {"captions": [{"role": "caption", "content": A}]})
    picture(tmp_path / "saved" / "images", "b.png")
    report = check_data(open_data(name))
    assert (report.num_images, report.problems) == (1, [])


def test_a_folder_with_the_data_and_their_pictures(tmp_path: Path) -> None:
    picture(tmp_path)
    write(tmp_path / "train.jsonl", [ROWS["LLaVA"][1]])
    with pytest.raises(DataError, match=r"a folder of no form that lavish knows\. Name a file in it: train\.jsonl\."):
        open_data(tmp_path)


def test_vlm_learning(tmp_path: Path) -> None:
    picture(tmp_path / "pix", "x.jpg")
    names = {
        "x": {"iamge_file": "x.jpg", "ID": 1, "path": f"{tmp_path}/pix/"},
        "y": {"iamge_file": "x.jpg", "ID": 2, "path": f"{tmp_path}/pix/"},
        "z": {"image_file": "x.jpg", "ID": 3, "path": "pix/"},
    }
    captions = {
        "1": {"q": f"{Q}<|extra_0|>", "a": [A, "Dark red."]},
        "3": {"q": Q, "a": [A]},
    }
    write(tmp_path / "image_map.json", names)
    write(tmp_path / "captions.json", captions)
    source = open_data(tmp_path)
    assert source.format == "image_map"
    rows = list(source.samples())
    assert [flat(sample) for _, sample in rows[:2]] == [
        [f"user: [x.jpg] {Q}", f"assistant: {A}"],
        [f"user: [x.jpg] {Q}", "assistant: Dark red."],
    ], "all answers are kept"
    assert rows[2] == ("image_map.json, 'y'", rows[2][1])
    assert "captions.json has no" in str(rows[2][1])
    assert "0 of <|extra_0|>" in str(rows[3][1])


def tar(path: Path, files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    """Write a shard."""
    with tarfile.open(path, "w", format=format) as shard:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def test_shards_with_odd_members(tmp_path: Path) -> None:
    files = {"\udce9.png": jpeg(), "\udce9.txt": b"x", "b.png": jpeg(), "b.json": b"[" * 100_000, "c.png": jpeg()}
    path = tar(tmp_path / "a.tar", {**files, "c.cls": b"3"}, tarfile.GNU_FORMAT)
    report = check_data(open_data(path))
    assert (report.num_rows, report.num_images) == (3, 1), "a name that is no UTF-8 is one all the same"
    assert [where for where, _ in report.problems] == [f"a.tar, sample '{name}'" for name in "bc"]
    assert "its .json cannot be read" in report.problems[0][1]
    assert "has no text (json, txt); it has png, cls" in report.problems[1][1], "a number is no caption"
    (tmp_path / "b.tar").write_bytes(b"no tar")
    ((where, told),) = check_data(open_data(tmp_path / "b.tar")).problems
    assert told.startswith("is no tar file"), "the path stands once"
    assert where == str(tmp_path / "b.tar")


def test_shards(tmp_path: Path) -> None:
    files = {
        "a.jpg": jpeg(),
        "a.json": json.dumps(ROWS["LLaVA"][1] | {"id": "la"}).encode(),
        "b.png": jpeg(),
        "b.txt": b" A red square. ",
        "c.0.png": jpeg(),
        "c.1.png": jpeg(),
        "c.json": json.dumps({"messages": said("<image><image>Same?")}).encode(),
        "d.png": jpeg(),
        "e.json": b"[]",
    }
    for at in range(2):
        tar(tmp_path / f"{at}.tar", files)
    for path, count in ((tmp_path / "0.tar", 5), (f"{tmp_path}/{{0..1}}.tar", 10), (tmp_path, 10)):
        source = open_data(path)
        assert (source.format, source.is_stream) == ("webdataset", True)
        assert len(list(source.samples())) == count
    found = dict(open_data(tmp_path / "0.tar").samples())
    one = found["0.tar, sample 'a'"]
    assert one["messages"][0]["content"][0] == {"type": "image", "image": files["a.jpg"]}
    assert one["id"] == "la"
    assert found["0.tar, sample 'b'"]["messages"][1]["content"] == "A red square."
    assert len(found["0.tar, sample 'c'"]["messages"][0]["content"]) == 3
    assert "has no text" in str(found["0.tar, sample 'd'"])
    assert "an object is expected" in str(found["0.tar, sample 'e'"])
    report = check_data(open_data(tmp_path / "0.tar"))
    assert (report.num_rows, report.num_bad, report.num_images) == (5, 2, 4)
    with pytest.raises(DataError, match=r"5\.tar: no such shard \(1 of 1"):
        open_data(tmp_path / "5.tar")
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:2000])
    report = check_data(open_data(f"{tmp_path}/{{0..1}}.tar"))
    assert "is no tar file, or is cut off" in report.problems[-1][1]


def test_hugging_face_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingDependency, match=r"pip install 'lavish\[data\]'"):
        open_data(tmp_path / "rows.parquet")


class Damaged:
    """A table of three rows whose second cannot be read."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 1:
            raise OSError("Corrupt snappy compressed data")
        if index > 2:
            raise IndexError
        return {"image": {"bytes": jpeg(), "path": None}, "text": b"\xff".decode() if index == 2 else A}


def test_tables_that_are_damaged_inside() -> None:
    where, row = tables.TableRows(Damaged(), "a.parquet")[1]
    assert (where, row) == ("a.parquet, row 2", "cannot be read (Corrupt snappy compressed data).")
    assert tables.TableRows(Damaged(), "a.parquet")[2][1].startswith("cannot be read ('utf-8' codec"), "row by row"
    stream = iter(tables.TableStream(Damaged(), "a.parquet"))
    assert next(stream)[0] == "a.parquet, row 1"
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read from row 2 on \(Corrupt"):
        next(stream)


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face(streaming: bool, tmp_path: Path) -> None:
    pytest.importorskip("datasets.features")
    import datasets

    rows = {
        "images": [[{"bytes": jpeg(), "path": None}], [{"bytes": jpeg(), "path": None}]],
        "texts": [[{"user": Q, "assistant": A}], [{"user": "", "assistant": A}]],
    }
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List({"user": datasets.Value("string"), "assistant": datasets.Value("string")}),
        }
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "rows.parquet")
    source = open_data(tmp_path / "rows.parquet", streaming=streaming)
    assert (source.format, source.is_stream) == ("hf", streaming)
    (_, first), (where, _) = source.samples()
    assert first["messages"][0]["content"][0] == {"type": "image", "image": jpeg()}, "not decoded"
    assert where == "rows.parquet, row 2"
    assert (check_data(source).num_rows, check_data(source).num_images) == (2, 2)
    if not streaming:
        table.save_to_disk(tmp_path / "saved")
        assert len(open_data(tmp_path / "saved")) == 2
        assert len(source.rows[:1]) == 1
        with pytest.raises(IndexError):
            source.rows[2]
        (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
        with pytest.raises(DataError, match="the package datasets cannot read it"):
            open_data(tmp_path / "broken.parquet")
        datasets.DatasetDict({"a": table, "b": table}).save_to_disk(tmp_path / "splits")
        with pytest.raises(DataError, match="holds the splits a, b"):
            tables.open_table(tmp_path / "splits")


def test_a_picture_column(tmp_path: Path) -> None:
    pytest.importorskip("datasets.features")
    import datasets

    rows = {"image": [{"bytes": jpeg(), "path": None}], "text": ["A square."]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "a.parquet")
    (sample,) = samples(open_data(tmp_path / "data"))
    assert sample["messages"][1]["content"] == "A square."


BAD: dict[str, tuple[Any, str]] = {
    "a conversation that starts with the assistant": (
        {"conversations": [{"from": "gpt", "value": "Hi."}, *spoken(Q)]},
        "Message 0 has role 'assistant' and starts the conversation",
    ),
    "two questions in a row": (
        {"messages": [{"role": "user", "content": Q}, *said()]},
        "Message 1 has role 'user' and follows a 'user' message",
    ),
    "nothing to learn": ({"messages": [{"role": "user", "content": Q}]}, "ends with a question"),
    "an empty answer": ({"messages": said(Q, "  ")}, "message 1 (of the assistant) is empty: nothing is learnt of it"),
    "an empty question": ({"messages": said("")}, "message 0 (of the user) is empty"),
    "no messages": ({"messages": []}, "the messages are"),
    "a missing picture": (
        {"image": "b.png", "messages": said()},
        "the picture or video 'b.png' is missing; looked in",
    ),
    "a web address": (
        {"image": "https://x.y/b.png", "messages": said()},
        "is a web address; fetch it and name the file",
    ),
    "a damaged picture": ({"image": "bad.png", "messages": said()}, "bad.png"),
    "fewer places than pictures": (
        {"image": "a.png", "conversations": spoken(Q)},
        "1 pictures or videos, and 0 places for them (<image> or <video>): they pair up",
    ),
    "more places than pictures": (
        {"image": "a.png", "conversations": spoken("<image><image>")},
        "1 pictures or videos, and 2 places",
    ),
    "more places beside messages": (
        {"images": ["a.png"], "messages": said("<image><image>")},
        "1 pictures or videos, and 2 places",
    ),
    "a place of the other kind": (
        {"image": "a.png", "messages": said("<video>")},
        "message 0 has <video> where the next file is an image",
    ),
    "pictures in two places": (
        {
            "image": "a.png",
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a.png"}]},
                {"role": "assistant", "content": A},
            ],
        },
        "pictures stand in the parts and beside the messages (1)",
    ),
    "an unknown speaker": (
        {"conversations": [{"from": "humen", "value": Q}]},
        "the speaker 'humen' is unknown. Did you mean 'human'",
    ),
    "a turn without a value": ({"conversations": [{"from": "human", "valu": Q}]}, "the field 'value' is missing"),
    "a value that is no text": ({"conversations": [{"from": "human", "value": 3}]}, "value is 3"),
    "a picture of the assistant": (
        {
            "messages": [
                {"role": "user", "content": Q},
                {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]},
            ]
        },
        "images belong to user messages",
    ),
    "instructions that do not pair up": ({"instruction": ["a", "b"], "output": ["c"]}, "2 instructions and 1 outputs"),
    "an instruction that is no text": ({"instruction": 3, "output": "c"}, "instruction is 3"),
    "a picture without its place": ({"image": "a.png", "instruction": "a", "output": "c"}, "1 pictures or videos"),
    "a history that is none": ({"query": Q, "response": A, "history": [Q]}, "history holds 'What colour?'; pairs"),
    "a caption that is none": ({"image": "a.png", "caption": " "}, "caption is ' '"),
    "a question without a picture": ({"question": Q, "answer": A}, "names no picture"),
    "an answer that is none": ({"image": "a.png", "question": Q, "answer": []}, "the answer is []"),
    "a box of three numbers": (
        {"image": "a.png", "expression": "x", "bbox": [1, 2, 3], "width": 4, "height": 4},
        "bbox is [1, 2, 3]; four numbers",
    ),
    "an empty box": (
        {"image": "a.png", "expression": "x", "box": [5, 5, 2, 9], "width": 9, "height": 9},
        "box is [5, 5, 2, 9], which is empty as corners",
    ),
    "a picture of unknown size": (
        {"image": "a.png", "expression": "x", "bbox": [1, 1, 2, 2]},
        "width and height are None and None",
    ),
    "a box that is no number": (
        {"image": "a.png", "expression": "x", "bbox": [float("nan"), 1, 2, 2], "width": 9, "height": 9},
        "bbox is [nan, 1, 2, 2]; four numbers of pixels",
    ),
    "a box without an end": (
        {"image": "a.png", "expression": "x", "bbox": [0, 0, float("inf"), 2], "width": 9, "height": 9},
        "bbox is [0, 0, inf, 2]; four numbers of pixels",
    ),
    "a box of words": (
        {"image": "a.png", "expression": "x", "bbox": ["1", "2", "3", "4"], "width": 9, "height": 9},
        "bbox is ['1', '2', '3', '4']; four numbers",
    ),
    "a box beyond all numbers": (
        {"image": "a.png", "expression": "x", "bbox": [0, 0, 10**400, 2], "width": 9, "height": 9},
        "four numbers of pixels",
    ),
    "a box beside its picture": (
        {"image": "a.png", "expression": "x", "bbox": [9, 0, 2, 2], "width": 9, "height": 9},
        "bbox is [9, 0, 2, 2], which lies beside the picture of 9 x 9 pixels",
    ),
    "a box below its picture": (
        {"image": "a.png", "expression": "x", "bbox": [0, 9, 2, 2], "width": 9, "height": 9},
        "bbox is [0, 9, 2, 2], which lies beside the picture",
    ),
    "a box left of its picture": (
        {"image": "a.png", "expression": "x", "box": [-3, 0, 0, 2], "width": 9, "height": 9},
        "box is [-3, 0, 0, 2], which lies beside the picture",
    ),
    "a picture of no height": (
        {"image": "a.png", "expression": "x", "bbox": [1, 1, 2, 2], "width": 9, "height": 0},
        "width and height are 9 and 0; the picture's size in pixels is needed",
    ),
    "a picture wider than all": (
        {"image": "a.png", "expression": "x", "bbox": [1, 1, 2, 2], "width": 10**400, "height": 4},
        "the picture's size in pixels is needed",
    ),
    "a URL of a file": (
        {"image": "file:///x/b.png", "messages": said()},
        "the picture 'file:///x/b.png' is a URL; name the file by its path",
    ),
    "base64 alone": ({"image": "iVBO" * 200, "messages": said()}, "Base64 text needs 'data:image/png;base64,' before"),
    "no object": (3, "3 where an object is expected"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_rows_are_told_by_their_number(name: str, tmp_path: Path) -> None:
    row, message = BAD[name]
    picture(tmp_path)
    (tmp_path / "bad.png").write_bytes(jpeg()[:40])
    good = {
        "captions": ROWS["a caption"][1],
        "instruction": ROWS["MiniGPT4-Qwen"][1],
        "question": ROWS["a question of LAVIS"][1],
        "expression": ROWS["RefCOCO"][1],
        "conversations": ROWS["LLaVA"][1],
        "messages": ROWS["messages with parts"][1],
        "query": ROWS["ms-swift"][1],
    }
    keys = set(row) if isinstance(row, dict) else set()
    keys = {"captions"} if keys == {"image", "caption"} else keys
    kind = next((name for name in good if name in keys), "messages")
    path = write(tmp_path / "rows.jsonl", [*[good[kind]] * 16, row, good[kind]])
    report = check_data(open_data(path))
    assert (report.num_rows, report.num_bad) == (18, 1)
    ((where, told),) = report.problems
    assert where == "rows.jsonl, row 17"
    assert message in told


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b"", "the file is empty"),
        ("rows.json", b"[]", "holds no rows"),
        ("rows.jsonl", b"\n\n", "the file is empty"),
        ("rows.jsonl", b"\n{", r"rows\.jsonl, row 2: no JSON"),
        ("rows.json", b'[{"id": ' + b"9" * 5000 + b"}]", "no JSON: Exceeds the limit"),
        ("rows.csv", b"image,caption,caption\na.png,x,y", "row 1: two columns have one name"),
        ("rows.json", b'{"a": 1}', "a list of rows is expected. Known: llava, sharegpt"),
        ("rows.json", b'[{"foo": 1, "bar": 2}]', r"its rows \(foo, bar\) are of no form"),
        ("rows.json", b"[1]", r"its rows \(1\) are of no form"),
        ("rows.bin", b"\xff\xfe\xfd", r"cannot be read as text .*; save it as UTF-8"),
        ("refs.p", pickle.dumps([]), "a pickle is not read"),
    ],
)
def test_files_that_are_wrong(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_data(tmp_path / name)


def test_places_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_data(tmp_path / "nothing.json")
    with pytest.raises(DataError, match="a folder of no form"):
        open_data(tmp_path)
    with pytest.raises(DataError, match="'coco_vqa' is a data set by name; `lavish data list`"):
        open_data("coco_vqa")
    write(tmp_path / "train.json", [])
    with pytest.raises(DataError, match=r"trian\.json: no such file or folder\. Did you mean 'train\.json'"):
        open_data(tmp_path / "trian.json")
    write(tmp_path / "rows.json", [ROWS["ShareGPT"][1]])
    with pytest.raises(ConfigError, match=r"format 'lava' is unknown\. Did you mean 'llava'"):
        open_data(tmp_path / "rows.json", "lava")
    with pytest.raises(DataError, match="is no cogvlm_sft, which is folder"):
        open_data(tmp_path / "rows.json", "cogvlm_sft")
    for name in ("~nobodys-folder/rows.json", "a" * 5000, "a\0b", ""):
        with pytest.raises(ConfigError, match="path="):
            open_data(name)
    with pytest.raises(ConfigError, match="images='~nobodys-folder'"):
        open_data(tmp_path / "rows.json", images="~nobodys-folder")
    (tmp_path / "shards").mkdir()
    with pytest.raises(DataError, match="shards: the folder holds no shard"):
        open_data(tmp_path / "shards", "webdataset")


@contextlib.contextmanager
def closed(folder: Path) -> Iterator[None]:
    """Take the right to look into a folder away, from root too."""
    is_root = os.geteuid() == 0
    folder.chmod(0)
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_what_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", [ROWS["ShareGPT"][1]])
    for place in (path, tmp_path):
        with closed(tmp_path), pytest.raises(DataError, match=r"cannot be opened \(Permission denied\)"):
            open_data(place)


def test_lines_that_are_no_json_are_rows_with_a_problem(tmp_path: Path) -> None:
    good = json.dumps(ROWS["ShareGPT"][1])
    lines = [good, "{", "", f'{{"id": {"9" * 5000}}}', "[" * 100_000, good]
    (tmp_path / "rows.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    source = open_data(tmp_path / "rows.jsonl")
    report = check_data(source)
    assert [where for where, _ in report.problems] == [f"rows.jsonl, row {at}" for at in (2, 4, 5)]
    assert all("no JSON (" in told for _, told in report.problems)
    assert report.num_rows == 5
    seen: list[int] = []
    count, left_out = write_data(source, tmp_path / "out.jsonl", skip_bad=True, progress=seen.append)
    assert (count, len(left_out), seen) == (2, 3, [1, 2, 3, 4, 5])


def test_lines_end_with_a_line_break_alone(tmp_path: Path) -> None:
    """Trap: U+2028 and its like stand inside of JSON texts as they are, and end a line for str.splitlines."""
    text = "one\u2028two\u0085three\u2029"
    row = {"id": "\ud800", "messages": said(text, text)}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"id": "x"}, ensure_ascii=False), encoding="utf-8")
    (sample,) = samples(open_data(tmp_path / "rows.jsonl"))
    assert sample["messages"] == said(text, text)
    write_data(open_data(write(tmp_path / "half.json", [row])), tmp_path / "out.jsonl")
    (again,) = samples(open_data(tmp_path / "out.jsonl"))
    assert again == row, "and half a character stays what it is"


def test_data_of_no_rows(tmp_path: Path) -> None:
    for name, content in (("image_map.json", {}), ("captions.json", {})):
        write(tmp_path / "map" / name, content)
    for path in (tmp_path / "map", write(tmp_path / "questions.json", {"questions": []})):
        write(tmp_path / "annotations.json", {"annotations": []})
        with pytest.raises(DataError, match=rf"{path.name}: holds no rows"):
            open_data(path)


def test_any_field_may_stand_in_a_row(tmp_path: Path) -> None:
    assert samples(open_data(write(tmp_path / "rows.json", [{"fault": "none", **ROWS["ShareGPT"][1]}])))


def test_a_format_that_is_named_is_that_of_the_rows_of_shards(tmp_path: Path) -> None:
    row = json.dumps({"question": Q, "answer": A, "caption": "A square."}).encode()
    path = tar(tmp_path / "a.tar", {"a.png": jpeg(), "a.json": row})
    assert flat(samples(open_data(path))[0])[1] == f"assistant: {A}"
    for place in (path, tmp_path):
        assert flat(samples(open_data(place, "captions"))[0])[1] == "assistant: A square."
    with pytest.raises(DataError, match=r"a\.tar: is no coco_vqa, which is JSON"):
        open_data(path, "coco_vqa")
    picture(tmp_path / "pictures")
    with pytest.raises(DataError, match="a folder of no form"):
        open_data(tmp_path / "pictures", "captions")


def test_a_folder_of_shards_and_more(tmp_path: Path) -> None:
    """img2dataset's: a table without pictures and statistics beside each shard."""
    tar(tmp_path / "000.tar", {"a.png": jpeg(), "a.txt": b"x"})
    (tmp_path / "000.parquet").write_bytes(b"PAR1")
    write(tmp_path / "000_stats.json", {})
    assert open_data(tmp_path).format == "webdataset"
    write(tmp_path / "train.json", [])
    with pytest.raises(
        DataError, match=r"Name a file in it: 000_stats\.json, train\.json\. Or say --format webdataset"
    ):
        open_data(tmp_path)


def test_a_table_of_rows_by_their_name(tmp_path: Path) -> None:
    rows = {"one": ROWS["ShareGPT"][1], "two": ROWS["ShareGPT"][1]}
    found = samples(open_data(write(tmp_path / "rows.json", rows)))
    assert [sample["id"] for sample in found] == ["one", "two"]
    assert len(samples(open_data(write(tmp_path / "rows.json", {"data": [ROWS["ShareGPT"][1]]})))) == 1


def test_every_format_is_described_and_tested() -> None:
    assert set(FORMATS) >= {kind for kind, _, _ in ROWS.values()}
    text = Path(__file__).read_text(encoding="utf-8")
    for name in FORMATS:
        assert f'"{name}"' in text


def test_notes_and_counts(tmp_path: Path) -> None:
    row = {"id": 1, **ROWS["ShareGPT"][1]}
    report = check_data(open_data(write(tmp_path / "rows.json", [row, row])))
    assert report.is_good
    assert report.notes == ["1 ids stand more than once, first '1' (2 times).", "no row has a picture or video."]
    assert (report.num_answers, report.num_characters) == (2, 2 * len(A))
    assert check_data(open_data(tmp_path / "rows.json"), max_rows=1).num_rows == 1


def test_a_damaged_video(tmp_path: Path) -> None:
    (tmp_path / "good.mp4").write_bytes(clip(3))
    (tmp_path / "v.mp4").write_bytes(b"no video")
    rows = [{"video": name, "messages": said("<video>?")} for name in ("good.mp4", "v.mp4", "v.mp4")]
    source = open_data(write(tmp_path / "rows.json", rows))
    report = check_data(source)
    assert [where for where, _ in report.problems] == ["rows.json, row 2", "rows.json, row 3"]
    assert "v.mp4" in report.problems[0][1]
    assert report.num_videos == 3
    assert check_data(source, quick=True).is_good


def test_a_quick_check_leaves_pictures_closed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    source = open_data(write(tmp_path / "rows.json", [ROWS["LLaVA"][1]] * 3))
    assert check_data(source, quick=True).is_good
    report = check_data(source, max_problems=1)
    assert (report.num_bad, len(report.problems)) == (3, 1)


def test_written_data_are_the_same(tmp_path: Path) -> None:
    """Pictures as files keep their place, those inside the data become files; boxes stay."""
    picture(tmp_path / "out", "a.png")
    picture(tmp_path, "b.png")
    url = f"data:image/png;base64,{base64.b64encode(jpeg()).decode()}"
    rows = [
        {"id": "x", "image": "out/a.png", "messages": said("<image>What?")},
        {"image": str(tmp_path / "b.png"), "messages": said()},
        {"image": url, "messages": said()},
        {"messages": said("Hello")},
    ]
    source = open_data(write(tmp_path / "rows.json", rows))
    out = tmp_path / "out" / "train.jsonl"
    assert write_data(source, out) == (4, [])
    again = samples(open_data(out))
    assert [flat(sample) for sample in again] == [
        ["user: [a.png] What?", f"assistant: {A}"],
        [f"user: [b.png] {Q}", f"assistant: {A}"],
        [f"user: [000003-1.png] {Q}", f"assistant: {A}"],
        ["user: Hello", f"assistant: {A}"],
    ]
    assert again[0]["id"] == "x"
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert lines[0]["messages"][0]["content"][0]["image"] == "a.png", "below the new file's folder"
    assert (tmp_path / "out/train_images/000003-1.png").read_bytes() == jpeg()
    assert check_data(open_data(out)).is_good
    source = open_data(write(tmp_path / "ref.json", [ROWS["RefCOCO"][1] | {"image": "b.png"}]))
    write_data(source, tmp_path / "ref.jsonl")
    assert json.loads((tmp_path / "ref.jsonl").read_text())["box"] == [0.1, 0.25, 0.6, 0.75]
    good = url.rstrip("=").replace("base64,", "base64,\n")
    bad = [{"image": f"data:image/png;base64,{content}", "messages": said()} for content in ("%%", "aGk=")]
    source = open_data(write(tmp_path / "bad.json", [*bad, {"image": good, "messages": said()}]))
    count, told = write_data(source, tmp_path / "bad.jsonl", skip_bad=True)
    assert count == 1, "line breaks, and no padding"
    assert ["no base64" in told[0][1], "of no format" in told[1][1]] == [True, True]


def test_nothing_is_written_by_halves(tmp_path: Path) -> None:
    """Not the pictures either, of which the first is good: what an older file names stays as it is."""
    row = {"images": [f"data:image/png;base64,{base64.b64encode(jpeg()).decode()}"], "messages": said("<image>?")}
    twice = {"images": [*row["images"], "data:image/png;base64,aGk="], "messages": said("<image><image>?")}
    out, rows = tmp_path / "out" / "train.jsonl", tmp_path / "rows.json"
    with pytest.raises(DataError, match=r"rows\.json, row 2: .* Nothing was written"):
        write_data(open_data(write(rows, [row, twice])), out)
    with pytest.raises(DataError, match=r"none of its 1 rows is good, first rows\.json, row 1: .* Nothing was written"):
        write_data(open_data(write(rows, [twice])), out, skip_bad=True)
    assert list(out.parent.iterdir()) == []
    (tmp_path / "out" / "train_images").mkdir()
    (tmp_path / "out" / "train_images" / "000001-1.png").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="train_images: is there already"):
        write_data(open_data(write(rows, [row])), out)
    with pytest.raises(DataError, match="Nothing was written"):
        write_data(open_data(write(rows, [row, twice])), out, overwrite=True)
    assert (tmp_path / "out" / "train_images" / "000001-1.png").read_bytes() == b"mine"
    write_data(open_data(rows), out, overwrite=True, skip_bad=True)
    assert [file.name for file in (tmp_path / "out" / "train_images").iterdir()] == ["000001-1.png"]
    assert (tmp_path / "out" / "train_images" / "000001-1.png").read_bytes() == jpeg()
    assert sorted(path.name for path in out.parent.iterdir()) == ["train.jsonl", "train_images"]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    source = open_data(write(tmp_path / "rows.json", [ROWS["ShareGPT"][1]] * 50))
    with pytest.raises(ConfigError, match="is a folder; name the file to write"):
        write_data(source, tmp_path, overwrite=True)
    with pytest.raises(OutputError, match=r"x\.jsonl: cannot be written \(.*\); make room there, or name another"):
        write_data(source, tmp_path / "rows.json" / "x.jsonl")
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, usual[1]))  # as a full disk
    try:
        with pytest.raises(OutputError, match=r"x\.jsonl: cannot be written \(file too large\)"):
            write_data(source, tmp_path / "new" / "x.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert list((tmp_path / "new").iterdir()) == []


JUNK = (
    *(None, 3, -1.5, True, "", " ", "\x00", "<image>", "a.png", "../a.png", "data:image/png;base64,xx", [], {}, [[]]),
    *([None], {"a": 1}, {"type": "image"}, [{"role": "user", "content": 3}], "\ud800", 10**30, "x" * 5000, "a" * 300),
    *(float("nan"), float("inf"), 10**400, "file:///a.png", "\u2028"),
)
NAMES = (
    "image",
    "messages",
    "conversations",
    "from",
    "value",
    "role",
    "content",
    "type",
    "text",
    "bbox",
    "annotations",
)


def spoiled(value: Any, draw: random.Random) -> Any:
    """Give a value with some of its parts gone, renamed, or replaced by junk."""
    if draw.random() < 0.12:
        return draw.choice(JUNK)
    if isinstance(value, dict):
        kept = {key: one for key, one in value.items() if draw.random() > 0.06}
        return {(draw.choice(NAMES) if draw.random() < 0.04 else key): spoiled(one, draw) for key, one in kept.items()}
    if isinstance(value, list):
        return [spoiled(one, draw) for one in value][int(draw.random() < 0.05) :]
    return value


@pytest.mark.parametrize("seed", range(8))
def test_spoiled_rows_are_told_and_break_nothing(seed: int, tmp_path: Path) -> None:
    """Whatever stands in a file: every row is good or has a problem in words, and the page and the copy are made."""
    draw = random.Random(seed)
    picture(tmp_path, "a.png", "b.png")
    whole = [
        {"images": [{"id": 1, "file_name": "a.png", "caption": "x"}], "annotations": [{"image_id": 1, "caption": "y"}]},
        {"annotations": [{"image_id": "a", "caption": "y"}]},
        {"images": [{"id": 1, "file_name": "a.png", "caption": "x"}], "annotations": [{"image_id": 1, "bbox": [1, 2]}]},
    ]
    for _ in range(60):
        rows: Any = [spoiled(draw.choice(list(ROWS.values()))[1], draw) for _ in range(4)]
        if draw.random() < 0.2:
            rows = spoiled(draw.choice(whole), draw)
        try:
            source = open_data(write(tmp_path / "rows.json", rows))
        except DataError:
            continue
        report = check_data(source)
        assert report.num_bad <= max(report.num_rows, 1)
        assert len(report.problems) == report.num_bad
        page([look_at(where, made) for where, made in source.samples()], title="x", facts=[])
        with contextlib.suppress(DataError):  # none of them is good
            count, left_out = write_data(source, tmp_path / "out.jsonl", skip_bad=True, overwrite=True)
            assert count + len(left_out) == report.num_rows
