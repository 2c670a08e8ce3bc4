"""The processors of GPTDialogue under LAVIS's names: `gpt_video_ft` (stored features) and `gpt_dialogue` (turns).

Source: salesforce/LAVIS, lavis/processors/gpt_processors.py. Both write ids of seven special tokens that stand behind
the GPT-2 vocabulary, in an order of their own. Unlike there text never becomes a special token, padding is told by
lengths and not by values, and a dialogue may lack its summary or its answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lavish.checkpoints import hub
from lavish.checkpoints.json_file import read_object
from lavish.common.errors import CheckpointError, ConfigError, DataError, shown
from lavish.processors.base_processor import BaseProcessor
from lavish.processors.tokenizers import encode_plain, load_tokenizer

SPECIAL_TOKENS = ("<bos>", "<eos>", "<speaker1>", "<speaker2>", "<video>", "<cap>", "<pad>")
"""In the order of their ids. Trap: `add_special_tokens` with LAVIS's dictionary puts <pad> third in transformers 5."""
GPT2 = "openai-community/gpt2"
"""Whose tokenizer it is where a config names none, as in LAVIS's recipes."""
IGNORED_LABEL = -1
UNDISCLOSED = "__UNDISCLOSED__"
"""What stands in the place of an answer in AVSD's test split."""
VIDEO_PADDING = 1.0


