"""The table of model families and released models that lavish knows.

Everything is a string until it is used: importing this file imports neither torch nor transformers. To add a family,
add one `Family`; to add a released model, add one `ZooEntry` and its layout in `configs/models/<name>.yaml`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

from lavish.checkpoints import deepspeed, hf, hub, mindspore, sat
from lavish.checkpoints.layouts import config_folder
from lavish.checkpoints.output import TargetOptions, TargetPlan
from lavish.checkpoints.release import Release
from lavish.checkpoints.tensor_map import TensorMap
from lavish.common.errors import CheckpointError, ConfigError, UnknownLayout, did_you_mean

CAPABILITIES = ("chat", "stream", "batch", "caption", "answer", "embed")
"""What a loaded model may be asked for, by the name of the method."""


@dataclass(frozen=True)
class Family:
    """One model family: how its config.json names it, and where its classes are (imported on use)."""

    name: str
    model_type: str
    """What config.json says in folders that lavish saved."""
    architectures: tuple[str, ...]
    """What config.json says in released folders, which may have no `model_type`."""
    package: str
    """Where the family's files are: config, model, processor, weights."""
    config: str
    model: str
    processor: str
    has_manifest: bool = False
    """True if the package has a `manifest.py` too, which predicts names and shapes without torch."""
    needs: tuple[str, ...] = ()
    """Fields without which a config.json is of another family that has the same names: GLM-4V's `vision_config`."""
    marks: tuple[str, ...] = ()
    """Patterns of files in a composite release (`weights.open_release`), any of which tells the family; a file that
    matches by its name alone is one too."""
    piece_marks: tuple[str, ...] = ()
    """Names of pieces that only this family has: one of them as a keyword of `lavish.load` tells the family."""
    key_marks: tuple[str, ...] = ()
    """Beginnings of tensor names, any of which tells the family of a single `.pth` file."""
    opener: str | None = None
    """Where a family of no chat networks has what loads it whole: "module:function" of the package, called with a
    path, config and tokenizer; it gives a registered model. See `inference/sample_model.py`."""
    tokenizer: str | None = None
    """"module:Class" for `AutoTokenizer`, where the release names a class of its own."""
    decoder_layers: str = "language_model.layers."
    """Beginning of the names of the decoder's layers: what quantisation takes."""
    towers: tuple[str, ...] = ("vision_tower.", "qformer.", "projector.")
    """Beginnings of the names of what sees: what `quantize_vision` takes too."""
    renames_adapters: bool = False
    """True if our modules have other names than the release's, so that its adapters need `weights.native_adapter`:
    (fields of adapter_config.json, tensors) -> both as they fit our modules."""
    capabilities: tuple[str, ...] = ("chat", "stream", "batch", "caption", "answer")
    """What a loaded model of the family can do, of `CAPABILITIES`."""
    layouts: tuple[str, ...] = ("hf",)
    """Layouts that can hold the family; each but "hf" is a module of the package with what `plan_target` calls."""

    @property
    def config_class(self) -> Any:
        """The config, a transformers `PreTrainedConfig`."""
        return self._get("config", self.config)

    @property
    def model_class(self) -> Any:
        """The network, a transformers `PreTrainedModel`."""
        return self._get("model", self.model)

    @property
    def processor_class(self) -> Any:
        """The processor."""
        return self._get("processor", self.processor)

    def read_config(self, fields: Mapping[str, Any], where: str, **overrides: Any) -> Any:
        """Make the config of a config.json; overrides may be nested (`vision_config={"num_hidden_layers": 2}`).

        Raises:
            ConfigError: a size is absent, an override is no field (the nearest is suggested), or fields contradict.
        """
        for name, nested in self.config_class.sub_configs.items():
            if isinstance(overrides.get(name), Mapping):
                overrides[name] = _checked_nested(name, overrides[name], nested)
        return self._get("config", "read_config")(dict(fields), where, **overrides)

    def check_version(self, config: Any, names: Container[str], where: str) -> None:
        """Check that stored tensors are of the version that the config is read as, before they are compared one by one.

        Raises:
            CheckpointError: they are not; names the field that decides.
        """
        if self.has_manifest and (problem := self._get("manifest", "version_problem")(config.version, names)):
            raise CheckpointError(f"{where}: {problem}")

    @property
    def is_composite(self) -> bool:
        """True if releases come in pieces: `weights.PIECES` names them, `weights.open_release` puts them together."""
        return bool(self.marks or self.piece_marks) and self.opener is None

    @property
    def tokenizer_class(self) -> Any:
        """The class that `AutoTokenizer` gives; None: what tokenizer_config.json says."""
        if self.tokenizer is None:
            return None
        module, _, name = self.tokenizer.partition(":")
        return getattr(import_module(module), name)

    def open_samples(self, path: Path, **options: Any) -> Any:
        """Load the registered model of a family of no chat networks."""
        if self.opener is None:
            raise ConfigError(f"The family {self.name!r} is of chat networks.")
        module, _, name = self.opener.partition(":")
        return attrgetter(name)(import_module(f"{self.package}.{module}"))(checkpoint=path, **options)

    def outline(self, path: Path | None, layout: Mapping[str, Any], config: Any = None) -> tuple[Any, Any, Any]:
        """Give the network of a family of no chat networks on the meta device, its `TensorMap` and the rules between;
        of a path, or (path None) of a model type's YAML."""
        return self._get("samples", "outline")(path, layout, config)

    def processor_of(self, path: Path, config: Any, tokenizer: str | Path | None) -> Any:
        """Give the processor of a path of a family of no chat networks, without its weights; None: there is no
        tokenizer, and none was named."""
        return self._get("samples", "processor_of")(path, config, tokenizer)

    @property
    def pieces(self) -> tuple[str, ...]:
        """Names of the pieces of a composite release."""
        return self._get("weights", "PIECES") if self.is_composite else ()

    def open_release(self, path: Path, pieces: Mapping[str, Path]) -> Release:
        """Open a composite release; see `lavish.checkpoints.release`."""
        return self._get("weights", "open_release")(path, pieces)

    def open_untrained(self, folder: Path | None, pieces: Mapping[str, Path]) -> Release:
        """Open a composite release without the piece that was trained: the projector is to start random."""
        return self._get("weights", "open_untrained")(folder, pieces)

    @property
    def untrained_rules(self) -> Any:
        """Rules in place of a projector's weights."""
        return self._get("weights", "UNTRAINED")

    def start_projector(self, network: Any, dtype: Any, device: Any) -> None:
        """Fill a projector on the meta device with random weights, as the release starts it."""
        self._get("weights", "start_projector")(network, dtype, device)

    @property
    def rules(self) -> Any:
        """Renaming rules from the released tensors to the network's."""
        return self._get("weights", "RULES")

    @property
    def native_adapter(self) -> Any:
        """What turns a released adapter into one for our modules; None where they have the release's names."""
        return self._get("weights", "native_adapter") if self.renames_adapters else None

    @property
    def tensor_parallel_plan(self) -> Any:
        """How each linear layer is shared out among processes, by a pattern of its name."""
        return self._get("weights", "TENSOR_PARALLEL_PLAN")

    def plan_target(
        self, layout: str, fields: Mapping[str, Any], tensors: TensorMap, options: TargetOptions
    ) -> TargetPlan:
        """Say what a checkpoint of the family is in another layout than "hf".

        Args:
            fields: of its config.json. tensors: under the names that RULES know.

        Raises:
            ConfigError: the layout cannot hold it.
        """
        return self._get(layout, "plan_target")(fields, tensors, options)

    def computed(self, config: Any, name: str, dtype: Any) -> Any:
        """Give a tensor that a Hugging Face release stores, and that another layout leaves to the network."""
        return self._get("weights", "computed")(config, name, dtype)

    def complete(self, network: Any, absent: Iterable[str]) -> None:
        """Compute what no file held (`absent` is on the meta device), and check what must agree."""
        self._get("weights", "complete")(network, absent)

    def _get(self, module: str, name: str) -> Any:
        return getattr(import_module(f"{self.package}.{module}"), name)


