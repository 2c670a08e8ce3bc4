"""What BLIP's three registered models share: loading, the parts of a sample, the settings of a `model` section.

Source: salesforce/LAVIS, lavis/models/base_model.py and blip_models. Not here: what each of them does with a
sample (samples.py), and how a file becomes a network (opening.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from lavish.checkpoints.json_file import read_object
from lavish.checkpoints.rules import Rule
from lavish.common.errors import ConfigError, DataError, check_path, did_you_mean, shown
from lavish.models.base_model import BaseModel, local_file, model_section, read_fields
from lavish.models.blip.beam_search import Rules
from lavish.models.blip.config import ARCHITECTURES, TOP_LEVEL, check_fields, lavis_config, read_med_config
from lavish.models.blip.lavis import TOKENIZER, files_beside
from lavish.models.blip.opening import BERT_IDS, Wanted, new_network, open_network
from lavish.models.blip.processor import BlipProcessor
from lavish.models.blip.weights import RULES

SECTION_KEYS = (
    *TOP_LEVEL,
    *("arch", "model_type", "pretrained", "finetuned", "load_pretrained", "load_finetuned"),
    *("prompt", "max_txt_len", "image_size", "embed_dim", "vit_drop_path_rate", "tokenizer", "med_config_path"),
)
"""What a `model` section may hold."""


class BlipBase(BaseModel):
    """What the three share: loading, pictures, questions of a sample."""

    arch: ClassVar[str] = ""

    def __init__(self, network: Any, processor: BlipProcessor) -> None:
        super().__init__()
        self.network = network
        self.processor = processor

    @property
    def release_rules(self) -> Sequence[Rule]:
        """Rules from the names of LAVIS's files."""
        return RULES

    @classmethod
    def check_config(cls, cfg: Mapping[str, Any]) -> None:
        """Check a `model` section: keys, sizes, and that a `med_config_path` is there."""
        section = read_fields(cfg)
        fields = cls._wanted(section, {}).base
        width = fields.get("vision_config", {}).get("hidden_size")
        if width is not None and _released(section) is not None:
            # The file of weights tells the text half's sizes, whatever the section or its defaults say.
            text = {**fields.get("text_config", {}), "hidden_size": width, "num_attention_heads": 1}
            fields = {**fields, "text_config": text}
        lavis_config(fields, BERT_IDS, ARCHITECTURES[cls.arch], "model")

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> BlipBase:
        """Make the model of a `model` section; it downloads the weights that the section names.

        Raises:
            ConfigError: an unknown key or a wrong value.
            CheckpointError: weights that cannot be fetched or do not fit.
        """
        section = read_fields(cfg)
        return cls._open(section, _released(section), {}, None, torch.float32, "cpu")

    @classmethod
    def from_pretrained(
        cls,
        model_type: str | None = None,
        *,
        checkpoint: str | Path | None = None,
        config: Any = None,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> BlipBase:
        """Load a model type: the released weights, or `checkpoint` in their place.

        Args:
            model_type: a key of `PRETRAINED_MODEL_CONFIG_DICT`; None is the first of them.
            checkpoint: a LAVIS `.pth` (path, folder that holds it, URL) or a transformers folder of BLIP.
            config: what no LAVIS file records, as a dict or JSON or YAML file: `vision_config`, `text_config` (head
                counts above all), `image_text_hidden_size`, `prompt`, `max_txt_len`, `image_size`.
            tokenizer: folder or hub id of bert-base-uncased, or a tokenizer; None: beside the checkpoint, else fetched.
            dtype: of the weights.
            device: of the weights.
            options: more keys of the `model` section.

        Raises:
            ConfigError: no such type, an unknown key, or fields that contradict the file.
            CheckpointError: weights or tokenizer that are absent, damaged or of another model.
        """
        if model_type is None:
            model_type = next(iter(cls.PRETRAINED_MODEL_CONFIG_DICT))
        section = model_section(cls.default_config_path(model_type), None, options)
        weights = checkpoint if checkpoint is not None else _released(section)
        return cls._open(section, weights, read_fields(config), tokenizer, dtype, device)

    @classmethod
    def _open(
        cls,
        section: Mapping[str, Any],
        weights: str | Path | None,
        given: Mapping[str, Any],
        tokenizer: str | Path | PreTrainedTokenizerBase | None,
        dtype: torch.dtype,
        device: str | torch.device,
    ) -> BlipBase:
        wanted = cls._wanted(section, given, tokenizer, dtype, device)
        if weights is None:
            return cls(*new_network(ARCHITECTURES[cls.arch], wanted))
        return cls(*open_network(local_file(weights), wanted))

    @classmethod
    def _wanted(
        cls,
        section: Mapping[str, Any],
        given: Mapping[str, Any],
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Wanted:
        for fields in (section, given):
            for key in fields:
                if key not in SECTION_KEYS:
                    raise ConfigError(f"model.{key} is no setting of {cls.arch!r}.{did_you_mean(key, SECTION_KEYS)}")
        texts = ("prompt", "max_txt_len")
        return Wanted(
            architecture=ARCHITECTURES[cls.arch],
            base=check_fields(_fields(section), "model"),
            given=_fields(given),
            base_texts={name: section[name] for name in texts if name in section},
            given_texts={name: given[name] for name in texts if name in given},
            tokenizer=tokenizer if tokenizer is not None else {**section, **given}.get("tokenizer"),
            dtype=dtype,
            device=device,
        )

    def load_checkpoint(self, url_or_filename: str | Path) -> None:
        """Replace the weights by those of another file of the same sizes, strictly.

        Raises:
            CheckpointError: absent, damaged, or tensors that are missing, unexpected or of another shape.
        """
        config = self.network.config
        sections = {"vision_config": config.vision_config, "text_config": config.text_config}
        wanted = Wanted(
            architecture=config.architectures[0],
            base={name: section.to_dict() for name, section in sections.items()},
            tokenizer=self.processor.tokenizer,
            dtype=self.network.dtype,
            device=self.device,
        )
        is_training = self.network.training
        self.network = open_network(local_file(url_or_filename), wanted)[0].train(is_training)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that transformers and lavish load: config.json, model.safetensors, tokenizer, pixels."""
        self.network.save_pretrained(str(folder))
        self.processor.save_pretrained(folder)

    def save_trained(self, folder: Path) -> None:
        """Put beside a run's checkpoints what they do not tell, heads and words, so that lavish opens the folder."""
        for name, content in files_beside(self.network.config.to_dict(), str(folder)).items():
            (folder / name).write_bytes(content)
        self.tokenizer.save_pretrained(str(folder / TOKENIZER))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """BERT's, with `[DEC]` and `[ENC]`."""
        return self.processor.tokenizer

    @property
    def max_txt_len(self) -> int:
        """Most ids of a caption or question; may be set."""
        return self.processor.max_txt_len

    @max_txt_len.setter
    def max_txt_len(self, value: int) -> None:
        self.processor.max_txt_len = value

    @property
    def prompt(self) -> str:
        """What captions begin with; may be set."""
        return self.processor.prompt

    @prompt.setter
    def prompt(self, value: str) -> None:
        self.processor.prompt = value

    @property
    def prompt_length(self) -> int:
        """Ids of the prompt, `[DEC]` counted."""
        return len(self.processor.prompt_ids(self.prompt))

    @property
    def image_size(self) -> int:
        """Side of the pictures it takes, in pixels."""
        return self.processor.image_processor.image_size

    def image_states(self, samples: Mapping[str, Any]) -> torch.Tensor:
        """Give the tower's states of a sample's pictures: (batch, patches + 1, hidden)."""
        return self.network.vision_model(pixel_values=self._pixels(samples)).last_hidden_state

    def _pixels(self, samples: Mapping[str, Any]) -> torch.Tensor:
        image = part(samples, "image")
        pixels = image if isinstance(image, torch.Tensor) else self.processor.pixels(image)
        size = self.image_size
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, size, size):
            hint = "; add the batch: image.unsqueeze(0)" if pixels.ndim == 3 else ""
            raise DataError(f"image has the shape {tuple(pixels.shape)} and must be (batch, 3, {size}, {size}){hint}.")
        return pixels.to(device=self.device, dtype=self.network.dtype)

    def _texts(self, samples: Mapping[str, Any], count: int | None) -> list[str]:
        """Give `text_input` as a list, one text for each of `count` pictures."""
        given = part(samples, "text_input")
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"text_input is a text or a list of texts, not {shown(given)}.")
        texts = list(texts)
        if count is not None and len(texts) != count:
            raise DataError(f"The number of texts ({len(texts)}) must equal the number of images ({count}).")
        return texts

    def _moved(self, pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return pair[0].to(self.device), pair[1].to(self.device)

    def _rules(self, **options: Any) -> Rules:
        text = self.network.config.text_config
        return Rules(eos_token_id=text.sep_token_id, pad_token_id=text.pad_token_id, **options)


def part(samples: Any, name: str) -> Any:
    """Give a part of the samples.

    Raises:
        DataError: it is not there, or the samples are no dict.
    """
    if not isinstance(samples, Mapping):
        raise DataError(f"The samples are a dict with {name!r}, not a {type(samples).__name__}: {{{name!r}: ...}}.")
    if name not in samples:
        raise DataError(f"The samples have no {name!r}; they have {', '.join(map(str, samples)) or 'nothing'}.")
    return samples[name]


def _released(section: Mapping[str, Any]) -> str | None:
    """Name the weights of a `model` section: the finetuned file, else the pretrained one, else none."""
    if section.get("load_finetuned", True) and section.get("finetuned"):
        return section["finetuned"]
    return section.get("pretrained") if section.get("load_pretrained", True) else None


def _fields(section: Mapping[str, Any]) -> dict[str, Any]:
    """Give the config fields of a section; three of them have short forms in LAVIS, and the text's may be in a file.

    Raises:
        ConfigError: `med_config_path` is no path.
        CheckpointError: no JSON object is there.
    """
    fields = {name: section[name] for name in TOP_LEVEL if name in section}
    if section.get("med_config_path") is not None:
        fields["text_config"] = {**(fields.get("text_config") or {}), **_med_fields(section["med_config_path"])}
    vision = dict(fields.get("vision_config") or {})
    for name, target in (("image_size", "image_size"), ("vit_drop_path_rate", "drop_path_rate")):
        if name in section:
            vision[target] = section[name]
    if vision:
        fields["vision_config"] = vision
    if "embed_dim" in section:
        fields["image_text_hidden_size"] = section["embed_dim"]
    return fields


def _med_fields(path: Any) -> dict[str, Any]:
    """Read a LAVIS med_config.json."""
    check_path(path, "model.med_config_path")
    return read_med_config(read_object(Path(path).expanduser()))
