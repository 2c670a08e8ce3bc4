"""SAT's checkpoints on the command line: chat with the options of SAT's demo, predict, convert, and what goes wrong."""

import io
import json
import shutil
from pathlib import Path

import pytest

import lavish
from lavish.cli import main

OPEN = Path(__file__).resolve().parents[1] / "fixtures/cogvlm_sat/open"
PICTURE = OPEN / "inputs/landscape.png"
QUESTION = "Describe this image in detail."


@pytest.fixture
def expected() -> str:
    content = [{"type": "image", "image": str(PICTURE)}, {"type": "text", "text": QUESTION}]
    vlm = lavish.load(OPEN / "checkpoint", tokenizer=OPEN / "tokenizer", device="cpu")
    return vlm.chat([{"role": "user", "content": content}], max_new_tokens=8).text


def test_chat_with_the_options_of_sat_s_demo(
    expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PICTURE}\n{QUESTION}\nclear\n\nstop\n"))
    options = "--version chat_old --temperature .8 --top_p .4 --top_k 1 --max_length 41 --stream_chat --english"
    where = ["--from_pretrained", str(OPEN / "checkpoint_mp2"), "--local_tokenizer", str(OPEN / "tokenizer")]
    assert main(["chat", *where, *options.split()]) == 0
    printed = capsys.readouterr()
    assert printed.out == expected + "\n"
    assert "was trained with" not in printed.err


def test_no_prompt_captions_a_picture(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PICTURE}\nstop\n"))
    where = [str(OPEN / "checkpoint"), "--local_tokenizer", str(OPEN / "tokenizer")]
    assert main(["chat", *where, "--no_prompt", "--version", "base", "--max_length", "27", "--english"]) == 0
    reference = json.loads((OPEN / "expected.json").read_text(encoding="utf-8"))["base_empty"]["response"]
    assert capsys.readouterr().out.strip() == reference


@pytest.mark.parametrize(
    ("name", "version", "warns"),
    [
        ("cogvlm-chat-v1.1", "base", True),
        ("cogvlm-chat-v1.1", "vqa", False),
        ("cogvlm-chat-v1.1", "inst", True),
        ("cogvlm-base-490", "chat_old", True),
        ("cogvlm-base-490", "base", False),
        ("mine", "base", False),
    ],
)
def test_a_version_that_does_not_fit_the_name(
    tmp_path: Path, name: str, version: str, warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(OPEN / "checkpoint", tmp_path / name)
    options = ["--tokenizer", str(OPEN / "tokenizer"), "--max-new-tokens", "1", "--template", version]
    assert main(["predict", str(root), "--image", str(PICTURE), "--question", "Hi", *options]) == 0
    assert ("was trained with the template" in capsys.readouterr().err) == warns


def test_predict_and_convert(expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["--image", str(PICTURE), "--question", QUESTION, "--max-new-tokens", "8"]
    where = ["--tokenizer", str(OPEN / "tokenizer")]
    assert (
        main(["convert", str(OPEN / "checkpoint"), str(tmp_path / "two"), "--to", "sat", "--model-parallel", "2"]) == 0
    )
    assert main(["convert", str(tmp_path / "two"), str(tmp_path / "hf"), *where]) == 0
    capsys.readouterr()
    for folder in (OPEN / "checkpoint_mp2", tmp_path / "two", tmp_path / "hf"):
        assert main(["predict", str(folder), *ask, *(where if folder.name != "hf" else [])]) == 0
        assert capsys.readouterr().out == expected + "\n"


def test_faults_are_one_line_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = shutil.copytree(OPEN / "checkpoint_mp2", tmp_path / "mine")
    ask = ["--image", str(PICTURE), "--question", "Hi"]
    assert main(["predict", str(root), *ask]) == 2
    assert "no tokenizer" in capsys.readouterr().err
    (root / "1/mp_rank_01_model_states.pt").unlink()
    assert main(["predict", str(root), *ask]) == 2
    assert "1 of 2 ranks are absent" in capsys.readouterr().err
    (root / "latest").write_text("newest")
    assert main(["predict", str(root), *ask]) == 2
    assert "it holds an iteration's number or the word 'release'" in capsys.readouterr().err