@dataclass(frozen=True)
class ZooEntry:
    """One released model: where it is, under which licence, how large, and what it is good at."""

    name: str
    family: str
    hub_id: str | None
    """None: bundled with lavish."""
    licence: str
    num_parameters: int
    num_bytes: int
    """Size of the weights as they are released; of a file of LAVIS, what its model reads of it."""
    image_size: int
    """Side of the square that every picture is resized to, in pixels."""
    good_at: str
    template: str
    """The chat template that the release uses by default; empty for a model that holds no conversation."""
    tokenizer: str | None = None
    """Hub id of the tokenizer, where the release keeps it apart from the weights."""


FAMILIES: tuple[Family, ...] = (
    Family(
        name="cogvlm",
        model_type="cogvlm",
        architectures=("CogVLMForCausalLM", "CogVLMVideoForCausalLM"),
        package="lavish.models.cogvlm",
        config="CogVLMConfig",
        model="CogVLMForCausalLM",
        processor="CogVLMProcessor",
        has_manifest=True,
        decoder_layers="model.layers.",
        towers=("model.vision.",),
        tokenizer="lavish.processors.tokenizers:SentencePieceTokenizer",
        marks=("model_config.json", "*.ckpt", "rank_*/*.ckpt"),
        layouts=("hf", "sat", "mindspore"),
    ),
    Family(
        name="clip_qwen",
        model_type="clip_qwen",
        architectures=("ClipQwenForConditionalGeneration",),
        package="lavish.models.clip_qwen",
        config="ClipQwenConfig",
        model="ClipQwenForConditionalGeneration",
        processor="ClipQwenProcessor",
        marks=("other_params.bin", "*/other_params.bin"),
        piece_marks=("vision_tower",),
        renames_adapters=True,
        layouts=("hf", "vlm_learning"),
    ),
    Family(
        name="glm4v_9b",
        model_type="chatglm",
        architectures=(
            "ChatGLMModel",
            "ChatGLMForConditionalGeneration",
            "ChatGLMForCausalLM",
            "Glm4v9bForCausalLM",
        ),
        package="lavish.models.glm4v_9b",
        config="ChatGLMConfig",
        model="Glm4v9bForCausalLM",
        processor="Glm4v9bProcessor",
        needs=("vision_config",),
        decoder_layers="transformer.encoder.layers.",
        towers=("transformer.vision.",),
        tokenizer="lavish.models.glm4v_9b.tokenizer:ChatGLM4Tokenizer",
    ),
    Family(
        name="minigpt4_qwen",
        model_type="minigpt4_qwen",
        architectures=("MiniGPT4QwenForConditionalGeneration",),
        package="lavish.models.minigpt4_qwen",
        config="MiniGPT4QwenConfig",
        model="MiniGPT4QwenForConditionalGeneration",
        processor="MiniGPT4QwenProcessor",
        marks=("eva*.pth", "*/eva*.pth", "layer_*-model_states.pt"),
        piece_marks=("eva", "blip2", "qformer"),
        key_marks=("llm_proj.", "llm_model."),
        renames_adapters=True,
        layouts=("hf", "lavis"),
    ),
    Family(
        name="blip",
        model_type="blip",
        architectures=("BlipForConditionalGeneration", "BlipForQuestionAnswering", "BlipForImageTextRetrieval"),
        package="lavish.models.blip",
        config="BlipConfig",
        model="BlipForConditionalGeneration",
        processor="BlipProcessor",
        key_marks=("text_decoder.bert.", "text_encoder.encoder."),
        opener="samples:open_model",
        capabilities=("caption", "answer", "embed"),
        layouts=("hf", "lavis"),
    ),
    Family(
        name="gpt_dialogue",
        model_type="gpt_dialogue",
        architectures=("GPTDialogueLMHeadModel",),
        package="lavish.models.gpt_dialogue",
        config="GPTDialogueConfig",
        model="GPTDialogueLMHeadModel",
        processor="GPTDialogueProcessor",
        key_marks=("video_ff.",),
        opener="samples:GPTDialogue.from_pretrained",
        capabilities=("answer",),
        layouts=("hf", "lavis"),
    ),
)

