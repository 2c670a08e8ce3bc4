"""What a command prints names options, not keyword arguments of Python."""

import json
import re
from pathlib import Path

import pytest

from lavish.cli import main
from lavish.cli.spelling import NAMES, PATHS, PIECES, for_command_line

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("Name it: llm=...", "Name it: --piece llm=PATH"),
        ("Name the right one with tokenizer=...", "Name the right one with --tokenizer PATH"),
        ("or give them: config=...", "or give them: --config FILE"),
        (
            "Give it: config={'vision_config': {'num_attention_heads': ...}}.",
            "Give it: --config FILE, a JSON or YAML file with {'vision_config': {'num_attention_heads': ...}}.",
        ),
        ("device='gpu' was asked", "--device gpu was asked"),
        ("use lavish.load(folder, llm=..., vision_tower=...).",
         "use lavish chat folder --piece llm=PATH --piece vision_tower=PATH."),
        ("parallel='tensor' shares it", "--tensor-parallel N shares it"),
        ("a text with base=7 and llm='x y' stays", "a text with base=7 and llm='x y' stays"),
    ],
)  # fmt: skip
def test_one_message(message: str, printed: str) -> None:
    assert for_command_line(message) == printed


PYTHON = re.compile(rf"(?<!--piece )\b({'|'.join((*PATHS, *PIECES, *NAMES, 'config'))})=(\.\.\.|['{{])")


def printed_by(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["predict", *arguments, "--question", "Hello", "--device", "cpu"]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_piece_that_is_absent(capsys: pytest.CaptureFixture[str]) -> None:
    printed = printed_by([str(FIXTURES / "minigpt4qwen/open/checkpoint")], capsys)
    assert "Name it: --piece llm=PATH" in printed
    assert not PYTHON.search(printed)


def test_a_field_that_is_absent(capsys: pytest.CaptureFixture[str]) -> None:
    pieces = ["--piece", f"llm={FIXTURES / 'qwen/llm'}"]
    printed = printed_by([str(FIXTURES / "minigpt4qwen/open/checkpoint"), *pieces], capsys)
    assert "--config FILE, a JSON or YAML file with {'vision_config': {'num_attention_heads'" in printed
    assert not PYTHON.search(printed)


def test_a_base_that_is_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = json.loads((FIXTURES / "glm4v/open/adapter/adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": "./nowhere"}))
    printed = printed_by([str(tmp_path)], capsys)
    assert "with --base PATH" in printed
    assert not PYTHON.search(printed)
