"""The tokenizer of GLM-4V-9B: byte pairs from `tokenizer.model` (lines `base64 rank`) and fourteen special tokens.

Source: tokenization_chatglm.py of THUDM/glm-4v-9b, read through huggingface/optimum-habana
(optimum/habana/transformers/models/glm4v/tokenization_chatglm.py). The class bears the released name, by which
tokenizer_config.json asks for it; the released code is never run. Not here: the chat template (processor.py), and
encoding what a user typed, which is `lavish.processors.tokenizers.encode_plain`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from lavish.checkpoints.json_file import read_optional_object
from lavish.common.errors import CheckpointError
from lavish.processors.tokenizers import rank_backend

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
"""What follows the ranks where tokenizer_config.json does not say it."""
PREFIX = ("[gMASK]", "<sop>")
"""What every prompt begins with, and what `encode` puts in front."""


class ChatGLM4Tokenizer(PreTrainedTokenizerFast):
    """The released tokenizer, read from `tokenizer.model`, or from the tokenizer.json that `save_pretrained` wrote.

    As the release: `encode` turns special strings into ids and puts `[gMASK] <sop>` in front; `decode` writes a space
    between special tokens and text. Neither is used for prompts or answers.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json", "vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Give the arguments as they are: transformers' own readers of `tokenizer.model` guess another split."""
        return kwargs

    def __init__(self, vocab_file: str | None = None, **kwargs: Any):
        kwargs.pop("auto_map", None)
        kwargs["clean_up_tokenization_spaces"] = False
        kwargs.setdefault("pad_token", SPECIAL_TOKENS[0])
        kwargs.setdefault("eos_token", SPECIAL_TOKENS[0])
        saved = kwargs.get("tokenizer_file")
        if kwargs.get("tokenizer_object") is None and not (saved and Path(saved).is_file()):
            if vocab_file is None or not Path(vocab_file).is_file():
                raise CheckpointError(f"No tokenizer.model to read the tokenizer from (looked for {vocab_file}).")
            path = Path(vocab_file)
            backend = rank_backend(path, split_pattern=SPLIT, special_tokens=special_tokens(path), prefix=PREFIX)
            kwargs["tokenizer_object"], kwargs["tokenizer_file"] = backend, None
        super().__init__(**kwargs)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(token_id) for token_id in token_ids]
        special = self.added_tokens_decoder
        texts: list[str] = []
        run: list[int] = []
        for token_id in [*ids, None]:
            if token_id is not None and token_id not in special:
                run.append(token_id)
                continue
            if run:
                texts.append(super()._decode(run, clean_up_tokenization_spaces=False))
                run = []
            if token_id is not None and not skip_special_tokens:
                texts.append(str(special[token_id]))
        return ("" if skip_special_tokens else " ").join(texts)


def special_tokens(vocab_file: Path) -> dict[str, int]:
    """Give the special tokens of a released folder and their ids: those of its tokenizer_config.json, else the
    release's, behind the ranks.
    """
    named = read_optional_object(vocab_file.parent / "tokenizer_config.json").get("added_tokens_decoder") or {}
    found: dict[str, int] = {}
    for key, value in named.items():
        content = value.get("content") if isinstance(value, dict) else value
        if not (str(key).isdecimal() and isinstance(content, str)):
            raise CheckpointError(
                f"{vocab_file.parent / 'tokenizer_config.json'}: added_tokens_decoder holds {key!r}: {value!r}, which "
                "is no special token; fetch the file again."
            )
        found[content] = int(key)
    if found:
        return found
    num_ranks = sum(1 for line in vocab_file.read_bytes().splitlines() if line.strip())
    return {token: num_ranks + index for index, token in enumerate(SPECIAL_TOKENS)}


def load(folder: Path) -> ChatGLM4Tokenizer:
    """Read the tokenizer of a folder, a released one or one that lavish saved.

    Raises:
        CheckpointError: no file of it there, or one that cannot be parsed.
    """
    model_file, json_file = folder / "tokenizer.model", folder / "tokenizer.json"
    if not model_file.is_file() and not json_file.is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise CheckpointError(
            f"{folder}: no tokenizer; looked for tokenizer.model and tokenizer.json, found "
            f"{found or 'an empty folder'}. Name the folder that has it with tokenizer=..."
        )
    return ChatGLM4Tokenizer.from_pretrained(folder)
