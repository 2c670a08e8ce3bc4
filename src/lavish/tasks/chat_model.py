"""A model of `lavish.load` that chats, behind the interface of samples: it is asked as its family wants to be asked.

A model that talks answers "What colour is the dog?" with a sentence, and an exact metric then counts it as wrong; so
each family has the words, or the template, that bring a short answer. What was asked stands in the record of a run.
Sources: the CogVLM releases' own template `vqa` ("Question: ... Short answer:"); open-compass/VLMEvalKit#236, where
CogVLM2 without it reached 4 % on TextVQA; LLaVA v1.5's instructions for short answers, choices and captions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import torch
from torch import nn

from lavish.common import grounding
from lavish.common.errors import ConfigError, DataError, did_you_mean
from lavish.datasets.formats.choices import PROMPT, listed, put
from lavish.inference.vlm import VLM
from lavish.nn.joined_rows import IGNORED
from lavish.tasks.captioning import texts
from lavish.tasks.metrics.text_match import read_choice


@dataclass(frozen=True)
class Ask:
    """How one kind of question is put."""

    text: str
    """With `{question}`, and of choices `{choices}`."""
    max_new_tokens: int
    chat_template: str | None = None
    """The family's template by name; None: the checkpoint's own."""


ASKS = {
    "vqa": Ask("{question}\nAnswer the question using a single word or phrase.", 16),
    "choice": Ask(PROMPT, 16),
    "caption": Ask("Provide a one-sentence caption for the provided image.", 48),
    "locate": Ask(grounding.PROMPTS["locate"][0].replace("<expr>", "{question}"), 48),
}
"""Of every family that has no own."""
FAMILY_ASKS: dict[str, dict[str, Ask]] = {
    "cogvlm": {
        "vqa": Ask("{question}", 16, "vqa"),
        "choice": Ask(PROMPT, 16, "vqa"),
        "caption": Ask("Describe this image in one short sentence.", 48),
    },
}
"""By the `model_type` of the network's config."""

OF_OTHERS = (
    *("prompt", "inference_method", "num_ans_candidates", "num_beams", "min_len", "use_nucleus_sampling"),
    *("top_p", "temperature", "repetition_penalty", "length_penalty", "k_test"),
)
"""Keys of `run` that do not apply: answers are greedy, and `Ask` says how questions are put."""


