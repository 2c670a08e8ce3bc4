"""BLIP: pictures and texts to tensors, ids back to text.

Source: salesforce/LAVIS, lavis/models/blip_models/{blip,blip_caption,blip_vqa,blip_feature_extractor}.py. The tokenizer
is BERT's WordPiece with `[DEC]` and then `[ENC]` behind its vocabulary; all ids come from it, none is written down.
What a user types never becomes a special token: `[SEP]` in a caption is three pieces of text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, BertTokenizer, BlipConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lavish.checkpoints import hub
from lavish.checkpoints.json_file import read_object, read_optional_object
from lavish.common.errors import CheckpointError, ConfigError, MediaError, PromptError, shown
from lavish.common.media import open_image
from lavish.models.blip.config import SpecialIds, image_size_of, text_of
from lavish.processors.blip_processors import BlipImageEvalProcessor

PROMPT = "a picture of "
DECODE_TOKEN, ENCODE_TOKEN = "[DEC]", "[ENC]"
TOKENIZER = "google-bert/bert-base-uncased"
"""Hub id of the tokenizer that LAVIS takes; fetched only when none lies beside the checkpoint."""
OWN_FILE = "lavish_processor.json"
"""Prompt and length of texts, which transformers' files have no place for."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
MAX_TXT_LEN = 40
"""Most ids of a caption; LAVIS cuts questions to 35, and the features of a text not at all."""


def find_tokenizer(folder: Path) -> Path | None:
    """Name the tokenizer's folder in or beside a checkpoint's folder, `bert-base-uncased` or the folder itself."""
    for place in (folder / "bert-base-uncased", folder):
        if any((place / name).is_file() for name in TOKENIZER_FILES):
            return place
    return None


def fetch_vocabulary() -> Path:
    """Give the folder of bert-base-uncased's vocab.txt, that one file fetched if the hub's cache has none.

    Raises:
        CheckpointError: it cannot be fetched now.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(TOKENIZER, "vocab.txt")).parent
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"BLIP's tokenizer {TOKENIZER} lies neither beside the checkpoint nor in the cache, and cannot be fetched "
            f"now ({str(error).splitlines()[0]}). Name a folder with its vocab.txt: tokenizer=..."
        ) from error


def load_tokenizer(source: str | Path | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Read BERT's tokenizer of a folder or hub id, and give it `[DEC]` and `[ENC]`, in this order.

    Raises:
        CheckpointError: no tokenizer file there, or a vocabulary without BERT's special tokens.
    """
    tokenizer = source if isinstance(source, PreTrainedTokenizerBase) else _read(hub.resolve(source))
    where = tokenizer.name_or_path or "the tokenizer"
    for name in ("cls_token", "sep_token", "pad_token", "unk_token"):
        if getattr(tokenizer, name) is None:  # attributes of every transformers tokenizer
            raise CheckpointError(f"{where}: has no {name}; BLIP needs the tokenizer bert-base-uncased.")
    if tokenizer.bos_token != DECODE_TOKEN:
        tokenizer.add_special_tokens({"bos_token": DECODE_TOKEN})
    if ENCODE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [ENCODE_TOKEN]})
    return tokenizer


def _read(folder: Path) -> PreTrainedTokenizerBase:
    if (folder / "vocab.txt").is_file():
        lower = read_optional_object(folder / "tokenizer_config.json").get("do_lower_case", True)
        entries = (folder / "vocab.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        # transformers would add what is absent behind the vocabulary, and shift [DEC] and [ENC].
        if absent := [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token not in entries]:
            raise CheckpointError(
                f"{folder / 'vocab.txt'}: {len(entries)} entries without {', '.join(absent)}; BLIP needs the "
                "vocabulary of bert-base-uncased (30522 entries). Fetch it again."
            )
        return BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=bool(lower))
    if (folder / "tokenizer.json").is_file():
        read_object(folder / "tokenizer.json")  # tells a cut download or an error page in words
        names = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    raise CheckpointError(
        f"{folder}: no tokenizer; looked for {' and '.join(TOKENIZER_FILES)}, found {found or 'an empty folder'}. Name "
        f"the folder of bert-base-uncased with tokenizer=..."
    )


