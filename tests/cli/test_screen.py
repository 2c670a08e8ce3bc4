"""The terminal's screen, driven by typed keys; what a model writes is no control sequence."""

from collections.abc import Iterator

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from lavish.cli.dialogue import COMMANDS
from lavish.cli.screen import Pipes, Terminal, _completer, _hide_control_keys, fold_columns


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys


def test_typing_history_and_new_lines(keys: PipeInput) -> None:
    terminal = Terminal(COMMANDS)
    keys.send_text("Hello\r")
    assert terminal.read("You: ") == "Hello"
    keys.send_text("two\x1b\rlines\r")
    assert terminal.read("You: ") == "two\nlines"
    keys.send_text("\x1b[A\x1b[A\x1b[A\r")
    assert terminal.read("You: ") == "Hello"


def test_control_c_clears_the_line_first(keys: PipeInput) -> None:
    terminal = Terminal(COMMANDS)
    keys.send_text("half a questi\x03other\r")
    assert terminal.read("You: ") == "other"
    keys.send_text("\x03")
    with pytest.raises(KeyboardInterrupt):
        terminal.read("You: ")


def test_control_d_ends(keys: PipeInput) -> None:
    keys.send_text("\x04")
    with pytest.raises(EOFError):
        Terminal(COMMANDS).read("You: ")


def test_completion_of_commands_and_paths(tmp_path) -> None:
    (tmp_path / "photo.png").touch()
    completer = _completer(COMMANDS)

    def complete(text: str) -> list[str]:
        return [found.text for found in completer.get_completions(Document(text, len(text)), None)]

    assert complete("/te") == ["/template"]
    assert complete(f"/image {tmp_path}/ph") == ["oto.png"]
    assert complete("Hello /te") == []


def test_an_answer_has_a_label_and_no_control_sequences(keys: PipeInput, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(COMMANDS)
    terminal.begin("model: ", "reading ...")
    terminal.piece(" red\x1b[2J")
    terminal.piece("dish\n\tend\x07")
    terminal.end("0.1 s")
    printed = capsys.readouterr()
    assert printed.out == "red[2Jdish\n\tend\n"
    assert "model: " in printed.err


def test_pipes_end_with_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("one\r\ntwo"))
    pipes = Pipes()
    assert [pipes.read(""), pipes.read("")] == ["one", "two"]
    with pytest.raises(EOFError):
        pipes.read("")


def test_a_list_that_is_too_wide_is_folded() -> None:
    text = "/clear, clear         forget it\n/save [文件]          保存对话"
    assert fold_columns(text, 80) == text
    assert fold_columns(text, 28) == "/clear, clear\n    forget it\n/save [文件]\n    保存对话"
    assert fold_columns("one line  that is wide", 5) == "one line  that is wide"


def test_control_keys_are_not_written_into_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    termios = pytest.importorskip("termios")
    import os
    import pty

    master, terminal = pty.openpty()
    try:
        with os.fdopen(os.dup(terminal)) as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            show_again = _hide_control_keys()
            assert not termios.tcgetattr(terminal)[3] & termios.ECHOCTL
            show_again()
            assert termios.tcgetattr(terminal)[3] & termios.ECHOCTL
    finally:
        os.close(master)
        os.close(terminal)
