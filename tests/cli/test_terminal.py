"""Numbers for people, and progress."""

import pytest

from lavish.cli.terminal import Progress, human_bytes, human_count, human_seconds, plain, say, say_error, working


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (999_999, "1.0 MB"), (39_006_214_656, "39.0 GB"), (123e6, "123 MB")]
)
def test_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(("count", "text"), [(12, "12"), (410_170, "410.17 k"), (19_503_107_328, "19.50 B")])
def test_counts(count: float, text: str) -> None:
    assert human_count(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.84, "0.8 s"), (60, "1:00"), (3723.4, "1:02:03")])
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_progress_into_a_file_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, done=4) as progress:
        progress.advance(3)
        progress.advance(3, failed=1)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("predict: 10 of 10, 1 failed, ")
    assert len(printed.err.splitlines()) == 1


def test_names_of_strangers_steer_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\x1b]0;title\x07\x9b2J\r\udcff.png"
    assert plain(hostile) == r"a\x1b]0;title\x07\x9b2J\r\udcff.png"
    assert plain("plain 图片 é\t\n") == "plain 图片 é\t\n"
    say(hostile)
    say_error(hostile)
    printed = capsys.readouterr().err
    assert printed.count(r"a\x1b]0;title\x07\x9b2J\r\udcff.png") == 2
    assert not {"\x1b", "\x07", "\x9b"} & set(printed)


def test_working_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with working("reading"):
        pass
    assert capsys.readouterr() == ("", "")