class BlipProcessor:
    """Turn pictures and texts into BLIP inputs and ids into text."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int = 384,
        prompt: str = PROMPT,
        max_txt_len: int = MAX_TXT_LEN,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        """`max_txt_len` is the most ids of a caption or question, `[CLS]` and `[SEP]` included."""
        if isinstance(max_txt_len, bool) or not isinstance(max_txt_len, int) or max_txt_len < 3:
            raise ConfigError(f"max_txt_len is {shown(max_txt_len)} and must be a whole number, 3 or more.")
        if not isinstance(prompt, str):
            raise ConfigError(f"prompt is {shown(prompt)} and must be a text.")
        self.tokenizer = load_tokenizer(tokenizer)
        self.prompt = prompt
        self.max_txt_len = max_txt_len
        self.image_processor = BlipImageEvalProcessor(image_size, mean, std)

    @classmethod
    def from_config(
        cls,
        config: BlipConfig,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str = PROMPT,
        max_txt_len: int = MAX_TXT_LEN,
    ) -> BlipProcessor:
        """Pair a tokenizer with the picture size and ids of a config.

        Raises:
            ConfigError: the tokenizer's ids are not the model's.
        """
        processor = cls(tokenizer, image_size_of(config), prompt, max_txt_len)
        text, ids = text_of(config), processor.special_ids
        if len(processor.tokenizer) > text.vocab_size or text.bos_token_id != ids.bos_token_id:
            raise ConfigError(
                f"The tokenizer has {len(processor.tokenizer)} ids and [DEC] is {ids.bos_token_id}; the model has "
                f"{text.vocab_size} and [DEC] is {text.bos_token_id}: it belongs to another model. Name the right one "
                "with tokenizer=..."
            )
        return processor

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, tokenizer: str | Path | PreTrainedTokenizerBase | None = None
    ) -> BlipProcessor:
        """Read a transformers folder of BLIP: config.json, preprocessor_config.json and the tokenizer.

        Raises:
            CheckpointError: a file is absent or damaged.
            ConfigError: the tokenizer belongs to another model.
        """
        from lavish.models.blip.config import read_config

        folder = hub.resolve(folder)
        config = read_config(read_object(folder / "config.json"), str(folder / "config.json"))
        return cls.from_folder(config, folder, load_tokenizer(folder if tokenizer is None else tokenizer))

    @classmethod
    def from_folder(
        cls,
        config: BlipConfig,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        base: Mapping[str, Any] = MappingProxyType({}),
        given: Mapping[str, Any] = MappingProxyType({}),
    ) -> BlipProcessor:
        """Pair a tokenizer with a config and with what preprocessor_config.json and lavish_processor.json say.

        `prompt` and `max_txt_len` of `given` count before those of the folder, and they before those of `base`.

        Raises:
            ConfigError: as `from_config`.
        """
        own = read_optional_object(folder / OWN_FILE)
        pixels = read_optional_object(folder / "preprocessor_config.json")
        texts = {name: value for name, value in {**base, **own, **given}.items() if name in ("prompt", "max_txt_len")}
        processor = cls.from_config(config, tokenizer, **texts)
        processor.image_processor = BlipImageEvalProcessor(
            image_size_of(config), pixels.get("image_mean"), pixels.get("image_std")
        )
        return processor

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer, the picture settings as transformers' BlipProcessor reads them, and our own two."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(str(folder))
        size = self.image_processor.image_size
        pixels = {
            "image_processor_type": "BlipImageProcessor",
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(self.image_processor.mean),
            "image_std": list(self.image_processor.std),
            "resample": int(Image.Resampling.BICUBIC),
            "rescale_factor": 1 / 255,
            "size": {"height": size, "width": size},
        }
        own = {"prompt": self.prompt, "max_txt_len": self.max_txt_len}
        for name, content in (("preprocessor_config.json", pixels), (OWN_FILE, own)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @property
    def special_ids(self) -> SpecialIds:
        """The ids that a config has to agree with."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id)
        return SpecialIds(*(int(str(value)) for value in ids))

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None) -> BatchFeature:
        """Encode pictures and texts as they are: pixel_values, input_ids and attention_mask, each where asked for."""
        features: dict[str, torch.Tensor] = {}
        if images is not None:
            features["pixel_values"] = self.pixels(images)
        if text is not None:
            input_ids, attention_mask = self.encode([text] if isinstance(text, str) else list(text))
            features |= {"input_ids": input_ids, "attention_mask": attention_mask}
        return BatchFeature(features)

    def pixels(self, images: Any) -> torch.Tensor:
        """Give (images, 3, size, size) float32 of pictures: PIL, paths or bytes, one or a list.

        Raises:
            MediaError: no picture, or one that cannot be opened.
        """
        sources = list(images) if isinstance(images, list | tuple) else [images]
        if not sources:
            raise MediaError("No picture was given: the list is empty.")
        return torch.stack([self.image_processor(open_image(source)) for source in sources])

    def encode(
        self, texts: Sequence[str], first_token: str | None = None, max_length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode texts, padded to the longest: input_ids and attention_mask, (texts, seq) int64.

        `[CLS]` becomes `first_token` where one is given; what is over `max_length` ids is cut, `[SEP]` kept.

        Raises:
            PromptError: no text, or something that is none.
        """
        if not texts or not all(isinstance(text, str) for text in texts):
            raise PromptError(f"BLIP takes a text or a list of texts, not {shown(texts)}.")
        encoded = self.tokenizer(
            list(texts),
            padding=True,
            truncation=max_length is not None,
            max_length=max_length,
            split_special_tokens=True,
            return_token_type_ids=False,
            return_tensors="pt",
            verbose=False,
        )
        input_ids, attention_mask = encoded["input_ids"], encoded["attention_mask"]
        if first_token is not None:
            input_ids[:, 0] = self.tokenizer.convert_tokens_to_ids(first_token)
        return input_ids, attention_mask

    def captions(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode captions to learn: `[DEC]` first, cut to `max_txt_len`."""
        return self.encode(texts, DECODE_TOKEN, self.max_txt_len)

    def questions(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode questions: `[ENC]` first, cut to `max_txt_len`."""
        return self.encode(texts, ENCODE_TOKEN, self.max_txt_len)

    def answers(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode answers: `[DEC]` first, never cut."""
        return self.encode(texts, DECODE_TOKEN)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Give the ids that a caption begins with: `[DEC]`, the prompt, and no `[SEP]`."""
        return self.encode([prompt], DECODE_TOKEN)[0][0, :-1].tolist()

    def decode(self, ids: torch.Tensor) -> list[str]:
        """Give the text of each row of ids, without special tokens, punctuation joined as BERT's old decoder does."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
