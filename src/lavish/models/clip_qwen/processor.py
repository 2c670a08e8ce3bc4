"""CLIP + Qwen: chat messages and a picture to model inputs, ids back to text.

Source: WatchTower-Liu/VLM-learning, data.py and demo.py. The format is ChatML; the picture stands in a user's turn
where it is in the content, one a conversation, as the release trains. Nothing here runs the network, and a prompt that
is longer than the context is refused in `lavish.inference`, not here.

What a user typed never becomes a special token; the release makes turns of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from lavish.checkpoints.json_file import read_object
from lavish.common.errors import CheckpointError, ConfigError, PromptError, shown
from lavish.common.media import MediaLimits, open_image
from lavish.common.messages import ImagePart, Message, TextPart, Turn, is_batch, normalize, turns
from lavish.models.clip_qwen.config import ClipQwenConfig, read_config
from lavish.processors.chat import (
    IGNORE_INDEX,
    check_end,
    check_one_image,
    checked_ids,
    collate,
    local_folder,
    naming_conversation,
    rows_of_ids,
)
from lavish.processors.pixels import normalize as normalize_pixels
from lavish.processors.pixels import resize_two_pass, to_rgb
from lavish.processors.qwen_tokenizer import ChatML, Slots, load_qwen_tokenizer, refuse_typed_image
from lavish.processors.tokenizers import encode_plain

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the release's demo and web UI, which show the network other pixels than its training did."""
PIXEL_RULES = ("training", "webui")