_COGVLM = "CogVLM model licence (research; commercial use after registration)"
_COGVLM2 = "CogVLM2 licence and Meta Llama 3 community licence"
_QWEN = "Tongyi Qianwen licence (Qwen), BSD-3-Clause (the tower and Q-Former of LAVIS)"
_BLIP = "BSD-3-Clause (BLIP and LAVIS)"
_VICUNA = "lmsys/vicuna-7b-v1.5"
_V1_490, _V1_224, _V2 = 17_639_685_376, 17_637_948_928, 19_503_105_280
_VIDEO, _VIDEO_BYTES = 12_507_530_496, 25_015_065_088
_V1_490_BYTES, _V1_224_BYTES, _V2_BYTES = 35_279_374_848, 35_275_901_952, 39_006_214_656

ZOO: tuple[ZooEntry, ...] = (
    ZooEntry(
        "pocket",
        "cogvlm",
        None,
        "Apache-2.0",
        7_457_088,
        14_914_416,
        112,
        "trying lavish, offline: drawn pictures of coloured shapes and a number, in English and Chinese; nothing else",
        "chat",
    ),
    ZooEntry(
        "cogvlm-chat-v1.1",
        "cogvlm",
        "THUDM/cogvlm-chat-hf",
        _COGVLM,
        _V1_490,
        _V1_490_BYTES,
        490,
        "conversations about one picture, in English; short answers with the vqa template",
        "chat",
        _VICUNA,
    ),
    ZooEntry(
        "cogvlm-base-490",
        "cogvlm",
        "THUDM/cogvlm-base-490-hf",
        _COGVLM,
        _V1_490,
        _V1_490_BYTES,
        490,
        "a start for fine-tuning; captions without a question",
        "base",
        _VICUNA,
    ),
    ZooEntry(
        "cogvlm-base-224",
        "cogvlm",
        "THUDM/cogvlm-base-224-hf",
        _COGVLM,
        _V1_224,
        _V1_224_BYTES,
        224,
        "a start for fine-tuning at a fifth of the image tokens",
        "base",
        _VICUNA,
    ),
    ZooEntry(
        "cogvlm-grounding-base",
        "cogvlm",
        "THUDM/cogvlm-grounding-base-hf",
        _COGVLM,
        _V1_490,
        _V1_490_BYTES,
        490,
        "a start for fine-tuning on boxes",
        "base",
        _VICUNA,
    ),
    ZooEntry(
        "cogvlm-grounding-generalist-v1.1",
        "cogvlm",
        "THUDM/cogvlm-grounding-generalist-hf",
        _COGVLM,
        _V1_490,
        _V1_490_BYTES,
        490,
        "boxes: phrase to box, box to phrase, captions with boxes (RefCOCO val 92.76 as published)",
        "base",
        _VICUNA,
    ),
    ZooEntry(
        "cogvlm2-llama3-chat-19B",
        "cogvlm",
        "THUDM/cogvlm2-llama3-chat-19B",
        _COGVLM2,
        _V2,
        _V2_BYTES,
        1344,
        "conversations and documents at 1344 px, 8192 tokens, in English (TextVQA 84.2, DocVQA 92.3 as published)",
        "chat",
    ),
    ZooEntry(
        "cogvlm2-llama3-chinese-chat-19B",
        "cogvlm",
        "THUDM/cogvlm2-llama3-chinese-chat-19B",
        _COGVLM2,
        _V2,
        _V2_BYTES,
        1344,
        "the same in Chinese and English (OCRBench 780 as published)",
        "chat",
    ),
    ZooEntry(
        "cogvlm2-llama3-caption",
        "cogvlm",
        "THUDM/cogvlm2-llama3-caption",
        _COGVLM2,
        _VIDEO,
        _VIDEO_BYTES,
        224,
        "captions of videos, 24 frames of the first minute; unproven against its release",
        "base",
    ),
    ZooEntry(
        "cogvlm2-video-llama3-chat",
        "cogvlm",
        "THUDM/cogvlm2-video-llama3-chat",
        _COGVLM2,
        _VIDEO,
        _VIDEO_BYTES,
        224,
        "conversations about a video, one frame of each of the first 24 seconds; unproven against its release",
        "chat",
    ),
    ZooEntry(
        "glm-4v-9b",
        "glm4v_9b",
        "THUDM/glm-4v-9b",
        "GLM-4 model licence (research; commercial use after registration)",
        13_906_320_896,
        27_812_641_856,
        1120,
        "conversations about one picture at 1120 px, in Chinese and English (MMBench EN 81.1, OCRBench 786)",
        "chat",
    ),
    ZooEntry(
        "minigpt4qwen-7b",
        "minigpt4_qwen",
        "github:Coobiw/MiniGPT4Qwen",
        _QWEN,
        8_815_588_864,
        17_631_177_728,
        224,
        "conversations about images and videos (32 frames), in Chinese and English; comes in pieces",
        "chat",
    ),
    ZooEntry(
        "minigpt4qwen-14b",
        "minigpt4_qwen",
        "github:Coobiw/MPP-LLaVA",
        _QWEN,
        15_262_342_656,
        30_524_685_312,
        224,
        "the same on Qwen-14B-Chat; comes in pieces",
        "chat",
    ),
    ZooEntry(
        "blip_caption_base_coco",
        "blip",
        "lavis:blip_caption/base_coco",
        _BLIP,
        223_971_644,
        989_780_448,
        384,
        "captions of photographs (COCO), in English",
        "",
    ),
    ZooEntry(
        "blip_caption_large_coco",
        "blip",
        "lavis:blip_caption/large_coco",
        _BLIP,
        446_290_492,
        1_879_055_840,
        384,
        "the same from the large tower",
        "",
    ),
    ZooEntry(
        "blip_vqa_vqav2",
        "blip",
        "lavis:blip_vqa/vqav2",
        _BLIP,
        361_478_972,
        1_539_811_808,
        480,
        "questions about photographs answered in a word or two; ranks given answers (VQAv2)",
        "",
    ),
    ZooEntry(
        "blip_vqa_okvqa",
        "blip",
        "lavis:blip_vqa/okvqa",
        _BLIP,
        361_478_972,
        1_539_811_808,
        480,
        "the same where the answer takes knowledge (OK-VQA)",
        "",
    ),
    ZooEntry(
        "blip_vqa_aokvqa",
        "blip",
        "lavis:blip_vqa/aokvqa",
        _BLIP,
        361_478_972,
        1_539_811_808,
        480,
        "the same, with reasoning (A-OKVQA)",
        "",
    ),
    ZooEntry(
        "blip_feature_extractor_base",
        "blip",
        "lavis:blip_feature_extractor/base",
        _BLIP,
        223_452_418,
        893_811_724,
        224,
        "vectors that compare pictures with texts; whether a text belongs to a picture",
        "",
    ),
)