def load_dialogue_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Read GPT-2's tokenizer (vocab.json and merges.txt, or tokenizer.json), and give it the special tokens.

    Raises:
        CheckpointError: the files are absent or damaged, or hold the special tokens in another order.
    """
    folder = Path(folder)
    if (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        tokenizer = _from_vocab_and_merges(folder)
    else:
        tokenizer = load_tokenizer(folder)
    add_special_tokens(tokenizer, str(folder))
    return tokenizer


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, where: str = "the tokenizer") -> dict[str, int]:
    """Append the special tokens one by one, unless they are there, and give their ids.

    Raises:
        CheckpointError: their ids are not the last ones in the order of `SPECIAL_TOKENS`.
    """
    known = tokenizer.get_vocab()
    for token in SPECIAL_TOKENS:
        if token not in known:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=True)], special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<bos>", "<eos>", "<pad>"
    ids = _special_ids(tokenizer)
    first = len(tokenizer) - len(SPECIAL_TOKENS)
    if list(ids.values()) != list(range(first, len(tokenizer))):
        raise CheckpointError(
            f"{where}: the special tokens have the ids {ids}; GPTDialogue needs them last, from {first} on, in the "
            "order of the list. Name the tokenizer of plain GPT-2."
        )
    return ids


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Look up what `add_special_tokens` has put there; one token has one id."""
    return {token: cast(int, tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL_TOKENS}


def _from_vocab_and_merges(folder: Path) -> PreTrainedTokenizerBase:
    """Byte-level BPE without a token beyond the files': transformers' class adds <|endoftext|> where it is absent."""
    merges_file = folder / "merges.txt"
    vocab = read_object(folder / "vocab.json")
    try:
        lines = merges_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{merges_file}: cannot be read ({error}); GPT-2 has it beside vocab.json.") from error
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    wrong = next((pair for pair in pairs if len(pair) != 2 or "".join(pair) not in vocab), None)
    if wrong is not None:
        raise CheckpointError(f"{merges_file}: {' '.join(wrong)!r} is no merge of vocab.json; fetch both files again.")
    if sorted(map(repr, vocab.values())) != sorted(map(repr, range(len(vocab)))):
        raise CheckpointError(f"{folder / 'vocab.json'}: the ids are not 0 to {len(vocab) - 1}; fetch the file again.")
    backend = Tokenizer(BPE(vocab, [(pair[0], pair[1]) for pair in pairs]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


class DialogueProcessor(BaseProcessor):
    """Has GPT-2's tokenizer with the special tokens: the given one, else that of the hub, fetched on first use."""

    def __init__(self, tokenizer: str | Path | PreTrainedTokenizerBase | None = None):
        self._given = GPT2 if tokenizer is None else tokenizer
        if tokenizer is not None:
            _ = self.special_ids  # a wrong one is told now

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            CheckpointError: it cannot be fetched now, or is another one.
        """
        if isinstance(self._given, PreTrainedTokenizerBase):
            add_special_tokens(self._given)
            return self._given
        return load_dialogue_tokenizer(hub.resolve_small(self._given) if self._given == GPT2 else self._given)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The ids of the special tokens."""
        return _special_ids(self.tokenizer)


class GPTVideoFeatureProcessor(DialogueProcessor):
    """`gpt_video_ft`: features of a video from `<root>/<feature>/<image_id>.npy`, one row a frame."""

    def __init__(
        self,
        visual_ft: Sequence[str] = ("i3d_rgb",),
        audio_ft: Sequence[str] = ("vggish",),
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    ):
        """The shipped AVSD recipe has `visual_ft: ["i3d_flow", "i3d_rgb"]`; the order is that of the columns."""
        self.visual_ft = _names("visual_ft", visual_ft)
        self.audio_ft = _names("audio_ft", audio_ft)
        if not (self.visual_ft or self.audio_ft):
            raise ConfigError("gpt_video_ft: visual_ft and audio_ft are both empty; name at least one feature.")
        super().__init__(tokenizer)

    @property
    def video_token_id(self) -> int:
        """The token type of frames."""
        return self.special_ids["<video>"]

    def __call__(self, ft_root: str | Path, vname: str) -> dict[str, torch.Tensor]:
        """Read one video: `video_fts` (frames, width) float32, and `token_type_ids` (frames,), <video> for each.

        Features of different lengths are cut to the shortest.

        Raises:
            DataError: a file is absent, damaged, of another shape than (frames, width), without frames, or not finite.
        """
        if not isinstance(vname, str) or Path(vname).name != vname:
            raise DataError(f"image_id {shown(vname)} is no plain file name.")
        arrays = [_read_features(Path(ft_root) / name / f"{vname}.npy") for name in (*self.visual_ft, *self.audio_ft)]
        num_frames = min(array.shape[0] for array in arrays)
        features = np.concatenate([array[:num_frames] for array in arrays], axis=1)
        return self.frames(torch.from_numpy(features))

    def frames(self, video_fts: torch.Tensor | np.ndarray) -> dict[str, torch.Tensor]:
        """Give features (frames, width) that are at hand as `__call__` gives stored ones.

        Raises:
            DataError: no tensor or array of floating-point numbers, of another shape, without frames, or not finite.
        """
        features = video_fts
        if isinstance(features, np.ndarray) and features.dtype.kind == "f":
            features = torch.from_numpy(features.astype(np.float32))
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or not features.is_floating_point():
            is_array = isinstance(features, torch.Tensor | np.ndarray)
            found = f"{features.dtype} {tuple(features.shape)}" if is_array else shown(features)
            raise DataError(
                f"The features of a video are a tensor or array of floating-point numbers (frames, width), not {found}."
            )
        if not features.shape[0]:
            raise DataError(f"The features of the video hold no frames (shape {tuple(features.shape)}).")
        if not features.isfinite().all():
            raise DataError("The features of the video hold NaN or infinity; extract them again.")
        types = torch.full((features.shape[0],), self.video_token_id, dtype=torch.long)
        return {"video_fts": features.float(), "token_type_ids": types}

    def padding(self, seq: Sequence[torch.Tensor], padding_value: float | None = None) -> torch.Tensor:
        """Stack videos of different lengths, padded behind with `padding_value` (None: 1.0, as LAVIS)."""
        return _pad(seq, VIDEO_PADDING if padding_value is None else padding_value)

    def get_attention_mask(self, seq: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Give 1 on the frames and 0 on the padding, by the lengths of the videos: a frame of ones is a frame.

        Of a batch that is padded already, as LAVIS's tutorial asks, only the values can tell: there it is padding.
        """
        return (seq != VIDEO_PADDING).any(dim=2).long() if isinstance(seq, torch.Tensor) else _lengths_mask(seq)


class GPTDialogueTextProcessor(DialogueProcessor):
    """`gpt_dialogue`: caption, earlier turns, question and answer of one dialogue as ids, token types and labels."""

    def __init__(
        self,
        max_turns: int = 3,
        use_caption: bool = True,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    ):
        if isinstance(max_turns, bool) or not isinstance(max_turns, int) or max_turns < 0:
            raise ConfigError(f"gpt_dialogue: max_turns is {shown(max_turns)} and must be a whole number from 0.")
        self.max_turns, self.use_caption = max_turns, use_caption
        super().__init__(tokenizer)

    def __call__(self, ann: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Encode one sample: `caption`, `summary`, `dialog` (earlier turns), `question`, `answer`.

        Every segment is encoded alone and ends with <eos>; questions are <speaker1>, answers <speaker2>, the caption
        <cap>. Without an answer (absent, None, or AVSD's `__UNDISCLOSED__`) the sample ends with the question, as
        generation needs it, and has no label.

        Shapes: `input_ids`, `token_type_ids`, `labels` (-1 but on the answer and its <eos>), each (seq,), int64.
        Raises:
            DataError: no question, or a turn that is no question with its answer.
        """
        history = ann.get("dialog") or []
        latest = history[max(len(history) - self.max_turns, 0) :]
        turns = [_text(turn, name) for turn in latest for name in ("question", "answer")]
        question, answer = _text(ann, "question"), ann.get("answer")
        segments = [(self._caption(ann), "<cap>")]
        segments += [(text, "<speaker1>" if i % 2 == 0 else "<speaker2>") for i, text in enumerate([*turns, question])]
        has_answer = answer is not None and answer != UNDISCLOSED
        if has_answer:
            segments.append((_text(ann, "answer"), "<speaker2>"))
        input_ids, types, labels = [], [], []
        for place, (text, speaker) in enumerate(segments):
            ids = [*encode_plain(self.tokenizer, text), self.special_ids["<eos>"]]
            is_learned = has_answer and place == len(segments) - 1
            input_ids += ids
            types += [self.special_ids[speaker]] * len(ids)
            labels += ids if is_learned else [IGNORED_LABEL] * len(ids)
        names = ("input_ids", "token_type_ids", "labels")
        return {name: torch.tensor(values) for name, values in zip(names, (input_ids, types, labels), strict=True)}

    def _caption(self, ann: Mapping[str, Any]) -> str:
        if not self.use_caption:
            return ""
        parts = [ann.get(name) for name in ("caption", "summary")]
        return " ".join(_text(ann, name) for name, part in zip(("caption", "summary"), parts) if part)

    def padding(self, seq: Sequence[torch.Tensor], padding_value: int | None = None) -> torch.Tensor:
        """Stack rows of different lengths, padded behind with `padding_value` (None: <pad>).

        Trap: in LAVIS -1 is the mark of the default too, so that labels are padded with <pad>, which is then learned.
        """
        return _pad(seq, self.special_ids["<pad>"] if padding_value is None else padding_value)

    def get_attention_mask(self, seq: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Give 1 on the ids and 0 on the padding, by the lengths of the rows; of a padded batch where <pad> stands."""
        return (seq != self.special_ids["<pad>"]).long() if isinstance(seq, torch.Tensor) else _lengths_mask(seq)


def _names(name: str, values: Any) -> tuple[str, ...]:
    if isinstance(values, str) or not all(isinstance(value, str) and value for value in values):
        raise ConfigError(f"gpt_video_ft: {name} is {shown(values)} and must be a list of folder names.")
    return tuple(values)


def _read_features(file: Path) -> np.ndarray:
    try:
        array = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such features; AVSD keeps them as <root>/<feature>/<image_id>.npy.") from error
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{file}: is no array of numbers ({error}).") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise DataError(f"{file}: holds {found}; features are floating-point numbers of the shape (frames, width).")
    if not array.shape[0]:
        raise DataError(f"{file}: holds no frames (shape {array.shape}).")
    if not np.isfinite(array).all():
        raise DataError(f"{file}: holds NaN or infinity; extract the features again.")
    return array.astype(np.float32)


def _text(ann: Any, name: str) -> str:
    value = ann.get(name) if isinstance(ann, Mapping) else None
    if not isinstance(value, str):
        raise DataError(f"a dialogue's {name} is {shown(value)} and must be a text; found in {shown(ann)}.")
    return value


def _pad(rows: Sequence[torch.Tensor], value: float) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def _lengths_mask(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return _pad([torch.ones(row.shape[0], dtype=torch.long) for row in rows], 0)
