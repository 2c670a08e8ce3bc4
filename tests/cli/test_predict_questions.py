"""What can be asked, and the file of answers: whole lines, once each, of one model."""

import json
import os
from pathlib import Path

import pytest

from lavish.cli.questions import Answers, Question, read_questions
from lavish.common.errors import DataError, MediaError
from lavish.common.media import open_image


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_a_folder_with_its_subfolders(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", "notes.txt", ".hidden/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = read_questions(str(tmp_path), "What?")
    assert [item.id for item in found] == ["a.JPG", "b.png", "sub/c.webp"]
    assert found[2] == Question("sub/c.webp", str(tmp_path / "sub" / "c.webp"), "What?")


def test_a_glob_and_one_image(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.jpg"):
        (tmp_path / name).touch()
    assert [item.image for item in read_questions(f"{tmp_path}/*.png", "What?")] == [
        f"{tmp_path}/{n}.png" for n in "ab"
    ]
    assert len(read_questions(f"{tmp_path}/c.jpg", "What?")) == 1


def test_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "near.png").touch()
    (tmp_path / "far.png").touch()
    monkeypatch.chdir(tmp_path)
    path = write_lines(
        tmp_path / "data" / "in.jsonl",
        {"image": "near.png", "question": "one"},
        "",
        {"image": "far.png", "id": "x", "source": "ignored"},
        {"question": "a line\u2028separator", "id": 7},
        {"image": "https://example.com/a.png"},
    )
    found = read_questions(str(path), "else")
    assert [item.id for item in found] == [1, "x", 7, 5]
    assert [item.image for item in found] == [
        str(path.parent / "near.png"),
        "far.png",
        None,
        "https://example.com/a.png",
    ]
    assert [item.question for item in found] == ["one", "else", "a line\u2028separator", "else"]
    assert not any(item.problem for item in found)


def test_wrong_lines_are_problems_of_their_own(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "in.jsonl", "{torn", [1], {"image": 3, "question": "?"}, {"qestion": "?"}, {"question": "!"}
    )
    problems = [item.problem or "" for item in read_questions(str(path), None)]
    assert "line 1: no JSON" in problems[0]
    assert "line 2: list, not an object" in problems[1]
    assert "image is int" in problems[2]
    assert "no question; the line has 'qestion'. Did you mean 'question'?" in problems[3]
    assert problems[4] == ""


def test_an_empty_object_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{}\n{"questoin": "?"}\n')
    empty, mistyped = (item.problem for item in read_questions(str(tmp_path / "in.jsonl"), None))
    assert empty == "in.jsonl, line 1: no question; the line is empty."
    assert mistyped == "in.jsonl, line 2: no question; the line has 'questoin'. Did you mean 'question'?"


def test_a_broken_line_takes_no_id_of_another(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", {"id": 1, "question": "?"}, {"id": 3, "question": "?"}, "{torn", "{torn")
    assert [item.id for item in read_questions(str(path), None)] == [1, 3, "line 3", 4]


def test_an_image_under_another_name_is_not_overlooked(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "in.jsonl",
        *({name: "a.png"} for name in ("imge", "images", "img", "image_path")),
        *({"caption": "x"}, {"image": None, "image_id": 5}, {"source": "b.png", "label": "c"}),
    )
    problems = [item.problem for item in read_questions(str(path), "?")]
    assert [bool(problem) for problem in problems] == [True] * 4 + [False] * 3
    assert (
        problems[0] == "in.jsonl, line 1: field 'imge' is not read; call it 'image', or say \"image\": null where "
        "there is none"
    )


@pytest.mark.parametrize("image", [5000 * "QUJD", "a\0b.png", "\ud800.png", "~nobody/a.png", "."])
def test_an_image_that_is_no_path_costs_its_own_line_only(tmp_path: Path, image: str) -> None:
    path = write_lines(tmp_path / "in.jsonl", {"image": image, "question": "?"}, {"question": "?"})
    found = read_questions(str(path), None)
    assert [item.problem for item in found] == [None, None]
    with pytest.raises(MediaError):
        open_image(found[0].image or "")


def test_nothing_to_ask(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_questions(str(tmp_path / "none"), "?")
    with pytest.raises(DataError, match="no such file or folder"):
        read_questions(5000 * "a", "?")
    with pytest.raises(DataError, match="no image found"):
        read_questions(str(tmp_path), "?")
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match="give --question"):
        read_questions(str(tmp_path), None)
    with pytest.raises(DataError, match="no line in it"):
        read_questions(str(write_lines(tmp_path / "in.jsonl")), None)
    with pytest.raises(DataError, match="2 inputs have the id 'x'"):
        read_questions(str(write_lines(tmp_path / "in.jsonl", *[{"id": "x", "question": "?"}] * 2)), None)
    (tmp_path / "in.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_questions(str(tmp_path / "in.jsonl"), None)


QUESTIONS = [Question(number, None, "?") for number in range(3)]


def row(number: int, **more: object) -> dict[str, object]:
    return {"id": number, "image": None, "question": "?", "model": "m", **more}


def test_answers_go_on_and_mend_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    answers = Answers(path)
    answers.open(QUESTIONS, {"model": "m"}, overwrite=False, retry_failed=False)
    answers.write([row(0, answer="ü\u2028"), row(1, answer="\ud800")])
    answers.close()
    with path.open("ab") as file:
        file.write('{"id": 2, "answer": "é'.encode()[:-1])
    answers = Answers(path)
    answers.open(QUESTIONS, {"model": "m"}, overwrite=False, retry_failed=False)
    assert answers.repaired
    assert list(answers.done) == [0, 1]
    answers.write([row(2, answer="x")])
    answers.close()
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert [found["answer"] for found in rows] == ["ü\u2028", "\ud800", "x"]


def test_answers_of_something_else_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for content, why in (
        ("hello\n", "no answer of `lavish predict`"),
        (json.dumps(row(9)) + "\n", "holds the id 9"),
        (json.dumps(row(1, question="!")) + "\n", "another image or question"),
        (json.dumps({**row(1), "model": "other"}) + "\n", "holds answers of 'other'"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=why):
            Answers(path).open(QUESTIONS, {"model": "m"}, overwrite=False, retry_failed=False)
        assert path.read_text() == content


def test_overwrite_and_retry(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write_lines(path, row(0, answer="x"), row(1, error="bad"))
    answers = Answers(path)
    answers.open(QUESTIONS, {"model": "m"}, overwrite=False, retry_failed=True)
    answers.close()
    assert list(answers.done) == [0]
    assert len(path.read_text().splitlines()) == 1
    answers = Answers(path)
    answers.open(QUESTIONS, {"model": "m"}, overwrite=True, retry_failed=False)
    assert not answers.done
    assert len(path.read_text().splitlines()) == 1, "the model may still fail to load"
    answers.write([row(2, answer="y")])
    answers.write([row(0, answer="z")])
    answers.close()
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [2, 0]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_full_disk_is_said(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "out.jsonl")
    answers._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    with pytest.raises(DataError, match="No space left"):
        answers.write([row(0, answer="x")])
    answers.close()
