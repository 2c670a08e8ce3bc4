"""The folder of a run: config, log, checkpoints that are whole or absent, and the plot of the losses.

A checkpoint is one folder `checkpoint_<step>/` with `model.safetensors` (the trained module), `state.pt` (optimizer, step and random
states: tensors and plain numbers, read back with `weights_only=True`). It is written under a temporary name and renamed, and the newest
two are kept, so a run that is killed at any moment resumes from a whole one.
"""

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lavish.common.errors import CheckpointError

CHECKPOINT = re.compile(r"checkpoint_(\d+)")
NUM_KEPT_CHECKPOINTS = 2


class RunFolder:
    """Reads and writes one run's folder."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob("*.partial"):
            shutil.rmtree(leftover)

    def checkpoints(self) -> list[tuple[int, Path]]:
        """List (step, folder), oldest first."""
        found = [(CHECKPOINT.fullmatch(entry.name), entry) for entry in self.path.iterdir()]
        return sorted((int(match.group(1)), entry) for match, entry in found if match)

    def save(self, step: int, model: nn.Module, state: dict) -> Path:
        """Write checkpoint `step` whole, then drop the oldest ones."""
        target = self.path / f"checkpoint_{step}"
        partial = self.path / f"checkpoint_{step}.partial"
        partial.mkdir()
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
        save_file(tensors, partial / "model.safetensors")
        torch.save(state, partial / "state.pt")
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        for _, old in self.checkpoints()[:-NUM_KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
        return target

    def load_latest(self, model: nn.Module, device: torch.device) -> dict | None:
        """Load the newest checkpoint into `model` and give its state, or None when the folder has none.

        Raises:
            CheckpointError: the checkpoint is of another model.
        """
        checkpoints = self.checkpoints()
        if not checkpoints:
            return None
        folder = checkpoints[-1][1]
        try:
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except RuntimeError as error:
            raise CheckpointError(
                f"{folder}: this checkpoint is of another model than the recipe describes ({error}). "
                "Use another run.output_dir, or delete the folder to start anew."
            ) from error
        return torch.load(folder / "state.pt", map_location=device, weights_only=True)

    def log(self, line: dict) -> None:
        """Append one JSON line to `log.jsonl`."""
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self, before_step: int | None = None) -> list[dict]:
        """Read the log; with `before_step`, cut off the lines that a resumed run will write again."""
        path = self.path / "log.jsonl"
        if not path.exists():
            return []
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text.endswith("}")]
        if before_step is None:
            return lines
        kept = [line for line in lines if line["step"] <= before_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)
        return kept

    def plot(self) -> Path | None:
        """Draw every logged loss over the steps to `loss.png`; None where matplotlib is not installed (the extra `train`)."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return None
        lines = self.read_log()
        names = sorted({name for line in lines for name in line if "loss" in name})
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.add_subplot()
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points, strict=True), label=name, linewidth=2 if name == "loss" else 1)
        axes.set(xlabel="optimizer step", ylabel="loss", yscale="log", title=self.path.name)
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, ncols=2, fontsize=8)
        path = self.path / "loss.png"
        figure.savefig(path, dpi=120)
        return path
