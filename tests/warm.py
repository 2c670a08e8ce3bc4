"""Python programs in processes of their own that start at once: forks of a server that has imported what they need.

A new Python takes three seconds to import torch and transformers, and a run of several processes takes that for each.
The server (of `multiprocessing`) is started once by each test process. What `torchrun` itself does is tested where a
test calls it; for all else the processes get its variables here.
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

IMPORTED = [
    *("torch", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers", "lavish", "lavish.cli"),
    *(
        "lavish.inference.load",
        "lavish.inference.parallel",
        "lavish.models.cogvlm.model",
        "lavish.models.glm4v_9b.model",
    ),
    *("lavish.models.minigpt4_qwen.model", "lavish.runners.recipe", "lavish.runners.runner_iter"),
]
_SERVED = multiprocessing.get_context("forkserver")
_SERVED.set_forkserver_preload(IMPORTED)
GRACE_S = 5.0
"""How long the others may go on after one has failed."""


def run(
    *arguments: object, environment: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 240
):
    """Run one program; see `run_together`."""
    return run_together(1, *arguments, environment=environment, cwd=cwd, timeout=timeout)


def run_together(
    size: int,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 240,
) -> "subprocess.CompletedProcess[str]":
    """Run a program in `size` processes as torchrun does; one that fails ends the others.

    Args:
        size: of the run; 1: without torchrun's variables.
        arguments: as of `python`: the path of a program, `-m` and a module, or `-c` and code; then its own.
        environment: variables besides those of this process.
        cwd: working folder.
        timeout: seconds.
    """
    command = [str(argument) for argument in arguments]
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        processes = []
        for rank in range(size):
            own = {**os.environ, **(environment or {}), **(_variables(rank, size, port) if size > 1 else {})}
            place = str(cwd or Path.cwd())
            processes.append(_SERVED.Process(target=_be, args=(command, own, place, str(out), str(err))))
        try:
            for process in processes:
                process.start()
            code = _wait(processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        told, complained = out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")
    return subprocess.CompletedProcess(command, code, told, complained)


def _variables(rank: int, size: int, port: int) -> dict[str, str]:
    number, count = str(rank), str(size)
    names = {
        "RANK": number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "OMP_NUM_THREADS": "1",
    }
    return names | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _wait(processes: list[BaseProcess], timeout: float) -> int:
    """Wait for all, and give the first exit status that is not 0; after it the others have a few seconds."""
    ends = time.monotonic() + timeout
    failed = 0
    while any(process.exitcode is None for process in processes):
        if time.monotonic() > ends:
            if failed:
                return failed
            raise TimeoutError(f"The processes took more than {timeout} s.")
        time.sleep(0.02)
        if not failed:
            failed = next((process.exitcode for process in processes if process.exitcode), 0)
            ends = min(ends, time.monotonic() + GRACE_S) if failed else ends
    return failed or next((process.exitcode for process in processes if process.exitcode), 0)


def _be(command: list[str], environment: dict[str, str], place: str, out: str, err: str) -> None:
    """Become the program: its variables, folder, streams and arguments."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place)
    for name, number in ((os.devnull, 0), (out, 1), (err, 2)):
        opened = os.open(name, os.O_RDWR | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    try:
        if command[0] == "-c":
            sys.argv = ["-c", *command[2:]]
            exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
        elif command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
