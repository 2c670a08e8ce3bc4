"""Generation options: what `chat`, `stream` and `batch` take, checked before anything is computed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lavish.common.errors import ConfigError, PromptError, did_you_mean, shown

MAX_TEMPERATURE = 100.0
"""At 100 all words are nearly equally likely already."""
PENALTIES = (0.01, 100.0)
"""What a repetition penalty may be; released demos use 1.0 to 1.2."""
DEFAULT_MAX_NEW_TOKENS = 2048
"""Released demos of both versions allow 2048; fewer where the context has no more room."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to answer. The default is greedy, as in the released demos.

    Raises:
        ConfigError: a value of a wrong type or out of its range.
    """

    max_new_tokens: int | None = None
    """Most tokens to generate; default as many as the context holds, at most 2048."""
    max_length: int | None = None
    """Most tokens of prompt (image slots included) and answer together, the released CogVLM demo's option; not with
    max_new_tokens.
    """
    do_sample: bool | None = None
    """True draws, False is greedy; default: draw if a temperature above 0 or top_p is given."""
    temperature: float | None = None
    """Divides the logits, from 0 (greedy) to 100. Default 1 where sampling is on."""
    top_p: float | None = None
    """Keep the most probable tokens up to this probability, in (0, 1]."""
    top_k: int | None = None
    """Keep this many tokens; 1 is greedy, 0 or None keeps all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that occurred (prompt included) less likely, as in transformers; from 0.01 to 100."""
    seed: int | None = None
    """Random stream of a sampled answer; the same seed gives the same answer."""
    stop: str | tuple[str, ...] = ()
    """Texts that end the answer; the answer is cut right before the first one."""
    chat_template: str | None = None
    """The family's template by name; default: what the checkpoint's config says."""
    grounding: bool | None = None
    """Parse boxes out of the answer into reply.boxes; default: only for grounding checkpoints."""

    def __post_init__(self) -> None:
        if self.repetition_penalty is None:
            raise ConfigError("repetition_penalty must be a number, not None; 1 changes nothing.")
        for name in ("max_new_tokens", "max_length", "top_k", "seed"):
            _check_number(name, getattr(self, name), int)
        for name in ("temperature", "top_p", "repetition_penalty"):
            _check_number(name, getattr(self, name), float)
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))  # torch takes no whole number over 2**63
        for name in ("do_sample", "grounding"):
            if not isinstance(getattr(self, name), bool | None):
                raise ConfigError(f"{name} must be True, False or None, not {shown(getattr(self, name))}.")
        if self.chat_template is not None and not isinstance(self.chat_template, str):
            raise ConfigError(f"chat_template must be a template's name, not {shown(self.chat_template)}.")
        self._check_ranges()
        object.__setattr__(self, "stop", _stop_strings(self.stop))

    def _check_ranges(self) -> None:
        if self.max_new_tokens is not None and self.max_length is not None:
            raise ConfigError(
                "Give max_new_tokens (the answer alone) or max_length (prompt and answer together), not both."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p}.")
        bounds = {"max_new_tokens": 1, "max_length": 1, "top_k": 0, "temperature": 0, "seed": 0}
        for name, low in bounds.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name} must be at least {low}, not {shown(value)}.")
        if self.seed is not None and self.seed >= 2**64:
            raise ConfigError(f"seed must be below 2**64, not {shown(self.seed)}.")
        if self.temperature is not None and self.temperature > MAX_TEMPERATURE:
            raise ConfigError(f"temperature must be from 0 to {MAX_TEMPERATURE:g}, not {self.temperature}.")
        low, high = PENALTIES
        if not low <= self.repetition_penalty <= high:
            raise ConfigError(f"repetition_penalty must be from {low:g} to {high:g}, not {self.repetition_penalty}.")
        if self.do_sample and self.temperature == 0:
            raise ConfigError("do_sample=True with temperature=0 has no meaning: leave one of them out.")

    @property
    def samples(self) -> bool:
        """True if the options ask to draw, before top_k=1 makes the draw greedy."""
        if self.do_sample is not None:
            return self.do_sample
        return (self.temperature or 0) > 0 or (self.top_p is not None and self.temperature != 0)

    @property
    def is_greedy(self) -> bool:
        """True if the answer is the most probable token each time."""
        return not self.samples or self.top_k == 1

    def num_new_tokens(self, prompt_tokens: int, context_tokens: int, spare: int = 0) -> int:
        """Give how many tokens may be generated after a prompt, both in cache slots (an image fills many).

        `spare` slots of the prompt take nothing of the context: those of an image that share one position.

        Raises:
            PromptError: prompt and answer do not fit into the context.
        """
        room = context_tokens + spare - prompt_tokens
        wanted = self.max_new_tokens
        if self.max_length is not None:
            wanted = self.max_length - prompt_tokens
            if wanted < 1:
                raise PromptError(
                    f"The prompt has {prompt_tokens} tokens, image slots included, and max_length={self.max_length} "
                    "leaves none for the answer. Raise max_length, or give max_new_tokens instead."
                )
        if room < (wanted or 1):
            asked = f"max_new_tokens={shown(wanted)}" if wanted else "an answer"
            advice = f" or ask for at most {room} new tokens" if room > 0 else ""
            takes = f"has {prompt_tokens} tokens, image slots included"
            if spare:
                takes = f"takes {prompt_tokens - spare} positions (slots of an image share them)"
            raise PromptError(
                f"The prompt {takes}; with {asked} that is more than the "
                f"{context_tokens} that this model holds. Shorten the conversation{advice}."
            )
        return wanted or min(room, DEFAULT_MAX_NEW_TOKENS)


def parse_options(given: dict[str, Any], defaults: dict[str, Any] | None = None) -> GenerationOptions:
    """Check generation options by name; `defaults` fill in temperature, top_p and top_k where sampling is asked for
    without them, and a repetition penalty, which changes greedy answers too.

    Raises:
        ConfigError: an unknown option (the nearest name is suggested) or a wrong value.
    """
    known = [field.name for field in fields(GenerationOptions)]
    if "template" in given:
        raise ConfigError(
            "No generation option 'template': in Python it is chat_template, as in transformers (--template is the "
            f"command line's). Write chat_template={shown(given['template'])}."
        )
    for name in given:
        if name not in known:
            raise ConfigError(f"No generation option {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    defaults = dict(defaults or {})
    if (penalty := defaults.pop("repetition_penalty", None)) is not None:
        given = {"repetition_penalty": penalty, **given}
    options = GenerationOptions(**given)
    if options.samples:
        # What generation_config.json says is used for a draw that leaves it open; it never turns sampling on by itself.
        filled = {name: value for name, value in defaults.items() if given.get(name) is None}
        options = GenerationOptions(**{**given, **filled, "do_sample": True})
        if options.temperature is None:
            options = GenerationOptions(**{**given, **filled, "do_sample": True, "temperature": 1.0})
    return options


def read_sampling_defaults(fields: Mapping[str, Any] | None, where: str) -> dict[str, float]:
    """Give temperature, top_p, top_k and repetition_penalty of a generation_config.json, as `defaults` of
    `parse_options`.

    A temperature of 0 is greedy, and so no default of a draw.

    Raises:
        ConfigError: a value that no draw can use; names the file and the field.
    """
    fields = {} if fields is None else fields
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{where} must be a dict of options, not {shown(fields)}.")
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    found = {name: fields[name] for name in names if fields.get(name) is not None}
    for name, value in found.items():
        try:
            GenerationOptions(**{name: value})
        except ConfigError as error:
            raise ConfigError(
                f"{where}: {error} Correct the field {name!r} or take it out; without it lavish's default is used."
            ) from error
    return {name: value for name, value in found.items() if (name, value) != ("temperature", 0)}


def _check_number(name: str, value: Any, kind: type) -> None:
    if value is None:
        return
    allowed = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or value != value:
        raise ConfigError(f"{name} must be {'a whole number' if kind is int else 'a number'}, not {shown(value)}.")
    if kind is float and abs(value) > sys.float_info.max:
        raise ConfigError(f"{name} must be a number that is finite, not {shown(value)}.")


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(text, str) and text for text in strings):
        raise ConfigError(f"stop must be a text or a list of texts, none of them empty, not {shown(stop)}.")
    return tuple(strings)
