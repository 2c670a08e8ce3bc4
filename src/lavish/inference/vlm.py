"""A loaded model that talks: `chat`, `stream` and `batch`.

State lives in the request, never on the network. Two bounded stores are shared by the requests of one `VLM` and are
locked: image features by content, and the caches of the last conversations. So requests may run in several threads;
each of them computes on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature

from lavish.checkpoints import hub
from lavish.common import grounding
from lavish.common.errors import (
    ConfigError,
    MediaError,
    NumericsError,
    PromptError,
    check_path,
    did_you_mean,
    shown,
)
from lavish.inference.adapters import NativeAdapter, apply_adapter, is_quantized, take_off
from lavish.inference.cache import SliceCache
from lavish.inference.options import GenerationOptions, parse_options, read_sampling_defaults
from lavish.inference.reuse import Conversation, ConversationStore, FeatureCache, pixel_digest, slots_per_image
from lavish.inference.sampling import Sampler, likeliest
from lavish.inference.steps import Prompt, slots_beyond_positions, steps_for
from lavish.inference.streaming import TextStream

_FIRST_ANSWER_TOKENS = 256
"""Room for the answer in a new cache; it grows when a longer one comes."""

CAPTION_PROMPT = "Describe this image."


@dataclass(frozen=True)
class Usage:
    """Tokens of one request. Image slots count as prompt tokens."""

    prompt_tokens: int
    completion_tokens: int
    """Generated tokens, the end-of-sequence token included."""
    cached_tokens: int
    """Prompt tokens that were not computed again, because an earlier request had computed them."""


@dataclass(frozen=True)
class Reply:
    """An answer."""

    text: str
    token_ids: list[int]
    """All tokens that were generated, the end-of-sequence token included; a stop text is in them and not in `text`."""
    boxes: list[grounding.Grounding]
    """Boxes named in the text, where grounding is on."""
    finish_reason: str
    """What ended it: "stop" (the model or a stop text), "length" (max_new_tokens) or "cancelled" (the caller)."""
    usage: Usage


class Answer:
    """An answer that grows by tokens. It decides when it ends."""

    def __init__(self, text: TextStream, max_new_tokens: int, eos_token_ids: frozenset[int]):
        self.token_ids: list[int] = []
        self.pieces: list[str] = []
        self.finish_reason: str | None = None
        self._text = text
        self._max_new_tokens = max_new_tokens
        self._eos_token_ids = eos_token_ids

    def push(self, token_id: int) -> str:
        """Add a token, give the text that became final, and set `finish_reason` if this was the last one."""
        self.token_ids.append(token_id)
        if token_id in self._eos_token_ids:
            return self.end("stop")
        piece = self._add(self._text.push(token_id))
        if self._text.is_stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self._max_new_tokens:
            piece += self.end("length")
        return piece

    def end(self, reason: str) -> str:
        """End the answer, and give the text that was held back."""
        piece = self._add(self._text.finish())
        self.finish_reason = "stop" if self._text.is_stopped else reason
        return piece

    def _add(self, piece: str) -> str:
        if piece:
            self.pieces.append(piece)
        return piece


class ReplyStream(Iterator[str]):
    """The pieces of one answer, as they come. They joined are `reply.text`.

    The prompt is computed when the first piece is asked for. `close()`, leaving a `with` block and Ctrl-C end the
    answer cleanly: `reply` then holds what came so far with finish_reason "cancelled", and the next turn can still
    reuse the cache.
    """

    def __init__(self, vlm: VLM, prompt: Prompt, options: GenerationOptions, max_new_tokens: int):
        self._vlm, self._prompt, self._options = vlm, prompt, options
        self._answer = vlm._answer(options, max_new_tokens)
        self._steps = self._run()
        self._num_cached = 0
        self._conversation: Conversation | None = None
        self.reply: Reply | None = None
        """The whole answer, once the stream has ended or was closed."""

    def __iter__(self) -> ReplyStream:
        return self

    def __next__(self) -> str:
        try:
            return next(self._steps)
        except BaseException:  # the end, an error, or Ctrl-C anywhere in the computation
            self.close()
            raise

    def close(self) -> None:
        """End the answer now. Closing twice, or after the end, changes nothing."""
        self._steps.close()
        self._finish()

    def __enter__(self) -> ReplyStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> Generator[str]:
        vlm, prompt, answer = self._vlm, self._prompt, self._answer
        sampler = Sampler(self._options, prompt.token_ids, vlm._new_seed)
        conversation, num_cached = vlm._begin(prompt)
        self._conversation, self._num_cached = conversation, num_cached
        cache = conversation.cache
        features = vlm._features([prompt], num_cached)
        logits, state = vlm._steps.prefill([prompt], features, cache, num_cached)
        conversation.extend(prompt.token_ids[num_cached:], prompt.token_type_ids[num_cached:])
        while True:
            (token_id,) = vlm._choose([sampler], logits)
            piece = answer.push(token_id)
            if piece:
                yield piece
            if answer.finish_reason is not None:
                return
            logits = vlm._steps.decode([token_id], state, cache)
            conversation.extend([token_id], [0])

    def _finish(self) -> None:
        if self.reply is not None:
            return
        if self._answer.finish_reason is None:
            self._answer.end("cancelled")
        self.reply = self._vlm._reply(self._answer, self._prompt, self._options, self._num_cached)
        if self._conversation is not None:
            # An interrupted pass may have written beyond the tokens noted here: `_begin` cuts what it takes up again.
            self._vlm.conversations.put(self._conversation)
            self._conversation = None


class VLM:
    """A network and its processor, ready to talk. Made by `lavish.load`.

    Args:
        model: the network, a transformers `PreTrainedModel` (or a `PeftModel` around it).
        processor: its processor.
        name: what it was loaded from, for messages and `repr`.
        grounding: parse boxes out of every answer unless a call says otherwise.
        eos_token_ids: what ends an answer; default: the config's.
        sampling_defaults: temperature, top_p and top_k for calls that sample and leave them open.
        max_feature_bytes: memory for image features kept between requests; 0 keeps none.
        max_conversations: how many conversations keep their key/value cache for the next turn; 0 keeps none.
        max_conversation_bytes: memory for all of them.
        new_seed: gives the random stream of an answer that is drawn without a seed; processes that compute one answer
            together need the same one. Default: the system's randomness.
        native_adapter: turns a released adapter of this family into one for these modules.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        name: str = "",
        grounding: bool = False,
        eos_token_ids: Sequence[int] | None = None,
        sampling_defaults: Mapping[str, float] | None = None,
        max_feature_bytes: int = 512 * 2**20,
        max_conversations: int = 2,
        max_conversation_bytes: int = 2 * 2**30,
        new_seed: Callable[[], int] | None = None,
        native_adapter: NativeAdapter | None = None,
    ):
        self.model = model
        self.processor = processor
        self.name = name
        self.grounding = grounding
        self.features = FeatureCache(max_feature_bytes)
        self.conversations = ConversationStore(max_conversations, max_conversation_bytes)
        # A PeftModel replaces layers inside the network and wraps it; the network itself is what the passes run on.
        self._steps = steps_for(model.get_base_model() if hasattr(model, "get_base_model") else model)
        eos = self._steps.config.eos_token_id if eos_token_ids is None else eos_token_ids
        eos = [eos] if isinstance(eos, int) else [] if eos is None else eos
        if isinstance(eos, str) or not isinstance(eos, Iterable) or any(not isinstance(i, int) for i in eos):
            raise ConfigError(f"eos_token_ids must be the numbers of tokens, not {shown(eos)}.")
        self._eos_token_ids = frozenset(eos)
        self._sampling_defaults = read_sampling_defaults(sampling_defaults, "sampling_defaults")
        self._new_seed = new_seed
        self._native_adapter = native_adapter
        self._active = self.adapters[0] if self.adapters else None

    def __repr__(self) -> str:
        weight = next(self._steps.network.parameters())
        return f"VLM({self.name!r}, {type(self._steps.network).__name__}, {weight.dtype}, {weight.device})"

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self._steps.device

    def chat(self, messages: Sequence[Any], **generation: Any) -> Reply:
        """Answer a conversation; see `GenerationOptions` for what can be asked.

        Raises:
            PromptError: messages that make no prompt, or a prompt and answer that do not fit into the context.
            MediaError: an image that cannot be opened.
            ConfigError: a wrong generation option.
            NumericsError: the network gives NaN or infinity: damaged weights, or a dtype that overflows.
        """
        with self.stream(messages, **generation) as stream:
            for _ in stream:
                pass
        return _finished(stream)

    def stream(self, messages: Sequence[Any], **generation: Any) -> ReplyStream:
        """Answer a conversation piece by piece; the same text as `chat`, and the whole reply in `.reply` at the end.

        Raises: as `chat`, at once and not with the first piece.
        """
        options = parse_options(generation, self._sampling_defaults)
        prompt = self._prompt(messages, options)
        return ReplyStream(self, prompt, options, self._num_new_tokens(prompt, options))

    def batch(self, conversations: Sequence[Sequence[Any]], *, batch_size: int = 8, **generation: Any) -> list[Reply]:
        """Answer many conversations, `batch_size` at a time, in their order; each as `chat` would, token for token.

        Lengths may differ, and conversations with and without an image may be mixed. With a seed every row draws from
        its own stream, so a row's answer does not depend on its neighbours.

        Raises: as `chat`, with the number of the conversation, before anything is computed.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size must be a whole number, at least 1, not {shown(batch_size)}.")
        options = parse_options(generation, self._sampling_defaults)
        if isinstance(conversations, str | bytes | Mapping) or not isinstance(conversations, Iterable):
            raise PromptError(
                f"batch takes a list of conversations, each a list of messages, not {shown(conversations)} "
                f"({type(conversations).__name__})."
            )
        conversations = list(conversations)
        prompts, limits = [], []
        for index, messages in enumerate(conversations):
            try:
                prompts.append(self._prompt(messages, options))
                limits.append(self._num_new_tokens(prompts[-1], options))
            except (PromptError, MediaError) as error:
                raise type(error)(f"Conversation {index} of {len(conversations)}: {error}") from error
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: little padding
        replies: dict[int, Reply] = {}
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            replies.update(zip(rows, self._batch([prompts[i] for i in rows], [limits[i] for i in rows], options)))
        return [replies[i] for i in range(len(prompts))]

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What it can do, by the name of the method."""
        return ("chat", "stream", "batch", "caption", "answer")

    def caption(self, image: Any, *, prompt: str = CAPTION_PROMPT, **generation: Any) -> str:
        """Describe a picture, as an answer to `prompt`.

        Raises: as `chat`.
        """
        return self.answer(image, prompt, **generation)

    def answer(self, image: Any, question: str, **generation: Any) -> str:
        """Answer one question about a picture; `chat` with a single message, its text alone.

        Raises: as `chat`.
        """
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        return self.chat([{"role": "user", "content": content}], **generation).text

    def embed(self, images: Sequence[Any] | None = None, texts: Sequence[str] | None = None) -> torch.Tensor:
        """Raise: a network that talks was never trained to compare pictures with texts.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{self!r} has no embeddings: a network that talks was never trained to compare pictures with texts. "
            "Load one that was, such as BLIP's feature extractor (`lavish zoo` lists them)."
        )

    # Adapters. They change the weights, so nothing that was computed under others is kept.

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters on the network, in the order in which they came; `adapter=` of load is "default"."""
        return tuple(getattr(self.model, "peft_config", {}))  # a network without adapters has none

    @property
    def active_adapter(self) -> str | None:
        """Name of the adapter that answers; None: the base does."""
        return self._active

    def load_adapter(self, path: str | Path, name: str) -> None:
        """Put one more LoRA adapter on the network and make it the active one.

        Raises:
            ConfigError, CheckpointError: as `lavish.load(adapter=...)`; the network is left as it was.
        """
        check_path(path, "path")
        self.model = apply_adapter(self.model, hub.resolve(path), name=name, native=self._native_adapter)
        self.set_adapter(name)

    def set_adapter(self, name: str | None) -> None:
        """Answer with this adapter from now on; None: with the base alone, adapters stay at hand.

        Raises:
            ConfigError: no adapter of that name.
        """
        if name is not None and name not in self.adapters:
            known = ", ".join(map(repr, self.adapters)) or "none"
            raise ConfigError(f"No adapter {shown(name)}.{did_you_mean(str(name), self.adapters)} Loaded: {known}.")
        if name is not None:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(name)
        elif self.adapters:
            self.model.base_model.disable_adapter_layers()
        self._active = name
        self._forget()

    def merge_adapter(self) -> None:
        """Add the active adapter to the weights for good, and take all others off.

        Raises:
            ConfigError: no adapter is active, or the weights are quantised.
        """
        if self._active is None:
            raise ConfigError("No adapter is active, so there is none to merge; choose one with set_adapter(name).")
        if is_quantized(self.model):
            raise ConfigError(
                "An adapter cannot be merged into quantised weights. Load without quantization=, merge, save, and "
                "quantise the result."
            )
        self.model = take_off(self.model, self._active)
        self._active = None
        self._forget()

    def unload_adapters(self) -> None:
        """Take all adapters off: the base is bit for bit what it was before them."""
        if self.adapters:
            self.model = take_off(self.model)
        self._active = None
        self._forget()

    def _forget(self) -> None:
        self.features.clear()
        self.conversations.clear()

    def _batch(self, prompts: list[Prompt], limits: list[int], options: GenerationOptions) -> list[Reply]:
        answers = [self._answer(options, limit) for limit in limits]
        samplers = [Sampler(options, prompt.token_ids, self._new_seed) for prompt in prompts]
        active = list(range(len(prompts)))
        cache = SliceCache(self._steps.num_layers, max(map(len, prompts)) + _FIRST_ANSWER_TOKENS)
        logits, state = self._steps.prefill(prompts, self._features(prompts), cache)
        while True:
            token_ids = self._choose([samplers[row] for row in active], logits)
            for row, token_id in zip(active, token_ids):
                answers[row].push(token_id)
            going = [place for place, row in enumerate(active) if answers[row].finish_reason is None]
            if not going:
                return [self._reply(answer, prompt, options, 0) for answer, prompt in zip(answers, prompts)]
            if len(going) < len(active):
                self._steps.select_rows(going, state, cache)
                active, token_ids = [active[place] for place in going], [token_ids[place] for place in going]
            logits = self._steps.decode(token_ids, state, cache)

    def _prompt(self, messages: Sequence[Any], options: GenerationOptions) -> Prompt:
        inputs: BatchFeature = self.processor.apply_chat_template(
            messages,
            chat_template=options.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        pixel_values = inputs.get("pixel_values")
        if len(inputs["input_ids"]) != 1:
            raise PromptError("chat and stream take one conversation; give a list of them to batch.")
        return Prompt(
            token_ids=inputs["input_ids"][0].tolist(),
            token_type_ids=inputs["token_type_ids"][0].tolist(),
            pixel_values=pixel_values,
            digests=() if pixel_values is None else tuple(pixel_digest(pixels) for pixels in pixel_values),
        )

    def _num_new_tokens(self, prompt: Prompt, options: GenerationOptions) -> int:
        spare = slots_beyond_positions(self._steps.network, prompt)
        return options.num_new_tokens(len(prompt), self._steps.context_tokens, spare)

    def _begin(self, prompt: Prompt) -> tuple[Conversation, int]:
        """Give a conversation whose cache holds the first tokens of the prompt, and how many."""
        token_ids, token_type_ids = prompt.token_ids, prompt.token_type_ids
        request_state = self._steps.request_state(len(prompt))
        kept, num_cached = self.conversations.take(token_ids, token_type_ids, prompt.digests, request_state)
        context = self._steps.context_tokens + slots_beyond_positions(self._steps.network, prompt)
        capacity = min(len(prompt) + _FIRST_ANSWER_TOKENS, context)
        cache = SliceCache(self._steps.num_layers, capacity) if kept is None else kept.cache
        cache.truncate(num_cached)
        known = token_ids[:num_cached], token_type_ids[:num_cached]
        return Conversation(*known, prompt.digests, len(prompt), cache, request_state), num_cached

    def _features(self, prompts: Sequence[Prompt], num_cached: int = 0) -> torch.Tensor | None:
        """Give the features of the prompts' images in order, each picture computed once; not of those among the first
        `num_cached` tokens of each prompt. None without images."""
        wanted: list[str] = []
        pixels: dict[str, torch.Tensor] = {}
        found: dict[str, torch.Tensor] = {}
        for prompt in prompts:
            slots = slots_per_image(prompt.token_type_ids, len(prompt.digests))
            if slots == 0 or prompt.pixel_values is None:
                continue
            first = sum(prompt.token_type_ids[:num_cached]) // slots
            for digest, picture in zip(prompt.digests[first:], prompt.pixel_values[first:]):
                wanted.append(digest)
                if digest in found or digest in pixels:
                    continue
                features = self.features.get(digest)
                if features is None:
                    pixels[digest] = picture
                else:
                    found[digest] = features
        todo = list(pixels)
        for start in range(0, len(todo), self._steps.images_per_pass):
            together = todo[start : start + self._steps.images_per_pass]
            computed = self._steps.image_features(torch.stack([pixels[digest] for digest in together]))
            for digest, features in zip(together, computed):
                found[digest] = features.clone() if len(together) > 1 else features  # no view keeps the others alive
                self.features.put(digest, found[digest])
        return torch.stack([found[digest] for digest in wanted]) if wanted else None

    def _choose(self, samplers: list[Sampler], logits: torch.Tensor) -> list[int]:
        """Choose a token for each row; greedy rows are reduced in one go. Shapes: logits (rows, vocab)."""
        try:
            if all(sampler.needs_only_argmax for sampler in samplers):
                return likeliest(logits)
            return [sampler(row) for sampler, row in zip(samplers, logits)]
        except NumericsError as error:
            raise NumericsError(f"{self!r}: {error}") from error

    def _answer(self, options: GenerationOptions, max_new_tokens: int) -> Answer:
        return Answer(TextStream(self.processor.decode, options.stop), max_new_tokens, self._eos_token_ids)

    def _reply(self, answer: Answer, prompt: Prompt, options: GenerationOptions, num_cached: int) -> Reply:
        text = "".join(answer.pieces)
        wants_boxes = self.grounding if options.grounding is None else options.grounding
        return Reply(
            text=text,
            token_ids=answer.token_ids,
            boxes=grounding.parse(text) if wants_boxes else [],
            finish_reason=answer.finish_reason or "cancelled",
            usage=Usage(len(prompt), len(answer.token_ids), num_cached),
        )


def _finished(stream: ReplyStream) -> Reply:
    if stream.reply is None:
        raise RuntimeError("the stream has not ended")
    return stream.reply
