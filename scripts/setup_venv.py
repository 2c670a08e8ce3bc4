"""Make `.venv` with torch, lavish and its extras: the half of `scripts/setup` in Python, standard library only.

It is idempotent (a stamp keyed on pyproject.toml, constraints.txt and the Python says what is installed), resumes after
an interruption (a `.venv` whose packages were half written is made anew) and keeps pip's own output in
`.venv/setup.log`. Packages come from wherever pip is configured to look; no index is named here.
"""

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup.json"
LOG = VENV / "setup.log"
CONSTRAINTS = ROOT / "constraints.txt"
HEARTBEAT_S = 10  # between progress lines where the output is no terminal
NO_NETWORK = re.compile(
    r"(Failed to establish a new connection|Temporary failure in name resolution|Name or service not known|dns error"
    r"|Network is unreachable|Connection refused|ConnectTimeout|ReadTimeout|Could not fetch URL|error sending request"
    r"|nodename nor servname|from versions: none)",
    re.IGNORECASE,
)


class SetupError(Exception):
    """A step that failed; the message says what to do."""


class Progress:
    """One line a step: what it does, what pip is at, how long it took.

    On a terminal the line is redrawn; elsewhere a new one follows every ten seconds.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.detail = ""
        self.outcome = "done"
        self.started_s = time.monotonic()
        self.is_tty = sys.stderr.isatty()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    @property
    def elapsed(self) -> str:
        seconds = time.monotonic() - self.started_s
        return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"

    def __enter__(self) -> "Progress":
        if not self.is_tty:
            say(f"{self.title} ...")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._write(f"{self.title}: {'stopped' if kind else self.outcome} after {self.elapsed}", end="\n")

    def _write(self, line: str, end: str) -> None:
        if self.is_tty:
            columns = shutil.get_terminal_size().columns - 1
            line = "\r\033[K" + line[:columns]
        print(line, end=end, file=sys.stderr, flush=True)

    def _beat(self) -> None:
        while not self._done.wait(0.2 if self.is_tty else HEARTBEAT_S):
            self._write(f"{self.title}: {self.elapsed}  {self.detail}", end="" if self.is_tty else "\n")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(command: list[str], progress: Progress) -> tuple[int, str]:
    """Run `command`, log what it prints, show pip's steps as progress. Returns its exit status and output.

    From the moment that pip writes packages until it ends, the stamp says so: a kill in between is seen next time.
    """
    lines: list[str] = []
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PYTHONUNBUFFERED": "1"}
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        with process, io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace") as output:
            try:
                for line in output:
                    log.write(line)
                    lines.append(line)
                    progress.detail = pip_step(line) or progress.detail
                    if line.startswith(("Installing collected packages", "Resolved ")):  # pip, uv
                        write_stamp(**read_stamp() | {"writing": True})
            except BaseException:
                process.terminate()
                raise
    write_stamp(**read_stamp() | {"writing": False})
    return process.returncode, "".join(lines)


def pip_step(line: str) -> str:
    """Give the few words of a pip or uv line that tell where it stands, or "" for the others."""
    words = line.split()
    if not words:
        return ""
    if words[0] == "Collecting":
        return f"resolving {words[1]}"
    if words[0] in ("Downloading", "Processing", "Using"):
        name = next((word.rsplit("/", 1)[-1] for word in words if ".whl" in word or ".tar" in word), "")
        size = line[line.find("(") :].strip() if "(" in line else ""
        verb = "downloading" if words[0] == "Downloading" else "using"
        return f"{verb} {'-'.join(name.split('-')[:2])} {size}".rstrip()
    if line.startswith("Installing collected packages"):
        return f"installing {line.count(',') + 1} packages"
    return ""


def explain(output: str) -> str:
    """Give the end of a failed command's output and what to do about it."""
    tail = "\n".join("  " + line for line in output.strip().splitlines()[-8:])
    advice = "Run the same command again once that is mended: what is already downloaded is kept."
    if NO_NETWORK.search(output):
        advice = (
            "The package index cannot be reached. Check the network, or set pip up for your proxy or mirror "
            "(pip config), then run the same command again: what is already downloaded is kept."
        )
    elif "No space left on device" in output:
        advice = "The disk is full: lavish needs about 2 GB for the CPU build, 8 GB with CUDA."
    return f"{tail}\n{advice}\nThe whole output: {LOG.relative_to(ROOT)}"


def has_nvidia_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "GPU" in answer.stdout


def wants_cpu_torch() -> bool:
    """Tell whether to look for torch's CPU build: on Linux without an NVIDIA GPU.

    The default build there brings gigabytes of CUDA libraries.
    """
    choice = os.environ.get("LAVISH_TORCH", "")
    if choice not in ("", "cpu", "default"):
        raise SetupError(
            f"LAVISH_TORCH={choice!r} is neither 'cpu' (torch's CPU build) nor 'default' (the build that pip offers). "
            "Leave it unset to let the set-up look for a GPU."
        )
    if choice:
        return choice == "cpu"
    return platform.system() == "Linux" and not has_nvidia_gpu()


