"""The folder of a run: log, checkpoints that are whole or absent, and the plot of the losses.

A checkpoint is one folder `checkpoint_<step>/` with the weights (`model.safetensors`, or `shards/` of several
processes) and `state.pt` (optimizer, step and random states: tensors and plain numbers, read back with
`weights_only=True`). It is written under a temporary name and renamed, and the newest two are kept, so a run that is
killed at any moment resumes from a whole one. One run at a time trains in a folder.
"""

import errno
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lavish.common import dist
from lavish.common.errors import CheckpointError, ConfigError
from lavish.runners.engines import MODEL_FILE, SHARDS, Mismatch

try:
    import fcntl
except ImportError:  # Windows: a second run is not noticed there
    fcntl = None

logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint_(\d+)")
STATE_FILE, LOG_FILE, PLOT_FILE, LOCK_FILE = "state.pt", "log.jsonl", "loss.png", ".lock"
VALIDATIONS_FILE, SAMPLES_FILE = "validations.jsonl", "samples.jsonl"
NUM_KEPT_CHECKPOINTS = 2
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems without locks answer: there a second run is not noticed."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Read = Callable[[Path, dict[str, Any]], None]
Write = Callable[[Path], dict[str, Any]]


class RunFolder:
    """Reads and writes one run's folder.

    Raises:
        ConfigError: another run is training in it.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        if dist.is_main():
            with self.locked():
                self._clean()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out; the system takes the lock from a process that ends, however it ends.

        Raises:
            ConfigError: another run is in.
        """
        with (self.path / LOCK_FILE).open("a+", encoding="utf-8") as file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise ConfigError(
                    f"{self.path}: another run is training here (process {file.read().strip() or 'unknown'}). Wait for "
                    "it, or set another run.output_dir."
                ) from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def _clean(self) -> None:
        """Remove what a killed process was writing."""
        for leftover in self.path.glob("*.partial"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    # -- checkpoints

    def checkpoints(self) -> list[tuple[int, Path]]:
        """List (step, folder) of the whole checkpoints, oldest first."""
        found = [(CHECKPOINT.fullmatch(entry.name), entry) for entry in self.path.iterdir()]
        return sorted((int(match.group(1)), entry) for match, entry in found if match and is_checkpoint(entry))

    def save(self, step: int, write: Write, state: dict[str, Any]) -> Path:
        """Write checkpoint `step` whole, then drop all but the newest ones; all processes of a run call it.

        Args:
            write: writes the weights into a folder, and gives what else of them the state has to hold.

        Raises:
            CheckpointError: the disk is full; the checkpoints before it are whole.
        """
        target, partial = self.path / f"checkpoint_{step}", self.path / f"checkpoint_{step}.partial"
        with self.room_for(f"checkpoint {step}", partial):
            if dist.is_main():
                partial.mkdir()
            dist.wait_for_all()
            state = state | write(partial)
            if dist.is_main():
                torch.save(state, partial / STATE_FILE)
        dist.wait_for_all()
        if dist.is_main():
            if target.exists():
                self._remove(target)
            partial.rename(target)
            for _, old in self.checkpoints()[:-NUM_KEPT_CHECKPOINTS]:
                self._remove(old)
        return target

    @contextmanager
    def room_for(self, what: str, partial: Path) -> Iterator[None]:
        """Say where the disk is full, and leave no half of a file.

        Raises:
            CheckpointError: what was written has no room.
        """
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors have errors of their own
            free = shutil.disk_usage(self.path).free
            is_full = getattr(error, "errno", None) in FULL  # only an OSError has one
            in_words = [f"(os error {number})" for number in FULL] + ["inline_container"]  # safetensors', torch's
            if not is_full and not any(words in str(error) for words in in_words):
                raise
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.path}: {what} could not be written: no room ({free / 2**30:.2f} GiB are free; {error}). What "
                "was written before is whole. Make room, and the same command goes on from there."
            ) from error

    def _remove(self, folder: Path) -> None:
        """Delete a checkpoint; killed in between, nothing of it is taken for one."""
        partial = folder.with_name(f"{folder.name}.old.partial")
        folder.rename(partial)
        shutil.rmtree(partial)

    def load_latest(self, read: Read, device: torch.device) -> dict[str, Any] | None:
        """Read the newest checkpoint and give its state, or None when the folder has none.

        A damaged one is told and passed over for the one before.

        Args:
            read: takes over the weights of a checkpoint's folder, given its state too.

        Raises:
            CheckpointError: all are damaged, or the newest whole one is of another model or optimizer.
        """
        checkpoints = self.checkpoints()
        for at in reversed(range(len(checkpoints))):
            _, folder = checkpoints[at]
            try:
                return read_checkpoint(folder, read, device)
            except Damaged as error:
                if at == 0:
                    raise
                logger.warning("%s It goes on from %s.", error, checkpoints[at - 1][1].name)
        return None

    # -- logs

    def log(self, line: dict[str, Any]) -> None:
        """Append one JSON line to `log.jsonl`."""
        self._append(LOG_FILE, line)

    def read_log(self) -> list[dict[str, Any]]:
        """Read the log; a last line that was not written whole is left out."""
        return self._lines(LOG_FILE)

    def log_validation(self, line: dict[str, Any]) -> None:
        """Append the scores of a split to `validations.jsonl`."""
        self._append(VALIDATIONS_FILE, line)

    def read_validations(self) -> list[dict[str, Any]]:
        """Read the scores of the splits so far."""
        return self._lines(VALIDATIONS_FILE)

    def read_samples(self) -> list[dict[str, Any]]:
        """Read the answers of `run.sample_generations` so far."""
        return self._lines(SAMPLES_FILE)

    def write_samples(self, lines: list[dict[str, Any]]) -> None:
        """Write `samples.jsonl` whole."""
        self.write_lines(SAMPLES_FILE, lines)

    def cut_log(self, last_step: int) -> None:
        """Drop the lines after `last_step`, which a resumed run will write again."""
        for name in (LOG_FILE, VALIDATIONS_FILE, SAMPLES_FILE):
            path = self.path / name
            if path.exists():
                kept = [line for line in self._lines(name) if line["step"] <= last_step]
                partial = path.with_suffix(".partial")
                partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
                partial.replace(path)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (
            self.room_for(f"a line of {name}", self.path / f"{name}.partial"),
            (self.path / name).open("a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(line) + "\n")

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            return []
        return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text.endswith("}")]

    def write_lines(self, name: str, lines: list[Any]) -> None:
        """Write a file of JSON lines whole, over the one that was there."""
        partial = self.path / f"{name}.partial"
        with self.room_for(name, partial):
            partial.write_text("".join(json.dumps(line, default=str) + "\n" for line in lines), encoding="utf-8")
            partial.replace(self.path / name)

    def plot(self) -> Path | None:
        """Draw every logged loss over the steps to `loss.png`.

        None where nothing is logged, or matplotlib (the extra `train`) is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return None
        lines = self.read_log()
        names = sorted({name for line in lines for name in line if "loss" in name})
        if not names:
            return None
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.add_subplot()
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points, strict=True), label=name, linewidth=2 if name == "loss" else 1)
        axes.set(xlabel="optimizer step", ylabel="loss", yscale="log", title=self.path.name)
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, ncols=2, fontsize=8)
        path = self.path / PLOT_FILE
        figure.savefig(path, dpi=120)
        return path


class Damaged(CheckpointError):
    """A checkpoint that cannot be read."""


def is_checkpoint(folder: Path) -> bool:
    """Tell whether a folder holds a whole checkpoint."""
    return (folder / STATE_FILE).is_file() and ((folder / MODEL_FILE).is_file() or (folder / SHARDS).is_dir())


def read_checkpoint(folder: Path, read: Read, device: torch.device) -> dict[str, Any]:
    """Read one checkpoint and give its state.

    Raises:
        CheckpointError: damaged (`Damaged`), or of another model or optimizer.
    """
    try:
        state = torch.load(folder / STATE_FILE, map_location=device, weights_only=True)
        read(folder, state)
    except Mismatch as error:
        raise CheckpointError(
            f"{folder}: this checkpoint is of another {error.what} than the recipe describes: {error} Use another "
            "run.output_dir, or delete the folder to start anew."
        ) from error
    except (OSError, pickle.UnpicklingError, EOFError, RuntimeError, CheckpointError, KeyError) as error:
        raise Damaged(
            f"{folder}: this checkpoint cannot be read ({error}). Delete the folder: the run goes on from the "
            "checkpoint before it, or from the start."
        ) from error
    return state
