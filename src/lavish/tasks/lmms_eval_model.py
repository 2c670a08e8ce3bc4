"""lavish's models in the host lmms-eval: `python -m lmms_eval --model lavish --model_args path=FOLDER --tasks ...`.

The host finds `manifest` by the entry point group `lmms_eval.models`, and asks for the class `Lavish` when a run names
it. Nothing of the host or of torch is imported before; it is no dependency of lavish.
Source of the interface: EvolvingLMMs-Lab/lmms-eval 0.7.3, lmms_eval/api/model.py and lmms_eval/models/registry_v2.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lavish.common.errors import ConfigError, did_you_mean

NAME = "lavish"
LOAD_OPTIONS = ("dtype", "quantization", "adapter", "base", "tokenizer", "config", "revision", "rope")
GENERATION = ("max_new_tokens", "temperature", "top_p", "top_k", "do_sample", "repetition_penalty", "seed")
"""What a task's generation_kwargs may say that is passed on."""
IGNORED = ("num_beams", "until", "image_aspect_ratio", "num_return_sequences", "max_gen_toks")
"""What they may say that has another place, or no meaning here: answers are of one beam, pictures are the family's."""
MAX_NEW_TOKENS = 128


def manifest() -> Any:
    """Give what the host's registry takes: the name, and where the class is."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(model_id=NAME, chat_class_path=f"{__name__}.Lavish")


def __getattr__(name: str) -> Any:
    """Make the class `Lavish` when the host asks for it."""
    if name != "Lavish":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]

    return type("Lavish", (Answering, lmms), {"__module__": __name__, "is_simple": False})


class Answering:
    """What the host calls; `Lavish` is this and the host's base class."""

    task_dict: dict[str, Any]
    cache_hook: Any

    def __init__(self, path: str = "", pretrained: str = "", batch_size: Any = 1, **options: Any) -> None:
        """Load the model of `path` (or `pretrained`, the host's usual name), with options of `lavish.load`.

        `chat_template` is the family's template of every question; `max_batch_size` is the host's and not used.

        Raises:
            ConfigError: no path, an unknown option, several processes, or a model that does not chat.
        """
        from lavish.common import dist
        from lavish.inference.load import load

        super().__init__()
        if dist.world_size() > 1:  # each would answer everything, and write over the others' results
            raise ConfigError(
                f"lmms-eval runs lavish's models in one process, and this run has {dist.world_size()}: start it "
                "without `accelerate launch` or torchrun; `lavish evaluate` shares samples among processes."
            )
        options.pop("max_batch_size", None)
        device, self.chat_template = options.pop("device", None), options.pop("chat_template", None)
        known = (*LOAD_OPTIONS, "path", "pretrained", "device", "chat_template", "batch_size")
        for name in options:
            if name not in LOAD_OPTIONS:
                hint = did_you_mean(name, known)
                raise ConfigError(f"--model_args {name}: no such option.{hint} Known: {', '.join(known)}.")
        if not (path or pretrained):
            raise ConfigError("--model_args path=FOLDER (or a hub id) names the model.")
        self.vlm = load(path or pretrained, device=str(device or "auto"), **options)
        if "batch" not in self.vlm.capabilities:
            raise ConfigError(f"{self.vlm!r} holds no conversation, which the tasks of lmms-eval need.")
        self.batch_size_per_gpu = int(batch_size) if str(batch_size).isdecimal() else 1  # "auto": one at a time

    @property
    def device(self) -> Any:
        """Where the model is."""
        return self.vlm.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer the requests, those of one kind of generation together, and give the replies in their order."""
        answers: dict[int, str] = {}
        by_options: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            by_options.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(at)
        for places in by_options.values():
            generation = generation_of(requests[places[0]].args[2])
            for start in range(0, len(places), self.batch_size_per_gpu):
                rows = places[start : start + self.batch_size_per_gpu]
                conversations = [self._conversation(requests[at].args) for at in rows]
                replies = self.vlm.batch(
                    conversations, batch_size=len(rows), chat_template=self.chat_template, **generation
                )
                for at, reply in zip(rows, replies, strict=True):
                    answers[at] = reply.text.strip()
                    context, _, options = requests[at].args[:3]
                    self.cache_hook.add_partial("generate_until", (context, options), answers[at])
        return [answers[at] for at in range(len(requests))]

    def _conversation(self, args: Sequence[Any]) -> list[dict[str, Any]]:
        _, to_messages, _, doc_id, task, split = args
        return messages_of(to_messages(self.task_dict[task][split][doc_id]))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raise: tasks that compare likelihoods are not offered."""
        raise NotImplementedError("lavish answers in words; take a task of lmms-eval that generates (generate_until).")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise: tasks of several rounds are not offered."""
        raise NotImplementedError("lavish answers one round; take a task of lmms-eval without several rounds.")


def messages_of(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give the host's messages as lavish takes them: a picture is under `image`, not `url`.

    Raises:
        ConfigError: a video or sound among them.
    """
    found = []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                parts.append({"type": "image", "image": part["url"]})
            else:
                raise ConfigError(f"The task asks with a part of the type {part['type']!r}; only texts and images go.")
        found.append({"role": message["role"], "content": parts})
    return found


def generation_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Give a task's generation_kwargs as options of lavish; `until` becomes texts that end the answer.

    Raises:
        ConfigError: a key that is none of the host's.
    """
    known = (*GENERATION, *IGNORED)
    for name in options:
        if name not in known:
            raise ConfigError(f"generation_kwargs.{name} is not known.{did_you_mean(str(name), known)}")
    found = {name: options[name] for name in GENERATION if options.get(name) is not None}
    if not found.get("temperature"):  # 0 is greedy; the others then say nothing
        found = {name: value for name, value in found.items() if name not in ("temperature", "top_p", "top_k")}
        found["do_sample"] = False
    until = options.get("until") or ()
    stops = [until] if isinstance(until, str) else list(until)
    found.setdefault("max_new_tokens", options.get("max_gen_toks") or MAX_NEW_TOKENS)
    return {**found, "stop": tuple(text for text in stops if text)}
