"""Any chat model of `lavish.load`, trained on conversations: whole, by parts, with LoRA, or with LoRA on nf4 (QLoRA).

    model:    {arch: chat, model_type: default, path: FOLDER, lora: {r: 8, alpha: 32}}       or  train: [projector]
    datasets: {conversations: {build_info: {annotations: {train: {storage: FILE}}}}}
    run:      {task: image_text_pretrain, ...}

What learns is kept in float32 whatever the model's dtype, so that small steps are not lost; what is frozen keeps its
dtype, and the forward pass runs in it. A finished run's folder is opened by `lavish.load` and `lavish chat`: it holds
the adapter in PEFT's layout where only an adapter learnt on a model that has a folder of its own, else the whole model.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lavish.common import config as configs
from lavish.common.errors import ConfigError, DataError, MissingDependency, did_you_mean
from lavish.inference.adapters import is_quantized, layers_over_quantized
from lavish.inference.load import POCKET, load
from lavish.inference.random_start import random_model, with_random_projector
from lavish.inference.vlm import VLM
from lavish.models import family_of
from lavish.models.base_model import BaseModel, read_fields
from lavish.nn.joined_rows import IGNORED
from lavish.nn.losses import NO_LOGITS
from lavish.runners.feature_folder import FeatureFolder, digest
from lavish.runners.order import NUM_TARGETS
from lavish.tasks.base_task import to_device

_TOWER = r"(?:^|\.)(?:vision_tower|vision\.(?:patch_embedding|transformer))\."
_QFORMER = r"(?:^|\.)(?:qformer\.|query_tokens)"
_PROJECTOR = r"(?:^|\.)(?:projector|vision\.(?:linear_proj|conv|boi|eoi))(?:\.|$)"
PARTS: dict[str, str] = {
    "all": r"",
    "tower": _TOWER,
    "qformer": _QFORMER,
    "projector": _PROJECTOR,
    "decoder": rf"^(?!.*(?:{_TOWER}|{_QFORMER}|{_PROJECTOR}))",
    "vision_expert": r"vision_expert|vision_mlp",
    "language_expert": r"language_expert|language_mlp",
    "embeddings": r"embed_tokens|word_embeddings",
    "lm_head": r"(?:^|\.)(?:lm_head|output_layer)\.",
    "lora": r"\.lora_",
}
"""Part -> pattern of the names of its weights."""


INPUTS, DIGESTS = "inputs", "image_digests"
PICTURE_LENGTH = 4000
"""Characters that a picture counts as."""


@dataclass
class LoraSettings:
    """The section `model.lora`."""

    r: int = 8
    """Rank."""
    alpha: int = 32
    """The adapter is scaled by alpha / r."""
    dropout: float = 0.0
    """Share of inputs that are dropped, 0..1."""
    target_modules: list[str] = field(default_factory=list)
    """Names of linear layers, by their ends; empty: every linear layer of the decoder's layers."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"r is {self.r}; it must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; it lies in 0 <= dropout < 1.")


