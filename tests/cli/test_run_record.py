"""What `lavish predict` records beside its output: options are not mixed, and two processes never write one file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lavish.cli import main
from lavish.cli.questions import Answers, Question
from lavish.cli.run_record import RunRecord
from lavish.common.errors import DataError

QUESTIONS = [Question("a", None, "Hello?"), Question("b", None, "And?")]
SETTINGS = {"model": "m", "chat_template": None, "temperature": 0.5}
ROW = {"id": "a", "image": None, "question": "Hello?", "answer": "Yes", "model": "m"}


def opened(path: Path, settings: dict, *, overwrite: bool = False) -> Answers:
    answers = Answers(path)
    answers.open(QUESTIONS, settings, overwrite=overwrite, retry_failed=False)
    return answers


def begin(path: Path) -> None:
    answers = opened(path, SETTINGS)
    answers.write([ROW])
    answers.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template": "vqa"}, 'chat_template is the default in it, and "vqa" was asked'),
        ({"temperature": None}, "temperature is 0.5 in it, and the default was asked"),
        ({"seed": 3}, "seed is the default in it, and 3 was asked"),
    ],
)
def test_another_set_of_options_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "out.jsonl"
    begin(path)
    before = path.read_bytes(), RunRecord(path).path.read_bytes()
    with pytest.raises(DataError) as error:
        opened(path, {**SETTINGS, **change})
    assert message in str(error.value)
    assert "--overwrite" in str(error.value)
    assert (path.read_bytes(), RunRecord(path).path.read_bytes()) == before
    again = opened(path, SETTINGS)  # and the lock is free again
    assert list(again.done) == ["a"]
    again.close()
    opened(path, {**SETTINGS, **change}, overwrite=True).close()  # a start that failed
    opened(path, SETTINGS).close()
    anew = opened(path, {**SETTINGS, **change}, overwrite=True)
    anew.write([{**ROW, "id": "b", "question": "And?"}])
    anew.close()
    with pytest.raises(DataError, match="was asked"):
        opened(path, SETTINGS)


def test_an_output_without_a_record_goes_on_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    begin(path)
    RunRecord(path).path.unlink()
    answers = opened(path, SETTINGS)
    assert "not recorded how it was made" in answers.notes[0]
    answers.close()
    with pytest.raises(DataError, match="temperature is"):
        opened(path, {**SETTINGS, "temperature": 1.0})


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"settings": 3}'])
def test_a_damaged_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "out.jsonl"
    begin(path)
    RunRecord(path).path.write_text(text)
    with pytest.raises(DataError, match=r"out\.jsonl\.run\.json: no record of a run.*remove it"):
        opened(path, SETTINGS)


def test_a_second_process_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first = opened(path, SETTINGS)
    code = f"""
from pathlib import Path
from lavish.cli.questions import Answers
Answers(Path({str(path)!r})).open([], {SETTINGS!r}, overwrite=True, retry_failed=False)
"""
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert second.returncode != 0
    assert f"process {os.getpid()} on " in second.stderr
    assert "is writing it" in second.stderr
    first.write([ROW])
    first.close()
    assert json.loads(path.read_text())["id"] == "a"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, "the lock ends with the run"


def test_nothing_is_left_where_nothing_was_answered(tmp_path: Path) -> None:
    opened(tmp_path / "out.jsonl", SETTINGS).close()
    assert list(tmp_path.iterdir()) == []
    stranger = tmp_path / "notes.txt"
    stranger.write_text("mine\n")
    with pytest.raises(DataError, match=r"no answer of `lavish predict`"):
        opened(stranger, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(DataError, match="a folder; --output is a file"):
        opened(tmp_path, SETTINGS)


def test_predict_refuses_other_options_and_leaves_no_file_of_a_failed_start(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"question": "Hello"}\n')
    arguments = ["predict", str(checkpoint), str(source), "-o", str(output), "--max-new-tokens", "2"]
    assert main([*arguments, "--dtype", "float17"]) == 2
    assert main([*arguments, "--template", "chatt"]) == 2
    assert main([*arguments, "--tokenizer", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    assert main(arguments) == 0
    before = output.read_bytes()
    capsys.readouterr()
    assert main([*arguments, "--template", "vqa"]) == 2
    assert 'chat_template is the default in it, and "vqa" was asked' in capsys.readouterr().err
    assert output.read_bytes() == before
    assert main(arguments) == 0
    assert output.read_bytes() == before
