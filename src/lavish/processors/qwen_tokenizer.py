"""Tokenizer and ChatML of Qwen's first generation, for every family that talks through it.

`qwen.tiktoken` holds ranks only; the special tokens follow them. A prompt is `<|im_start|>role\\ntext<|im_end|>` blocks
with newlines between; all special ids come from here, and text is encoded without any, so nobody can type a turn.
Source: Qwen/Qwen-7B-Chat, tokenization_qwen.py and qwen_generation_utils.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tokenizers.normalizers import NFC
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lavish.common.errors import CheckpointError, PromptError
from lavish.processors.tokenizers import encode_plain, load_rank_file, load_tokenizer

RANK_FILE = "qwen.tiktoken"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT, IM_START, IM_END, IMAGE = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{index}|>" for index in range(205)))


def load_qwen_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Read `qwen.tiktoken` of a released folder, or the tokenizer.json of one that lavish saved.

    The ids of the special tokens follow from the number of ranks: 151643 in the release.

    Raises:
        CheckpointError: no tokenizer there, a damaged one, or one of another model.
    """
    path = Path(folder) / RANK_FILE
    if path.is_file():
        num_ranks = sum(1 for line in path.read_bytes().splitlines() if line.strip())
        tokenizer: PreTrainedTokenizerBase = load_rank_file(
            path,
            split_pattern=QWEN_SPLIT,
            special_tokens={token: num_ranks + index for index, token in enumerate(SPECIAL_TOKENS)},
            normalizer=NFC(),
            eos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
        )
    elif (Path(folder) / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
    else:
        raise CheckpointError(
            f"{folder}: no {RANK_FILE} (released folders) and no tokenizer.json (folders that lavish saved). Fetch the "
            "tokenizer of Qwen-7B-Chat, or name its folder with tokenizer=..."
        )
    special_ids(tokenizer)
    return tokenizer


@dataclass(frozen=True)
class SpecialIds:
    """The special ids that prompts are made of."""

    end_of_text: int
    im_start: int
    im_end: int
    image: int

    @property
    def stop(self) -> tuple[int, int, int]:
        """What ends an answer: of the chat model `<|im_end|>`, of fine-tuned ones `<|endoftext|>`; a new turn too."""
        return (self.end_of_text, self.im_start, self.im_end)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> SpecialIds:
    """Look the special ids up.

    Raises:
        CheckpointError: the tokenizer lacks one: it is not Qwen's.
    """
    # Every tokenizer of transformers has it; their base class does not declare it.
    vocab = cast(PreTrainedTokenizerFast, tokenizer).get_added_vocab()
    absent = [token for token in (END_OF_TEXT, IM_START, IM_END, IMAGE) if token not in vocab]
    if absent:
        raise CheckpointError(
            f"The tokenizer ({type(tokenizer).__name__}, {len(tokenizer)} ids) has no special token {absent[0]!r}; it "
            f"is not that of a Qwen of the first generation. Give a folder with {RANK_FILE} as tokenizer=..."
        )
    return SpecialIds(*(vocab[token] for token in (END_OF_TEXT, IM_START, IM_END, IMAGE)))


@dataclass(frozen=True)
class Slots:
    """The place of one image in a text: so many ids of `<|extra_0|>`."""

    num_tokens: int


Content = Sequence[str | Slots]
"""A text with images in it, in reading order."""


class ChatML:
    """Render ChatML as ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids = special_ids(tokenizer)
        self.newline = encode_plain(tokenizer, "\n")

    def block(self, role: str, content: Content, *, is_open: bool = False) -> list[int]:
        """Give the ids of one block; an open one is still to be written and has no end."""
        ids = [self.ids.im_start]
        text = f"{role}\n"
        for part in content:
            if isinstance(part, Slots):
                ids += [*encode_plain(self.tokenizer, text), *[self.ids.image] * part.num_tokens]
                text = ""
            else:
                text += part  # with the role in one piece: their newlines are one token together
        ids += encode_plain(self.tokenizer, text) if text else []
        return ids if is_open else [*ids, self.ids.im_end]

    def turn(self, question: Content, answer: str | None) -> list[int]:
        """Give the ids of a turn, a newline before each block; without an answer it ends where that begins."""
        asked = [*self.newline, *self.block("user", question), *self.newline]
        reply = () if answer is None else (answer,)
        return asked + self.block("assistant", reply, is_open=answer is None)

    def system(self, text: str) -> list[int]:
        """Give the ids of the system block, which opens a prompt also where its text is empty."""
        return self.block("system", (text,))

    def num_dropped(self, system: str, past: Sequence[tuple[Content, str]], max_window_tokens: int) -> int:
        """Give how many of the past turns, oldest first, do not fit into the window; images count with their slots."""
        used = len(self.system(system))
        for index in range(len(past) - 1, -1, -1):
            used += len(self.turn(*past[index]))
            if used >= max_window_tokens:
                return index + 1
        return 0


def refuse_typed_image(text: str, where: str) -> None:
    """Refuse a text that holds the image token: only a picture makes one.

    Raises:
        PromptError: it does.
    """
    if IMAGE in text:
        raise PromptError(
            f"{where}: the text holds {IMAGE!r}, the place of an image, and no image stands there. Give the picture as "
            "a part of the content where it belongs: [{'type': 'image', 'image': ...}, {'type': 'text', 'text': ...}]."
        )
