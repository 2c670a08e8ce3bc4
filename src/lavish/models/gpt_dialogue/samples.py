"""GPTDialogue behind LAVIS's interface of samples: `gpt_dialogue`, which is trained and answers.

A batch of samples is a dict as LAVIS's collater gives it: `input_ids`, `token_type_ids`, `labels`, `video_fts`,
`attn_mask`; `processor.collate` makes one. Source: salesforce/LAVIS, lavis/models/gpt_models/gpt_dialogue.py and
projects/gpt/eval/dialogue_avsd_eval.yaml for the options of generation, which LAVIS reads and never uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from lavish.checkpoints import deepspeed, hf, hub, lavis
from lavish.checkpoints.json_file import read_object
from lavish.checkpoints.layouts import config_folder, read_weights
from lavish.checkpoints.loading import load_into
from lavish.checkpoints.rules import Rule
from lavish.checkpoints.tensor_map import TensorMap
from lavish.common.errors import CheckpointError, ConfigError, DataError, did_you_mean
from lavish.models.base_model import BaseModel, local_file, model_section, read_fields
from lavish.models.gpt_dialogue.config import GPTDialogueConfig, read_config
from lavish.models.gpt_dialogue.model import COMPATS, GPTDialogueLMHeadModel, GPTDialogueOutput
from lavish.models.gpt_dialogue.processor import GPTDialogueProcessor
from lavish.models.gpt_dialogue.weights import RULES, complete, start_from_gpt2, stored_sizes
from lavish.processors.gpt_processors import load_dialogue_tokenizer

PROCESSOR_KEYS = ("visual_ft", "audio_ft", "max_turns", "use_caption")
SECTION_KEYS = (
    *("arch", "model_type", "pretrained", "finetuned", "load_pretrained", "load_finetuned", "tokenizer", "compat"),
    *PROCESSOR_KEYS,
)
"""What a `model` section may hold beside the fields of the config."""
BATCH_KEYS = ("input_ids", "token_type_ids", "attention_mask", "video_fts")


class GPTDialogue(BaseModel):
    """Dialogues about a video. `compat="lavis"` gives the losses that LAVIS computes."""

    PRETRAINED_MODEL_CONFIG_DICT = {"base": "configs/models/gpt_dialogue_base.yaml"}

    def __init__(
        self,
        network: GPTDialogueLMHeadModel,
        processor: GPTDialogueProcessor,
        compat: str | None = None,
        tokenizer_folder: Path | None = None,
    ) -> None:
        super().__init__()
        if compat not in COMPATS:
            raise ConfigError(f"compat={compat!r} is unknown; use None or 'lavis'.")
        self.network, self.processor, self.compat = network, processor, compat
        self.tokenizer_folder = tokenizer_folder

    @classmethod
    def check_config(cls, cfg: Mapping[str, Any]) -> None:
        """Check the keys of a `model` section."""
        _check_keys(read_fields(cfg))

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> GPTDialogue:
        """Make the model of a `model` section: its `finetuned` file, else GPT-2's weights with fresh video layers.

        Raises:
            ConfigError: an unknown key or a wrong value.
            CheckpointError: weights or tokenizer that cannot be fetched or do not fit.
        """
        return cls._open(read_fields(cfg), {}, None, None)

    @classmethod
    def from_pretrained(
        cls,
        model_type: str | None = None,
        *,
        checkpoint: str | Path | None = None,
        config: Any = None,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> GPTDialogue:
        """Load `checkpoint` (a `.pth` of a LAVIS run, or a folder that `save_pretrained` wrote).

        Sizes are read off the tensors; the number of heads is in no file and comes from `config`, from a config.json
        beside the file or in a folder `gpt2` there, or from the model type.

        Args:
            model_type: `"base"`.
            checkpoint: None: plain GPT-2, fetched from the hub, with fresh video layers, as LAVIS starts a run.
            config: fields to replace, as a dict or file: those of GPT-2, `len_video_ft`, `visual_ft`, `max_turns` ...
            tokenizer: folder or hub id of GPT-2's tokenizer, or a tokenizer; None: beside the checkpoint, in a folder
                `gpt2` there, else the hub's.
            options: more keys of the `model` section.

        Raises:
            ConfigError: no such type, an unknown key, or a number of heads that is not known.
            CheckpointError: weights or tokenizer that are absent, damaged or of another model.
        """
        section = model_section(cls.default_config_path(model_type or "base"), None, options)
        return cls._open(section, {**read_fields(config), **options}, checkpoint, tokenizer)

    @classmethod
    def _open(
        cls,
        section: Mapping[str, Any],
        given: Mapping[str, Any],
        checkpoint: str | Path | None,
        tokenizer: str | Path | PreTrainedTokenizerBase | None,
    ) -> GPTDialogue:
        settings = {**section, **given}
        fields = {name: value for name, value in section.items() if name not in SECTION_KEYS}
        asked = {name: value for name, value in given.items() if name not in SECTION_KEYS}
        _check_keys(fields | asked)
        weights = checkpoint if checkpoint is not None else settings.get("finetuned") or None
        if checkpoint is None and not settings.get("load_finetuned", True):
            weights = None
        tokenizer = tokenizer if tokenizer is not None else settings.get("tokenizer")
        if weights is None:
            network, folder = _new(fields | asked, settings)
        else:
            path = local_file(weights)
            network = _load(path, fields, asked)
            folder = _beside(path, "vocab.json") or _beside(path, "tokenizer.json")
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            folder = hub.resolve(tokenizer or folder or settings["pretrained"])
            tokenizer = load_dialogue_tokenizer(folder)
        options = {name: settings[name] for name in PROCESSOR_KEYS if name in settings}
        processor = GPTDialogueProcessor.from_config(network.config, tokenizer, **options)
        return cls(network, processor, settings.get("compat"), folder)

    @property
    def release_rules(self) -> Sequence[Rule]:
        """Rules from the names of LAVIS's files."""
        return RULES

    @property
    def processor_settings(self) -> dict[str, Any]:
        """The settings of this model's processors; the names of the features and turns that it was loaded with."""
        names = {name: getattr(self.processor, name) for name in PROCESSOR_KEYS}
        return names if self.tokenizer_folder is None else {**names, "tokenizer": str(self.tokenizer_folder)}

    def load_checkpoint(self, url_or_filename: str | Path) -> None:
        """Replace the weights by those of another file of the same sizes, strictly.

        Raises:
            CheckpointError: absent, damaged, or tensors that are missing, unexpected or of another shape.
        """
        first, is_training = next(self.parameters()), self.training
        path = local_file(url_or_filename)
        self.network = _filled(self.network.config, _tensors(path), first.dtype, first.device).train(is_training)

    def save_trained(self, folder: Path) -> None:
        """Put config and tokenizer beside a run's checkpoints, which do not tell the number of heads."""
        self.network.config.save_pretrained(str(folder))
        self.processor.save_pretrained(str(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that lavish loads: config.json, model.safetensors, tokenizer, processor."""
        self.network.save_pretrained(str(folder))
        self.processor.save_pretrained(str(folder))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, samples: Mapping[str, Any]
    ) -> GPTDialogueOutput:
        """Give `loss`, and its parts `lm_loss` and `video_loss`, of a batch with `labels`."""
        output = self.network(**self._batch(samples), labels=self._tensor(samples, "labels"), compat=self.compat)
        assert isinstance(output, GPTDialogueOutput)
        return output

    @torch.no_grad()
    def generate(
        self,
        samples: Mapping[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 1,
        max_length: int = 20,
        min_length: int = 1,
        top_p: float = 0.9,
        temperature: float = 1.0,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        too_long: str = "raise",
    ) -> list[str]:
        """Answer the last question of each dialogue; answers that the batch holds are not looked at.

        Args:
            samples: a batch, as `forward` takes it.
            use_nucleus_sampling: draw, instead of the likeliest; `top_p` and `temperature` count then only.
            num_beams: 1 is greedy.
            max_length: the most tokens of an answer (`max_len` of LAVIS's recipe).
            min_length: the fewest, before <eos>.
            top_p: share of the nucleus.
            temperature: below 1 likelier, above 1 more varied.
            repetition_penalty: above 1: fewer repetitions.
            length_penalty: exponent of a beam's length.
            too_long: "raise", or "cut": a dialogue that does not fit loses its oldest tokens.

        Raises:
            DataError: the batch lacks a tensor.
            PromptError: features of another width, or a dialogue without room for an answer.
        """
        rows = [self.processor.prompt(row) for row in self._rows(samples)]
        prompts = self.processor.collate(rows, padding_side="left", too_long=too_long, num_new_tokens=max_length)
        drawing = {"top_p": top_p, "top_k": 0, "temperature": temperature} if use_nucleus_sampling else {}
        beams = {"length_penalty": length_penalty} if num_beams > 1 else {}
        # The `self` of transformers' `generate` is a protocol of more attributes than any network declares.
        ids = cast(Any, self.network).generate(
            **{name: tensor.to(self.device) for name, tensor in prompts.items() if name != "labels"},
            do_sample=use_nucleus_sampling,
            num_beams=num_beams,
            max_new_tokens=max_length,
            min_new_tokens=min_length,
            repetition_penalty=repetition_penalty,
            **drawing,
            **beams,
        )
        return [self.processor.decode(row[prompts["input_ids"].shape[1] :]).strip() for row in ids]

    def answer(
        self,
        dialogue: Mapping[str, Any],
        video_fts: torch.Tensor | None = None,
        *,
        features: str | Path | None = None,
        **options: Any,
    ) -> str:
        """Answer the `question` of one dialogue; what is given is that of `processor.sample`, then of `generate`."""
        sample = self.processor.sample({**dialogue, "answer": None}, video_fts, features=features)
        too_long = options.get("too_long", "raise")
        return self.generate(self.processor.collate([sample], too_long=too_long), **options)[0]

    def _batch(self, samples: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        mask = "attention_mask" if "attention_mask" in samples else "attn_mask"
        return {name: self._tensor(samples, mask if name == "attention_mask" else name) for name in BATCH_KEYS}

    def _tensor(self, samples: Mapping[str, Any], name: str) -> torch.Tensor:
        if not isinstance(samples.get(name), torch.Tensor):
            found = ", ".join(map(str, samples)) or "nothing"
            raise DataError(f"The samples have no tensor {name!r}; they have {found}. processor.collate makes them.")
        return samples[name].to(self.device)

    def _rows(self, samples: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
        """Take a batch apart, without its padding."""
        batch = self._batch(samples)
        labels = self._tensor(samples, "labels") if "labels" in samples else None
        num_frames, rows = batch["video_fts"].shape[1], []
        for at, mask in enumerate(batch["attention_mask"] != 0):
            frames, text, types = mask[:num_frames], mask[num_frames:], batch["token_type_ids"][at]
            ignored = torch.full_like(types, -1) if labels is None else labels[at]
            rows.append(
                {
                    "input_ids": batch["input_ids"][at][text].cpu(),
                    "token_type_ids": types[num_frames:][text].cpu(),
                    "labels": ignored[num_frames:][text].cpu(),
                    "video_fts": batch["video_fts"][at][frames].float().cpu(),
                    "video_token_type_ids": types[:num_frames][frames].cpu(),
                }
            )
        return rows


def _check_keys(fields: Mapping[str, Any]) -> None:
    known = {*SECTION_KEYS, *GPTDialogueConfig.__dataclass_fields__, *GPTDialogueConfig.attribute_map, "model_type"}
    for name in fields:
        if name not in known:
            raise ConfigError(f"model.{name} is no setting of 'gpt_dialogue'.{did_you_mean(str(name), known)}")


def _beside(path: Path, name: str) -> Path | None:
    """Give the folder beside a checkpoint, or `gpt2` in it, that holds a file of that name."""
    folder = config_folder(path) if path.is_dir() or deepspeed.is_run(path) else path.parent
    return next((place for place in (folder, folder / "gpt2") if (place / name).is_file()), None)


def _tensors(path: Path) -> TensorMap:
    is_saved = path.is_dir() and (path / "config.json").is_file() and not any(path.glob(f"*{lavis.SUFFIX}"))
    return read_weights(path) if is_saved or deepspeed.is_run(path) else lavis.read(path)


def _load(path: Path, base: Mapping[str, Any], asked: Mapping[str, Any]) -> GPTDialogueLMHeadModel:
    tensors = _tensors(path)
    return _filled(_config(path, tensors, base, asked), tensors, torch.float32, torch.device("cpu")).eval()


def _config(path: Path, tensors: TensorMap, base: Mapping[str, Any], asked: Mapping[str, Any]) -> GPTDialogueConfig:
    """Make the config of a trained file: what the caller asks counts before a config beside it, and that before the
    type's YAML."""
    stored = stored_sizes(tensors)
    folder = _beside(path, "config.json")
    where = str(tensors.path if folder is None else folder / "config.json")
    beside = {} if folder is None else read_object(folder / "config.json")
    heads = asked.get("n_head", asked.get("num_attention_heads", beside.get("n_head")))
    if heads is None and stored.get("n_embd") not in (None, base.get("n_embd")):
        raise ConfigError(
            f"{tensors.path}: the tensors are {stored['n_embd']} wide and those of this model type {base['n_embd']}; "
            "no file tells how many heads share them. Give config={'n_head': ...}, or put GPT-2's config.json there."
        )
    fields = {**base, **beside}
    if beside.get("model_type") == "gpt2":  # of plain GPT-2, without the special tokens
        fields["vocab_size"] = stored.get("vocab_size", fields["vocab_size"])
        fields = {name: value for name, value in fields.items() if not name.endswith("_token_id")}
    return read_config({**fields, "model_type": "gpt_dialogue"}, where, **{**stored, **asked})


def _filled(
    config: GPTDialogueConfig, tensors: TensorMap, dtype: torch.dtype, device: torch.device
) -> GPTDialogueLMHeadModel:
    with torch.device("meta"):
        network = GPTDialogueLMHeadModel(config)
    complete(network, load_into(network, tensors, dtype=dtype, device=device, rules=RULES))
    return network


def _new(fields: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[GPTDialogueLMHeadModel, Path | None]:
    """Make an untrained network: on plain GPT-2's weights, or with drawn ones (`load_pretrained: false`)."""
    if not settings.get("load_pretrained", True) or not settings.get("pretrained"):
        return GPTDialogueLMHeadModel(read_config(dict(fields), "model")).eval(), None
    folder = hub.resolve(settings["pretrained"])
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: pretrained names the folder or hub id of a GPT-2, with its config.json.")
    network = GPTDialogueLMHeadModel(read_config(dict(fields), "model")).eval()
    start_from_gpt2(network, hf.read(folder))
    return network, folder


def processor_of(path: Path, config: Any, tokenizer: str | Path | None) -> GPTDialogueProcessor | None:
    """Give the processor of a path, without its weights; None: no tokenizer lies beside it, and none was named.

    Raises:
        CheckpointError: a tokenizer that is damaged or of another model.
    """
    folder = tokenizer or _beside(path, "vocab.json") or _beside(path, "tokenizer.json")
    if folder is None:
        return None
    return GPTDialogueProcessor.from_config(config, load_dialogue_tokenizer(hub.resolve(folder)))


def outline(path: Path | None, layout: Mapping[str, Any], config: Any = None) -> Any:
    """Give a path's network on the meta device, its tensors (None without a path) and the rules between them.

    Args:
        path: a `.pth` of a LAVIS run or a folder that `save_pretrained` wrote; None: the network of `layout`.
        layout: a model type's YAML; empty: that of the type "base".
        config: fields to replace.

    Raises: as `GPTDialogue.from_pretrained`, before the first weight is read.
    """
    section = layout["model"] if layout else model_section(GPTDialogue.default_config_path("base"))
    fields = {name: value for name, value in section.items() if name not in SECTION_KEYS}
    asked = {name: value for name, value in read_fields(config).items() if name not in SECTION_KEYS}
    _check_keys(fields | asked)
    if path is None:
        tensors, made = None, read_config(fields, "model", **asked)
    else:
        tensors = _tensors(path)
        made = _config(path, tensors, fields, asked)
    with torch.device("meta"):
        return GPTDialogueLMHeadModel(made), tensors, RULES