_BY_NAME = {entry.name: entry for entry in ZOO}
_BY_HUB_ID = {entry.hub_id: entry for entry in ZOO if entry.hub_id is not None}


def _checked_nested(name: str, overrides: Mapping[str, Any], config_class: Any) -> dict[str, Any]:
    """Check the names of nested overrides, and give them in the spelling that is used on disk."""
    known = [*config_class.__dataclass_fields__, *config_class.attribute_map]
    for key in overrides:
        if key not in known:
            raise ConfigError(f"config: {f'{name}.{key}'!r} is no field.{did_you_mean(key, known)}")
    return {config_class.attribute_map.get(key, key): value for key, value in overrides.items()}


def family(name: str) -> Family:
    """Give a family by its name.

    Raises:
        ConfigError: no family has that name.
    """
    for row in FAMILIES:
        if row.name == name:
            return row
    known = [row.name for row in FAMILIES]
    raise ConfigError(f"No model family {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")


def family_of_layout(layout: Mapping[str, Any], where: str) -> Family:
    """Give the family of a model type's YAML, by the name of its model.

    Raises:
        ConfigError: of none.
    """
    arch = str((layout.get("model") or {}).get("arch"))
    for row in FAMILIES:
        if row.opener is not None and arch.startswith(row.name):
            return row
    raise ConfigError(f"{where}: names the model {arch!r}, which lavish does not know.")


