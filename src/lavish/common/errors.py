"""The errors that lavish raises on purpose: one tree, each also the builtin that it refines.

    LavishError
    ├── CheckpointError (ValueError)        a checkpoint that cannot be read as asked
    │   ├── MissingKeys                     tensors that the config needs are absent
    │   ├── UnexpectedKeys                  tensors that the config has no place for
    │   ├── ShapeMismatch                   a tensor of another shape than the config says
    │   ├── UnknownLayout                   a folder or file of no layout or architecture that lavish knows
    │   └── UnsafeCheckpoint                reading it would run code or leave the folder
    ├── ConfigError (ValueError)            a config, recipe, option or registry name that is wrong
    ├── PromptError (ValueError)            messages that cannot be made into a prompt, or a prompt that does not fit
    ├── MediaError (ValueError)             an image or video that cannot or must not be opened
    ├── OutputError (OSError)               a result that cannot be written: a full disk, no permission
    ├── DataError (ValueError)              a dataset file or sample that is wrong
    ├── TrainingError (ArithmeticError)     a run that cannot go on: its loss or gradients are no numbers any more
    ├── NumericsError (ArithmeticError)     a network that gives NaN: damaged weights, or a dtype that overflows
    └── MissingDependency (ImportError)     an optional package that the call needs is not installed

The command line prints the message alone and exits with 2; the server maps the class to a status. A message says what
was asked, what was found, where, and what to do next; `did_you_mean` ends it with the nearest known name.
"""

import errno
import os
from collections.abc import Iterable


class LavishError(Exception):
    """Base of every error that lavish raises on purpose."""


class CheckpointError(LavishError, ValueError):
    """A checkpoint that cannot be read as asked."""


class MissingKeys(CheckpointError):
    """Tensors that the config needs are absent from the checkpoint."""


class UnexpectedKeys(CheckpointError):
    """The checkpoint holds tensors that the config has no place for."""


class ShapeMismatch(CheckpointError):
    """A tensor has another shape than the config says."""


class UnknownLayout(CheckpointError):
    """A folder, file or architecture that lavish does not know."""


class UnsafeCheckpoint(CheckpointError):
    """Reading the checkpoint would run code or leave its folder."""


class ConfigError(LavishError, ValueError):
    """A config, recipe, option or registry name that is wrong."""


class OutputError(LavishError, OSError):
    """A result that cannot be written."""


class PromptError(LavishError, ValueError):
    """Messages that cannot be made into a prompt, or a prompt that does not fit."""


class MediaError(LavishError, ValueError):
    """An image or video that cannot, or must not, be opened."""


class DataError(LavishError, ValueError):
    """A dataset file or a sample that is wrong."""


class TrainingError(LavishError, ArithmeticError):
    """A training run that cannot go on."""


class NumericsError(LavishError, ArithmeticError):
    """A network gave NaN or infinity."""


class MissingDependency(LavishError, ImportError):
    """An optional package that the call needs is not installed."""


def shown(value: object, most: int = 80) -> str:
    """Give the `repr` of a value that a caller gave, cut in its middle so that a message stays readable."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        text = f"a {type(value).__name__} that is too long to print"
    keep = (most - 3) // 2
    return text if len(text) <= most else f"{text[:keep]}...{text[-keep:]}"


def check_path(path: object, what: str) -> None:
    """Check that a caller's path is one: a text or a `Path` that the file system can be asked for.

    Raises:
        ConfigError: another type, empty, too long for a path, or with a NUL or half a character in it.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ConfigError(f"{what} must be a path or a hub id, not {shown(path)} ({type(path).__name__}).")
    try:
        os.stat(path)
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG or not os.fspath(path):
            raise ConfigError(f"{what}={shown(os.fspath(path))} can be no path: {_reason(error)}.") from error


def _reason(error: ValueError | OSError) -> str:
    return str(error.strerror or error).lower() if isinstance(error, OSError) else str(error)


def did_you_mean(name: str, known: Iterable[str], *, nearness: float = 0.6) -> str:
    """Give ` Did you mean 'x'?` for the known name nearest to `name`, to append to a message, or an empty string.

    Case, `-` and `_` count as equal. `nearness` is the least share of letters in common, from 0 to 1.
    """
    import difflib  # only a failing call pays for it

    def fold(text: str) -> str:
        return text.casefold().replace("-", "_")

    by_folded = {fold(other): other for other in known}
    nearest = difflib.get_close_matches(fold(name), list(by_folded), n=1, cutoff=nearness)
    return f" Did you mean {by_folded[nearest[0]]!r}?" if nearest else ""
