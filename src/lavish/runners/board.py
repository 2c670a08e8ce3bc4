"""TensorBoard, where it is installed: what `log.jsonl` says, as curves in `tensorboard/` of the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


class Board:
    """Writes numbers by step; nothing where tensorboard is not installed.

    Args:
        folder: of the run.
        first_step: the run goes on after this one; what an earlier process wrote beyond it is dropped by the viewer.
    """

    def __init__(self, folder: Path, first_step: int = 0):
        self._writer: Any = None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / FOLDER), purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, values: Mapping[str, Any], prefix: str = "train") -> None:
        """Write the numbers among the values."""
        if self._writer is None:
            return
        for name, value in values.items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def write_text(self, step: int, name: str, text: str) -> None:
        """Write a text in Markdown."""
        if self._writer is not None:
            self._writer.add_text(name, text, step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
