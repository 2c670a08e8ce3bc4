"""Wrong files on the command line: a message in words, status 2, and nothing left behind."""

from pathlib import Path

import pytest

from lavish.cli import main

LONG = "x" * 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "MODEL", "in.jsonl", "-o", "x" * 300], "File name too long"),
        (["predict", "MODEL", "in.jsonl", "-o", "plain.txt/x.jsonl"], "a part of its folder's name is a file"),
        (["predict", "MODEL", "in.jsonl", "-o", "folder"], "a folder; --output is a file"),
        (["predict", "MODEL", "folder", "-q", "?"], "no image found"),
        (["predict", "MODEL", "empty.jsonl"], "no line in it"),
        (["predict", "MODEL", LONG, "-q", "?"], "no such file or folder"),
        (["predict", "MODEL", "-q", "?", "-i", "folder"], "is a folder; name one image file"),
        (["predict", "MODEL", "-q", "?", "-i", "plain.txt"], "is text, not an image"),
        (["predict", LONG, "-q", "?"], "no such folder here"),
        (["chat", "folder"], "found nothing"),
        (["chat", "a\0b"], "no such folder here"),
        (["chat", "MODEL", "--tokenizer", LONG], "not a hub id"),
        (["inspect", "plain.txt"], "plain.txt: a file of no layout"),
        (["inspect", ""], "No model was named"),
        (["inspect", LONG], "no such folder here"),
        (["train", "folder"], "cannot be read"),
        (["evaluate", "none.yaml"], "no such config file"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_files(
    arguments: list[str],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain.txt").write_text("words")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "in.jsonl").write_text('{"question": "Hello"}\n')
    before = sorted(tmp_path.rglob("*"))
    assert main([str(checkpoint) if word == "MODEL" else word for word in arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err) < 700
    assert printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before
