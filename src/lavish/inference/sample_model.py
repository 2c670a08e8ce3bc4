"""A loaded model that holds no conversation: it captions pictures, answers a question about one, or gives embeddings.

Around a registered model of LAVIS (`lavish.models.base_model`), which stays at hand as `.samples`. What it cannot do it
says in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any, NoReturn

import torch

from lavish.common.errors import ConfigError, did_you_mean, shown
from lavish.inference.vlm import VLM, Reply, ReplyStream
from lavish.models.base_model import BaseModel

_MADE_FOR = {
    "BlipCaption": ("caption",),
    "BlipVQA": ("answer",),
    "BlipFeatureExtractor": ("embed",),
    "GPTDialogue": ("answer",),
}
"""What the released weights of a registered model were trained for, by the name of its class."""


class SampleModel(VLM):
    """What `lavish.load` gives for BLIP and GPTDialogue. `chat`, `stream` and `batch` raise."""

    def __init__(self, samples: BaseModel, *, name: str = ""):
        # Not VLM's: there is no conversation, so neither steps nor caches.
        self.samples: Any = samples
        """The registered model, with `generate`, `predict_answers`, `extract_features` on samples."""
        self.model = self.samples.network
        self.processor = self.samples.processor
        self.name = name
        self.grounding = False

    def __repr__(self) -> str:
        weight = next(self.model.parameters())
        return f"SampleModel({self.name!r}, {type(self.samples).__name__}, {weight.dtype}, {weight.device})"

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What it can do, by the name of the method."""
        return _MADE_FOR[type(self.samples).__name__]

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.samples.device

    @property
    def adapters(self) -> tuple[str, ...]:
        """None: it takes no adapters."""
        return ()

    def caption(self, image: Any, *, prompt: str | None = None, **generation: Any) -> str:
        """Describe a picture; `prompt` is what the caption begins with, `generation` that of `BlipCaption.generate`.

        Raises:
            ConfigError: weights that were not trained for captions, or a wrong option.
            MediaError: a picture that cannot be opened.
        """
        self._need("caption")
        return self.samples.generate({"image": [image]}, prompt=prompt, **_options(self.samples.generate, generation))[
            0
        ]

    def answer(self, image: Any, question: str, **generation: Any) -> str:
        """Answer a question about a picture, in a word or two; `generation` is that of `BlipVQA.predict_answers`, with
        `answer_list` for a choice. For GPTDialogue the picture is the features of a video, (frames, width), and
        `generation` may hold the `dialog` so far and the `caption`.

        Raises:
            ConfigError: weights that were not trained for answers, or a wrong option.
            MediaError: a picture that cannot be opened.
        """
        self._need("answer")
        if type(self.samples).__name__ == "GPTDialogue":
            parts = {key: generation.pop(key) for key in ("dialog", "caption") if key in generation}
            dialogue = {"caption": "", "dialog": [], **parts, "question": question}
            return self.samples.answer(dialogue, image, **_options(self.samples.generate, generation))
        generation.setdefault("inference_method", "rank" if generation.get("answer_list") else "generate")
        wanted = {"image": [image], "text_input": question}
        return self.samples.predict_answers(wanted, **_options(self.samples.predict_answers, generation))[0]

    def caption_all(self, images: Sequence[Any], **generation: Any) -> list[str]:
        """Describe several pictures together, each as `caption` does.

        Raises: as `caption`.
        """
        self._need("caption")
        return self.samples.generate({"image": list(images)}, **_options(self.samples.generate, generation))

    def answer_all(self, images: Sequence[Any], questions: Sequence[str], **generation: Any) -> list[str]:
        """Answer a question about each of several pictures together, each as `answer` does; not for GPTDialogue.

        Raises: as `answer`.
        """
        self._need("answer")
        generation.setdefault("inference_method", "rank" if generation.get("answer_list") else "generate")
        wanted = {"image": list(images), "text_input": list(questions)}
        return self.samples.predict_answers(wanted, **_options(self.samples.predict_answers, generation))

    def embed(self, images: Sequence[Any] | None = None, texts: Sequence[str] | None = None) -> torch.Tensor:
        """Give vectors of length 1 whose products compare pictures with texts, (count, embed_dim); of both together
        the states of each picture with its text, (count, hidden), as `extract_features` has them at the first place.

        Raises:
            ConfigError: weights without embeddings, or neither pictures nor texts.
            MediaError: a picture that cannot be opened.
        """
        self._need("embed")
        if images is None and texts is None:
            raise ConfigError("embed takes images=[...], texts=[...], or as many of both.")
        for what, given in (("images", images), ("texts", texts)):
            if given is not None and (not isinstance(given, list | tuple) or not given):
                raise ConfigError(f"{what} is a list with one or more, not {shown(given)}.")
        wanted: dict[str, Any] = {} if images is None else {"image": list(images)}
        if texts is not None:
            wanted["text_input"] = list(texts)
        mode = "text" if images is None else "image" if texts is None else "multimodal"
        name = {"text": "text_embeds_proj", "image": "image_embeds_proj", "multimodal": "multimodal_embeds"}[mode]
        return getattr(self.samples.extract_features(wanted, mode=mode), name)[:, 0]

    def chat(self, messages: Sequence[Any], **generation: Any) -> Reply:
        """Raise: it holds no conversation."""
        self._refuse("chat")

    def stream(self, messages: Sequence[Any], **generation: Any) -> ReplyStream:
        """Raise: it holds no conversation."""
        self._refuse("stream")

    def batch(self, conversations: Sequence[Sequence[Any]], *, batch_size: int = 8, **generation: Any) -> list[Reply]:
        """Raise: it holds no conversation."""
        self._refuse("batch")

    def load_adapter(self, path: Any, name: str) -> None:
        """Raise: it takes no adapters."""
        self._refuse("load_adapter")

    def set_adapter(self, name: str | None) -> None:
        """Raise: it takes no adapters."""
        self._refuse("set_adapter")

    def merge_adapter(self) -> None:
        """Raise: it takes no adapters."""
        self._refuse("merge_adapter")

    def unload_adapters(self) -> None:
        """Do nothing: there are none."""

    def _need(self, name: str) -> None:
        if name not in self.capabilities:
            self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        can = " and ".join(f"{known}(...)" for known in self.capabilities)
        raise ConfigError(
            f"{self.name or 'This model'} is a {type(self.samples).__name__}, which has no {name}: it can {can}. "
            "`lavish zoo` lists what other models can do."
        )


def _options(function: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Check that a method of a registered model takes these options."""
    known = [name for name in signature(function).parameters if name not in ("samples", "image", "prompt")]
    for name in given:
        if name not in known:
            raise ConfigError(f"No option {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return given
