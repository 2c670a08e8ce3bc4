"""The command `lavish`: one module a command, imported when it is used; torch only by commands that run a network.

A command's module has a function `command` with typer's annotations, or `subcommands`, several of them by name: the
docstring is the help, what it returns (None or a number) is the exit status. Results go to stdout, everything else to
stderr. A `LavishError` is printed as its message alone and ends with status 2, Ctrl-C with 130; LAVISH_DEBUG=1 shows
the traceback.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from inspect import getdoc
from pathlib import Path
from types import TracebackType
from typing import Any

import typer
from typer.core import TyperGroup

from lavish import __version__
from lavish.cli.spelling import for_command_line
from lavish.common.errors import LavishError

__all__ = ["main"]

ORDER = ("chat", "predict", "data", "train", "evaluate", "convert", "inspect", "serve", "zoo")
"""The commands in the order of `lavish --help`."""
FAILED, INTERRUPTED = 2, 130
HERE = Path(__file__).resolve().parent


class Commands(TyperGroup):
    """Finds a command's module by its name and turns what goes wrong in it into a message and a status."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Name the commands whose module is here."""
        return [name for name in ORDER if (HERE / f"{name}.py").is_file()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command's module and give the command, or None."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = vars(import_module(f"lavish.cli.{cmd_name}"))
        if "subcommands" not in module:
            return _click_command({cmd_name: module["command"]})
        group = _click_command(module["subcommands"], help=module["__doc__"])
        group.name = cmd_name
        return group

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; typer suggests the nearest of `list_commands` for a name that is none."""
        self.commands = dict.fromkeys(self.list_commands(ctx), self.callback)  # pyright: ignore
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command and exit with its status."""
        try:
            status = super().invoke(ctx)
        except LavishError as error:
            if is_debugging():
                raise
            _say(for_command_line(str(error)))
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            if is_debugging():
                raise
            raise typer.Exit(INTERRUPTED) from error
        raise typer.Exit(status if isinstance(status, int) else 0)


def _click_command(functions: dict[str, Any], help: str | None = None) -> Any:
    """Make a command of one function, or a group of several."""
    is_group = len(functions) > 1
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode="rich",
        context_settings=SETTINGS,
        help=help,
        no_args_is_help=is_group,
    )
    for name, function in functions.items():
        app.command(name, help=re.sub(r"(?<!\n)\n(?!\n)", " ", getdoc(function) or ""))(function)
    return typer.main.get_command(app)


def normalize_option(name: str) -> str:
    """Give an option's name with dashes: the released demos spell `--max_length`, and both are taken."""
    return name.replace("_", "-")


SETTINGS = {"help_option_names": ["-h", "--help"], "token_normalize_func": normalize_option}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `lavish` with the arguments of the process, or these, and give the exit status."""
    from lavish.cli.mindformers import translated
    from lavish.cli.processes import one_voice

    sys.excepthook = _report_fault
    given = list(sys.argv[1:] if arguments is None else arguments)
    app = typer.Typer(
        cls=Commands, add_completion=False, rich_markup_mode="rich", no_args_is_help=True, context_settings=SETTINGS
    )
    app.callback()(_options)
    try:
        with translated(given) as understood, one_voice(understood):
            typer.main.get_command(app).main(args=understood, prog_name="lavish", obj=understood)
    except LavishError as error:  # of `translated`: those of a command are told where it runs
        if is_debugging():
            raise
        _say(str(error))
        return FAILED
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def is_debugging() -> bool:
    """Tell whether LAVISH_DEBUG asks for tracebacks."""
    return os.environ.get("LAVISH_DEBUG", "") not in ("", "0")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lavish {__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Talk with open vision-language models: load, ask, look inside, natively and equal to their releases.

    Without a model's name the small one that comes with lavish answers. Each command has its own --help.
    """


def _say(message: str) -> None:
    from lavish.cli.terminal import say_error

    say_error(message)


def _report_fault(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print an error that nobody foresaw: in one line, unless LAVISH_DEBUG is set."""
    if is_debugging() or issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    _say(f"a fault of lavish, please report it: {kind.__name__}: {error}\nLAVISH_DEBUG=1 shows where it happened.")
