"""The tokenizer of the pocket model: a token for each word, Chinese character and coordinate of the drawn world.

Ids: 0..2 specials, 3..258 bytes, then 1000 coordinates, then `[[`, `]]`, words and characters. A coordinate is a token
only inside `[[...]]`; other digits are single bytes. Any text round-trips exactly, because what is no known word falls
apart into its bytes.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from lavish.common.errors import DataError
from lavish.datasets.scenes.phrases import LANGUAGES, all_texts

SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>")
BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID = 0, 1, 2
COORDINATE_BASE = len(SPECIAL_TOKENS) + 256
"""Id of the coordinate 000; coordinate v has the id COORDINATE_BASE + v."""

_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_FIELD = re.compile(r"\{\w+\}")
_WIDE = re.compile(r"[^\x00-\x7f]")
_COORDINATE = r"(?<=\[\[|[,;])[0-9]{3}(?=(?:[,;][0-9]{3}){0,63}\]\])"
_SPLIT = rf"{_COORDINATE}|\[\[|\]\]| ?[A-Za-z]+(?:'[a-z]+)?|[^\x00-\x7f]|[\x00-\x7f]"


def coordinate_id(value: int) -> int:
    """Give the token id of a coordinate in thousandths.

    Raises:
        DataError: `value` lies outside 0..999.
    """
    if not 0 <= value <= 999:
        raise DataError(f"coordinate_id({value}): coordinates are thousandths, 0..999.")
    return COORDINATE_BASE + value


@lru_cache(maxsize=1)
def words() -> tuple[str, ...]:
    """Give the word tokens in the order of their ids: English with and without a space before, then wide characters."""
    english, wide = set(), set()
    for language in LANGUAGES:
        for text in all_texts(language):
            plain = _FIELD.sub(" ", text)
            english.update(_WORD.findall(plain))
            wide.update(_WIDE.findall(plain))
    with_space = {" " + word for word in english}
    single_letters = {word for word in english if len(word) == 1}  # these are bytes already
    return (*sorted((english - single_letters) | with_space), *sorted(wide))


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[int, str]:
    """Map each byte to the printable character that stands for it in a byte-level vocabulary (GPT-2's table)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in kept}
    others = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + index) for index, byte in enumerate(others)}


def _spelled(token: str) -> str:
    return "".join(_byte_alphabet()[byte] for byte in token.encode())


def build_tokenizer() -> Tokenizer:
    """Make the tokenizer; it adds no special tokens by itself."""
    alphabet = _byte_alphabet()
    tokens = [*SPECIAL_TOKENS, *(alphabet[byte] for byte in range(256)), *(f"{value:03d}" for value in range(1000))]
    tokens += [_spelled(token) for token in ("[[", "]]", *words())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def save_tokenizer(folder: str | Path) -> None:
    """Write the three tokenizer files that transformers reads with `PreTrainedTokenizerFast.from_pretrained`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    bos, eos, pad = SPECIAL_TOKENS
    special = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    for name, content in (("special_tokens_map.json", special), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
