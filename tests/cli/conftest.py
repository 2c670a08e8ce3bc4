"""The tiny CogVLM2 of the fixtures, loaded once, and a screen that reads from a list."""

from pathlib import Path

import pytest

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
CHECKPOINT = FIXTURES / "cogvlm2" / "open" / "checkpoint"
PICTURES = FIXTURES / "cogvlm" / "open" / "inputs"


class Script:
    """A screen whose person types what the script says; an exception in it is raised instead."""

    def __init__(self, lines: list, *, is_interactive: bool = True, interrupt_at: int | None = None):
        self.lines, self.is_interactive, self.interrupt_at = list(lines), is_interactive, interrupt_at
        self.prompts: list[str] = []
        self.notes: list[str] = []
        self.errors: list[str] = []
        self.answers: list[str] = []
        self.labels: list[str] = []

    def read(self, prompt: str, *, wants_path: bool = False) -> str:
        self.prompts.append(prompt)
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, type):
            raise line
        return line

    def note(self, text: str) -> None:
        self.notes.append(text)

    def error(self, text: str) -> None:
        self.errors.append(text)

    def begin(self, label: str, waiting: str) -> None:
        self.labels.append(label)
        self.answers.append("")
        self._num_pieces = 0

    def piece(self, text: str) -> None:
        self.answers[-1] += text
        self._num_pieces += 1
        if self._num_pieces == self.interrupt_at:
            raise KeyboardInterrupt

    def end(self, note: str = "") -> None:
        self.notes.append(note)


@pytest.fixture(scope="session")
def vlm():
    import lavish

    return lavish.load(CHECKPOINT)


@pytest.fixture
def script() -> type[Script]:
    return Script


@pytest.fixture
def checkpoint() -> Path:
    return CHECKPOINT


@pytest.fixture
def picture() -> Path:
    return PICTURES / "square.png"


@pytest.fixture
def other_picture() -> Path:
    return PICTURES / "landscape.png"
