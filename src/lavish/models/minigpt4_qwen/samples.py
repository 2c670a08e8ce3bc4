"""MiniGPT4-Qwen behind LAVIS's interface of samples: `minigpt4qwen`, with the calls of its release.

Source: Coobiw/MPP-LLaVA, lavis/models/minigpt4qwen_models/minigpt4qwen.py. `chat`, `generate`, `encode_image` and
`preprocess` take and give what they do there; special tokens that a user typed, windows, cuts and batches are ours (see
processor.py). Chats with messages, streaming and a kept cache: `lavish.load`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lavish.checkpoints import hf, hub
from lavish.checkpoints.json_file import read_object, read_optional_object
from lavish.checkpoints.loading import load_into, rearrange
from lavish.checkpoints.release import Release
from lavish.checkpoints.rules import Rule
from lavish.common.errors import (
    ConfigError,
    DataError,
    MissingKeys,
    PromptError,
    ShapeMismatch,
    UnexpectedKeys,
    shown,
)
from lavish.models.base_model import BaseModel, local_file, model_section, read_fields
from lavish.models.minigpt4_qwen.config import read_config
from lavish.models.minigpt4_qwen.model import MiniGPT4QwenForConditionalGeneration
from lavish.models.minigpt4_qwen.pieces import PLACE, check_count
from lavish.models.minigpt4_qwen.processor import MiniGPT4QwenProcessor
from lavish.models.minigpt4_qwen.section import KEYS, RANDOM_PROJECTOR, read_section, starts_random
from lavish.models.minigpt4_qwen.weights import (
    PIECES,
    RULES,
    UNTRAINED,
    complete,
    open_release,
    open_untrained,
    pieces_in,
    read_trained,
    start_projector,
)
from lavish.processors.qwen_tokenizer import load_qwen_tokenizer

MAX_NEW_TOKENS = 512
"""Of an answer, as the release's command line has it."""


