"""`--tensor-parallel N` and torchrun: the answers of one process, one voice, Ctrl-C in step, one message at the end."""

import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lavish.cli import main
from lavish.cli.processes import one_voice

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "LC_ALL": "C.UTF-8"}
LAVISH = [sys.executable, "-m", "lavish"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FAILING = str(Path(__file__).with_name("one_fails_program.py"))


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | environment, timeout=280)


# -- predict -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_many_answers_are_those_of_one_process_and_go_on_after_a_kill(
    size, checkpoint: Path, picture: Path, other_picture: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_text("no image")
    lines = [
        {"image": str(picture), "question": "What?", "id": "a"},
        {"image": "bad.png", "question": "What?", "id": "b"},
        {"question": "Hello", "id": "c"},
        {"image": str(other_picture), "question": "word " * 9000, "id": "d"},
        {"image": str(picture), "question": "And a longer one here?", "id": "e"},
        {"image": str(other_picture), "question": "Where?", "id": "f"},
    ]
    source, alone, shared = (tmp_path / name for name in ("in.jsonl", "alone.jsonl", "shared.jsonl"))
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--batch-size", "3", "--max-new-tokens", "12", "--device", "cpu"]
    assert main(["predict", str(checkpoint), str(source), "-o", str(alone), *options]) == 1
    expected = alone.read_text().splitlines(keepends=True)
    # What a killed run leaves: whole lines and a torn one, with the record of its options.
    shared.write_text("".join(expected[:2]) + expected[2][:20])
    Path(f"{shared}.run.json").write_text(Path(f"{alone}.run.json").read_text())
    arguments = ["predict", str(checkpoint), str(source), "-o", str(shared), *options]
    done = run([*LAVISH, *arguments, "--tensor-parallel", str(size)])
    assert done.returncode == 1, done.stderr
    assert shared.read_text().splitlines(keepends=True) == expected
    assert done.stdout == ""
    assert "2 of 6 are in" in done.stderr
    assert done.stderr.count("loaded in") == 1
    assert done.stderr.count("4 answered, 2 failed") == 1
    assert "Traceback" not in done.stderr


def test_one_answer_under_torchrun(checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No option is needed: several processes never run alone."""
    asked = [str(checkpoint), "--image", str(picture), "-q", "What is it?", "--max-new-tokens", "9", "--device", "cpu"]
    assert main(["predict", *asked]) == 0
    expected = capsys.readouterr().out
    done = run([*TORCHRUN, "-m", "lavish", "predict", *asked])
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected  # once, and by the first process alone
    assert done.stderr.count("loaded in") == 1


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-q", "Hello", "--tensor-parallel", "3"], "parallel='tensor' with 3 processes: the 4 heads of"),
        (["-q", "Hello", "--tensor-parallel", "2", "--quantization", "int8"], "takes no quantised network"),
        (["--image", "absent.png", "--tensor-parallel", "2"], "The image file 'absent.png' does not exist"),
    ],
)
def test_what_all_or_the_first_find_wrong_is_said_once(arguments, message, checkpoint: Path) -> None:
    done = run([*LAVISH, "predict", str(checkpoint), "--device", "cpu", *arguments])
    assert done.returncode == 2
    assert done.stderr.count(message) == 1, done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raised", "process 1 of 2 cannot go on: OutOfMemoryError: no memory left on this one"),
        ("killed", "Signal 9 (SIGKILL)"),  # torchrun's own words: nobody is left to say more
    ],
)
def test_one_that_fails_ends_all_with_its_message(how, message, checkpoint: Path) -> None:
    started_s = time.monotonic()
    asked = ["predict", str(checkpoint), "-q", "Hello", "--max-new-tokens", "50", "--device", "cpu"]
    done = run([*TORCHRUN, FAILING, *asked], HOW=how)
    assert done.returncode == 1  # torchrun's
    assert done.stderr.count(message) == 1, done.stderr
    assert done.stderr.count("error:") == (how == "raised"), done.stderr
    assert done.stdout == ""
    assert time.monotonic() - started_s < 120


def test_another_number_of_processes_than_torchrun_s_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["predict", "-q", "Hello", "--tensor-parallel", "4"]) == 2
    assert "--tensor-parallel 4 in a run of 2 processes (WORLD_SIZE); leave one of them out." in capsys.readouterr().err


def test_a_world_without_its_other_variables_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(["predict", "-q", "Hello", "--device", "cpu"]) == 2
    assert "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set." in capsys.readouterr().err


def test_those_that_follow_say_nothing(monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "1")
    with one_voice(["predict", "--nonsense"]):
        print("said by all")
    with one_voice(["train"]):
        print("said by each")
    assert capsys.readouterr().out == "said by each\n"


# -- chat --------------------------------------------------------------------------------------------------------------


class Talk:
    """A chat at a terminal of its own."""

    def __init__(self, command: list[str]):
        import pty

        self.terminal, inside = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=inside, stdout=inside, stderr=inside, env=ENVIRONMENT | {"TERM": "xterm"}, close_fds=True
        )
        os.close(inside)
        self.seen = ""

    def wait_for(self, pattern: str, timeout_s: float = 120) -> str:
        """Read until something shows, and give what showed up to it."""
        end_s = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end_s, f"{pattern!r} did not show in {self.seen!r}"
            if select.select([self.terminal], [], [], 0.2)[0]:
                piece = os.read(self.terminal, 65536).decode(errors="replace")
                if "\x1b[6n" in piece:  # where is the cursor?
                    os.write(self.terminal, b"\x1b[1;1R")
                self.seen += piece
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of its own")
@pytest.mark.parametrize("start", ["option", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_ctrl_c_ends_an_answer_and_the_talk_goes_on(start, checkpoint: Path) -> None:
    chat = ["chat", str(checkpoint), "--device", "cpu", "--lang", "en", "--max-new-tokens", "1500"]
    command = [*LAVISH, *chat, "--tensor-parallel", "2"] if start == "option" else [*TORCHRUN, "-m", "lavish", *chat]
    talk = Talk(command)
    try:
        talk.wait_for("(?i)image")
        talk.wait_for(r"\x1b\[6n|\?25h")
        talk.type("\r")
        talk.wait_for("(?i)you")
        for _ in range(2):
            talk.type("Tell me a long story\r")
            talk.wait_for("checkpoint")
            time.sleep(1)
            talk.type("\x03")
            talk.wait_for("(?i)stopped")
            talk.wait_for("(?i)you")
        talk.type("/quit\r")
        assert talk.process.wait(60) == 0
    finally:
        talk.process.kill()
        talk.process.wait()
        os.close(talk.terminal)
