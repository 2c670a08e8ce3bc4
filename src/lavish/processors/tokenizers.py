"""Tokenizers read from the files of a release, and the one way to encode what a user typed.

`tokenizer.model` may be sentencepiece (Vicuna) or a tiktoken rank file (Llama-3); `tokenizer.json` is read by the
`tokenizers` library. All give a transformers tokenizer, so `save_pretrained`, `decode` and `len` work as usual. No
class that a checkpoint names is looked up and no code that it brings is run.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from lavish.checkpoints.json_file import read_optional_object
from lavish.common.errors import CheckpointError

# The split of Llama-3's tokenizer.model; its file holds ranks only.
# Source: tokenizer.json of the Llama-3 release (the same string stands there).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*")


class SentencePieceTokenizer(SentencePieceBackend):
    """A transformers tokenizer whose encoding and decoding are sentencepiece's own.

    transformers 4 and 5 encode a text that starts with two spaces differently, and joining pieces loses spaces and
    bytes; so text goes through the sentencepiece model untouched, both ways.
    """

    def __init__(self, vocab_file: str, **kwargs: Any):
        super().__init__(**{**kwargs, "vocab_file": vocab_file, "legacy": True, "clean_up_tokenization_spaces": False})

    def encode_plain(self, text: str) -> list[int]:
        """Give the ids of text; no string in it becomes a control id."""
        return self.sp_model.encode(text)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = False,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(token_id) for token_id in token_ids]
        special = {*self.all_special_ids, *self.added_tokens_decoder}
        pieces: list[str] = []
        run: list[int] = []
        for token_id in ids:
            if token_id in special:
                pieces.append(self.sp_model.decode(run))
                pieces.append("" if skip_special_tokens else self.convert_ids_to_tokens(token_id))
                run = []
            elif 0 <= token_id < self.vocab_size:  # an embedding may have more rows than there are pieces: no text
                run.append(token_id)
        return "".join([*pieces, self.sp_model.decode(run)])


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode what a user typed: no special tokens are added and none is recognised in the text."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.encode_plain(text)
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)


def load_tokenizer(folder: str | Path, *, vocab_size: int | None = None) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a folder.

    A sentencepiece `tokenizer.model`, else `tokenizer.json`, else a tiktoken `tokenizer.model`. Sentencepiece comes
    first because a `tokenizer.json` beside it is a conversion of it. `vocab_size` (of the model) bounds how many
    special tokens follow the ranks of a tiktoken file that has no `tokenizer_config.json`.

    Raises:
        CheckpointError: no tokenizer file there, or one that cannot be parsed.
    """
    folder = Path(folder)
    model_file, json_file = folder / "tokenizer.model", folder / "tokenizer.json"
    is_tiktoken = model_file.is_file() and _is_tiktoken(model_file)
    if model_file.is_file() and not is_tiktoken:
        return _from_sentencepiece(model_file)
    if json_file.is_file():
        return _from_tokenizer_json(json_file)
    if is_tiktoken:
        return _from_tiktoken(model_file, vocab_size)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    raise CheckpointError(
        f"{folder}: no tokenizer; looked for tokenizer.model and tokenizer.json, found {found or 'an empty folder'}. "
        "Name the folder that has it with tokenizer=... (CogVLM v1 uses that of lmsys/vicuna-7b-v1.5)."
    )


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{path} is neither a sentencepiece model nor a tiktoken rank file ({path.stat().st_size} bytes); fetch it "
            "again."
        ) from error
    names = {
        name: pieces.id_to_piece(token_id)
        for name, token_id in (
            ("bos_token", pieces.bos_id()),
            ("eos_token", pieces.eos_id()),
            ("unk_token", pieces.unk_id()),
        )
        if token_id >= 0
    }
    return SentencePieceTokenizer(str(path), **names)


def _from_tokenizer_json(path: Path) -> PreTrainedTokenizerBase:
    text = path.read_bytes().strip()
    # Parsing 9 MB twice would cost half a second: look at both ends, which tells a cut download and an error page.
    if not (text.startswith(b"{") and text.endswith(b"}")):
        raise CheckpointError(f"{path} is not a JSON object ({len(text)} bytes, it may be cut); fetch it again.")
    try:
        return _fast(path.parent, tokenizer_file=str(path))
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more special
        raise CheckpointError(f"{path} describes no tokenizer ({error}); fetch it again.") from error


def _from_tiktoken(path: Path, vocab_size: int | None) -> PreTrainedTokenizerBase:
    num_ranks = len(_read_ranks(path))
    special = _special_tokens(path.parent, num_ranks, vocab_size)
    return load_rank_file(
        path,
        split_pattern=LLAMA3_SPLIT,
        special_tokens={token: num_ranks + index for index, token in enumerate(special)},
        prefix=special[:1],
        bos_token=special[0],
        eos_token=special[1],
    )


