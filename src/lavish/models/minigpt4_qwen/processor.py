"""MiniGPT4-Qwen: chat messages, pictures and videos to model inputs, ids back to text.

Source: Coobiw/MPP-LLaVA, minigpt4qwen.py (preprocess), chat_utils.py (make_context), webui_demo.py. The format is
ChatML; in a user's turn each picture stands as `<Img>` + slots + `</Img>`, a video as one such pair around the slots of
all its frames. `<Img>` and `</Img>` are ordinary text. Nothing here runs the network, and a prompt that is longer than
the context is refused in `lavish.inference`, not here.

What a user typed never becomes a special token or a slot; the release makes both of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from lavish.checkpoints.json_file import read_object, read_optional_object
from lavish.common.errors import CheckpointError, ConfigError, PromptError, shown
from lavish.common.media import MediaLimits, open_image
from lavish.common.messages import Message, is_batch, normalize, turns
from lavish.common.video import read_frames
from lavish.models.minigpt4_qwen.config import MiniGPT4QwenConfig, read_config
from lavish.models.minigpt4_qwen.pieces import (
    PLACE,
    Piece,
    Slot,
    Spoken,
    check_count,
    from_release,
    joined,
    split_places,
    user_pieces,
)
from lavish.processors.chat import (
    IGNORE_INDEX,
    check_end,
    checked_ids,
    collate,
    local_folder,
    naming_conversation,
    rows_of_ids,
)
from lavish.processors.pixels import clip_square
from lavish.processors.qwen_tokenizer import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMAGE,
    SPECIAL_TOKENS,
    ChatML,
    Content,
    Slots,
    load_qwen_tokenizer,
)
from lavish.processors.tokenizers import encode_plain

MARKERS = (END_OF_TEXT, IM_START, IM_END)
"""The special tokens that a rendered prompt may hold; a slot comes from `<ImageHere>` alone."""
MAX_FRAMES = 32
"""Frames of a video, as the release trains (1024 slots)."""


@dataclass
class Row:
    """One encoded, unpadded row, and its pictures in order."""

    input_ids: list[int] = field(default_factory=list)
    token_type_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, is_learnt: bool = False, kind: int = 0) -> None:
        """Put ids at the end."""
        self.input_ids += ids
        self.token_type_ids += [kind] * len(ids)
        self.labels += list(ids) if is_learnt else [IGNORE_INDEX] * len(ids)

    def join(self, other: Row) -> None:
        """Put another row at the end."""
        self.input_ids += other.input_ids
        self.token_type_ids += other.token_type_ids
        self.labels += other.labels
        self.images += other.images


class MiniGPT4QwenProcessor(ProcessorMixin):
    """Turn chat messages into MiniGPT4-Qwen inputs and ids into text.

    `image_size` is the side of the square picture in pixels, `num_image_tokens` the slots that it takes,
    `max_window_size` the tokens (slots counted) that the system message and past turns of a prompt may take.
    """

    max_images: int | None = None
    """Most images of a conversation; None: as many as fit."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int,
        num_image_tokens: int,
        system_message: str = "You are a helpful assistant.",
        max_window_size: int = 6144,
    ):
        super().__init__(tokenizer)
        self.image_size = image_size
        self.num_image_tokens = num_image_tokens
        self.system_message = system_message
        self.max_window_size = max_window_size
        # The special ids come from the tokenizer: they follow its ranks, which are not 151643 in every checkpoint.
        self._chatml = ChatML(tokenizer)
        self._ids = self._chatml.ids

    @classmethod
    def from_config(cls, config: MiniGPT4QwenConfig, tokenizer: PreTrainedTokenizerBase) -> MiniGPT4QwenProcessor:
        """Pair a tokenizer with the sizes of a model config.

        Raises:
            ConfigError: the tokenizer's special ids are not the model's.
        """
        found = tokenizer.convert_tokens_to_ids(IMAGE)
        if found != config.image_token_id:
            raise ConfigError(
                f"The tokenizer's id of {IMAGE!r} is {found} ({len(tokenizer)} ids) and the model's is "
                f"{config.image_token_id}: the tokenizer belongs to another model. Name the right one with "
                "tokenizer=..."
            )
        if config.image_size is None:
            raise ConfigError("config: image_size is absent; the processor takes the size of the picture from it.")
        return cls(
            tokenizer,
            image_size=config.image_size,
            num_image_tokens=config.num_query_tokens,
            system_message=config.system_message,
            max_window_size=config.max_window_size,
        )

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        trust_remote_code: bool | None = None,
        _from_auto: bool = False,
    ) -> MiniGPT4QwenProcessor:
        """Read a folder that `save_pretrained` wrote; released pieces go through `lavish.load`.

        `trust_remote_code` and `_from_auto` are what `AutoProcessor` passes along; they change nothing, since no code
        of a checkpoint is ever run.

        Raises:
            CheckpointError: config.json or the tokenizer is absent or damaged.
            ConfigError: the tokenizer belongs to another model.
        """
        folder = local_folder(pretrained_model_name_or_path, revision)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = load_qwen_tokenizer(folder if tokenizer is None else local_folder(tokenizer, None))
        saved = read_optional_object(folder / "processor_config.json")
        fields = ("image_size", "num_image_tokens", "system_message", "max_window_size")
        if saved.get("processor_class") == cls.__name__ and all(name in saved for name in fields):
            return cls(tokenizer, **{name: saved[name] for name in fields})
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder}: no config.json and no processor_config.json of a saved model. Released pieces are loaded "
                "with lavish.load(folder)."
            )
        return cls.from_config(read_config(read_object(folder / "config.json"), str(folder / "config.json")), tokenizer)

    # Prompts

    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        messages: Any,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str | None = "pt",
        padding_side: str = "left",
        return_labels: bool = False,
        compat: str | None = None,
        allow_paths: bool = True,
        allow_urls: bool = False,
        limits: MediaLimits | None = None,
        num_frames: int = MAX_FRAMES,
    ) -> Any:
        """Render one conversation or a list of them in ChatML, and encode it.

        A picture stands where its part stands among the texts of its message; where texts hold `<ImageHere>`, the
        pictures of that message take these places in order. Without a system message the model's own goes first. Past
        turns that do not fit into `max_window_size` are left out, oldest first, with their pictures.

        With `return_labels` the layout is that of training: `labels` hold the answers, and of every turn the markers
        and the newline after it, as the release trains; -100 elsewhere. `compat="release"` reads special tokens in what
        a user typed, as the release does when it trains.

        Shapes: input_ids, attention_mask, token_type_ids (1 = image slot), labels (batch, seq) int64; pixel_values
        (images, 3, size, size) float32 in reading order, absent without an image. With `return_tensors=None` lists of
        ids, flat for a single conversation. With `tokenize=False` the text alone, a picture as `<ImageHere>`; with
        `return_dict=False` the ids alone.

        Raises:
            PromptError: messages out of order, places and pictures that do not fit, nothing to answer or to learn.
            MediaError: a picture or video that cannot or must not be opened.
        """
        if chat_template not in (None, "chat"):
            raise PromptError(f"chat_template={shown(chat_template)} is unknown; this family has one, 'chat'.")
        _check_compat(compat)
        conversations = messages if is_batch(messages) else [messages]

        def frames(source: Any) -> list[Any]:
            return read_frames(source, num_frames, allow_paths=allow_paths)

        rows, texts = [], []
        for index, conversation in enumerate(conversations):
            with naming_conversation(index, len(conversations)):
                spoken = self._spoken(normalize(conversation, allow_videos=True), frames)
                check_end(spoken.is_finished, add_generation_prompt, return_labels)
                if not tokenize:
                    texts.append(self._text(spoken, add_generation_prompt))
                elif return_labels:
                    rows.append(self._training_row(spoken, _live(compat)))
                else:
                    rows.append(self._prompt_row(spoken))
        if not tokenize:
            return texts if is_batch(messages) else texts[0]
        pictures = [
            open_image(source, limits=limits or MediaLimits(), allow_paths=allow_paths, allow_urls=allow_urls)
            for row in rows
            for source in row.images
        ]
        is_single = not is_batch(messages)
        batch = self._collate(rows, pictures, padding_side, return_labels, return_tensors, is_single)
        return batch if return_dict else batch["input_ids"]

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        padding_side: str = "left",
    ) -> BatchFeature:
        """Encode prompts that are rendered already: `<|im_start|>` and `<|im_end|>` in them are the markers.

        What a user typed belongs into `apply_chat_template`. `images` are the pictures of all texts in the order of
        their `<ImageHere>`; None leaves the pixels to the caller.

        Raises:
            PromptError: no text, or another number of pictures than of places.
        """
        texts = [text] if isinstance(text, str) else list(text or ())
        if not texts or not all(isinstance(one, str) for one in texts):
            raise PromptError(f"text must be a string or a list of strings, not {shown(text)}.")
        rows = [self._row(split_places(one), MARKERS) for one in texts]
        pictures: list[Any] = []
        if images is not None:
            given = list(images) if isinstance(images, list | tuple) else [images]
            check_count(sum(len(row.images) for row in rows), len(given), "The texts")
            pictures = [open_image(picture) for picture in given]
        return self._collate(rows, pictures, padding_side, False, return_tensors, is_single=isinstance(text, str))

    def chat_inputs(
        self, query: str, history: Sequence[tuple[str, str]] = (), system_message: str | None = None
    ) -> tuple[BatchFeature, int]:
        """Encode a question of the release's `chat`: `<ImageHere>` stands for each image, whose pixels the caller has.

        Gives the inputs, and how many of the images, the newest ones, are left in the window.
        """
        questions = [split_places(text) for text in (*(asked for asked, _ in history), query)]
        row = self._prompt_row(Spoken(system_message, questions, [answer for _, answer in history]))
        return self._collate([row], [], "left", False, "pt", is_single=True), len(row.images)

    def preprocess(
        self,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        max_length: int = 512,
        *,
        system_message: str | None = None,
        compat: str | None = None,
        cut_images: bool = False,
    ) -> BatchFeature:
        """Encode samples of the release's datasets for training: lists of {"from": "user"|"assistant", "value": text}.

        Padded to `max_length` on the right, and cut there. A picture whose slots would be cut off is an error;
        `cut_images` lets it go with the text behind it, and `num_images` says how many each sample has left.
        `compat="release"` gives the release's ids: special tokens that a user typed are live, and a cut takes slots
        and leaves pictures.

        Shapes: input_ids, labels, attention_mask, token_type_ids (batch, max_length); num_images (batch,).
        Raises:
            PromptError: no turn of a user, an unknown role, or slots beyond `max_length`.
        """
        _check_compat(compat)
        if not isinstance(conversations, list | tuple) or not conversations:
            raise PromptError(f"conversations is a list of one or more conversations, not {shown(conversations)}.")
        rows = []
        for index, turns_of_one in enumerate(conversations):
            row = self._training_row(from_release(turns_of_one, system_message, index), _live(compat))
            rows.append(self._cut(row, max_length, index, cut_images, is_checked=compat is None))
        batch = self._collate(rows, [], "right", True, "pt", is_single=False, width=max_length)
        batch["num_images"] = torch.tensor([len(row.images) for row in rows])
        return batch

    # Conversation -> pieces

    def _spoken(self, messages: list[Message], frames: Callable[[Any], list[Any]]) -> Spoken:
        system, rounds = turns(messages)
        questions = [user_pieces(turn.user, frames) for turn in rounds]
        answers = [turn.answer.text() for turn in rounds if turn.answer is not None]
        return Spoken(None if system is None else system.text(), questions, answers)

    def _text(self, spoken: Spoken, add_generation_prompt: bool) -> str:
        def mark(role: str, content: str) -> str:
            return f"{IM_START}{role}\n{content}{IM_END}"

        parts = [mark("system", self._system(spoken))]
        for index, question in enumerate(spoken.questions):
            parts.append(mark("user", "".join(p if isinstance(p, str) else PLACE for p in question)))
            if index < len(spoken.answers):
                parts.append(mark("assistant", spoken.answers[index]))
        if add_generation_prompt and not spoken.is_finished:
            parts.append(f"{IM_START}assistant\n")
        return "\n".join(parts)

    def _system(self, spoken: Spoken) -> str:
        return self.system_message if spoken.system is None else spoken.system

    # Pieces -> ids

    def _prompt_row(self, spoken: Spoken) -> Row:
        """Encode for generation: what stands between two markers is encoded in one piece, as the release does.

        Trap: the release counts `<ImageHere>` in the window as text, a handful of tokens instead of the slots, and
        drops the slots of an old turn without its picture. Here a turn goes with its pictures.
        """
        *past, question = [self._content(pieces) for pieces in spoken.questions]
        answers = [*spoken.answers, None][: len(spoken.questions)]
        system = self._system(spoken)
        finished = [(asked, answer) for asked, answer in zip(past, answers) if answer is not None]
        first = self._chatml.num_dropped(system, finished, self.max_window_size)
        ids = self._chatml.system(system)
        for asked, answer in [*finished[first:], (question, answers[-1])]:
            ids += self._chatml.turn(asked, answer)
        row = Row()
        row.add(ids)
        row.token_type_ids = [int(token_id == self._ids.image) for token_id in ids]
        row.images = [one.source for pieces in spoken.questions[first:] for one in pieces if isinstance(one, Slot)]
        return row

    def _content(self, pieces: Sequence[Piece]) -> Content:
        return [Slots(self.num_image_tokens) if isinstance(piece, Slot) else piece for piece in pieces]

    def _training_row(self, spoken: Spoken, live: Sequence[str]) -> Row:
        """Encode for training: each piece on its own, and a newline after every turn."""
        newline = self._chatml.newline
        row = Row()

        def add(role: str, content: Sequence[Piece], is_answer: bool) -> None:
            inner = self._row(content, live)
            if is_answer:
                inner.labels = list(inner.input_ids)
            row.add([self._ids.im_start], is_learnt=True)
            row.add(encode_plain(self.tokenizer, role) + newline)
            row.join(inner)
            row.add([self._ids.im_end, *newline], is_learnt=True)

        add("system", [self._system(spoken)], False)
        for index, question in enumerate(spoken.questions):
            add("user", question, False)
            if index < len(spoken.answers):
                add("assistant", [spoken.answers[index]], True)
        return row

    def _row(self, content: Sequence[Piece], live: Sequence[str] = ()) -> Row:
        """Encode texts and slots. Special tokens of a text are read where they are `live`; else no string is one."""
        row = Row()
        special = {token: token_id for token, token_id in self.tokenizer.get_added_vocab().items() if token in live}
        border = f"({'|'.join(map(re.escape, special))})" if special else "(?!)"  # (?!) is nowhere
        for piece in joined(content):
            if isinstance(piece, Slot):
                row.add([self._ids.image] * self.num_image_tokens, kind=1)
                row.images.append(piece.source)
                continue
            for part in re.split(border, piece):
                if part in special:
                    row.add([special[part]], kind=int(part == IMAGE))
                elif part:
                    row.add(encode_plain(self.tokenizer, part))
        return row

    def _cut(self, row: Row, max_length: int, index: int, cut_images: bool, *, is_checked: bool) -> Row:
        length = len(row.input_ids)
        if length <= max_length:
            return row
        end, num_images = max_length, len(row.images)
        lost = sum(row.token_type_ids[max_length:])
        if lost and is_checked:
            left, torn = divmod(sum(row.token_type_ids[:max_length]), self.num_image_tokens)
            if not cut_images:
                raise PromptError(
                    f"Sample {index}: {length} tokens, of which max_length keeps {max_length}; {lost} image slots lie "
                    f"behind that, and {left} of {num_images} images would stay whole. Give a larger max_length, a "
                    "shorter text, or cut_images=True."
                )
            num_images = left
            if torn:  # the slots of this picture begin before the cut: they end the row
                starts = [i for i, kind in enumerate(row.token_type_ids) if kind == 1]
                end = starts[left * self.num_image_tokens]
        return Row(row.input_ids[:end], row.token_type_ids[:end], row.labels[:end], row.images[:num_images])

    def _collate(
        self,
        rows: list[Row],
        pictures: list[Any],
        padding_side: str,
        return_labels: bool,
        return_tensors: str | None,
        is_single: bool,
        width: int = 0,
    ) -> BatchFeature:
        names = ("input_ids", "token_type_ids", *(("labels",) if return_labels else ()))
        return collate(
            {name: [getattr(row, name) for row in rows] for name in names},
            [self._pixels(picture) for picture in pictures],
            pad_token_id=self._ids.end_of_text,
            padding_side=padding_side,
            return_tensors=return_tensors,
            is_single=is_single,
            width=width,
        )

    # Images

    def pixel_values(
        self, image: Any, *, allow_paths: bool = True, allow_urls: bool = False, limits: MediaLimits | None = None
    ) -> torch.Tensor:
        """Give one picture as the tower takes it: LAVIS's `blip_image_eval`.

        RGB, bicubic with antialiasing to a square in two passes (the aspect ratio is not kept), CLIP mean and std.

        Shapes: (3, size, size), float32.
        """
        picture = open_image(image, limits=limits or MediaLimits(), allow_paths=allow_paths, allow_urls=allow_urls)
        return torch.from_numpy(self._pixels(picture))

    def _pixels(self, picture: Any) -> np.ndarray:
        return clip_square(picture, self.image_size)

    # Text

    def decode(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> str:
        """Give the text of ids, without special tokens unless asked.

        Bytes of a character that is not complete yet become U+FFFD; ids beyond the tokenizer give no text.

        Raises:
            PromptError: what is no id: a negative one (the -100 of labels), a text.
        """
        ids = checked_ids(token_ids)
        known = [token_id for token_id in ids if token_id < len(self.tokenizer)]
        return self.tokenizer.decode(known, skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, sequences: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Give the text of each row of ids, as `decode`."""
        rows = rows_of_ids(sequences)
        return [self.decode(row, skip_special_tokens=skip_special_tokens, **kwargs) for row in rows]


def _check_compat(compat: str | None) -> None:
    if compat not in (None, "release", "mpp"):
        raise PromptError(f"compat={shown(compat)} is unknown; use None, or 'release' (also called 'mpp').")


def _live(compat: str | None) -> Sequence[str]:
    """Give the special tokens that the release reads in what a user typed: all; none by default."""
    return () if compat is None else SPECIAL_TOKENS
