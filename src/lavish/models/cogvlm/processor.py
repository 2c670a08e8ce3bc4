"""CogVLM and CogVLM2: chat messages and a picture (or a video) to model inputs, ids back to text.

Source: THUDM/CogVLM and THUDM/CogVLM2 releases (build_conversation_input_ids, the demos). A sequence is
`[bos] + image slots (boi, patches, eoi) + text`; the picture of a conversation always stands right after bos, in
whatever turn it was sent; of a video each frame is such a run of slots, and with the template `chat` its index follows
it as text. Nothing here runs the network, and a prompt that is longer than the context is refused in
`lavish.inference`, not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from lavish.checkpoints.json_file import read_object, read_optional_object
from lavish.common.errors import CheckpointError, ConfigError, PromptError, did_you_mean, shown
from lavish.common.media import MediaLimits, image_digest, open_image
from lavish.common.messages import ImagePart, Message, VideoPart, images, is_batch, normalize, turns
from lavish.models.cogvlm.config import CogVLMConfig, CogVLMVisionConfig, read_config
from lavish.models.cogvlm.video import frame_pixels, read_clip
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
from lavish.processors.pixels import clip_square
from lavish.processors.tokenizers import encode_plain, load_tokenizer

TEXT_TYPE, VISION_TYPE = 0, 1


@dataclass(frozen=True)
class Template:
    """One released prompt format.

    `opening`, then per turn `question`, the text, `answer`; a past turn goes on with `space`, its answer, `turn_end`.
    """

    question: str
    answer: str
    opening: str = ""
    keeps_history: bool = True
    text_only: bool = False
    space: str = " "
    turn_end: str = "\n"
    markup: tuple[str, ...] = ()
    """What no user may type: the model would take it for the end of a turn."""

    def format(self, question: str) -> str:
        """Give one question with the words around it, up to where its answer begins."""
        return self.question + question + self.answer


TEMPLATES = {
    "chat": Template("Question: ", " Answer:"),
    "vqa": Template("Question: ", " Short answer:"),
    "base": Template("", "", keeps_history=False),
    # What SAT calls `chat`: CogAgent's prompt, which no released CogVLM was trained with. SAT's `chat_old` is `chat`.
    "inst": Template(" [INST] ", " [/INST] ", space="", turn_end="", markup=("[INST]", "[/INST]")),
    # The text-only rule of the v1 terminal demo, without its fault: from turn 3 on the demo repeats the earlier turns.
    "vicuna": Template(
        "USER: ",
        " ASSISTANT:",
        opening="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        text_only=True,
    ),
}


ALIASES = {"chat_old": "chat"}
"""What else a template is called: SAT's `--version` of the CogVLM chat models."""


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation: pieces of (text, is an answer to learn), and its picture or video, if any."""

    pieces: tuple[tuple[str, bool], ...]
    media: ImagePart | VideoPart | None = None
    template: str = "base"


@dataclass(frozen=True)
class Row:
    """One encoded, unpadded row. `labels` are the ids of the answers and -100 elsewhere."""

    input_ids: list[int]
    token_type_ids: list[int]
    labels: list[int]


class CogVLMProcessor(ProcessorMixin):
    """Turn chat messages into CogVLM inputs and ids into text.

    `image_size` is the side of the square picture in pixels, `num_image_tokens` the slots it takes, boi and eoi
    included. The ids of bos, eos and pad come from the model config, never from the tokenizer: the v2 release sets the
    tokenizer's pad id as a side effect, we do not.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int,
        num_image_tokens: int,
        bos_token_id: int,
        eos_token_id: int,
        pad_token_id: int,
        template_version: str = "chat",
        max_frames: int | None = None,
    ):
        super().__init__(tokenizer)
        self.image_size = image_size
        self.num_image_tokens = num_image_tokens
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.template_version = template_version
        self.max_frames = max_frames

    @classmethod
    def from_config(cls, config: CogVLMConfig, tokenizer: PreTrainedTokenizerBase) -> CogVLMProcessor:
        """Pair a tokenizer with the sizes and ids of a model config.

        Raises:
            ConfigError: the tokenizer's bos is not the model's, so it belongs to another model; or the config lacks an
            id.
        """
        vision, eos = config.vision_config, config.eos_token_id
        if not isinstance(vision, CogVLMVisionConfig):
            raise ConfigError("config: vision_config is absent; the processor takes the size of the picture from it.")
        if tokenizer.bos_token_id is not None and tokenizer.bos_token_id != config.bos_token_id:
            raise ConfigError(
                f"The tokenizer's bos id is {tokenizer.bos_token_id} ({tokenizer.bos_token!r}, {len(tokenizer)} ids) "
                "and the model's is "
                f"{config.bos_token_id} ({config.vocab_size} ids): the tokenizer belongs to another model. Name the "
                "right one with tokenizer=..."
            )
        return cls(
            tokenizer,
            image_size=vision.image_size,
            num_image_tokens=config.num_image_tokens,
            bos_token_id=_one_id("bos_token_id", config.bos_token_id),
            eos_token_id=_one_id("eos_token_id", eos[0] if isinstance(eos, list) and eos else eos),
            pad_token_id=_one_id("pad_token_id", config.pad_token_id),
            template_version=config.template_version,
            max_frames=config.max_frames,
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
    ) -> CogVLMProcessor:
        """Read a released folder (config.json and tokenizer files), or one that `save_pretrained` wrote.

        `tokenizer` names a folder apart from the weights (v1 releases have none of their own). `trust_remote_code` and
        `_from_auto` are what `AutoProcessor` passes along; they change nothing, since no code of a checkpoint is ever
        run.

        Raises:
            CheckpointError: config.json or the tokenizer is absent or damaged.
            ConfigError: the tokenizer belongs to another model.
        """
        folder = local_folder(pretrained_model_name_or_path, revision)
        saved = read_optional_object(folder / "processor_config.json")
        fields = ("image_size", "num_image_tokens", "bos_token_id", "eos_token_id", "pad_token_id", "template_version")
        if saved.get("processor_class") == cls.__name__ and all(field in saved for field in fields):
            options: dict[str, Any] = {field: saved[field] for field in fields}
            options["max_frames"] = saved.get("max_frames")
            return cls(_tokenizer(tokenizer, folder, None), **options)
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder}: no config.json and no processor_config.json; give the folder of a CogVLM release."
            )
        config = read_config(read_object(folder / "config.json"), str(folder / "config.json"))
        return cls.from_config(config, _tokenizer(tokenizer, folder, config.vocab_size))

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
        """Render one conversation or a list of them with a released template, and encode it.

        `chat_template` is one of TEMPLATES, "vicuna" for text only; None takes the model's `template_version`. A
        system message has no place in the released formats: its text goes in front of the first question that is
        rendered, with a space between. With `return_labels` the answers stay in the sequence, each encoded on its own
        and followed by eos, and `labels` is -100 outside them; `compat="release"` trains the last answer only, with the
        earlier turns as the text that inference sees.

        Shapes: input_ids, attention_mask, token_type_ids, labels (batch, seq) int64; pixel_values (rows with a picture,
        3, size, size) float32, absent when no row has one. With `return_tensors=None` lists of ids, flat for a single
        conversation. With `tokenize=False` the text alone; with `return_dict=False` the ids alone.

        Raises:
            PromptError: messages out of order, an unknown template, two pictures, nothing to answer or to learn.
            MediaError: a picture that cannot or must not be opened.
        """
        conversations = messages if is_batch(messages) else [messages]
        if compat not in (None, "release"):
            raise PromptError(f"compat={compat!r} is unknown; use None or 'release'.")
        prompts = []
        for index, conversation in enumerate(conversations):
            with naming_conversation(index, len(conversations)):
                checked = normalize(conversation, allow_videos=self.max_frames is not None)
                prompts.append(self._render(checked, chat_template, add_generation_prompt, return_labels, compat))
        if not tokenize:
            texts = ["".join(text for text, _ in prompt.pieces) for prompt in prompts]
            return texts if is_batch(messages) else texts[0]
        opening = {"allow_paths": allow_paths, "allow_urls": allow_urls, "limits": limits}
        opened = [self._open(prompt.media, prompt.template, **opening) for prompt in prompts]
        rows = [self._encode(prompt, len(pictures)) for prompt, pictures in zip(prompts, opened, strict=True)]
        pictures = [picture for pictures in opened for picture in pictures]
        batch = self._collate(
            rows, pictures, padding_side, return_labels, return_tensors, is_single=not is_batch(messages)
        )
        return batch if return_dict else batch["input_ids"]

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        padding_side: str = "left",
    ) -> BatchFeature:
        """Encode text as it is, without a template.

        One string and at most one picture, or a list of strings and a picture or None for each.

        Raises:
            PromptError: no text, or another number of pictures than of strings.
        """
        if text is None:
            raise PromptError("Give text=...; for a chat use apply_chat_template(messages).")
        is_single = isinstance(text, str)
        if not is_single and not (isinstance(text, list | tuple) and text):
            raise PromptError(f"text must be a string or a list of strings, not {shown(text)}.")
        texts = [text] if isinstance(text, str) else list(text)
        normalize([{"role": "user", "content": one} for one in texts])  # strings, of whole characters
        sources = (
            [None] * len(texts)
            if images is None
            else [images]
            if is_single and not isinstance(images, list)
            else list(images)
        )
        if len(sources) != len(texts):
            raise PromptError(f"{len(texts)} texts and {len(sources)} images: give one image, or None, for each text.")
        opened = [[] if source is None else [open_image(source)] for source in sources]
        rows = [self._encode(Prompt(((text, False),)), len(one)) for text, one in zip(texts, opened, strict=True)]
        pictures = [picture for one in opened for picture in one]
        return self._collate(rows, pictures, padding_side, False, return_tensors, is_single=is_single)

    def _render(
        self,
        messages: list[Message],
        chat_template: str | None,
        add_generation_prompt: bool,
        return_labels: bool,
        compat: str | None,
    ) -> Prompt:
        name, template = self._template(chat_template)
        system, rounds = turns(messages)
        media = _one_picture(messages)
        if template.text_only and media is not None:
            raise PromptError(
                f"The template {name!r} is for conversations without an image; use 'chat', 'vqa' or 'base'."
            )
        is_finished = rounds[-1].answer is not None
        check_end(is_finished, add_generation_prompt, return_labels)
        if not is_finished and media is None and not any(message.text().strip() for message in messages):
            raise PromptError("The prompt is empty: no text and no image.")
        questions = [turn.user.text() for turn in rounds]
        if typed := [mark for mark in template.markup for question in questions if mark in question]:
            raise PromptError(
                f"A question holds {typed[0]!r}, with which the template {name!r} marks turns; take it out of the text."
            )
        answers = [turn.answer.text() for turn in rounds if turn.answer is not None]
        is_last_only = not is_finished or compat == "release"
        if not template.keeps_history:
            if is_finished and not is_last_only and len(answers) > 1:
                raise PromptError(
                    f"The template {name!r} has no history, so a conversation of {len(answers)} answers cannot be "
                    "trained as one sequence: give each question with its answer as a conversation of its own, or use "
                    "compat='release' (the last answer only)."
                )
            questions, answers = questions[-1:], answers[-1:] if is_finished else []
        if system is not None and system.text():
            questions[0] = f"{system.text()} {questions[0]}"
        if is_last_only:
            pieces = _last_turn(template, questions, answers, add_answer_prompt=add_generation_prompt or is_finished)
        else:
            pieces = _all_turns(template, questions, answers)
        return Prompt(pieces, media, name)

    def _template(self, chat_template: str | None) -> tuple[str, Template]:
        name = self.template_version if chat_template is None else chat_template
        name = ALIASES.get(name, name) if isinstance(name, str) else name
        if not isinstance(name, str) or name not in TEMPLATES:
            origin = "the model config's template_version" if chat_template is None else "chat_template"
            raise PromptError(
                f"Unknown template {shown(name)} ({origin}); known are "
                f"{', '.join(TEMPLATES)}.{did_you_mean(str(name), TEMPLATES)}"
            )
        return name, TEMPLATES[name]

    # Ids

    def _encode(self, prompt: Prompt, num_pictures: int) -> Row:
        # The slots hold the pad id; what marks them as image is their type, never their id.
        input_ids, token_type_ids = [self.bos_token_id], [TEXT_TYPE]
        has_indices = self.max_frames is not None and prompt.template == "chat"
        for index in range(num_pictures):
            number = encode_plain(self.tokenizer, str(index)) if has_indices else []
            input_ids += [self.pad_token_id] * self.num_image_tokens + number
            token_type_ids += [VISION_TYPE] * self.num_image_tokens + [TEXT_TYPE] * len(number)
        labels = [IGNORE_INDEX] * len(input_ids)
        for text, is_answer in prompt.pieces:
            ids = encode_plain(self.tokenizer, text) + ([self.eos_token_id] if is_answer else [])
            input_ids += ids
            labels += ids if is_answer else [IGNORE_INDEX] * len(ids)
        return Row(input_ids, token_type_ids + [TEXT_TYPE] * (len(input_ids) - len(token_type_ids)), labels)

    def _collate(
        self,
        rows: list[Row],
        pictures: list[Any],
        padding_side: str,
        return_labels: bool,
        return_tensors: str | None,
        is_single: bool,
    ) -> BatchFeature:
        names = ("input_ids", "token_type_ids", *(("labels",) if return_labels else ()))
        return collate(
            {name: [getattr(row, name) for row in rows] for name in names},
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

    def _open(
        self,
        media: ImagePart | VideoPart | None,
        template: str,
        *,
        allow_paths: bool,
        allow_urls: bool,
        limits: MediaLimits | None,
    ) -> list[Any]:
        """Open what a conversation shows: no picture, one, or the frames of a video."""
        if media is None:
            return []
        if isinstance(media, VideoPart):
            is_base = template == "base"
            return read_clip(media.source, self.max_frames or 0, is_base=is_base, allow_paths=allow_paths)
        limits = limits or MediaLimits()
        return [open_image(media.source, limits=limits, allow_paths=allow_paths, allow_urls=allow_urls)]

    def _pixels(self, picture: Any) -> np.ndarray:
        if self.max_frames is not None:
            return frame_pixels(picture, self.image_size)
        return clip_square(picture, self.image_size)

    def open_images(
        self, messages: Any, *, allow_paths: bool = True, allow_urls: bool = False, limits: MediaLimits | None = None
    ) -> list[Message]:
        """Give the checked messages of one conversation with every picture opened.

        Later calls with them read no file and no URL again.
        """
        checked = normalize(messages, allow_videos=self.max_frames is not None)
        _one_picture(checked)
        opening = {"allow_paths": allow_paths, "allow_urls": allow_urls, "limits": limits}

        def opened(part: Any) -> Any:
            if not isinstance(part, ImagePart | VideoPart):
                return part
            pictures = self._open(part, self.template_version, **opening)
            return VideoPart(pictures) if isinstance(part, VideoPart) else ImagePart(pictures[0])

        return [Message(message.role, tuple(opened(part) for part in message.parts)) for message in checked]

    def image_digests(
        self, messages: Any, *, allow_paths: bool = True, allow_urls: bool = False, limits: MediaLimits | None = None
    ) -> list[str]:
        """Give the content hash of each picture or frame of one conversation, the key of a feature cache."""
        opened = self.open_images(messages, allow_paths=allow_paths, allow_urls=allow_urls, limits=limits)
        frames = [frame for message in opened for video in message.videos() for frame in video]
        return [image_digest(picture) for picture in [*(one for _, one in images(opened)), *frames]]

    # Text

    def decode(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> str:
        """Give the text of ids, without special tokens unless asked.

        Bytes of a character that is not complete yet become U+FFFD; ids that the tokenizer has no piece for give no
        text. `kwargs` are those of the tokenizer's `decode`.

        Raises:
            PromptError: what is no id: a negative one (the -100 of labels), one that no vocabulary can hold, a text.
        """
        return self.tokenizer.decode(checked_ids(token_ids), skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, sequences: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Give the text of each row of ids, as `decode`.

        Raises:
            PromptError: as `decode`.
        """
        rows = rows_of_ids(sequences)
        return [self.decode(row, skip_special_tokens=skip_special_tokens, **kwargs) for row in rows]

    def show_labels(self, batch: BatchFeature) -> str:
        """Render the rows of a training batch for a human, one line each: what is trained stands between « and ».

        Image slots and padding are counted (`<image x1227>`, `<pad x12>`); newlines are written as `\\n`.

        Raises:
            PromptError: the batch has no labels.
        """
        if "labels" not in batch:
            raise PromptError("The batch has no labels; make it with apply_chat_template(..., return_labels=True).")
        names = ("input_ids", "token_type_ids", "attention_mask", "labels")
        columns = [np.atleast_2d(np.asarray(batch[name])).tolist() for name in names]
        return "\n".join(self._show_row(*row) for row in zip(*columns, strict=True))

    def _show_row(
        self, input_ids: list[int], token_type_ids: list[int], attention_mask: list[int], labels: list[int]
    ) -> str:
        kinds = [
            "pad" if not mask else "image" if kind == VISION_TYPE else "text" if label == IGNORE_INDEX else "answer"
            for kind, mask, label in zip(token_type_ids, attention_mask, labels, strict=True)
        ]
        shown, start = [], 0
        for end in range(1, len(kinds) + 1):
            if end < len(kinds) and kinds[end] == kinds[start]:
                continue
            kind, ids = kinds[start], input_ids[start:end]
            if kind in ("pad", "image"):
                shown.append(f"<{kind} x{end - start}>")
            else:
                text = self.decode(ids, skip_special_tokens=False).replace("\n", "\\n")
                shown.append(f"«{text}»" if kind == "answer" else text)
            start = end
        return "".join(shown)


def _last_turn(
    template: Template, questions: list[str], answers: list[str], add_answer_prompt: bool
) -> tuple[tuple[str, bool], ...]:
    """Render as inference sees it: past turns as text, then the question, then (`compat="release"`) its answer."""
    last = len(questions) - 1
    past = [f"{template.format(questions[i])}{template.space}{answers[i]}{template.turn_end}" for i in range(last)]
    question = template.format(questions[last]) if add_answer_prompt else template.question + questions[last]
    context = template.opening + "".join(past) + question
    return ((context, False), *((answer, True) for answer in answers[last:]))


def _all_turns(template: Template, questions: list[str], answers: list[str]) -> tuple[tuple[str, bool], ...]:
    """Render for training: every answer is a piece of its own; the text goes on as in the history."""
    pieces: list[tuple[str, bool]] = []
    for index, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        before = template.opening if index == 0 else template.turn_end
        pieces += [(before + template.format(question), False), (answer, True)]
    return tuple(pieces)


def _one_picture(messages: list[Message]) -> ImagePart | VideoPart | None:
    parts = [(index, part) for index, message in enumerate(messages) for part in message.parts]
    found = [(index, part) for index, part in parts if isinstance(part, ImagePart | VideoPart)]
    places = [index for index, _ in found]
    if len(found) > 1 and any(isinstance(part, VideoPart) for _, part in found):
        raise PromptError(
            f"The conversation holds {len(found)} videos and images (messages {', '.join(map(str, places))}); "
            "CogVLM2-Video takes one video, or one image."
        )
    check_one_image(places, "CogVLM takes one, which stands before the text for all turns")
    return found[0][1] if found else None


def _tokenizer(
    tokenizer: str | Path | PreTrainedTokenizerBase | None, folder: Path, vocab_size: int | None
) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    return load_tokenizer(folder if tokenizer is None else local_folder(tokenizer, None), vocab_size=vocab_size)


def _one_id(name: str, token_id: Any) -> int:
    if not isinstance(token_id, int):
        raise ConfigError(f"config: {name} is {token_id!r}; the processor needs one id. Correct the config.json.")
    return token_id
