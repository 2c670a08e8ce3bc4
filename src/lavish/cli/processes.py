"""A command on several processes: it starts them, or finds itself started by torchrun.

The first process does what the command does; the others compute along (`lavish.inference.in_step`) and say nothing.
torch is imported on use.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

import typer

from lavish.cli.terminal import say_error
from lavish.common import dist
from lavish.common.errors import ConfigError, LavishError

if TYPE_CHECKING:
    from lavish.inference.in_step import Channel
    from lavish.inference.vlm import VLM

SHARED_COMMANDS = ("chat", "predict")
FAILED = 2
CTRL_C = b"\x03"


def run(
    size: int | None,
    arguments: Sequence[str],
    device: str,
    load: Callable[[], VLM],
    work: Callable[[Callable[[], VLM]], int],
) -> int:
    """Run `work(load)` here, or on the processes of torchrun, or on `size` processes; give the exit status.

    `work` runs in the first process only, and calls `load` once or not at all; all processes load then. `arguments` are
    the command's, with which new processes are started.

    Raises:
        ConfigError: `size` is not the number of processes that torchrun started.
    """
    world_size = dist.world_size()
    if world_size > 1 and size not in (None, world_size):
        raise ConfigError(
            f"--tensor-parallel {size} in a run of {world_size} processes (WORLD_SIZE); leave one of them out."
        )
    if world_size == 1:
        return work(load) if size in (None, 1) else launch(size or 1, arguments)
    from lavish.inference.in_step import Channel, OutOfStep

    if not dist.is_main():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process says when to stop
    channel = Channel(device)
    try:
        return _lead(channel, load, work) if dist.is_main() else _follow(channel, load)
    except OutOfStep as end:
        _tell_once(channel, end.__cause__ or end)
        raise typer.Exit(FAILED) from end


def launch(size: int, arguments: Sequence[str]) -> int:
    """Start the command `size` times on this machine through torch's launcher, and give its exit status."""
    from tempfile import TemporaryDirectory
    from uuid import uuid4

    from lavish.cli.terminal import working

    with working("Starting"):
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    _silence_launcher()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    with TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=size,
            run_id=uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "lavish", *arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode >= 0:
                return failure.exitcode
            say_error(f"process {rank} of {size} was ended by {signal.Signals(-failure.exitcode).name}, and so all are")
            return FAILED
        except SignalException as error:
            return 128 + error.sigval
    return 0


@contextmanager
def one_voice(arguments: Sequence[str]) -> Iterator[None]:
    """Print nothing in the block if this is a process that follows another one."""
    if os.environ.get("RANK", "0") in ("", "0") or not arguments or arguments[0] not in SHARED_COMMANDS:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _lead(channel: Channel, load: Callable[[], VLM], work: Callable[[Callable[[], VLM]], int]) -> int:
    from lavish.inference.in_step import LOAD, lead

    keyboard = Keyboard()

    def load_together() -> VLM:
        with channel.together():
            channel.tell(LOAD)
            vlm = load()
        keyboard.take()
        lead(vlm, channel, keyboard.has_ctrl_c)
        return vlm

    try:
        return work(load_together)
    finally:
        keyboard.give_back()
        channel.dismiss()


def _follow(channel: Channel, load: Callable[[], VLM]) -> int:
    from lavish.inference.in_step import LOAD, OutOfStep, follow

    try:
        message, _ = channel.hear()
        if message["what"] == LOAD:
            follow(load(), channel)
    except (LavishError, RuntimeError) as error:  # as in_step's
        raise OutOfStep from error
    return 0


def _tell_once(channel: Channel, error: BaseException) -> None:
    """Print what ended the run, unless another process has done so. LAVISH_DEBUG shows where it came from."""
    from lavish.cli import is_debugging

    if not channel.is_first_to_fail(error):
        return
    message = str(error)
    if not isinstance(error, LavishError):
        message = f"process {dist.rank()} of {dist.world_size()} cannot go on: {type(error).__name__}: {message}"
    with redirect_stderr(sys.__stderr__):
        say_error(message)
        if is_debugging():
            import traceback

            traceback.print_exception(error)
    channel.has_told()


def _silence_launcher() -> None:
    """Leave words to the processes: torch's launcher logs a traceback for each that ends with a status."""
    import logging

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)


class Keyboard:
    """Ctrl-C as a key, read between two tokens.

    Trap: torch's launcher starts each process in a session of its own and takes the terminal's Ctrl-C as the end of
    all. So the terminal sends no signal while the model is there, and the first process, which has the terminal as
    its stdin, looks whether the key was pressed. What else is typed during an answer is lost; Ctrl-\\ still ends all.
    """

    def __init__(self) -> None:
        self._before: list[Any] | None = None

    def take(self) -> None:
        """Make Ctrl-C a key, if stdin is a terminal."""
        if not sys.stdin.isatty():
            return
        import termios

        handle = sys.stdin.fileno()
        self._before = termios.tcgetattr(handle)
        keys = list(self._before[6])
        keys[termios.VINTR], keys[termios.VMIN], keys[termios.VTIME] = b"\0", 1, 0  # NUL: no key
        modes = [*self._before[:3], self._before[3] & ~termios.ICANON, *self._before[4:6], keys]
        termios.tcsetattr(handle, termios.TCSADRAIN, modes)

    def has_ctrl_c(self) -> bool:
        """Say whether Ctrl-C was pressed since the last look."""
        if self._before is None:
            return False
        import select

        handle = sys.stdin.fileno()
        typed = b""
        while select.select([handle], [], [], 0)[0] and (piece := os.read(handle, 1024)):
            typed += piece
        return CTRL_C in typed

    def give_back(self) -> None:
        """Leave the terminal as it was."""
        if self._before is not None:
            import termios

            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, self._before)
            self._before = None