def family_of(network: Any) -> Family:
    """Give the family of a network.

    Raises:
        ConfigError: it is of no family.
    """
    for row in FAMILIES:
        if type(network).__name__ in (row.model, *row.architectures):
            return row
    raise ConfigError(f"{type(network).__name__} is a network of no family of lavish.")


def detect_family(config: Mapping[str, Any], where: str) -> Family:
    """Give the family that a config.json (`where` is its path) belongs to, by `architectures` first: CogVLM's released
    files have no `model_type`.

    Raises:
        UnknownLayout: neither `architectures` nor `model_type` names a family of the table.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        architectures = [architectures]
    model_type = config.get("model_type")
    for row in FAMILIES:
        by_name = any(name in row.architectures for name in architectures)
        if by_name or (not architectures and model_type == row.model_type):
            if absent := [name for name in row.needs if not config.get(name)]:
                raise UnknownLayout(
                    f"{where} names {model_type or architectures[0]!r} and has no {absent[0]!r}: a text-only model of "
                    f"that name, not {row.name!r}, which sees pictures. Text-only models load with transformers itself."
                )
            return row
    known = [name for row in FAMILIES for name in row.architectures]
    found = f"architectures {list(architectures)!r}, model_type {model_type!r}"
    # All architectures end alike, so only a slip of the pen is near.
    suggestion = did_you_mean(str(architectures[0]), known, nearness=0.9) if architectures else ""
    raise UnknownLayout(
        f"{where} names {found}, and lavish knows the architectures {', '.join(known)}.{suggestion} "
        "Other models load with transformers itself."
    )


def detect_composite(path: Path, pieces: Iterable[str]) -> Family | None:
    """Give the family whose release comes in pieces and that `path` (a folder or a file) is or belongs to: by the names
    of the pieces that were given, else by the files. None: no such release; a config.json beside weights describes it.
    """
    if (path / "config.json").is_file() and any((path / name).exists() for name in hf.WEIGHT_FILES):
        return None
    if sat.find_root(path) is None and deepspeed.is_run(path) and (config_folder(path) / "config.json").is_file():
        return None
    if mindspore.is_mindspore(path):
        return next(row for row in FAMILIES if "mindspore" in row.layouts)
    path = sat.find_root(path) or path  # of an iteration's folder or a rank's file
    given = set(pieces)
    named = [row for row in FAMILIES if given.intersection(row.piece_marks)]
    if named:  # of pieces of two families: the one that has more of them, which then refuses the rest
        return max(named, key=lambda row: len(given.intersection(row.pieces)))
    for row in FAMILIES:
        if path.is_file() and any(fnmatch(path.name, pattern.rpartition("/")[2]) for pattern in row.marks):
            return row
        if path.is_dir() and any(next(path.glob(pattern), None) is not None for pattern in row.marks):
            return row
    return None


def detect_by_keys(names: Iterable[str]) -> Family | None:
    """Give the family of a single `.pth` file by the names of its tensors, or None."""
    known = list(names)
    for row in FAMILIES:
        if any(name.startswith(row.key_marks) for name in known if row.key_marks):
            return row
    return None


class ModelZoo(Mapping[str, ZooEntry]):
    """The released models by name, also found by hub id (by any name of its owner); printed, it is a table."""

    def __getitem__(self, name: str) -> ZooEntry:
        if name in _BY_NAME:
            return _BY_NAME[name]
        for hub_id in hub.spellings(name):
            if hub_id in _BY_HUB_ID:
                return _BY_HUB_ID[hub_id]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(_BY_NAME)

    def __len__(self) -> int:
        return len(_BY_NAME)

    def __str__(self) -> str:
        rows = [(e.name, e.hub_id or "bundled", _size(e.num_bytes), e.licence, e.good_at) for e in ZOO]
        head = ("name", "hub id", "size", "licence", "good at")
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head) - 1)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[-1]]) for row in [head, *rows])


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


model_zoo = ModelZoo()

_LAVIS_CALLS = ("load_model", "load_model_and_preprocess", "load_preprocess")


def __getattr__(name: str) -> Any:
    if name in _LAVIS_CALLS:  # they need torch
        return getattr(import_module("lavish.models.loading"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
