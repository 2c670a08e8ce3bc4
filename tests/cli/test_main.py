"""The command itself: statuses, messages on stderr, names and suggestions."""

import io
import json
import subprocess
import sys

import pytest

from lavish.cli import main, normalize_option
from lavish.models import ZOO


def test_unknown_command_suggests(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zo"]) == 2
    assert "zoo" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import lavish

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lavish {lavish.__version__}\n"


def test_a_lavish_error_is_its_message_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "cogvlm2-lama3-chat-19B"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: 'cogvlm2-lama3-chat-19B': no such folder here")
    assert "Did you mean 'cogvlm2-llama3-chat-19B'?" in printed.err
    assert "Traceback" not in printed.err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from lavish.common.errors import ConfigError

    monkeypatch.setenv("LAVISH_DEBUG", "1")
    with pytest.raises(ConfigError):
        main(["inspect", "nothing-of-this-name"])


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdout", Interrupted())
    assert main(["zoo", "--json"]) == 130


def test_an_unforeseen_error_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delenv("LAVISH_DEBUG", raising=False)
    main(["--version"])
    sys.excepthook(RuntimeError, RuntimeError("boom"), None)
    assert capsys.readouterr().err.startswith("error: a fault of lavish, please report it: RuntimeError: boom\n")


def test_underscores_are_dashes() -> None:
    assert normalize_option("max_new_tokens") == "max-new-tokens"


def test_zoo_lists_every_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["zoo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for entry in ZOO:
        assert any(line.startswith(entry.name) for line in lines)
        assert entry.hub_id is None or any(line.startswith(entry.hub_id) for line in lines)


def test_zoo_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == {entry.name for entry in ZOO}
    assert all(row["licence"] and row["good_at"] and row["num_bytes"] for row in rows)
    bundled = [row["hub_id"] is None for row in rows]
    assert bundled == sorted(bundled, reverse=True), "the bundled model comes first"


def test_python_m_lavish() -> None:
    run = subprocess.run([sys.executable, "-m", "lavish", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("lavish ")
    wrong = subprocess.run([sys.executable, "-m", "lavish", "evaluate", "x" * 5000], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert len(wrong.stderr) < 400
