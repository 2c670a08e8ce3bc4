"""Where a dialogue is typed and shown: a terminal, or pipes with one question a line.

On a terminal the answer's label, the notes and a spinner stand around it; through pipes stdout holds the answers alone,
everything else goes to stderr. What a model writes never reaches a terminal as a control sequence.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from lavish.cli.terminal import CONTROL, console, plain, say, say_error

if TYPE_CHECKING:
    from rich.status import Status


class Screen(Protocol):
    """What a dialogue needs of a screen."""

    is_interactive: bool
    """True if a person can be asked again."""

    def read(self, prompt: str, *, wants_path: bool = False) -> str:
        """Give the next line. Raises EOFError at the end, KeyboardInterrupt on Ctrl-C."""
        ...

    def note(self, text: str) -> None:
        """Say something beside the conversation."""
        ...

    def error(self, text: str) -> None:
        """Say what went wrong."""
        ...

    def begin(self, label: str, waiting: str) -> None:
        """Get ready for an answer; `waiting` is shown until its first piece."""
        ...

    def piece(self, text: str) -> None:
        """Show the next piece of the answer."""
        ...

    def end(self, note: str = "") -> None:
        """End the answer, with a note behind it."""
        ...


class Pipes:
    """Lines from stdin, answers to stdout."""

    is_interactive = False

    def read(self, prompt: str, *, wants_path: bool = False) -> str:
        """Give the next line of stdin."""
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def note(self, text: str) -> None:
        """Write to stderr."""
        say(text)

    def error(self, text: str) -> None:
        """Write to stderr."""
        say_error(text)

    def begin(self, label: str, waiting: str) -> None:
        """Nothing: an answer has no label."""

    def piece(self, text: str) -> None:
        """Write to stdout at once."""
        sys.stdout.write(text if not sys.stdout.isatty() else CONTROL.sub("", text))
        sys.stdout.flush()

    def end(self, note: str = "") -> None:
        """End the line; the note is for people only."""
        sys.stdout.write("\n")
        sys.stdout.flush()


class Terminal:
    """A person at a terminal. If stdout is a file, the answers go there, and the rest to the terminal."""

    is_interactive = True

    def __init__(self, commands: tuple[str, ...]):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output

        self._shown = console(stderr=not sys.stdout.isatty())
        self._session: Any = PromptSession(
            completer=_completer(commands),
            complete_while_typing=False,
            key_bindings=_key_bindings(),
            output=create_output(always_prefer_tty=True),
        )
        self._paths: Any = PromptSession(
            completer=_path_completer(),
            complete_while_typing=False,
            key_bindings=_key_bindings(),
            output=create_output(always_prefer_tty=True),
        )
        self._label, self._status, self._has_begun = "", None, False
        self._echo: Callable[[], None] = _nothing
        self._status: Status | None

    def read(self, prompt: str, *, wants_path: bool = False) -> str:
        """Let the person type, with history, completion by Tab and Alt-Enter for a new line."""
        session = self._paths if wants_path else self._session
        return session.prompt([("bold ansigreen", prompt)])

    def note(self, text: str) -> None:
        """Print dimly; a list in two columns that is too wide gets its second column below the first."""
        self._shown.print(fold_columns(plain(text), self._shown.width), style="dim", markup=False)

    def error(self, text: str) -> None:
        """Print in red."""
        self._shown.print(plain(text), style="red", markup=False)

    def begin(self, label: str, waiting: str) -> None:
        """Start the spinner."""
        self._label, self._has_begun = label, False
        self._echo = _hide_control_keys()
        self._status = self._shown.status(waiting, spinner="dots", spinner_style="cyan")
        self._status.start()

    def piece(self, text: str) -> None:
        """Print the piece, before the first one the label."""
        if not self._has_begun:
            self._start_answer()
            text = text.lstrip()
        sys.stdout.write(CONTROL.sub("", text))
        sys.stdout.flush()

    def end(self, note: str = "") -> None:
        """End the line, and print the note dimly."""
        if not self._has_begun:
            self._start_answer()
        self._echo()
        sys.stdout.write("\n")
        sys.stdout.flush()
        if note:
            self.note(note)
        self._shown.print()

    def _start_answer(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
        self._has_begun = True
        self._shown.print(plain(self._label), style="bold cyan", end="", markup=False)


def fold_columns(text: str, width: int) -> str:
    """Put what stands behind two spaces or more into a line of its own, where a line is wider than the terminal."""
    from rich.cells import cell_len

    if "\n" not in text or all(cell_len(line) <= width for line in text.split("\n")):
        return text
    return re.sub(r"(?m)^(\S.*?) {2,}(\S.*)$", r"\1\n    \2", text)


def _nothing() -> None:
    pass


def _hide_control_keys() -> Callable[[], None]:
    """Keep the terminal from writing ^C into an answer; give what undoes it."""
    try:
        import termios
    except ImportError:  # Windows
        return _nothing
    try:
        handle = sys.stdin.fileno()
        before = termios.tcgetattr(handle)
    except (OSError, ValueError, termios.error):  # no terminal
        return _nothing
    quiet = [*before[:3], before[3] & ~termios.ECHOCTL, *before[4:]]
    termios.tcsetattr(handle, termios.TCSADRAIN, quiet)
    return lambda: termios.tcsetattr(handle, termios.TCSADRAIN, before)


def _completer(commands: tuple[str, ...]) -> Any:
    from prompt_toolkit.completion import Completer, WordCompleter
    from prompt_toolkit.document import Document

    names, paths = WordCompleter(list(commands), sentence=True), _path_completer()

    class CommandCompleter(Completer):
        """Completes the commands, and a path behind `/image` and `/save`."""

        def get_completions(self, document: Document, complete_event: Any) -> Any:
            text = document.text_before_cursor
            first, space, rest = text.partition(" ")
            if space and first in ("/image", "/save"):
                return paths.get_completions(Document(rest, len(rest)), complete_event)
            return names.get_completions(document, complete_event) if text.startswith("/") else iter(())

    return CommandCompleter()


def _path_completer() -> Any:
    from prompt_toolkit.completion import PathCompleter

    return PathCompleter(expanduser=True)


def _key_bindings() -> Any:
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    def _interrupt(event: Any) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return bindings
