"""Open files that a stranger made, each in a process of its own, and say what happened. Not a test: `test_hostile.py`
starts it once and sends one line of JSON a case.

A child does what a user would (list, check, load, convert) and may only read the case and write below its `out`. What
it starts, imports by a file's wish or writes elsewhere is told, with the CPU seconds and the memory that it took.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pty.spawn")
MAX_WALL_S = 60
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def doors() -> dict[str, Callable[[Path, Path], Any]]:
    """What a user can do with a path; `out` is an empty folder."""
    import lavish
    from lavish.cli import inspection
    from lavish.inference import checkup, convert

    def check(path: Path, out: Path) -> None:
        found = checkup.check(path)
        if found.problems:
            from lavish.common.errors import CheckpointError

            raise CheckpointError(found.problems[0])

    return {
        "inspect": lambda path, out: inspection.look(str(path)),
        "check": check,
        "load": lambda path, out: lavish.load(path),
        "convert": lambda path, out: convert.convert(path, out / "converted"),
    }


def watch(allowed: Path, seen: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    """Note what no reader of a checkpoint has a reason to do."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN or event.startswith("shutil."):
            seen.append(f"{event} {arguments!r:.200}")
        elif event == "open":
            name, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & WRITING)
            place = str(name)
            if writes and not place.startswith((str(allowed), "/dev/", "/proc/")) and not isinstance(name, int):
                seen.append(f"writes {place:.200}")
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.symlink", "os.link"):
            target = str(arguments[1] if event in ("os.rename", "os.symlink", "os.link") else arguments[0])
            if not target.startswith(str(allowed)):
                seen.append(f"{event} {target:.200}")

    return hook


def try_door(open_it: Callable[[Path, Path], Any], path: Path, out: Path) -> dict[str, Any]:
    """Open the case by one door; give the outcome, the CPU seconds and the memory above the start, in bytes."""
    from lavish.common.errors import LavishError

    seen: list[str] = []
    sys.addaudithook(watch(out, seen))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        open_it(path, out)
        outcome, says = "opened", ""
    except LavishError as error:
        outcome, says = type(error).__name__, str(error)
    except BaseException as error:  # noqa: BLE001 - the test is told of each
        outcome, says = f"untyped {type(error).__name__}", str(error)[:500]
    seconds = time.process_time() - started
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"outcome": outcome, "says": says[:2000], "seconds": seconds, "memory": memory, "seen": list(seen)}


def in_a_child(open_it: Callable[[Path, Path], Any], path: Path, out: Path) -> dict[str, Any]:
    """Run `try_door` in a fork, which inherits the imports; a crash is an outcome too."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(MAX_WALL_S)  # ends a child that waits, as at a device
        answer = try_door(open_it, path, out)
        with os.fdopen(writer, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    return (
        json.loads(text) if text else {"outcome": f"crash {status}", "says": "", "seconds": 0, "memory": 0, "seen": []}
    )


def warm_up(all_doors: dict[str, Callable[[Path, Path], Any]], whole: list[str], out: Path) -> None:
    """Open whole checkpoints first, so that what a door imports counts for no case."""
    for index, path in enumerate(whole):
        for name, open_it in all_doors.items():
            place = out / f"{index}{name}"
            place.mkdir(parents=True)
            with suppress(Exception):
                open_it(Path(path), place)


def main() -> None:
    """Read {"path", "out", "doors"} from stdin line by line (no doors: all); write {door: outcome}."""
    all_doors = doors()
    start = json.loads(sys.stdin.readline())
    warm_up(all_doors, start["whole"], Path(start["out"]))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        answers = {}
        for name in case["doors"] or all_doors:
            out = Path(case["out"]) / name
            out.mkdir(parents=True)
            answers[name] = in_a_child(all_doors[name], Path(case["path"]), out)
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