def load_rank_file(
    path: str | Path,
    *,
    split_pattern: str,
    special_tokens: Mapping[str, int],
    normalizer: normalizers.Normalizer | None = None,
    prefix: Sequence[str] = (),
    tokenizer_class: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast,
    **named: str,
) -> PreTrainedTokenizerFast:
    """Read a file of `base64 rank` lines (tiktoken's) as a transformers tokenizer.

    Args:
        path: the file; the names of special tokens in a tokenizer_config.json beside it come before `named`.
        split_pattern: the regular expression that cuts text before byte pairs are joined; the file does not hold it.
        special_tokens: id of each special token; they follow the ranks without a gap.
        normalizer: what is done to text first (Qwen: NFC).
        prefix: special tokens that `encode` puts in front; `encode_plain` never does.
        tokenizer_class: what to make of it.
        named: bos_token, eos_token, unk_token, pad_token.
    Raises:
        CheckpointError: a damaged file, or special ids that do not follow its ranks.
    """
    path = Path(path)
    backend = rank_backend(
        path, split_pattern=split_pattern, special_tokens=special_tokens, normalizer=normalizer, prefix=prefix
    )
    return _fast(path.parent, tokenizer_class, tokenizer_object=backend, **named)


def rank_backend(
    path: Path,
    *,
    split_pattern: str,
    special_tokens: Mapping[str, int],
    normalizer: normalizers.Normalizer | None = None,
    prefix: Sequence[str] = (),
) -> Tokenizer:
    """Give what `load_rank_file` puts into a transformers tokenizer, which copies it: 1.5 s at 151,329 ranks."""
    if not _is_tiktoken(path):
        raise CheckpointError(
            f"{path} is no rank file: expected 'base64 rank' in each of its lines. It is another model's tokenizer, or "
            "damaged; fetch the file again, or name the folder that has it with tokenizer=..."
        )
    ranks = _read_ranks(path)
    special = sorted(special_tokens, key=special_tokens.__getitem__)
    found = [special_tokens[token] for token in special]
    if found != list(range(len(ranks), len(ranks) + len(special))):
        raise CheckpointError(
            f"{path}: {len(ranks)} ranks, so the {len(special)} special tokens have the ids {len(ranks)} to "
            f"{len(ranks) + len(special) - 1}; they are given as {found[0]} to {found[-1]}. File and ids belong "
            "to different models; fetch the tokenizer's files again."
        )
    backend = _byte_pairs(ranks, split_pattern)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if prefix:
        start = " ".join(prefix)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{start} $A",
            pair=f"{start} $A {start} $B",
            special_tokens=[(token, special_tokens[token]) for token in prefix],
        )
    return backend


def _byte_pairs(ranks: Mapping[bytes, int], split_pattern: str) -> Tokenizer:
    """Give the plain tokenizer of a rank file: a split by pattern, then byte pairs by rank."""
    letters = bytes_to_unicode()
    spelled = {token: token.decode("latin-1").translate(letters) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    merges = [(spelled[left], spelled[right]) for left, right in _merges(ranks)]
    backend = Tokenizer(BPE(vocab, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split_pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Give every pair that joins to a token, tokens by rank: tiktoken joins what has the lowest rank joined."""
    for token in sorted(ranks, key=ranks.__getitem__):
        known = []
        for cut in range(1, len(token)):
            left = token[:cut]
            if left in ranks and (right := token[cut:]) in ranks:
                known.append((left, right))
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _fast(
    folder: Path, tokenizer_class: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast, **known: Any
) -> PreTrainedTokenizerFast:
    """Make the transformers tokenizer; the names of special tokens in tokenizer_config.json come before `known`."""
    config = read_optional_object(folder / "tokenizer_config.json")
    named = {name: _content(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    known.update({name: token for name, token in named.items() if token is not None})
    # Llama-3's file says clean_up_tokenization_spaces; it would delete spaces before punctuation, so decoding would not
    # be exact.
    return tokenizer_class(clean_up_tokenization_spaces=False, **known)


def _content(token: Any) -> str | None:
    """Give the string of a special token, which a tokenizer_config.json writes as a string or as a dict."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _special_tokens(folder: Path, num_ranks: int, vocab_size: int | None) -> list[str]:
    """Give the special tokens that follow the ranks: those of tokenizer_config.json, else Llama-3's own."""
    added = read_optional_object(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    named = {int(key): _content(value) for key, value in added.items() if key.isdecimal()}
    listed = [named[token_id] for token_id in sorted(named) if token_id >= num_ranks]
    if listed:
        return [str(token) for token in listed]
    count = len(LLAMA3_SPECIAL_TOKENS) if vocab_size is None else vocab_size - num_ranks
    if not 2 <= count <= len(LLAMA3_SPECIAL_TOKENS):
        raise CheckpointError(
            f"{folder}: tokenizer.model holds {num_ranks} ranks and the model has {vocab_size} ids; a Llama-3 "
            "vocabulary has 2 to "
            f"{len(LLAMA3_SPECIAL_TOKENS)} special tokens after the ranks. Name the tokenizer of this model with "
            "tokenizer=..."
        )
    return list(LLAMA3_SPECIAL_TOKENS[:count])


def _is_tiktoken(path: Path) -> bool:
    with path.open("rb") as file:
        return _TIKTOKEN_LINE.fullmatch(file.readline(4096)) is not None


def _read_ranks(path: Path) -> dict[bytes, int]:
    # Not tiktoken.load: it caches by path and would go on serving a file that has been replaced.
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(
                f"{path}, line {number}: expected 'base64 rank', found {line[:40]!r}; fetch the file again."
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(
            f"{path}: the {len(ranks)} ranks are not 0 to {len(ranks) - 1}; the file is cut or damaged, fetch it again."
        )
    return ranks
