"""GLM-4V-9B: chat messages and a picture to model inputs, ids back to text.

Source: tokenization_chatglm.py of THUDM/glm-4v-9b (see tokenizer.py), and for labels THUDM/GLM-4,
finetune/finetune_vision.py. A prompt is `[gMASK] <sop>`, then for each message its role's token, the metadata and a
newline, the image, the text; it ends with `<|assistant|>`. The next role's token ends a turn. Nothing here runs the
network, and a prompt that is longer than the context is refused in `lavish.inference`, not here.

The ids are expanded: where the release writes boi, pad, eoi and grows the sequence inside the network, here boi and eoi
stand around as many pad ids as the picture has tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from lavish.checkpoints.json_file import read_object, read_optional_object
from lavish.common.errors import CheckpointError, ConfigError, PromptError, did_you_mean, shown
from lavish.common.media import MediaLimits, open_image
from lavish.common.messages import ROLES, ImagePart, Message, is_batch, normalize
from lavish.models.glm4v_9b import tokenizer as glm_tokenizer
from lavish.models.glm4v_9b.config import ChatGLMConfig, read_config
from lavish.models.glm4v_9b.tools import tools_text
from lavish.processors.chat import (
    IGNORE_INDEX,
    check_batch,
    check_one_image,
    checked_ids,
    collate,
    local_folder,
    naming_conversation,
    rows_of_ids,
)
from lavish.processors.pixels import clip_square
from lavish.processors.tokenizers import encode_plain

ALL_ROLES = (*ROLES, "observation")
BOI, EOI = "<|begin_of_image|>", "<|end_of_image|>"
TURN_ENDS = ("user", "observation")
"""Roles whose token ends an answer: the model stops there."""
RELEASE_TRAIN_TOKENS = 1024
"""Where `compat="release"` cuts a sample, the image counted as three: 512 tokens of input and 512 of output."""
RELEASE_BLACK_SIZE = 224
"""Side of the black picture that `compat="release"` gives a sample without one."""


@dataclass(frozen=True)
class GLMMessage(Message):
    """A checked message, with what GLM's template has beside role and content."""

    metadata: str = ""
    tools: Any = ()


@dataclass
class Row:
    """One encoded, unpadded row, the image still as three ids, and how it reads."""

    text: str = ""
    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    image: Any = None
    image_at: int | None = None

    def add(self, text: str, ids: Sequence[int], *, is_learnt: bool = False) -> None:
        """Put ids and their text at the end."""
        self.text += text
        self.input_ids += ids
        self.labels += list(ids) if is_learnt else [IGNORE_INDEX] * len(ids)