def pinned_torch() -> str:
    found = re.search(r"^torch==([\w.]+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise SetupError("constraints.txt has no line torch==VERSION.")
    return found[1]


def state_key() -> str:
    """Hash what decides the content of `.venv`: the project's two files, the Python and the choice of torch."""
    machine = (sys.version_info[:2], platform.machine(), os.environ.get("LAVISH_TORCH", ""))
    digest = hashlib.sha256(repr(machine).encode())
    for path in (ROOT / "pyproject.toml", CONSTRAINTS):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read_stamp() -> dict:
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(**state: object) -> None:
    partial = STAMP.with_suffix(".tmp")
    partial.write_text(json.dumps(state) + "\n", encoding="utf-8")
    partial.replace(STAMP)


def venv_works() -> bool:
    if not PYTHON.exists():
        return False
    check = f"import sys, pip; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    return subprocess.run([str(PYTHON), "-c", check], capture_output=True).returncode == 0


def make_venv(stamp: dict) -> None:
    """Make `.venv`, anew if its packages were half written or its Python is another or gone."""
    if stamp.get("writing"):
        say("The last set-up was stopped while it wrote packages: making .venv anew (downloads are kept).")
    elif venv_works():
        return
    with Progress(f"Making .venv with Python {platform.python_version()}"):
        if VENV.is_symlink():
            raise SetupError(f"{VENV} is a link to {VENV.resolve()}: remove it, or make that environment work.")
        shutil.rmtree(VENV, ignore_errors=True)
        VENV.mkdir()
        write_stamp(writing=True)
        answer = subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True, text=True)
        if answer.returncode:
            raise SetupError(f"python -m venv failed:\n{answer.stdout}{answer.stderr}")
        write_stamp(writing=False)


def install_torch(version: str) -> None:
    """Install torch unless this version is there; a CPU build gives way to the default one where that is wanted."""
    query = "from importlib.metadata import version; print(version('torch'))"
    installed = subprocess.run([str(PYTHON), "-c", query], capture_output=True, text=True)
    found, _, build = installed.stdout.strip().partition("+")
    use_cpu = wants_cpu_torch()
    if found == version and (use_cpu or build != "cpu"):
        return
    if use_cpu:
        install_cpu_torch(version)
        return
    with Progress(f"Installing torch {version}") as progress:
        if found:  # to pip, 2.13.0+cpu already is 2.13.0
            pip(["uninstall", "-y", "torch"], progress)
        pip(["install", f"torch=={version}"], progress)


def install_cpu_torch(version: str) -> None:
    """Install torch's CPU build: from where pip is set up to look, else from where uv knows it, else the default."""
    with Progress(f"Installing torch {version}, CPU build") as progress:
        pip_install = [str(PYTHON), "-m", "pip", "install"]
        if run([*pip_install, f"torch=={version}+cpu"], progress)[0] == 0:
            return
        progress.detail = "asking uv for the CPU build"
        uv_install = [str(VENV / "bin" / "uv"), "pip", "install", "--python", str(PYTHON), "--torch-backend=cpu"]
        if run([*pip_install, "uv"], progress)[0] == 0 and run([*uv_install, f"torch=={version}"], progress)[0] == 0:
            return
        progress.outcome = "not found"
    if platform.system() == "Linux":
        say("warning: no CPU build of torch can be had here; the default one brings CUDA libraries, about 3 GB.")
    with Progress(f"Installing torch {version}, default build") as progress:
        pip(["install", f"torch=={version}"], progress)


def pip(arguments: list[str], progress: Progress) -> None:
    """Run the venv's pip.

    Raises:
        SetupError: it failed.
    """
    status, output = run([str(PYTHON), "-m", "pip", *arguments], progress)
    if status:
        raise SetupError(f"pip {' '.join(arguments)} failed:\n{explain(output)}")


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Let one set-up of this folder run at a time; a second waits for it."""
    with (ROOT / "pyproject.toml").open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up of this folder is running: waiting for it.")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def set_up(extras: set[str]) -> None:
    """Bring `.venv` to what `extras` need; does nothing if it is there."""
    stamp, key = read_stamp(), state_key()
    wanted = sorted(extras | set(stamp.get("extras", ())))
    if stamp.get("key") == key and stamp.get("extras") == wanted and not stamp.get("writing") and PYTHON.exists():
        return
    started_s = time.monotonic()
    make_venv(stamp)
    write_stamp(writing=False)
    install_torch(pinned_torch())
    with Progress(f"Installing lavish[{','.join(wanted)}]") as progress:
        pip(["install", "-c", str(CONSTRAINTS), "-e", f".[{','.join(wanted)}]"], progress)
    write_stamp(key=key, extras=wanted)
    say(f"Set-up done in {time.monotonic() - started_s:.0f} s.")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/setup", description="Make .venv with torch, lavish and its extras.")
    parser.add_argument("--dev", action="store_true", help="also install what the tests and checks need")
    parser.add_argument("--extras", default="train", help="extras of pyproject.toml, comma separated (%(default)s)")
    options = parser.parse_args()
    extras = {extra for extra in options.extras.split(",") if extra} | ({"dev"} if options.dev else set())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with only_one():
            set_up(extras)
    except SetupError as error:
        say(f"setup: {error}")
        return 1
    except KeyboardInterrupt:
        say("\nsetup: interrupted; run the same command again to go on.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