@dataclass
class ChatSettings:
    """The section `model` of a recipe that trains a chat model."""

    arch: str = "chat"
    """This."""
    model_type: str = "default"
    """The only one."""
    path: str | None = None
    """Folder or hub id, as `lavish.load` takes it; null: the bundled pocket model."""
    init: Literal["random", "random_projector"] | None = None
    """What starts random, by the seed of the run: everything, of the folder's config.json alone; or the projector of a
    release in pieces. Null: nothing, all weights are in the files."""
    pieces: dict[str, str] = field(default_factory=dict)
    """Parts of the release that are elsewhere."""
    base: str | None = None
    """Of an adapter's folder."""
    tokenizer: str | None = None
    """Folder or hub id, where the model's folder has none."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields that replace those of config.json."""
    dtype: str = "auto"
    """Of what is frozen."""
    quantization: Literal["nf4"] | None = None
    """nf4: the decoder's frozen matrices in four bits, for LoRA."""
    chat_template: str | None = None
    """The family's template by name."""
    compat: Literal["", "release"] = ""
    """The release's own loss mask."""
    lora: LoraSettings | None = None
    """Put a new adapter on the model."""
    train: list[str] = field(default_factory=list)
    """Parts that learn, or patterns of names."""
    freeze: list[str] = field(default_factory=list)
    """Parts that do not, though `train` names them."""
    packing: bool = False
    """Conversations of a batch share rows where they fit, instead of padding; each sees itself alone."""
    feature_cache: str | None = None
    """Folder where what the frozen tower gives of each picture is kept, so that it is computed once; null: nowhere."""

    def __post_init__(self) -> None:
        if self.lora is None and not self.train:
            raise ConfigError(
                "nothing would learn: set model.lora: {r: 8}, or model.train to parts "
                f"({', '.join(PARTS)}) or patterns of names"
            )
        if self.quantization and (self.lora is None or {"all", "decoder"} & set(self.train)):
            raise ConfigError("quantization nf4 freezes the decoder: set model.lora, and leave it out of model.train")
        if self.init == "random":
            self._check_random()
        elif self.init == "random_projector":
            learns = [name for name in self.train if name == "all" or name.startswith("projector")]
            if not learns or {"all", "projector"} & set(self.freeze):
                raise ConfigError("a random projector has to learn: put projector into model.train")

    def _check_random(self) -> None:
        if self.path is None:
            raise ConfigError(
                "init: random needs a folder with a config.json and a tokenizer, and model.path is null; name one, "
                "such as projects/glm4v_9b/tiny"
            )
        given = {"pieces": self.pieces, "base": self.base, "quantization": self.quantization}
        if wrong := next((name for name, value in given.items() if value), None):
            raise ConfigError(
                f"init: random makes all weights of model.path's config.json, and model.{wrong} is about weights in "
                f"files; leave model.{wrong} out"
            )


class ChatCollator:
    """Makes the network's tensors of a batch of conversations, in the process that loads it.

    Args:
        processor: of the model.
        settings: whose template and loss mask count.
    """

    def __init__(self, processor: Any, settings: ChatSettings) -> None:
        self.processor, self.settings = processor, settings

    @torch.no_grad()
    def __call__(self, samples: Mapping[str, Any]) -> dict[str, Any]:
        """Give the samples with `inputs` (tensors by name), and `num_targets`: the tokens that the loss is over.

        Raises:
            DataError: the samples have no messages.
            PromptError, MediaError: a conversation or picture that cannot be read.
        """
        batch = self.processor.apply_chat_template(
            _messages(samples),
            chat_template=self.settings.chat_template,
            add_generation_prompt=False,
            padding_side="right",
            return_labels=True,
            compat=self.settings.compat or None,
        )
        made = {**samples, INPUTS: dict(batch), NUM_TARGETS: int((batch["labels"][:, 1:] != IGNORED).sum())}
        pictures = batch.get("pixel_values")
        if self.settings.feature_cache is not None and pictures is not None and len(pictures):
            made[DIGESTS] = [digest(pixels) for pixels in pictures]
        return made