class Glm4v9bProcessor(ProcessorMixin):
    """Turn chat messages into GLM-4V inputs and ids into text.

    `image_size` is the side of the square picture in pixels, `num_image_tokens` the slots it takes, boi and eoi
    included. The ids of roles and edges come from the tokenizer: they follow its ranks, which are not 151329 in every
    checkpoint.
    """

    template_version = "chat"
    """The only template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_size: int, num_image_tokens: int, pad_token_id: int):
        super().__init__(tokenizer)
        self.image_size = image_size
        self.num_image_tokens = num_image_tokens
        self.pad_token_id = pad_token_id
        names = (*glm_tokenizer.PREFIX, *(f"<|{role}|>" for role in ALL_ROLES), BOI, EOI)
        vocab = tokenizer.get_vocab()
        absent = [name for name in names if name not in vocab]
        if absent:
            raise ConfigError(
                f"The tokenizer ({len(tokenizer)} ids) has no {absent[0]}: it belongs to another model. Name that of "
                "GLM-4V-9B with tokenizer=..."
            )
        self._ids = {name: vocab[name] for name in names}

    @classmethod
    def from_config(cls, config: ChatGLMConfig, tokenizer: PreTrainedTokenizerBase) -> Glm4v9bProcessor:
        """Pair a tokenizer with the sizes and ids of a model config.

        Raises:
            ConfigError: the tokenizer's ids of the image are not the model's, or the config lacks an id.
        """
        if config.vision_config is None or config.pad_token_id is None:
            raise ConfigError("config: vision_config or pad_token_id is absent; the processor is made from them.")
        made = cls(
            tokenizer,
            image_size=config.tower.image_size,
            num_image_tokens=config.num_image_tokens,
            pad_token_id=config.pad_token_id,
        )
        for name, wanted in ((BOI, config.boi_token_id), (EOI, config.eoi_token_id)):
            if made._ids[name] != wanted:
                raise ConfigError(
                    f"The tokenizer's id of {name} is {made._ids[name]} and the model's is {wanted}: the tokenizer "
                    "belongs to another model. Name the right one with tokenizer=..."
                )
        return made

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        trust_remote_code: bool | None = None,
        _from_auto: bool = False,
    ) -> Glm4v9bProcessor:
        """Read a released folder (config.json and tokenizer files), or one that `save_pretrained` wrote.

        `tokenizer` names a folder apart from the weights. `trust_remote_code` and `_from_auto` are what `AutoProcessor`
        passes along; they change nothing, since no code of a checkpoint is ever run.

        Raises:
            CheckpointError: config.json or the tokenizer is absent or damaged.
            ConfigError: the tokenizer belongs to another model, or was made for pictures of another size.
        """
        folder = local_folder(pretrained_model_name_or_path, revision)
        saved = read_optional_object(folder / "processor_config.json")
        fields = ("image_size", "num_image_tokens", "pad_token_id")
        if saved.get("processor_class") == cls.__name__ and all(name in saved for name in fields):
            return cls(_tokenizer(tokenizer, folder), **{name: saved[name] for name in fields})
        path = folder / "config.json"
        if not path.is_file():
            raise CheckpointError(
                f"{folder}: no config.json and no processor_config.json; give the folder of a GLM-4V-9B release."
            )
        config = read_config(read_object(path), str(path))
        size = read_optional_object(folder / "tokenizer_config.json").get("image_size", config.tower.image_size)
        if size != config.tower.image_size:
            raise ConfigError(
                f"{folder}: tokenizer_config.json says image_size {shown(size)} and config.json "
                f"{config.tower.image_size}; the files belong to different models. Fetch them again."
            )
        return cls.from_config(config, _tokenizer(tokenizer, folder))

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
    ) -> Any:
        """Render one conversation or a list of them with the released template, and encode it.

        Messages have the roles system, user, assistant and observation, in any order, and may have `metadata` (a
        string), `tools` (a list) and, in the release's own form, `image`. One picture, in any user message. A message
        without text and image gives nothing, not even its role.

        With `return_labels` the targets are the assistant's messages with their role token and newline, and the token
        that ends each of them, so that the model learns to stop. `compat="release"` never makes that token a target,
        gives a sample whose first message has no picture a black one, and cuts at 1024 tokens, an image counted as
        three.

        Shapes: input_ids, attention_mask, token_type_ids (1 = image slot), labels (batch, seq) int64; pixel_values
        (rows with a picture, 3, size, size) float32, absent when no row has one. With `return_tensors=None` lists of
        ids, flat for a single conversation. With `tokenize=False` the text alone, without the image's tokens; with
        `return_dict=False` the ids alone.

        Raises:
            PromptError: messages that make no prompt, two pictures, an unknown tool, nothing to answer or to learn.
            MediaError: a picture that cannot or must not be opened.
        """
        _check_options(chat_template, compat, padding_side, return_tensors)
        conversations = messages if is_batch(messages) else [messages]
        rows = []
        for index, conversation in enumerate(conversations):
            with naming_conversation(index, len(conversations)):
                checked = read_messages(conversation)
                if return_labels:
                    rows.append(self._training_row(checked, is_release=compat == "release"))
                else:
                    rows.append(self._row(checked, add_generation_prompt))
        if not tokenize:
            return [row.text for row in rows] if is_batch(messages) else rows[0].text
        pictures = [
            open_image(row.image, limits=limits or MediaLimits(), allow_paths=allow_paths, allow_urls=allow_urls)
            for row in rows
            if row.image is not None
        ]
        batch = self._collate(
            rows, pictures, padding_side, return_labels, return_tensors, is_single=not is_batch(messages)
        )
        return batch if return_dict else batch["input_ids"]

    def __call__(self, *args: Any, **kwargs: Any) -> BatchFeature:  # pyright: ignore[reportIncompatibleMethodOverride]
        """GLM-4V has no format but its chat template.

        Raises:
            PromptError: always.
        """
        raise PromptError(
            "GLM-4V-9B answers conversations only: use apply_chat_template([{'role': 'user', 'content': [{'type': "
            "'image', 'image': ...}, {'type': 'text', 'text': '...'}]}])."
        )

    def _row(self, messages: list[GLMMessage], add_generation_prompt: bool) -> Row:
        if messages[-1].role == "assistant" and messages[-1].text() and add_generation_prompt:
            raise PromptError(
                "The conversation ends with an answer, so there is nothing to generate: add a question, or pass "
                "add_generation_prompt=False (or return_labels=True for training)."
            )
        row = self._start()
        for message in messages:
            self._add(row, message)
        if len(row.input_ids) == len(glm_tokenizer.PREFIX):
            raise PromptError("The prompt is empty: no text and no image.")
        if add_generation_prompt:
            self._add_token(row, "<|assistant|>")  # no newline: the model writes it, and `decode` takes it off
        return row

    def _training_row(self, messages: list[GLMMessage], *, is_release: bool) -> Row:
        if is_release and not messages[0].images():
            black = ImagePart(Image.new("RGB", (RELEASE_BLACK_SIZE, RELEASE_BLACK_SIZE)))
            first = messages[0]
            messages = [GLMMessage(first.role, (*first.parts, black), first.metadata, first.tools), *messages[1:]]
        if not any(message.role == "assistant" and message.text() for message in messages):
            raise PromptError("return_labels needs an answer to learn: no message of role 'assistant' has text.")
        row, role = self._start(), ""
        for message in messages:
            role = self._add(row, message, role, learns=True, learns_ends=not is_release)
        if is_release or role == "assistant":
            self._add_token(row, "<|user|>", is_learnt=not is_release)
        if is_release:
            _cut(row)
        return row

    def _start(self) -> Row:
        row = Row()
        for name in glm_tokenizer.PREFIX:
            self._add_token(row, name)
        return row

    def _add_token(self, row: Row, name: str, *, is_learnt: bool = False) -> None:
        row.add(name, [self._ids[name]], is_learnt=is_learnt)

    def _add(
        self, row: Row, message: GLMMessage, before: str = "", *, learns: bool = False, learns_ends: bool = False
    ) -> str:
        """Put a message at the end of a row; give its role, or that of the one before if it gives nothing."""
        if message.tools:
            text = tools_text(message.tools, f"The message of role {message.role!r}")
            before = self._add(row, GLMMessage("system", normalize([{"role": "system", "content": text}])[0].parts))
        text, images = message.text(), message.images()
        if not text and not images:
            return before
        is_learnt = learns and message.role == "assistant"
        ends_answer = learns_ends and before == "assistant" and message.role in TURN_ENDS
        self._add_token(row, f"<|{message.role}|>", is_learnt=is_learnt or ends_answer)
        # Two encodings: the newline and the text are never joined to one token.
        head = f"{message.metadata}\n"
        row.add(head, encode_plain(self.tokenizer, head), is_learnt=is_learnt)
        if images:
            if row.image is not None:
                raise PromptError(
                    "The conversation holds 2 images or more; GLM-4V-9B takes one. Keep one image, or start a new "
                    "conversation for the next one."
                )
            row.image, row.image_at = images[0], len(row.input_ids)
            row.add("", [self._ids[BOI], self.pad_token_id, self._ids[EOI]])
        row.add(text, encode_plain(self.tokenizer, text), is_learnt=is_learnt)
        return message.role

    # Ids

    def _collate(
        self,
        rows: list[Row],
        pictures: list[Any],
        padding_side: str,
        return_labels: bool,
        return_tensors: str | None,
        is_single: bool,
    ) -> BatchFeature:
        count = self.num_image_tokens
        slots = [self._ids[BOI], *[self.pad_token_id] * (count - 2), self._ids[EOI]]
        columns = {
            "input_ids": [_expanded(row, row.input_ids, slots) for row in rows],
            "token_type_ids": [_expanded(row, [0] * len(row.input_ids), [1] * count) for row in rows],
        }
        if return_labels:
            columns["labels"] = [_expanded(row, row.labels, [IGNORE_INDEX] * count) for row in rows]
        return collate(
            columns,
            [self._pixels(picture) for picture in pictures],
            pad_token_id=self.pad_token_id,
            padding_side=padding_side,
            return_tensors=return_tensors,
            is_single=is_single,
        )

    # Images

    def pixel_values(
        self, image: Any, *, allow_paths: bool = True, allow_urls: bool = False, limits: MediaLimits | None = None
    ) -> torch.Tensor:
        """Give one picture as the tower takes it.

        RGB (alpha dropped), bicubic with antialiasing to a square (the aspect ratio is not kept), CLIP mean and std.

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
        """Give the text of an answer's ids, without special tokens unless asked.

        The newline that begins every answer belongs to the template and is taken off, where special tokens are skipped
        and the first id is none; `tokenizer.decode` leaves it. So `decode` of any part of an answer may lack its first
        newline, of two parts with the same beginning alike: `TextStream` relies on that. Bytes of a character that is
        not complete yet become U+FFFD; ids that the tokenizer has no piece for give no text. `kwargs` are those of the
        tokenizer's `decode`.

        Raises:
            PromptError: what is no id: a negative one (the -100 of labels), one that no vocabulary can hold, a text.
        """
        ids = checked_ids(token_ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)
        begins_special = bool(ids) and ids[0] in self.tokenizer.added_tokens_decoder
        return text if begins_special or not skip_special_tokens else text.removeprefix("\n")

    def batch_decode(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, sequences: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Give the text of each row of ids, as `decode`.

        Raises:
            PromptError: as `decode`.
        """
        rows = rows_of_ids(sequences)
        return [self.decode(row, skip_special_tokens=skip_special_tokens, **kwargs) for row in rows]


def read_messages(messages: Any) -> list[GLMMessage]:
    """Check the messages of one conversation.

    Raises:
        PromptError: names the index of the bad message and what is allowed there.
    """
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
    plain = [_plain(message, index) for index, message in enumerate(messages)] if is_list else messages
    found = []
    for index, message in enumerate(normalize(plain)):
        given = messages[index]
        if isinstance(given, GLMMessage):
            found.append(given)
            continue
        extra = given if isinstance(given, Mapping) else {}
        role, metadata, tools = extra.get("role", message.role), extra.get("metadata") or "", extra.get("tools") or ()
        if not isinstance(metadata, str):
            raise PromptError(f"Message {index}: metadata is {shown(metadata)} and must be a string.")
        parts = message.parts if extra.get("image") is None else (ImagePart(extra["image"]), *message.parts)
        checked = GLMMessage(role, parts, metadata, tools)
        if checked.images() and role != "user":
            raise PromptError(f"Message {index} has role {role!r} and holds an image; images belong to user messages.")
        if tools:
            tools_text(tools, f"Message {index}")
        found.append(checked)
    places = [index for index, message in enumerate(found) for _ in message.images()]
    check_one_image(places, "GLM-4V-9B takes one, in any turn")
    return found


def _plain(message: Any, index: int) -> Any:
    """Give a message without what only GLM's template knows, so that the common checks see the rest."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return message
    role = message["role"]
    if role in ("tool", "function"):
        raise PromptError(
            f"Message {index} has role {role!r}; GLM-4's name for what a tool gave is 'observation', and the call "
            "before it is an assistant's message with the tool's name as metadata."
        )
    if role not in ALL_ROLES:
        hint = did_you_mean(role, ALL_ROLES)
        raise PromptError(f"Message {index} has role {role!r}; known roles are {', '.join(ALL_ROLES)}.{hint}")
    plain = {key: value for key, value in message.items() if key not in ("content", "image", "metadata", "tools")}
    plain["role"] = role if role in ROLES else "user"
    if "content" in message or "image" in message:
        plain["content"] = message.get("content", "")
    return plain


def _check_options(chat_template: Any, compat: Any, padding_side: Any, return_tensors: Any) -> None:
    if chat_template not in (None, Glm4v9bProcessor.template_version):
        raise PromptError(f"chat_template={shown(chat_template)} is unknown; GLM-4V-9B has one template, 'chat'.")
    if compat not in (None, "release"):
        raise PromptError(f"compat={compat!r} is unknown; use None or 'release'.")
    check_batch(padding_side, return_tensors)


def _expanded(row: Row, values: list[int], slots: list[int]) -> list[int]:
    """Put `slots` in the place of the image's three."""
    at = row.image_at
    return values if at is None else values[:at] + slots + values[at + 3 :]


def _cut(row: Row) -> None:
    """Cut a training row from the right as the release does, before the image is expanded."""
    if row.image_at is not None and row.image_at + 3 > RELEASE_TRAIN_TOKENS:
        raise PromptError(
            f"compat='release' cuts a sample at {RELEASE_TRAIN_TOKENS} tokens, and the image of this one stands at "
            f"{row.image_at} to {row.image_at + 2}, where the release's training fails. Shorten the text before it."
        )
    del row.input_ids[RELEASE_TRAIN_TOKENS:], row.labels[RELEASE_TRAIN_TOKENS:]


def _tokenizer(tokenizer: str | Path | PreTrainedTokenizerBase | None, folder: Path) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    return glm_tokenizer.load(folder if tokenizer is None else local_folder(tokenizer, None))
