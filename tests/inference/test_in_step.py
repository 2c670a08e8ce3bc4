"""One process asks and another computes along: the same answers, also after an answer that was cut short."""

import json
import signal
from pathlib import Path

import pytest
from in_step_program import answers
from warm import run_together

import lavish
from lavish.inference.in_step import undisturbed

PROGRAM = Path(__file__).with_name("in_step_program.py")


def test_answers_stay_in_step_after_an_interruption(v2, tmp_path: Path) -> None:
    picture, told = v2.image("square.png"), tmp_path / "told.json"
    done = run_together(2, PROGRAM, v2.folder, picture, told)
    assert done.returncode == 0, done.stderr
    found = json.loads(told.read_text())
    alone = answers(lavish.load(v2.folder, device="cpu"), str(picture))
    assert len({len(row) for row in alone[-3:]}) > 1, "rows of the batch must end one after the other"
    assert found["first"] == found["again"] == "cancelled"
    assert found["answers"] == alone
    assert found["after"] == alone
    assert found["length"] <= 3, "caches that the first process let go are let go by all"


@pytest.fixture
def heard():
    """Ctrl-C as in a terminal; a shell starts what runs in its background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_the_end_of_a_pass(heard) -> None:
    passed = []

    def a_pass() -> None:
        with undisturbed():
            signal.raise_signal(signal.SIGINT)
            passed.append("the rest of the block")

    with pytest.raises(KeyboardInterrupt):
        a_pass()
    assert passed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
