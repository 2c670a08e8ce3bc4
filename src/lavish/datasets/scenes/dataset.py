"""Scenes as training samples: one picture, its dense labels, and many conversations packed behind the one image.

Encoding a picture costs more than reading a question, so every sample carries `num_conversations` of them. They stand
in one row, one after the other, each a segment of its own: a token sees the image and its own segment only, and
positions start anew after the image. A segment is a question with a few past turns before it; its last answer is what
is learnt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from lavish.datasets.scenes.phrases import NO_PICTURE
from lavish.datasets.scenes.questions import Question, ask
from lavish.datasets.scenes.tokenizer import build_tokenizer
from lavish.datasets.scenes.world import Scene, dense_labels, draw, sample_scene
from lavish.models.cogvlm.processor import TEMPLATES
from lavish.models.cogvlm.routing import position_ids_from
from lavish.processors.pixels import resize_two_pass

IGNORED = -100
FIRST_TEXT_POSITION = 4  # bos 0, boi 1, every patch 2, eoi 3 (facts of the CogVLM position rule)
DENSE_LABELS = ("shape", "colour", "size", "digit", "digit_index", "number_length", "background", "box", "number_box")


@dataclass(frozen=True)
class Segment:
    """One packed conversation: ids, as many next-token targets (-100: not learnt), and whether it sees the image."""

    input_ids: list[int]
    targets: list[int]
    sees_image: bool


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    return build_tokenizer()


@lru_cache(maxsize=20_000)
def encode(text: str) -> tuple[int, ...]:
    """Give the ids of a text, without special ones. Questions and answers come again and again."""
    return tuple(_tokenizer().encode(text, add_special_tokens=False).ids)


class SceneDataset(Dataset):
    """An endless stream of drawn scenes: sample `i` is a function of (seed, i) alone.

    Args:
        num_samples: samples of an epoch.
        image_size: side of the network's picture in pixels; `grid` its patches a side.
        num_image_tokens: slots of the image, boi and eoi included.
        num_conversations: most questions about a picture; those that fit in `max_text_tokens` are taken.
        follow_up_share: share of questions that the next one continues, as a turn of the same conversation.
        max_turns: questions of the longest conversation.
        no_picture_share: share of conversations that do not see the picture, and whose answers say so.
        scene: keyword arguments of `sample_scene`.
        picture_sizes: sides to draw at, in turn; none: the network's own.
        length_penalty: a token weighs its answer's length to the power of -length_penalty: 0 all tokens alike, 1 all
            answers alike.
        task_weights: how often each task is asked, as of `questions.ask`; none: its own.
        with_picture: give the pictures.
        with_text: give the conversations.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        seed: int,
        image_size: int,
        grid: int,
        num_image_tokens: int,
        num_conversations: int,
        max_text_tokens: int,
        bos_token_id: int,
        eos_token_id: int,
        pad_token_id: int,
        follow_up_share: float = 0.12,
        max_turns: int = 3,
        no_picture_share: float = 0.02,
        scene: dict[str, Any] | None = None,
        picture_sizes: Sequence[int] = (),
        length_penalty: float = 0.0,
        task_weights: Mapping[str, float] | None = None,
        with_picture: bool = True,
        with_text: bool = True,
    ):
        self.num_samples, self.seed = num_samples, seed
        self.image_size, self.grid, self.num_image_tokens = image_size, grid, num_image_tokens
        self.num_conversations, self.max_text_tokens = num_conversations, max_text_tokens
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.length_penalty = length_penalty
        self.task_weights = dict(task_weights) if task_weights else None
        self.follow_up_share, self.max_turns, self.no_picture_share = follow_up_share, max_turns, no_picture_share
        self.scene, self.picture_sizes = scene or {}, tuple(picture_sizes) or (image_size,)
        self.with_picture, self.with_text = with_picture, with_text

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Give `dense_labels`, and as asked `image` (uint8, image_size x image_size x 3) and `segments`."""
        rng = np.random.default_rng([self.seed, index])
        scene = sample_scene(rng, **self.scene)
        sample: dict[str, Any] = {"dense_labels": dense_labels(scene, self.grid)}
        if self.with_picture:
            sample["image"] = self._picture(scene, index)
        if self.with_text:
            sample["segments"] = self._segments(
                ask(scene, rng, self.num_conversations, task_weights=self.task_weights), rng
            )
        return sample

    def _picture(self, scene: Scene, index: int) -> np.ndarray:
        """Draw at one of the sizes and resize as the processor does."""
        picture = draw(scene, self.picture_sizes[index % len(self.picture_sizes)])
        return np.asarray(resize_two_pass(picture, (self.image_size, self.image_size)))

    def _segments(self, questions: list[Question], rng: np.random.Generator) -> list[Segment]:
        segments, turns = [], []
        for question in questions:
            is_new = bool(turns) and (turns[0].template != question.template or question.template == "base")
            if is_new or len(turns) == self.max_turns:
                segments.append(self._segment(turns, rng))
                turns = []
            turns.append(question)
            if rng.random() >= self.follow_up_share:
                segments.append(self._segment(turns, rng))
                turns = []
        if turns:
            segments.append(self._segment(turns, rng))
        return self._fit(segments)

    def _fit(self, segments: list[Segment]) -> list[Segment]:
        """Take the segments that still fit in the row, in their order; at least one."""
        taken, room = [], self.max_text_tokens
        for segment in segments:
            if len(segment.input_ids) <= room or not taken:
                taken.append(segment)
                room -= len(segment.input_ids)
        return taken

    def _segment(self, turns: list[Question], rng: np.random.Generator) -> Segment:
        """Encode past turns and the question as one text, as the processor does, then the last answer on its own."""
        sees_image = bool(rng.random() >= self.no_picture_share)
        answers = [turn.answer if sees_image else NO_PICTURE[turn.language] for turn in turns]
        template = TEMPLATES[turns[-1].template]
        past = "".join(
            f"{template.format(turn.question)} {answer}\n" for turn, answer in zip(turns[:-1], answers, strict=False)
        )
        prompt_ids = encode(past + template.format(turns[-1].question))
        answer_ids = encode(answers[-1])
        targets = [IGNORED] * (len(prompt_ids) - 1) + [*answer_ids, self.eos_token_id]
        return Segment([*prompt_ids, *answer_ids], targets, sees_image)

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Stack samples into the tensors that the learner takes.

        Shapes: pictures (batch, size, size, 3) uint8; dense labels (batch, grid * grid) int64, boxes among them (batch,
        grid * grid, 4) float32; the packed text (batch, seq): see `pack`.
        """
        batch: dict[str, Any] = {}
        for name in DENSE_LABELS:
            stacked = torch.from_numpy(np.stack([sample["dense_labels"][name] for sample in samples]))
            batch[name] = stacked.flatten(1, 2).float() if stacked.ndim == 4 else stacked.flatten(1).long()
        if self.with_picture:
            batch["pictures"] = torch.from_numpy(np.stack([sample["image"] for sample in samples]))
        if self.with_text:
            batch.update(self.pack([sample["segments"] for sample in samples]))
        return batch

    def pack(self, rows: list[list[Segment]]) -> dict[str, torch.Tensor]:
        """Put the segments of each row behind bos and the image slots.

        Shapes: all (batch, seq). `input_ids`, `targets`, `position_ids`, `token_type_ids` int64; `segment_ids` int64: 0
        bos and image, 1 .. the segments, -1 padding; `sees_image` bool; `target_weights` float32, see
        `length_penalty`.
        """
        prefix = 1 + self.num_image_tokens
        shape = (len(rows), prefix + max(sum(len(segment.input_ids) for segment in row) for row in rows))
        packed = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "targets": torch.full(shape, IGNORED),
            "target_weights": torch.zeros(shape),
            "segment_ids": torch.full(shape, -1),
            "position_ids": torch.zeros(shape, dtype=torch.long),
            "sees_image": torch.ones(shape, dtype=torch.bool),
            "token_type_ids": torch.zeros(shape, dtype=torch.long),
        }
        packed["input_ids"][:, 0] = self.bos_token_id
        packed["segment_ids"][:, :prefix] = 0
        packed["token_type_ids"][:, 1:prefix] = 1
        packed["position_ids"][:, :prefix] = position_ids_from(packed["token_type_ids"][:, :prefix])
        for index, row in enumerate(rows):
            start = prefix
            for number, segment in enumerate(row, 1):
                stop = start + len(segment.input_ids)
                place = index, slice(start, stop)
                first = FIRST_TEXT_POSITION if segment.sees_image else 1
                packed["input_ids"][place] = torch.tensor(segment.input_ids)
                packed["targets"][place] = torch.tensor(segment.targets)
                num_targets = sum(target != IGNORED for target in segment.targets)
                packed["target_weights"][place] = num_targets**-self.length_penalty
                packed["segment_ids"][place] = number
                packed["position_ids"][place] = torch.arange(first, first + stop - start)
                packed["sees_image"][place] = segment.sees_image
                start = stop
        return packed


def packed_attention_mask(segment_ids: torch.Tensor, sees_image: torch.Tensor) -> torch.Tensor:
    """Give the mask of packed rows, True = attend: own segment and, if it sees the image, the prefix, causally.

    A segment without a picture sees bos alone of the prefix. Padding sees padding too, so that no row is empty.
    Shapes: (batch, seq), (batch, seq) -> (batch, 1, seq, seq).
    """
    seq = segment_ids.shape[1]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=segment_ids.device).tril()
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    prefix = (segment_ids == 0)[:, None, :] & sees_image[:, :, None]
    prefix[:, :, 0] |= segment_ids >= 0
    return ((same | prefix) & causal)[:, None]