class ChatLearner(BaseModel):
    """A chat model behind LAVIS's interface of samples: `messages`, a list of conversations.

    Args:
        vlm: the model.
        settings: what learns.
    """

    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": "configs/training/chat.yaml"}

    def __init__(self, vlm: VLM, settings: ChatSettings) -> None:
        super().__init__()
        self.vlm, self.settings = vlm, settings
        self.collator = ChatCollator(vlm.processor, settings)
        self.stored_dtype = next(vlm.model.parameters()).dtype
        self.network = vlm.model if settings.lora is None else _with_lora(vlm.model, settings.lora)
        _choose(self.network, settings)
        self.features: FeatureFolder | None = None
        if settings.feature_cache is not None:
            self.features = FeatureFolder(settings.feature_cache, self._base)

    @classmethod
    def check_config(cls, cfg: Mapping[str, Any]) -> None:
        """Check a `model` section: keys, types, and that something learns."""
        configs.check(read_fields(cfg), ChatSettings, "model")

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> ChatLearner:
        """Load the model of a `model` section, or make what `init` says of it, and choose what learns.

        Raises:
            ConfigError: an unknown key or part, or nothing learns.
            CheckpointError: weights that are absent, damaged or do not fit.
            MissingDependency: LoRA without peft, nf4 without bitsandbytes.
        """
        settings = configs.check(read_fields(cfg), ChatSettings, "model")
        return cls(_model(settings), settings)

    @property
    def processor(self) -> Any:
        """Makes tensors of conversations."""
        return self.vlm.processor

    def forward(self, samples: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Give the loss of a batch of conversations, over the tokens of their answers.

        Raises:
            DataError: the samples have no messages.
            PromptError, MediaError: a conversation or picture that cannot be read.
        """
        prepared = samples if INPUTS in samples else self.collator(samples)
        inputs = to_device(prepared[INPUTS], self.device)
        with self._precision(self.device):
            if self.features is not None and DIGESTS in prepared:
                pixel_values = inputs.pop("pixel_values")
                inputs["image_features"] = self.features.image_features(pixel_values, prepared[DIGESTS])
            if self.settings.packing and self.training:
                return {"loss": self._base.joined_loss(inputs).float()}
            return {"loss": self.network(**inputs, logits_to_keep=NO_LOGITS).loss.float()}

    @property
    def _base(self) -> Any:
        """The network without what a PeftModel wraps around it."""
        model: Any = self.vlm.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model  # only a PeftModel has it

    @torch.no_grad()
    def generate(self, samples: Mapping[str, Any], max_new_tokens: int = 64) -> list[str]:
        """Answer the last question of each conversation, greedily; the answer that stands there is not looked at.

        Raises: as `forward`.
        """
        asked = [_without_answer(messages) for messages in _messages(samples)]
        self.vlm.features.clear()  # they are of older weights
        with self._precision(self.device):
            replies = self.vlm.batch(
                asked,
                batch_size=max(len(asked), 1),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                chat_template=self.settings.chat_template,
            )
        return [reply.text.strip() for reply in replies]

    def sample_length(self, sample: Mapping[str, Any]) -> int:
        """Give a measure of a conversation's length: the characters of its texts, and a lot for each picture."""
        length = 0
        for message in sample["messages"]:
            content = message["content"]
            for part in [content] if isinstance(content, str) else content:
                text = part if isinstance(part, str) else part.get("text")
                length += len(text) if text is not None else PICTURE_LENGTH
        return length

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """Compute in the frozen weights' dtype, where it is a half one."""
        if self.stored_dtype not in (torch.bfloat16, torch.float16):
            return nullcontext()
        return torch.autocast(device.type, self.stored_dtype)

    # -- what a run leaves

    def save_trained(self, folder: Path) -> None:
        """Write the adapter, or the whole model, so that `lavish.load(folder)` opens it."""
        partial = folder / "model.partial"
        if partial.exists():
            shutil.rmtree(partial)
        if self._is_adapter_alone():
            self._save_adapter(partial)
        else:
            self._save_whole(partial)
        for path in partial.iterdir():
            path.replace(folder / path.name)
        partial.rmdir()

    def _is_adapter_alone(self) -> bool:
        settings = self.settings
        changed = settings.train or settings.pieces or settings.base or settings.config or settings.init
        return settings.lora is not None and not changed

    def _save_adapter(self, folder: Path) -> None:
        place = POCKET if self.settings.path is None else Path(self.settings.path)
        base = str(place.resolve()) if place.exists() else str(self.settings.path)
        for one in self.network.peft_config.values():  # pyright: ignore (a PeftModel's)
            one.base_model_name_or_path = base
        # peft would ask the hub whether the base's vocabulary has grown.
        self.network.save_pretrained(str(folder), save_embedding_layers=False)  # pyright: ignore

    def _save_whole(self, folder: Path) -> None:
        network: Any = self.network
        if hasattr(network, "merge_and_unload"):  # a PeftModel has it, a network has not
            if is_quantized(network):
                raise ConfigError(
                    "What learnt beside the adapter cannot be saved with nf4 weights; leave out model.train and "
                    "model.pieces, and put the model's pieces into one folder."
                )
            network = network.merge_and_unload()
        network = network.to(self.stored_dtype)
        network.config.dtype = self.stored_dtype
        network.save_pretrained(str(folder))
        self.processor.save_pretrained(str(folder))


def _messages(samples: Mapping[str, Any]) -> list[Any]:
    if "messages" not in samples:
        raise DataError(
            f"The samples have no 'messages'; they have {', '.join(map(str, samples)) or 'nothing'}. Data of your own "
            "are read by the data set `conversations`."
        )
    return list(samples["messages"])


def _without_answer(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Give a conversation up to its last question."""
    questions = [at for at, message in enumerate(messages) if message["role"] == "user"]
    return list(messages[: questions[-1] + 1]) if questions else list(messages)


def _model(settings: ChatSettings) -> VLM:
    """Give the model that a section names; on the CPU, from where the runner moves it."""
    same: dict[str, Any] = {
        "dtype": settings.dtype,
        "device": "cpu",
        "tokenizer": settings.tokenizer,
        "config": settings.config or None,
    }
    if settings.init == "random" and settings.path is not None:
        return random_model(settings.path, **same)
    if settings.init == "random_projector":
        return with_random_projector(settings.path, settings.pieces, quantization=settings.quantization, **same)
    same |= settings.pieces  # paths by the names of pieces
    return load(settings.path, quantization=settings.quantization, base=settings.base, **same)


def _with_lora(network: Any, settings: LoraSettings) -> Any:
    """Put a new LoRA on a network.

    Raises:
        ConfigError: it has one already, or no layer has such a name.
        MissingDependency: peft is not installed.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise MissingDependency(
            "model.lora needs peft, which is not installed: pip install 'lavish[train]'."
        ) from error
    if isinstance(network, PeftModel):
        raise ConfigError("The model has an adapter already: train it with model.train: [lora], without model.lora.")
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules or _decoder_linears(network),
        task_type="CAUSAL_LM",
    )
    if is_quantized(network):
        config._register_custom_module(layers_over_quantized())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            return get_peft_model(network, config)
    except ValueError as error:  # what peft raises when no layer has a name of target_modules
        leaves = {name.rpartition(".")[2] for name, one in network.named_modules() if isinstance(one, nn.Linear)}
        wrong = next((name for name in settings.target_modules if name.rpartition(".")[2] not in leaves), "")
        hint = did_you_mean(wrong, leaves)
        raise ConfigError(
            f"model.lora.target_modules: no linear layer of {type(network).__name__} is called {wrong!r}.{hint} Its "
            f"layers: {', '.join(sorted(leaves))}."
        ) from error


def _decoder_linears(network: Any) -> str:
    """Give the pattern of the linear layers of the decoder's layers."""
    start = family_of(network).decoder_layers
    leaves = {
        name.rpartition(".")[2]
        for name, one in network.named_modules()
        if name.startswith(start) and (isinstance(one, nn.Linear) or "Linear" in type(one).__name__)
    }
    return rf"{re.escape(start)}\d+\..*\b({'|'.join(sorted(leaves))})"


def _choose(network: nn.Module, settings: ChatSettings) -> None:
    """Switch gradients on for what learns, in float32, and off elsewhere.

    Raises:
        ConfigError: a part that the network does not have.
    """
    names = [name for name, _ in network.named_parameters()]
    learns = _named(settings.train, names, "train") - _named(settings.freeze, names, "freeze")
    if settings.lora is not None:
        learns |= _named(["lora"], names, "train")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in learns)
        if name in learns:
            parameter.data = parameter.data.float()


def _named(wanted: Iterable[str], names: list[str], key: str) -> set[str]:
    found: set[str] = set()
    for part in wanted:
        pattern = PARTS.get(part)
        bare = {name: name.removeprefix("base_model.model.") for name in names}
        if pattern is None:
            here = {name for name in names if fnmatchcase(bare[name], part) or bare[name].startswith(f"{part}.")}
        else:
            here = {name for name in names if re.search(pattern, bare[name])}
        if not here:
            hint = did_you_mean(part, [*PARTS, *bare.values()])
            raise ConfigError(
                f"model.{key}: no weight of the model is of {part!r}.{hint} Parts: {', '.join(PARTS)}; or a pattern of "
                f"names such as {names[0]!r}."
            )
        found |= here
    return found