@dataclass
class Row:
    """One encoded, unpadded row, and its picture."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    image: Any = None

    def add(self, ids: Sequence[int], *, is_learnt: bool = False) -> None:
        """Put ids at the end."""
        self.input_ids += ids
        self.labels += list(ids) if is_learnt else [IGNORE_INDEX] * len(ids)


class ClipQwenProcessor(ProcessorMixin):
    """Tokenizer, prompt and pixels of one model config."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: ClipQwenConfig):
        super().__init__(tokenizer)
        self.config = config
        self.chatml = ChatML(tokenizer)
        self.num_image_tokens = config.num_image_tokens
        if self.chatml.ids.image != config.image_token_id:
            raise ConfigError(
                f"The tokenizer's image token has the id {self.chatml.ids.image} and the model's "
                f"{config.image_token_id} ({config.vocab_size} ids): the tokenizer belongs to another model. Name the "
                "right one with tokenizer=..."
            )

    @classmethod
    def from_config(cls, config: ClipQwenConfig, tokenizer: PreTrainedTokenizerBase) -> ClipQwenProcessor:
        """Pair a tokenizer with the sizes and ids of a model config.

        Raises:
            ConfigError: the tokenizer's ids are not the model's.
            CheckpointError: the tokenizer is no Qwen's.
        """
        return cls(tokenizer, config)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        trust_remote_code: bool | None = None,
        _from_auto: bool = False,
    ) -> ClipQwenProcessor:
        """Read a folder that lavish saved; `tokenizer` names a folder apart from it.

        `trust_remote_code` and `_from_auto` are what `AutoProcessor` passes along; they change nothing.

        Raises:
            CheckpointError: config.json or the tokenizer is absent or damaged.
            ConfigError: the tokenizer belongs to another model.
        """
        folder = local_folder(pretrained_model_name_or_path, revision)
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder}: no config.json; released pieces are put together by lavish.load(folder, llm=..., "
                "vision_tower=...)."
            )
        config = read_config(read_object(folder / "config.json"), str(folder / "config.json"))
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = load_qwen_tokenizer(folder if tokenizer is None else local_folder(tokenizer, None))
        return cls(tokenizer, config)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:  # pyright: ignore
        """Write the tokenizer; sizes, prompt and pixel rule stand in the network's config.json."""
        return list(self.tokenizer.save_pretrained(save_directory, **kwargs))

    # Prompts

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:  # pyright: ignore[reportIncompatibleMethodOverride]
        """CLIP + Qwen has no format but its chat template; transformers' own call would let typed tokens live.

        Raises:
            PromptError: always.
        """
        raise PromptError(
            "CLIP + Qwen answers conversations only: use apply_chat_template([{'role': 'user', 'content': [{'type': "
            "'image', 'image': ...}, {'type': 'text', 'text': '...'}]}])."
        )

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
    ) -> Any:
        """Render one conversation or a list of them as ChatML, and encode it.

        The oldest turns that do not fit into the window of `max_window_tokens` are left out, with their picture. With
        `return_labels` the answers stay: `labels` is -100 outside them, the last one ends with `<|endoftext|>` as the
        release trains, the others with `<|im_end|>`. `compat="webui"` gives the pixels of the release's demo.

        Shapes: input_ids, attention_mask, token_type_ids (1 on image slots), labels (batch, seq) int64; pixel_values
        (pictures, 3, size, size) float32, absent when there is none. With `return_tensors=None` lists, flat for a
        single conversation. With `tokenize=False` the text alone; with `return_dict=False` the ids alone.

        Raises:
            PromptError: messages out of order, two pictures, a picture's token in a text, nothing to answer or learn.
            MediaError: a picture that cannot or must not be opened.
        """
        if chat_template not in (None, "chat"):
            raise PromptError(f"Unknown template {shown(chat_template)}; this family has one, 'chat'.")
        if compat not in (None, "webui"):
            raise PromptError(f"compat={shown(compat)} is unknown; use None or 'webui'.")
        conversations = messages if is_batch(messages) else [messages]
        rows: list[Row] = []
        for index, conversation in enumerate(conversations):
            with naming_conversation(index, len(conversations)):
                rows.append(self._row(normalize(conversation), add_generation_prompt, return_labels))
        if not tokenize:
            texts = [self._text(row) for row in rows]
            return texts if is_batch(messages) else texts[0]
        rule = compat or self.config.pixel_rule
        limits = limits or MediaLimits()
        pixels = [
            self.pixels(open_image(row.image, limits=limits, allow_paths=allow_paths, allow_urls=allow_urls), rule)
            for row in rows
            if row.image is not None
        ]
        batch = self._collate(rows, pixels, padding_side, return_labels, return_tensors, not is_batch(messages))
        return batch if return_dict else batch["input_ids"]

    def _row(self, messages: list[Message], add_generation_prompt: bool, return_labels: bool) -> Row:
        system, rounds = turns(messages)
        _check_images(messages)
        is_finished = rounds[-1].answer is not None
        check_end(is_finished, add_generation_prompt, return_labels)
        if not is_finished and not any(message.images() or message.text().strip() for message in messages):
            raise PromptError("The prompt is empty: no text and no image.")
        system_text = self.config.system_prompt if system is None else system.text()
        rounds = self._in_window(system_text, rounds)
        row = Row()
        row.add(self.chatml.system(system_text))
        for index, turn in enumerate(rounds):
            row.image = next(iter(turn.user.images()), row.image)
            is_last = index == len(rounds) - 1
            self._add_turn(row, turn, is_last, add_generation_prompt, return_labels)
        return row

    def _add_turn(self, row: Row, turn: Turn, is_last: bool, add_generation_prompt: bool, return_labels: bool) -> None:
        content = self._content(turn.user)
        if turn.answer is None and not add_generation_prompt:
            row.add([*self.chatml.newline, *self.chatml.block("user", content)])
        elif turn.answer is None or not return_labels:
            row.add(self.chatml.turn(content, None if turn.answer is None else turn.answer.text()))
        else:
            row.add(self.chatml.turn(content, None))
            end = self.chatml.ids.end_of_text if is_last else self.chatml.ids.im_end
            row.add([*encode_plain(self.tokenizer, turn.answer.text()), end], is_learnt=True)

    def _in_window(self, system_text: str, rounds: list[Turn]) -> list[Turn]:
        past = [(self._content(turn.user), turn.answer.text()) for turn in rounds[:-1] if turn.answer is not None]
        return rounds[self.chatml.num_dropped(system_text, past, self.config.max_window_tokens) :]

    def _content(self, message: Message) -> list[str | Slots]:
        """Give texts and the place of the picture, in order; texts beside each other have a space between."""
        content: list[str | Slots] = []
        for part in message.parts:
            if isinstance(part, ImagePart):
                content.append(Slots(self.num_image_tokens))
            elif isinstance(part, TextPart):  # `normalize` refuses videos
                is_after_text = content and isinstance(content[-1], str)
                content.append(f" {part.text}" if is_after_text else part.text)
        return content

    def _text(self, row: Row) -> str:
        """Give the prompt as the release writes it, with one token for the picture."""
        ids, image = row.input_ids, self.chatml.ids.image
        kept = [token for index, token in enumerate(ids) if token != image or index == 0 or ids[index - 1] != image]
        return self.tokenizer.decode(kept)

    def _collate(
        self,
        rows: list[Row],
        pixels: list[np.ndarray],
        padding_side: str,
        return_labels: bool,
        return_tensors: str | None,
        is_single: bool,
    ) -> BatchFeature:
        image = self.chatml.ids.image
        columns = {
            "input_ids": [row.input_ids for row in rows],
            "token_type_ids": [[int(token == image) for token in row.input_ids] for row in rows],
        }
        if return_labels:
            columns["labels"] = [row.labels for row in rows]
        return collate(
            columns,
            pixels,
            pad_token_id=self.chatml.ids.end_of_text,
            padding_side=padding_side,
            return_tensors=return_tensors,
            is_single=is_single,
        )

    # Images

    def pixels(self, picture: Image.Image, rule: str | None = None) -> np.ndarray:
        """Give one picture as the tower takes it, (3, size, size) float32.

        "training" (CLIP's own): shortest edge to `shortest_edge`, bicubic in two passes, centre crop, CLIP mean and
        std. "webui": ImageNet mean and std, then a bilinear squash of the float picture without antialiasing.
        """
        rule = self.config.pixel_rule if rule is None else rule
        size = int(self.config.tower.image_size)  # pyright: ignore[reportArgumentType]
        picture = to_rgb(picture)
        if rule == "webui":
            values = torch.from_numpy(normalize_pixels(picture, IMAGENET_MEAN, IMAGENET_STD))
            return F.interpolate(values[None], size=(size, size), mode="bilinear", align_corners=False)[0].numpy()
        if rule != "training":
            raise ConfigError(f"pixel rule {shown(rule)} is unknown; known are {', '.join(PIXEL_RULES)}.")
        edge = int(self.config.shortest_edge or size)
        short, long = sorted(picture.size)
        longer = int(edge * long / short)
        resized = resize_two_pass(picture, (edge, longer) if picture.width <= picture.height else (longer, edge))
        left, top = (resized.width - size) // 2, (resized.height - size) // 2
        cropped = resized.crop((left, top, left + size, top + size))
        return normalize_pixels(cropped, self.config.image_mean or (), self.config.image_std or ())

    def open_images(
        self, messages: Any, *, allow_paths: bool = True, allow_urls: bool = False, limits: MediaLimits | None = None
    ) -> list[Message]:
        """Give the checked messages of one conversation with every picture opened; no later call reads a file again."""
        checked = normalize(messages)
        _check_images(checked)

        def opened(part: Any) -> Any:
            if not isinstance(part, ImagePart):
                return part
            limit = limits or MediaLimits()
            return ImagePart(open_image(part.source, limits=limit, allow_paths=allow_paths, allow_urls=allow_urls))

        return [Message(message.role, tuple(opened(part) for part in message.parts)) for message in checked]

    # Text

    def decode(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> str:
        """Give the text of ids, without special tokens unless asked.

        Bytes of a character that is not complete yet become U+FFFD; ids behind the vocabulary give no text.

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


def _check_images(messages: Sequence[Message]) -> None:
    places = [index for index, message in enumerate(messages) for _ in message.images()]
    check_one_image(places, "this family was trained with one")
    for index, message in enumerate(messages):
        refuse_typed_image(message.text(), f"Message {index}")
