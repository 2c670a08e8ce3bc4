"""`lavish predict`: one answer; many, batched, each input once, also after kill -9; failures cost nobody else."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lavish.cli import main
from lavish.cli.asking import Seen
from lavish.cli.predict import Run
from lavish.cli.questions import Answers, Question

SHORT = ["--max-new-tokens", "4"]


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def ask(image: Path | None, question: str) -> list[dict]:
    content = [{"type": "text", "text": question}]
    return [{"role": "user", "content": content if image is None else [{"type": "image", "image": image}, *content]}]


def test_one_answer(vlm, checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["predict", str(checkpoint), "--image", f"'{picture}'", "--prompt", "What is it?", *SHORT]
    assert main(arguments) == 0
    assert capsys.readouterr().out == vlm.chat(ask(picture, "What is it?"), max_new_tokens=4).text + "\n"


def test_an_answer_steers_no_terminal(
    checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["predict", str(checkpoint), "--image", str(picture), "-q", "一", "--max-new-tokens", "12"]
    assert main(arguments) == 0
    assert "\x1b" in capsys.readouterr().out  # a file gets what the model wrote
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(arguments) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_many_are_batched_in_order_and_failures_are_listed(
    vlm, checkpoint: Path, picture: Path, other_picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_text("no image")
    lines = [
        {"image": str(picture), "question": "What?", "id": "a"},
        {"image": "bad.png", "question": "What?", "id": "b"},
        {"question": "Hello", "id": "c"},
        {"image": str(other_picture), "question": "word " * 9000, "id": "d"},
        {"image": str(other_picture), "question": "And a longer one here?", "id": "e"},
        {"id": "f"},
        {"image": "https://name:word@example.com/a.png?key=1", "question": "What?", "id": "g"},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["predict", str(checkpoint), str(source), "-o", str(output), "--batch-size", "3", *SHORT]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "3 answered, 4 failed" in printed.err
    assert (
        "error: g: 'https://...@example.com/a.png' is a URL; URLs of a JSONL are fetched with --allow-urls"
        in printed.err
    )
    assert "error: b: The image file" in printed.err
    rows = read_rows(output)
    assert [row["id"] for row in rows] == list("abcdefg")
    kinds = [None, "MediaError", None, "PromptError", None, "DataError", "MediaError"]
    assert [row.get("error_type") for row in rows] == kinds
    assert not rows[3]["error"].startswith("Conversation")
    for place, image, question in ((0, picture, "What?"), (2, None, "Hello"), (4, other_picture, lines[4]["question"])):
        expected = vlm.chat(ask(image, question), max_new_tokens=4)
        assert rows[place]["answer"] == expected.text
        assert rows[place]["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    before = output.read_bytes()
    assert main(arguments) == 1, "nothing is left to ask, and what failed is still failed"
    assert output.read_bytes() == before
    (tmp_path / "bad.png").unlink()
    (tmp_path / "bad.png").write_bytes(picture.read_bytes())
    assert main([*arguments, "--retry-failed"]) == 1
    rows = read_rows(output)
    assert sorted(row["id"] for row in rows) == list("abcdefg")
    assert "answer" in next(row for row in rows if row["id"] == "b")


def test_without_output_the_lines_go_to_stdout(
    checkpoint: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(picture.read_bytes())
    assert main(["predict", str(checkpoint), "--input", str(tmp_path), "--question", "What?", *SHORT]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["id"] == "a.png"


def test_boxes_are_in_the_line(vlm, picture: Path) -> None:
    from PIL import Image

    from lavish.common import grounding
    from lavish.inference.vlm import Reply, Usage

    text = "A dog[[100,200,500,1000]]"
    reply = Reply(text, [1], grounding.parse(text), "stop", Usage(3, 1, 0))
    run = Run(vlm, Answers(None), "m", {}, 1)
    row = run._row(Question("a", str(picture), "Where?"), reply, Seen([Image.new("RGB", (200, 100))]))
    assert row["boxes"] == [{"phrase": "A dog", "boxes": [[100, 200, 500, 1000]], "boxes_px": [[20, 20, 100, 99]]}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing to ask"),
        (["--image", "a.png", "--input", "b"], "give one of them"),
        (["--question", "?", "--output", "a.jsonl"], "belong to --input"),
        (["model", "one", "--input", "two"], "contradict each other"),
        (["--input", "/nowhere/at/all", "--question", "?"], "no such file or folder"),
    ],
)
def test_what_cannot_be_is_said_with_words(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_where_a_model_should_stand_and_pictures_do(
    tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, lines = tmp_path / "photos", tmp_path / "in.jsonl"
    photos.mkdir()
    (photos / "A.PNG").write_bytes(picture.read_bytes())
    lines.write_text("{}")
    for place, hint in ((photos, "--input"), (lines, "--input"), (picture, "--image")):
        assert main(["predict", str(place), "--prompt", "What?"]) == 2
        assert f"Write lavish predict {hint} {place}" in capsys.readouterr().err.replace("\n", " ")


def test_an_image_is_opened_before_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "org/nowhere", "--image", "/nowhere/a.png", "--prompt", "What?"]) == 2
    assert "/nowhere/a.png" in capsys.readouterr().err


def test_two_images_are_refused_by_a_model_that_sees_one(
    checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ["--image", str(picture), "--image", str(picture)]
    assert main(["predict", str(checkpoint), *images, "--prompt", "What?"]) == 2
    assert "To ask the same about each: --input with a folder" in " ".join(capsys.readouterr().err.split())


def test_a_killed_run_goes_on_and_asks_each_input_once(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output, count = tmp_path / "in.jsonl", tmp_path / "out.jsonl", 400
    source.write_text("".join(json.dumps({"question": f"What is {n}?", "id": f"q{n}"}) + "\n" for n in range(count)))
    arguments = ["predict", str(checkpoint), "--input", str(source), "--output", str(output), *SHORT]
    code = f"import sys; from lavish.cli import main; sys.exit(main({arguments!r}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 120
        while not (output.exists() and output.read_bytes().count(b"\n") >= 8):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    written = output.read_bytes()
    num_before = written.count(b"\n")
    assert num_before < count
    with output.open("ab") as file:
        file.write(b'{"id": "q399", "ans')
    assert main(arguments) == 0
    printed = capsys.readouterr().err
    assert f"{num_before} of {count} are in {output} already" in printed
    assert "torn" in printed
    assert output.read_bytes().startswith(written[: written.rfind(b"\n") + 1]), "what was answered is not asked again"
    rows = read_rows(output)
    assert [row["id"] for row in rows] == [f"q{n}" for n in range(count)]
    assert all(row["answer"] is not None for row in rows)
