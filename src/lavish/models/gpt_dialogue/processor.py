"""GPTDialogue: dialogues and features to model inputs, ids back to text.

Source: salesforce/LAVIS, lavis/datasets/datasets/avsd_dialogue_datasets.py (the collater) and
lavis/processors/gpt_processors.py; the two registered processors do one sample, this one pairs and batches them.
Where the release's collater is wrong (padded labels, masks read off values) the right batch is the default and
`compat="lavis"` gives the release's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from lavish.checkpoints.json_file import read_optional_object
from lavish.common.errors import CheckpointError, ConfigError, PromptError, did_you_mean
from lavish.models.gpt_dialogue.config import GPTDialogueConfig
from lavish.processors.gpt_processors import (
    IGNORED_LABEL,
    VIDEO_PADDING,
    GPTDialogueTextProcessor,
    GPTVideoFeatureProcessor,
    add_special_tokens,
    load_dialogue_tokenizer,
)

RELEASED_WIDTHS = {"i3d_flow": 2048, "i3d_rgb": 2048, "vggish": 128}
"""Of the AVSD features, in numbers a frame; `len_video_ft` of the release is their sum."""
SAVED = ("max_positions", "len_video_ft", "visual_ft", "audio_ft", "max_turns", "use_caption")


class GPTDialogueProcessor(ProcessorMixin):
    """Make samples of dialogues and features, batches of samples, and text of ids.

    `len_video_ft` and `max_positions` are the network's; a sample that does not fit is refused here, by name.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        len_video_ft: int = 4224,
        max_positions: int = 1024,
        visual_ft: Sequence[str] = ("i3d_flow", "i3d_rgb"),
        audio_ft: Sequence[str] = ("vggish",),
        max_turns: int = 3,
        use_caption: bool = True,
    ):
        self.special_ids = add_special_tokens(tokenizer)
        super().__init__(tokenizer)
        self.len_video_ft, self.max_positions = len_video_ft, max_positions
        self.visual_ft, self.audio_ft = list(visual_ft), list(audio_ft)
        self.max_turns, self.use_caption = max_turns, use_caption
        self._features = GPTVideoFeatureProcessor(self.visual_ft, self.audio_ft, tokenizer)
        self._dialogue = GPTDialogueTextProcessor(max_turns, use_caption, tokenizer)

    @classmethod
    def from_config(
        cls, config: GPTDialogueConfig, tokenizer: PreTrainedTokenizerBase, **options: Any
    ) -> GPTDialogueProcessor:
        """Pair a tokenizer with the sizes of a model config; `options` are those of the class.

        Raises:
            ConfigError: the tokenizer has another number of ids than the network, an option is unknown, or the named
                features are not as wide as the network takes.
        """
        for name in options:
            if name not in SAVED:
                raise ConfigError(f"GPTDialogueProcessor has no option {name!r}.{did_you_mean(name, SAVED)}")
        _check_names(config, options)
        add_special_tokens(tokenizer)
        if len(tokenizer) != config.vocab_size:
            raise ConfigError(
                f"The tokenizer has {len(tokenizer)} ids, special tokens included, and the network {config.vocab_size}:"
                " they belong to different models. Name the right one with tokenizer=..."
            )
        return cls(tokenizer, config.len_video_ft, config.n_positions, **options)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pretrained_model_name_or_path: str | Path, *, tokenizer: str | Path | None = None, **options: Any
    ) -> GPTDialogueProcessor:
        """Read a folder that `save_pretrained` wrote, or that holds GPT-2's tokenizer; `options` replace what it says.

        Raises:
            CheckpointError: no tokenizer there.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; give one with GPT-2's vocab.json or a saved processor.")
        saved = read_optional_object(folder / "processor_config.json")
        kept = {name: saved[name] for name in SAVED if name in saved}
        return cls(load_dialogue_tokenizer(tokenizer or folder), **{**kept, **options})

    # Samples

    def sample(
        self,
        dialogue: Mapping[str, Any],
        video_fts: torch.Tensor | None = None,
        *,
        features: str | Path | None = None,
    ) -> dict[str, torch.Tensor]:
        """Encode one dialogue (see `gpt_dialogue`) about features at hand, or about those of its `image_id` under the
        folder `features`.

        Shapes: input_ids, token_type_ids, labels (seq,); video_fts (frames, len_video_ft), video_token_type_ids.
        Raises:
            DataError: a text or a feature file is wrong.
            PromptError: no features, both, or features of another width than the network's.
        """
        if (video_fts is None) == (features is None):
            raise PromptError("Give the features of the video: video_fts=, or features= and an image_id. Not both.")
        if features is not None:
            video = self._features(features, str(dialogue.get("image_id")))
        else:
            assert video_fts is not None
            video = self._features.frames(video_fts)
        self._check_features(video["video_fts"])
        return {
            **self._dialogue(dialogue),
            "video_fts": video["video_fts"],
            "video_token_type_ids": video["token_type_ids"],
        }

    def prompt(self, sample: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Cut the answer off a sample: what generation starts from."""
        is_answer = (sample["labels"] >= 0).nonzero()
        stop = int(is_answer[0]) if len(is_answer) else len(sample["labels"])
        text = {name: sample[name][:stop] for name in ("input_ids", "token_type_ids", "labels")}
        return {**sample, **text}

    def collate(
        self,
        samples: Sequence[Mapping[str, torch.Tensor]],
        padding_side: str = "right",
        too_long: str = "raise",
        num_new_tokens: int = 0,
        compat: str | None = None,
    ) -> BatchFeature:
        """Make a batch. Frames are padded behind; text behind (training) or before (`padding_side="left"`, generation).

        Args:
            samples: those of `sample`.
            padding_side: of the text.
            too_long: "raise", or "cut": the text of a sample that does not fit loses its oldest tokens.
            num_new_tokens: positions to leave free for an answer.
            compat: "lavis": labels are padded with <pad>, and the mask is read off the values (a frame of ones is
                padding).
        Shapes: input_ids (batch, seq); token_type_ids, attention_mask, labels (batch, frames + seq); video_fts (batch,
            frames, len_video_ft).
        Raises:
            PromptError: nothing to collate, an unknown option, features of another width, or a sample that does not
                fit.
        """
        _check_options(padding_side, too_long, compat)
        if not samples:
            raise PromptError("collate got no samples.")
        for sample in samples:
            self._check_features(sample["video_fts"])
        rows = [self._fitted(sample, too_long, num_new_tokens, at) for at, sample in enumerate(samples)]
        pad, is_left = self.special_ids["<pad>"], padding_side == "left"
        videos = [row["video_fts"] for row in rows]
        texts = [row["input_ids"] for row in rows]
        video_fts, input_ids = _padded(videos, VIDEO_PADDING), _padded(texts, pad, is_left)
        if compat == "lavis":
            video_mask, text_mask = (video_fts != VIDEO_PADDING).any(dim=2).long(), (input_ids != pad).long()
        else:
            video_mask = _padded([torch.ones(len(video), dtype=torch.long) for video in videos], 0)
            text_mask = _padded([torch.ones_like(text) for text in texts], 0, is_left)
        types = [
            _padded([row["video_token_type_ids"] for row in rows], pad),
            _padded([row["token_type_ids"] for row in rows], pad, is_left),
        ]
        labels = [
            torch.full(video_mask.shape, IGNORED_LABEL),
            _padded([row["labels"] for row in rows], pad if compat == "lavis" else IGNORED_LABEL, is_left),
        ]
        return BatchFeature(
            {
                "input_ids": input_ids,
                "token_type_ids": torch.cat(types, dim=1),
                "attention_mask": torch.cat((video_mask, text_mask), dim=1),
                "labels": torch.cat(labels, dim=1),
                "video_fts": video_fts,
            }
        )

    def _check_features(self, video_fts: torch.Tensor) -> None:
        if video_fts.ndim != 2 or not video_fts.shape[0] or video_fts.shape[1] != self.len_video_ft:
            raise PromptError(
                f"The features of a video have the shape {tuple(video_fts.shape)} and this network takes (frames, "
                f"{self.len_video_ft}), made of {', '.join([*self.visual_ft, *self.audio_ft])}. Name the features that "
                "it was trained on with visual_ft and audio_ft, in their order."
            )

    def _fitted(self, sample: Mapping[str, torch.Tensor], too_long: str, num_new_tokens: int, at: int):
        num_frames, num_tokens = len(sample["video_fts"]), len(sample["input_ids"])
        room = self.max_positions - num_frames - num_new_tokens
        if num_tokens <= room:
            return sample
        if too_long == "raise" or room < 1:
            answer = f" and {num_new_tokens} of the answer" if num_new_tokens else ""
            advice = "Take fewer frames" if room < 1 else "Take fewer turns or frames, or collate with too_long='cut'"
            raise PromptError(
                f"Sample {at} has {num_frames} frames{answer} and {num_tokens} tokens, and this network has "
                f"{self.max_positions} positions. {advice}."
            )
        return {**sample, **{name: sample[name][-room:] for name in ("input_ids", "token_type_ids", "labels")}}

    # Text

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str:  # pyright: ignore
        """Give the text of ids, up to the first <eos>."""
        ids = token_ids.tolist() if isinstance(token_ids, torch.Tensor) else list(token_ids)
        eos = self.special_ids["<eos>"]
        ids = ids[: ids.index(eos)] if skip_special_tokens and eos in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, **kwargs)