class MiniGPT4Qwen(BaseModel):
    """Chats about images and videos; trained on the release's conversations."""

    PRETRAINED_MODEL_CONFIG_DICT = {
        "qwen7b_chat": "configs/models/minigpt4qwen_qwen7b_chat.yaml",
        "qwen14b_chat": "configs/models/minigpt4qwen_qwen14b_chat.yaml",
    }

    def __init__(
        self, network: MiniGPT4QwenForConditionalGeneration, processor: MiniGPT4QwenProcessor, max_txt_len: int = 512
    ) -> None:
        super().__init__()
        self.network, self.processor, self.max_txt_len = network, processor, max_txt_len
        self.stored_dtype = next(network.parameters()).dtype
        """What the forward pass runs in, though what learns may be float32."""

    @classmethod
    def check_config(cls, cfg: Mapping[str, Any]) -> None:
        """Check the keys of a `model` section."""
        read_section(read_fields(cfg))

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> MiniGPT4Qwen:
        """Make the model of a `model` section: `finetuned` is the piece that was trained, or a folder with all pieces.

        Raises:
            ConfigError: an unknown key, a wrong value or an absent piece.
            CheckpointError: weights that cannot be fetched or do not fit.
        """
        model = cls._open(read_fields(cfg), None, None)
        for parameter in model.network.parameters():  # steps of 1e-4 are lost on bfloat16 weights
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return model

    @classmethod
    def from_pretrained(
        cls,
        model_type: str = "qwen7b_chat",
        *,
        checkpoint: str | Path | None = None,
        config: Any = None,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> MiniGPT4Qwen:
        """Load a release.

        Args:
            model_type: `"qwen7b_chat"` or `"qwen14b_chat"`.
            checkpoint: the piece that was trained (`checkpoint_9.pth`, a run's folder), a folder with all pieces, or
                one that lavish saved. It has no default: the release keeps it on GitHub.
            config: fields to replace, as a dict or file.
            tokenizer: folder of the tokenizer, or a tokenizer; None: the LLM's.
            options: more keys of the `model` section: the pieces `eva`, `blip2`, `qformer`, `llm`, which the YAML takes
                from LAVIS's bucket and the hub; `llm_device_map`; what is frozen.

        Raises:
            ConfigError: no such type, an unknown key, or an absent piece.
            CheckpointError: weights that are absent, damaged, or do not fit.
        """
        section = model_section(cls.default_config_path(model_type), config, options)
        return cls._open(section, checkpoint, tokenizer)

    @classmethod
    def _open(cls, section: Mapping[str, Any], checkpoint: str | Path | None, tokenizer: Any) -> MiniGPT4Qwen:
        section = read_section(section)
        is_random = starts_random(section, checkpoint)
        trained = None if is_random else checkpoint if checkpoint is not None else section.get("finetuned")
        if not trained and not is_random:
            raise ConfigError(
                "The weights that were trained are on no hub: fetch ckpt.zip from the releases of Coobiw/MiniGPT4Qwen "
                "on GitHub, and give it as checkpoint=... (or finetuned: of the config). To train a projector from "
                f"random weights, ask for it: init: {RANDOM_PROJECTOR}."
            )
        check_llm_device_map(section.get("llm_device_map", "cpu"))
        fields = {name: value for name, value in section.items() if name not in KEYS}
        network, processor = _load(local_file(trained) if trained else None, section, fields, tokenizer)
        if section.get("use_grad_checkpoint"):
            network.activation_checkpointing_enable()
        _freeze(network, section)
        return cls(network, processor, int(section.get("max_txt_len", 512)))

    @property
    def release_rules(self) -> Sequence[Rule]:
        """Rules from the names of the release's files."""
        return RULES

    @property
    def processor_settings(self) -> dict[str, Any]:
        """The settings of this model's named processors."""
        return {"image_size": self.processor.image_size}

    def load_checkpoint(self, url_or_filename: str | Path) -> None:
        """Replace what a trained piece holds; the rest stays.

        Raises:
            CheckpointError: absent, damaged, or a tensor that does not fit; the network is left as it was.
        """
        path = local_file(url_or_filename)
        found, expected = rearrange(read_trained(path), RULES), self.network.state_dict()
        if not found:
            raise MissingKeys(f"{path}: holds no tensor; give what a training of this model wrote.")
        if unexpected := sorted(found.keys() - expected.keys()):
            raise UnexpectedKeys(
                f"{path}: {len(unexpected)} of {len(found)} tensors have no place in this network, first "
                f"{shown(unexpected[0])}."
            )
        for name, value in found.items():
            if value.shape != expected[name].shape:
                raise ShapeMismatch(f"{path}: {name!r} is {tuple(value.shape)}, not {tuple(expected[name].shape)}.")
        self.network.load_state_dict(found, strict=False)

    # -- samples -------------------------------------------------------------------------------------------------------

    def forward(self, samples: Mapping[str, Any]) -> dict[str, torch.Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Give the loss of a batch: `conversations` (lists of {"from", "value"}) and `image`, all their pictures.

        Shapes: image (images, 3, S, S), in the order of the places `<ImageHere>`.
        Raises:
            PromptError: another number of images than of places, or a place beyond `max_txt_len`.
            DataError: no conversations, or images of another shape.
        """
        batch = self.processor.preprocess(_part(samples, "conversations"), self.max_txt_len)
        inputs = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask", "labels")}
        images = samples.get("image")
        _check_images(int(batch["num_images"].sum()), images)
        pixel_values = images if images is not None and len(images) else None
        with self._precision():
            return {"loss": self.network(**inputs, pixel_values=pixel_values).loss.float()}

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Give the embeddings of pictures. (images, 3, S, S) -> (images, num_query_tokens, hidden)."""
        with self._precision():
            return self.network.get_image_features(image.to(self.device))

    def preprocess(self, sources: Sequence[Any], max_len: int, **options: Any) -> dict[str, torch.Tensor]:
        """Encode conversations for training; see `MiniGPT4QwenProcessor.preprocess`."""
        batch = self.processor.preprocess(sources, max_len, **options)
        return {name: batch[name] for name in ("input_ids", "labels", "attention_mask")}

    # -- answers -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        samples: Mapping[str, Any],
        chat: bool = False,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[str] | torch.Tensor:
        """Answer rendered prompts: `text` (one or a list, `<ImageHere>` for each picture) and `image`.

        Without `text` the last question of each of `conversations` is answered, which are as `forward` takes them.

        Trap: the release fails for two texts; here a batch is padded on the left and equals single runs.

        Args:
            samples: image (images, 3, S, S) over all texts in order, or None.
            chat: give the new ids, (batch, new), instead of texts.
            generation_config: a GenerationConfig or its fields; the answer ends at `<|im_end|>` and `<|im_start|>`
                whatever it says.
            options: fields of it by name.

        Raises:
            PromptError: another number of images than of places.
            DataError: no text, or images of another shape.
        """
        if isinstance(samples, Mapping) and "text" not in samples and "conversations" in samples and not chat:
            return self._answer_last(samples, {"generation_config": generation_config, **options})
        inputs = self.processor(text=_part(samples, "text"))
        places = int(inputs["token_type_ids"].sum()) // self.processor.num_image_tokens
        tokens = self._answer(inputs, places, samples.get("image"), generation_config, options)
        return tokens if chat else [self._text(row) for row in tokens.tolist()]

    @torch.no_grad()
    def chat(
        self,
        query: str,
        history: list[tuple[str, str]] | None,
        image_tensor: torch.Tensor | None,
        system: str = "You are a helpful assistant.",
        append_history: bool = True,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answer a question after a history of (question, answer), and give the answer and the history.

        Trap: the release loses the last token of an answer that ends by its length; here it stays.

        Args:
            query: with `<ImageHere>` where pictures stand; `image_tensor` holds those of history and query in order.
            append_history: put this turn at the end of `history`, in place.

        Raises:
            PromptError: no texts, or another number of images than of places.
            DataError: images of another shape.
        """
        history = [] if history is None else history
        if not isinstance(query, str) or not isinstance(history, list) or not all(map(_is_turn, history)):
            raise PromptError(
                f"chat takes a query and a list of (question, answer), not {shown(query)} and {shown(history)}."
            )
        places = sum(text.count(PLACE) for text in (query, *(asked for asked, _ in history)))
        _check_images(places, image_tensor)
        inputs, kept = self.processor.chat_inputs(query, history, system)
        images = None if image_tensor is None or kept == 0 else image_tensor[len(image_tensor) - kept :]
        response = self._text(self._answer(inputs, kept, images, generation_config, options)[0].tolist())
        if append_history:
            history.append((query, response))
        return response, history

    def _answer_last(self, samples: Mapping[str, Any], options: dict[str, Any]) -> list[str]:
        """Answer the last question of each conversation; the answer that stands there is not looked at."""
        images, start, answers = samples.get("image"), 0, []
        for turns in samples["conversations"]:
            said = [str(turn["value"]) for turn in turns]  # question, answer, question, answer ...
            stop = start + sum(text.count(PLACE) for text in said[::2])
            history = list(zip(said[:-2:2], said[1:-2:2], strict=True))
            own = None if images is None else images[start:stop]
            answers.append(self.chat(said[-2], history, own, append_history=False, **options)[0])
            start = stop
        return answers

    def _answer(self, inputs: Any, places: int, images: Any, generation_config: Any, options: dict[str, Any]) -> Any:
        _check_images(places, images)
        if isinstance(generation_config, Mapping):
            generation_config = GenerationConfig(**generation_config)
        given = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False} if generation_config is None else {}
        config = self.network.config
        stop = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
        tensors = {name: inputs[name].to(self.device) for name in ("input_ids", "attention_mask")}
        if images is not None and len(images):
            tensors["pixel_values"] = images.to(self.device)
        # The `self` of transformers' `generate` is a protocol of more attributes than any network declares.
        network = cast(Any, self.network)
        with self._precision():
            tokens = network.generate(**tensors, generation_config=generation_config, **{**given, **options, **stop})
        return tokens[:, tensors["input_ids"].shape[1] :]

    def _precision(self) -> AbstractContextManager[Any]:
        """Compute in a half dtype, where the frozen weights have one."""
        kinds = {parameter.dtype for parameter in self.network.parameters()}
        if len(kinds) == 1 or self.stored_dtype not in (torch.bfloat16, torch.float16):
            return nullcontext()
        return torch.autocast(self.device.type, self.stored_dtype)

    def _text(self, token_ids: list[int]) -> str:
        eos = self.network.config.eos_token_id
        stops = [index for index, token_id in enumerate(token_ids) if isinstance(eos, list) and token_id in eos]
        return self.processor.decode(token_ids[: stops[0]] if stops else token_ids).strip()


def check_llm_device_map(llm_device_map: object) -> None:
    """Check the release's option for where the decoder goes: "cpu" (with the rest), or "auto" (where there is room).

    With one device both are the same: `load_model(device=...)` moves the whole model there.

    Raises:
        ConfigError: another value, or "auto" with several GPUs, which `lavish.load` serves.
    """
    if llm_device_map not in ("cpu", "auto"):
        raise ConfigError(
            f"llm_device_map={shown(llm_device_map)} was asked; it is 'cpu' (the decoder stays with the rest of the "
            "model) or 'auto'."
        )
    if llm_device_map == "auto" and torch.cuda.device_count() > 1:
        raise ConfigError(
            f"llm_device_map='auto' was asked, and {torch.cuda.device_count()} GPUs are there: a model is spread over "
            "them by lavish.load(path, eva=..., blip2=..., llm=..., device='auto'). Here use 'cpu' and device=."
        )


def _load(
    path: Path | None, section: Mapping[str, Any], overrides: dict[str, Any], tokenizer: Any
) -> tuple[MiniGPT4QwenForConditionalGeneration, MiniGPT4QwenProcessor]:
    """Load the network and its processor; without a path its projector starts random."""
    if path is not None and read_optional_object(path / "config.json").get("model_type") == "minigpt4_qwen":
        release = Release(read_object(path / "config.json"), hf.read(path), path, load_qwen_tokenizer)
    else:
        named = {name: section[name] for name in PIECES if section.get(name)}
        if path is not None and path.is_dir():  # what it holds itself comes before what the YAML names
            named = {name: value for name, value in named.items() if not pieces_in(path)[name]}
        folders = ("llm", "qformer")
        pieces = {name: hub.resolve(at) if name in folders else local_file(at) for name, at in named.items()}
        release = open_untrained(None, pieces) if path is None else open_release(path, pieces)
    fields, tensors, place = release.fields, release.tensors, release.tokenizer
    config = read_config(fields, str(path or place), **overrides)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = load_qwen_tokenizer(place if tokenizer is None else hub.resolve(tokenizer))
    processor = MiniGPT4QwenProcessor.from_config(config, tokenizer)
    with torch.device("meta"):
        network = MiniGPT4QwenForConditionalGeneration(config)
    name = next((one for one in ("llm_model.lm_head.weight", "lm_head.weight") if one in tensors), next(iter(tensors)))
    dtype = tensors.meta(name)[1]  # the decoder's: pieces are stored in several
    rules = (*RULES, *(UNTRAINED if release.is_untrained else ()))
    left = load_into(network, tensors, dtype=dtype, device="cpu", rules=rules)
    if release.is_untrained:
        start_projector(network, dtype, torch.device("cpu"))
        left = [one for one in left if not one.startswith("projector.")]
    complete(network, left)
    config.dtype = dtype
    return network, processor


def _freeze(network: MiniGPT4QwenForConditionalGeneration, section: Mapping[str, Any]) -> None:
    """Switch gradients off, as the section says; the release trains the projector alone."""
    parts = {
        "freeze_vit": [network.vision_tower.embeddings, network.vision_tower.encoder],
        "freeze_qformer": [network.qformer, network.vision_tower.post_layernorm],
        "freeze_proj": [network.projector],
        "freeze_llm": [network.language_model, network.lm_head],
    }
    for name, modules in parts.items():
        for module in modules:
            module.requires_grad_(not section.get(name, name != "freeze_proj"))
    network.query_tokens.requires_grad_(not section.get("freeze_queries", True))
    if section.get("unfreeze_pos_embed"):
        network.vision_tower.embeddings.position_embedding.requires_grad_(True)


def _is_turn(turn: object) -> bool:
    return isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def _part(samples: Any, name: str) -> Any:
    if not isinstance(samples, Mapping):
        raise DataError(f"The samples are a dict with {name!r}, not a {type(samples).__name__}: {{{name!r}: ...}}.")
    if name not in samples:
        raise DataError(f"The samples have no {name!r}; they have {', '.join(map(str, samples)) or 'nothing'}.")
    return samples[name]


def _check_images(places: int, images: torch.Tensor | None) -> None:
    if images is not None and (not isinstance(images, torch.Tensor) or (len(images) and images.ndim != 4)):
        found = tuple(images.shape) if isinstance(images, torch.Tensor) else shown(images)
        hint = "add the batch: image.unsqueeze(0)" if isinstance(images, torch.Tensor) else "the processor makes it"
        raise DataError(f"The images are a tensor (images, 3, S, S), not {found}; {hint}.")
    check_count(places, 0 if images is None else len(images), "The texts")