class ChatModel(nn.Module):
    """What the tasks ask, on a model that chats: `generate`, `predict_answers`, `choose`, `locate`, and losses.

    Samples have `image`, a list of pictures, and `text_input`.
    """

    def __init__(self, vlm: VLM, asks: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """`asks` replaces parts of how questions are put: {"vqa": {"text": "{question} Answer shortly."}}.

        Raises:
            ConfigError: the model holds no conversation, or an unknown kind of question or part.
        """
        super().__init__()
        if "batch" not in vlm.capabilities:
            raise ConfigError(
                f"{vlm!r} holds no conversation; evaluate it as a registered model, with model.arch, model.model_type "
                "and its weights as model.finetuned."
            )
        self.vlm = vlm
        self.network = vlm.model
        kind = str(getattr(vlm.model.config, "model_type", ""))  # a class attribute of every config of ours
        self.asks = {**ASKS, **FAMILY_ASKS.get(kind, {})}
        for name, changes in (asks or {}).items():
            self.asks[name] = changed(self.asks, name, changes)

    def generate(self, samples: Mapping[str, Any], max_length: int | None = None, **options: Any) -> list[str]:
        """Caption each picture; of `options` beams and drawing do not apply, answers are greedy."""
        (images,) = asked_of(samples, "image")
        return self.ask("caption", images, [""] * len(images), max_length)

    def predict_answers(self, samples: Mapping[str, Any], max_len: int | None = None, **options: Any) -> list[str]:
        """Answer each question in a word or two: the first line of the reply.

        Of `options`, those of ranking do not apply: an answer is always written.
        """
        images, questions = asked_of(samples, "image", "text_input")
        replies = self.ask("vqa", images, texts(questions), max_len)
        return [first_line(reply) for reply in replies]

    def choose(self, samples: Mapping[str, Any], choices: Sequence[Sequence[str]]) -> list[tuple[int | None, str]]:
        """Answer each question by one of its choices: the place of the one that the reply names, and the reply.

        Raises:
            DataError: more choices than letters.
        """
        if most := max((row for row in map(len, choices) if row > len(ascii_uppercase)), default=0):
            raise DataError(f"A question has {most} choices; they are shown by the letters A to Z.")
        images, questions = asked_of(samples, "image", "text_input")
        replies = self.ask("choice", images, texts(questions), choices=list(map(listed, choices)))
        return [(read_choice(reply, row), reply) for reply, row in zip(replies, choices, strict=True)]

    def locate(self, samples: Mapping[str, Any], max_len: int | None = None) -> list[str]:
        """Say where each phrase is: the replies, with boxes in thousandths."""
        images, phrases = asked_of(samples, "image", "text_input")
        return self.ask("locate", images, texts(phrases), max_len)

    @torch.no_grad()
    def forward(self, samples: Mapping[str, Any]) -> dict[str, Any]:
        """Give the loss of a batch of conversations, and the number of answers' tokens that it is the mean of.

        Raises:
            DataError: the samples have no messages.
            PromptError, MediaError: a conversation or picture that cannot be read.
        """
        if "messages" not in samples:
            have = ", ".join(map(str, samples)) or "nothing"
            raise DataError(
                f"The samples have no messages; they have {have}. The losses of a model that chats are of the data set "
                "conversations."
            )
        batch = self.vlm.processor.apply_chat_template(
            list(samples["messages"]), add_generation_prompt=False, padding_side="right", return_labels=True
        )
        inputs = {
            name: value.to(self.vlm.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }
        learnt = int((batch["labels"][:, 1:] != IGNORED).sum())  # a row's first token is never predicted
        return {"loss": self.network(**inputs).loss.float(), "num_tokens": learnt}

    @torch.no_grad()
    def ask(
        self,
        kind: str,
        images: Sequence[Any],
        questions: Sequence[str],
        max_new_tokens: int | None = None,
        choices: Sequence[str] | None = None,
    ) -> list[str]:
        """Put questions about pictures, all of one kind, and give the replies.

        Raises:
            DataError: another number of pictures than of questions, or pictures that are tensors.
        """
        if len(images) != len(questions) or isinstance(images, torch.Tensor):
            raise DataError(
                f"{len(questions)} questions and {len(images)} pictures ({type(images).__name__}): a chat model takes "
                "a list of pictures as they are, one for each question."
            )
        ask, rows = self.asks[kind], choices or [""] * len(questions)
        conversations = [
            conversation(image, put(ask.text, question, row))
            for image, question, row in zip(images, questions, rows, strict=True)
        ]
        replies = self.vlm.batch(
            conversations,
            batch_size=len(conversations),
            max_new_tokens=max_new_tokens or ask.max_new_tokens,
            chat_template=ask.chat_template,
        )
        return [reply.text.strip() for reply in replies]


def asked_of(samples: Mapping[str, Any], *names: str) -> list[Any]:
    """Give what a question is made of.

    Raises:
        DataError: the samples are of another kind.
    """
    if absent := [name for name in names if name not in samples]:
        raise DataError(
            f"The samples have no {absent[0]!r}; they have {', '.join(map(str, samples)) or 'nothing'}. Files of your "
            "own are read by the data sets questions, captions and refcoco; the task image_text_pretrain gives the "
            "losses of conversations."
        )
    return [samples[name] for name in names]


def changed(asks: Mapping[str, Ask], name: str, changes: Mapping[str, Any]) -> Ask:
    """Give how one kind of question is put, with parts replaced.

    Raises:
        ConfigError: no such kind or part, or a text without `{question}`.
    """
    if name not in asks:
        raise ConfigError(f"model.ask.{name}: no such kind.{did_you_mean(str(name), asks)} Known: {', '.join(asks)}.")
    parts = vars(asks[name]) | dict(changes)
    for part in parts:
        if part not in Ask.__dataclass_fields__:
            known = ", ".join(Ask.__dataclass_fields__)
            raise ConfigError(f"model.ask.{name}.{part}: no such part. Known: {known}.")
    made = Ask(**parts)
    if name != "caption" and "{question}" not in made.text:
        raise ConfigError(f"model.ask.{name}.text is {made.text!r}; it needs {{question}} where the question goes.")
    return made


def conversation(image: Any, text: str) -> list[dict[str, Any]]:
    """Give the messages of one question about one picture."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def first_line(reply: str) -> str:
    """Give the first line of a reply that is not empty."""
    return next((line.strip() for line in reply.splitlines() if line.strip()), "")
