"""The folder of a run: log, checkpoints that are whole or absent, and the plot of the losses.

A checkpoint is one folder `checkpoint_<step>/` with `model.safetensors` (the trained module) and `state.pt` (optimizer,
step and random states: tensors and plain numbers, read back with `weights_only=True`). It is written under a temporary
name and renamed, and the newest two are kept, so a run that is killed at any moment resumes from a whole one.
"""

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lavish.common import dist
from lavish.common.errors import CheckpointError

CHECKPOINT = re.compile(r"checkpoint_(\d+)")
MODEL_FILE, STATE_FILE, LOG_FILE, PLOT_FILE = "model.safetensors", "state.pt", "log.jsonl", "loss.png"
NUM_KEPT_CHECKPOINTS = 2


class RunFolder:
    """Reads and writes one run's folder; one process at a time."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob("*.partial") if dist.is_main() else ():  # what a killed process was writing
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    def checkpoints(self) -> list[tuple[int, Path]]:
        """List (step, folder) of the whole checkpoints, oldest first."""
        found = [(CHECKPOINT.fullmatch(entry.name), entry) for entry in self.path.iterdir()]
        return sorted(
            (int(match.group(1)), entry)
            for match, entry in found
            if match and (entry / MODEL_FILE).is_file() and (entry / STATE_FILE).is_file()
        )

    def save(self, step: int, model: nn.Module, state: dict[str, Any]) -> Path:
        """Write checkpoint `step` whole, then drop all but the newest ones."""
        target = self.path / f"checkpoint_{step}"
        partial = self.path / f"checkpoint_{step}.partial"
        partial.mkdir()
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
        save_file(tensors, partial / MODEL_FILE)
        torch.save(state, partial / STATE_FILE)
        if target.exists():
            self._remove(target)
        partial.rename(target)
        for _, old in self.checkpoints()[:-NUM_KEPT_CHECKPOINTS]:
            self._remove(old)
        return target

    def _remove(self, folder: Path) -> None:
        """Delete a checkpoint; killed in between, nothing of it is taken for one."""
        partial = folder.with_name(f"{folder.name}.old.partial")
        folder.rename(partial)
        shutil.rmtree(partial)

    def load_latest(self, model: nn.Module, device: torch.device) -> dict[str, Any] | None:
        """Load the newest checkpoint into `model` and give its state, or None when the folder has none.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another model.
        """
        checkpoints = self.checkpoints()
        if not checkpoints:
            return None
        folder = checkpoints[-1][1]
        try:
            tensors = load_file(folder / MODEL_FILE)
            state = torch.load(folder / STATE_FILE, map_location=device, weights_only=True)
        except (OSError, SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder}: this checkpoint cannot be read ({error}). Delete the folder: the run goes on from the "
                "checkpoint before it, or from the start."
            ) from error
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise CheckpointError(
                f"{folder}: this checkpoint is of another model than the recipe describes: "
                f"{' '.join(str(error).split())} Use another run.output_dir, or delete the folder to start anew."
            ) from error
        return state

    def log(self, line: dict[str, Any]) -> None:
        """Append one JSON line to `log.jsonl`."""
        with (self.path / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """Read the log; a last line that was not written whole is left out."""
        path = self.path / LOG_FILE
        if not path.exists():
            return []
        return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text.endswith("}")]

    def cut_log(self, last_step: int) -> None:
        """Drop the lines after `last_step`, which a resumed run will write again."""
        path = self.path / LOG_FILE
        if not path.exists():
            return
        kept = [line for line in self.read_log() if line["step"] <= last_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)

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
