"""Instructions about pictures and videos, as MiniGPT4-Qwen and MPP-Qwen are trained on them.

A row is `{"image" or "video", "instruction", "output"}`; lists of the last two are turns, and several pictures stand in
a list. Each picture has its `<ImageHere>`; a video has one, which becomes one a frame.
Source: Coobiw/MPP-LLaVA, lavis/datasets/datasets/{minigpt4_instructions,video_instructions}.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lavish.common.errors import DataError, shown
from lavish.common.video import read_frames
from lavish.datasets.datasets.annotations import need
from lavish.datasets.datasets.base_dataset import BaseDataset, present

PLACE = "<ImageHere>"
MAX_FRAMES = 32


class InstructionDataset(BaseDataset):
    """Training: `image` ((3, S, S), or (pictures, 3, S, S) of several, or None) and `conversations`."""

    def sample(self, index: int) -> dict[str, Any]:
        """Give one conversation with its pictures."""
        record = self.annotation[index]
        names = record.get("image")
        if isinstance(names, list):
            image = torch.stack([self.picture(name) for name in names]) if names else None
        else:
            image = None if names is None else self.picture(names)
        conversations = self.conversations(record)
        check_places(conversations, len(names) if isinstance(names, list) else int(names is not None))
        return {"image": image, "conversations": conversations}

    def conversations(self, record: dict[str, Any]) -> list[dict[str, str]]:
        """Give the turns as `{"from": "user" or "assistant", "value": text}`."""
        asked, answered = need(record, "instruction"), need(record, "output")
        questions, answers = ([one] if isinstance(one, str) else one for one in (asked, answered))
        for name, texts in (("instruction", questions), ("output", answers)):
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise DataError(f"the field {name!r} is {shown(texts)}; a text, or a list of one a turn, is expected.")
        if len(questions) != len(answers):
            raise DataError(f"{len(questions)} instructions and {len(answers)} outputs; they pair up.")
        return [
            turn
            for question, answer in zip(questions, answers, strict=True)
            for turn in (
                {"from": "user", "value": self.text_processor(question)},
                {"from": "assistant", "value": answer},
            )
        ]

    def collater(self, samples: Sequence[Any]) -> dict[str, Any]:
        """Make a batch: the pictures of all conversations one after the other, (pictures, 3, S, S), or None."""
        kept = present(samples)
        pictures = [sample["image"] for sample in kept if sample["image"] is not None]
        stacked = [one if one.ndim == 4 else one[None] for one in pictures]
        return {
            "image": torch.cat(stacked) if stacked else None,
            "conversations": [sample["conversations"] for sample in kept],
        }


class VideoInstructionDataset(InstructionDataset):
    """Training on videos: `image` holds the frames, (frames, 3, S, S), spread over the clip."""

    def __init__(
        self,
        vis_processor: Any = None,
        text_processor: Any = None,
        vis_root: str | Path | None = None,
        ann_paths: Sequence[str | Path] = (),
        max_frames: int = MAX_FRAMES,
    ) -> None:
        super().__init__(vis_processor, text_processor, vis_root, ann_paths)
        self.max_frames = max_frames

    def sample(self, index: int) -> dict[str, Any]:
        """Give one conversation with the frames of its video."""
        record = self.annotation[index]
        frames = read_frames(self.path(need(record, "video")), self.max_frames)
        conversations = self.conversations(record)
        check_places(conversations, 1)
        for turn in conversations:
            turn["value"] = turn["value"].replace(PLACE, PLACE * len(frames))
        return {"image": torch.stack([self.vis_processor(frame) for frame in frames]), "conversations": conversations}


def check_places(conversations: Sequence[dict[str, str]], num_images: int) -> None:
    """Check that there are as many `<ImageHere>` as pictures.

    Raises:
        DataError: there are not.
    """
    places = sum(turn["value"].count(PLACE) for turn in conversations if turn["from"] == "user")
    if places != num_images:
        raise DataError(f"{num_images} pictures or videos, and {places} of {PLACE} in the instructions: they pair up.")
