"""Dialogues turn by turn. Source: salesforce/LAVIS, lavis/datasets/datasets/dialogue_datasets.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavish.common.errors import DataError, shown
from lavish.datasets.datasets.annotations import read_json
from lavish.datasets.datasets.base_dataset import BaseDataset


class DialogueDataset(BaseDataset):
    """Training: one sample a turn, the earlier turns are its history (`dialog`), with its `question` and `answer`."""

    def __init__(
        self,
        vis_processor: Any = None,
        text_processor: Any = None,
        vis_root: str | Path | None = None,
        ann_paths: Sequence[str | Path] = (),
    ) -> None:
        super().__init__(vis_processor, text_processor, vis_root)
        for path in ann_paths:
            dialogs = read_dialogs(path)
            self.add_annotation(path, [sample for dialog in dialogs for sample in self.samples_of(dialog)])
        self._add_instance_ids()

    @staticmethod
    def samples_of(dialog: dict[str, Any]) -> list[dict[str, Any]]:
        """Give the records of one dialogue: one a turn."""
        return [turn_record(dialog, at) for at in range(len(dialog["dialog"]))]


class DialogueEvalDataset(DialogueDataset):
    """Evaluation: one sample a dialogue, its last turn."""

    @staticmethod
    def samples_of(dialog: dict[str, Any]) -> list[dict[str, Any]]:
        """Give the record of the last turn."""
        return [turn_record(dialog, len(dialog["dialog"]) - 1)]


def read_dialogs(path: str | Path) -> list[dict[str, Any]]:
    """Read `{"dialogs": [{"image_id", "caption", "summary", "dialog": [{"question", "answer"}]}]}`.

    Raises:
        DataError: another shape; says which dialogue.
    """
    loaded = read_json(path)
    dialogs = loaded.get("dialogs") if isinstance(loaded, dict) else None
    if not isinstance(dialogs, list):
        raise DataError(f"{path}: holds {shown(loaded)}; an object with a list 'dialogs' is expected.")
    for at, dialog in enumerate(dialogs, start=1):
        turns = dialog.get("dialog") if isinstance(dialog, dict) else None
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            raise DataError(f"{path}, dialogue {at}: 'dialog' is {shown(turns)}; a list of turns is expected.")
    return dialogs


def turn_record(dialog: dict[str, Any], at: int) -> dict[str, Any]:
    """Give one turn with the turns before it as history."""
    turn = dialog["dialog"][at]
    earlier = dialog["dialog"][:at]
    return {**dialog, "dialog": earlier, "question": turn.get("question"), "answer": turn.get("answer")}