def _check_names(config: GPTDialogueConfig, options: Mapping[str, Any]) -> None:
    """Trap: the yaml of the release names i3d_rgb and vggish, 2176 wide, beside a network that takes 4224.

    Asked of networks of the released width only: elsewhere the same names may be of another width.
    """
    names = [*options.get("visual_ft", ("i3d_flow", "i3d_rgb")), *options.get("audio_ft", ("vggish",))]
    width = sum(RELEASED_WIDTHS.get(name, 0) for name in names)
    if config.len_video_ft == sum(RELEASED_WIDTHS.values()) != width and all(name in RELEASED_WIDTHS for name in names):
        shares = " + ".join(f"{name} {RELEASED_WIDTHS[name]}" for name in names)
        raise ConfigError(
            f"visual_ft and audio_ft name {shares} = {width} numbers a frame, and this network takes "
            f"{config.len_video_ft} (len_video_ft): {', '.join(RELEASED_WIDTHS)}."
        )


def _check_options(padding_side: str, too_long: str, compat: str | None) -> None:
    if padding_side not in ("left", "right") or too_long not in ("raise", "cut") or compat not in (None, "lavis"):
        raise PromptError(
            f"padding_side={padding_side!r}, too_long={too_long!r}, compat={compat!r}: they are 'left' or 'right', "
            "'raise' or 'cut', None or 'lavis'."
        )


def _padded(rows: Sequence[torch.Tensor], value: float, is_left: bool = False) -> torch.Tensor:
    side = "left" if is_left else "right"
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side=side)
