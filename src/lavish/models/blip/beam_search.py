"""Decoding with the rules of transformers up to 4.26, on which every published BLIP number of LAVIS rests.

Later versions divide a beam's score by the generated length alone, stop by another rule and fill finished rows
otherwise: the same weights then give other captions. Greedy and sampled decoding stand here too, so that all three
share one step, one cache and one shape of output. Source of the rules: huggingface/transformers v4.26.1,
generation/{beam_search,utils,logits_process}.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from lavish.common.errors import ConfigError, shown

FAR_BELOW = -1e9
"""Running score of the beams that do not exist yet."""


@dataclass(frozen=True)
class Rules:
    """How to decode. Lengths count the prompt, as in transformers."""

    max_length: int
    min_length: int
    eos_token_id: int
    pad_token_id: int
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    do_sample: bool = False
    top_k: int = 50
    top_p: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_length", "num_beams"):
            _check(name, getattr(self, name), int, 1)
        for name in ("min_length", "top_k"):
            _check(name, getattr(self, name), int, 0)
        for name in ("repetition_penalty", "temperature"):
            _check(name, getattr(self, name), (int, float), 1e-6)
        _check("length_penalty", self.length_penalty, (int, float), float("-inf"))
        _check("top_p", self.top_p, (int, float), 1e-6)
        if self.top_p > 1:
            raise ConfigError(f"top_p is {self.top_p} and must be at most 1.")
        if self.do_sample and self.num_beams > 1:
            raise ConfigError(f"num_beams is {self.num_beams}: nucleus sampling goes without beams; use num_beams=1.")


def _check(name: str, value: object, kind: type | tuple[type, ...], least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not value >= least:  # type: ignore[operator]
        wanted = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{name} is {shown(value)} and must be {wanted}, {least:g} or more.")


class Decoder:
    """The text decoder over fixed states of an image or question, one cached step at a time."""

    def __init__(self, network: BlipTextLMHeadModel, states: torch.Tensor, mask: torch.Tensor | None) -> None:
        """`states` is (rows, keys, hidden), `mask` (rows, keys) with 1 where a key may be attended."""
        self.network = network
        self.states = states
        self.mask = mask
        self.cache = EncoderDecoderCache(DynamicCache(config=network.config), DynamicCache(config=network.config))

    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Give the logits of the next token of each row, float32: (rows, length) -> (rows, vocabulary)."""
        length = self.cache.get_seq_length()
        output = self.network(
            input_ids=input_ids[:, length:],
            encoder_hidden_states=self.states,
            encoder_attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def reorder(self, rows: torch.Tensor) -> None:
        """Let row i go on from what row `rows[i]` has seen. Beams of one image share its states: those stay."""
        self.cache.self_attention_cache.reorder_cache(cast(torch.LongTensor, rows))


@torch.no_grad()
def generate(
    network: BlipTextLMHeadModel,
    prompt_ids: torch.Tensor,
    states: torch.Tensor,
    mask: torch.Tensor | None,
    rules: Rules,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Continue prompts of one length.

    Shapes: prompt_ids (rows, length), states (rows, keys, hidden), mask (rows, keys) or None; the result is (rows, up
    to max_length), prompt included, padded with pad after eos.

    Raises:
        ConfigError: the prompt fills max_length already, or max_length is more than the network has positions for.
    """
    positions = network.config.max_position_embeddings
    if rules.max_length > positions:
        raise ConfigError(f"max_length is {rules.max_length} and the network has {positions} positions.")
    if prompt_ids.shape[1] >= rules.max_length:
        raise ConfigError(
            f"max_length is {rules.max_length} and counts the prompt, which has {prompt_ids.shape[1]} tokens already."
        )
    if rules.num_beams > 1:
        states = states.repeat_interleave(rules.num_beams, 0)
        mask = None if mask is None else mask.repeat_interleave(rules.num_beams, 0)
        return _beam_search(Decoder(network, states, mask), prompt_ids, rules)
    pick = (lambda scores: _draw(scores, rules, generator)) if rules.do_sample else (lambda scores: scores.argmax(-1))
    return _one_by_one(Decoder(network, states, mask), prompt_ids, rules, pick)


def _processed(scores: torch.Tensor, input_ids: torch.Tensor, rules: Rules) -> torch.Tensor:
    """Push down what was said before, and eos below the least length."""
    if rules.repetition_penalty != 1.0:
        said = scores.gather(1, input_ids)
        said = torch.where(said < 0, said * rules.repetition_penalty, said / rules.repetition_penalty)
        scores = scores.scatter(1, input_ids, said)
    if input_ids.shape[1] < rules.min_length:
        scores = scores.clone()
        scores[:, rules.eos_token_id] = -torch.inf
    return scores


def _one_by_one(
    decoder: Decoder, input_ids: torch.Tensor, rules: Rules, pick: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    is_open = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    while input_ids.shape[1] < rules.max_length and is_open.any():
        picked = pick(_processed(decoder.step(input_ids), input_ids, rules))
        picked = torch.where(is_open, picked, rules.pad_token_id)
        input_ids = torch.cat([input_ids, picked[:, None]], dim=1)
        is_open = is_open & (picked != rules.eos_token_id)
    return input_ids


def _draw(scores: torch.Tensor, rules: Rules, generator: torch.Generator | None) -> torch.Tensor:
    """Draw from the nucleus: temperature, then the `top_k` best, then the fewest that hold `top_p` together."""
    scores = scores / rules.temperature
    if 0 < rules.top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(rules.top_k).values[:, -1:], -torch.inf)
    if rules.top_p < 1.0:
        ascending, order = scores.sort(dim=-1)
        is_out = ascending.softmax(-1).cumsum(-1) <= 1 - rules.top_p
        is_out[:, -1] = False  # one token is always left
        scores = scores.masked_fill(torch.zeros_like(is_out).scatter(1, order, is_out), -torch.inf)
    return torch.multinomial(scores.softmax(-1), num_samples=1, generator=generator)[:, 0]


@dataclass
class _Finished:
    """The best finished beams of one image."""

    most: int
    length_penalty: float
    beams: list[tuple[float, torch.Tensor]] = field(default_factory=list)
    is_done: bool = False

    def add(self, ids: torch.Tensor, total: float) -> None:
        """Keep a beam, eos excluded; its score is the sum over its length, prompt included."""
        score = total / len(ids) ** self.length_penalty
        if len(self.beams) < self.most or score > self.worst:
            self.beams.append((score, ids))
            self.beams.sort(key=lambda beam: beam[0])
            del self.beams[: -self.most]

    @property
    def worst(self) -> float:
        """The lowest score kept."""
        return self.beams[0][0]

    def is_beaten(self, best_running: float, length: int) -> bool:
        """Whether no open beam can still get in, by the old rule: the best sum over the length before the step."""
        return len(self.beams) >= self.most and self.worst >= best_running / length**self.length_penalty


def _beam_search(decoder: Decoder, prompt_ids: torch.Tensor, rules: Rules) -> torch.Tensor:
    num_images, num_beams, device = len(prompt_ids), rules.num_beams, prompt_ids.device
    input_ids = prompt_ids.repeat_interleave(num_beams, 0)
    running = torch.full((num_images, num_beams), FAR_BELOW, device=device)
    running[:, 0] = 0.0
    finished = [_Finished(num_beams, rules.length_penalty) for _ in range(num_images)]
    while input_ids.shape[1] < rules.max_length and not all(image.is_done for image in finished):
        scores = _processed(decoder.step(input_ids).log_softmax(-1), input_ids, rules)
        vocab_size = scores.shape[1]
        totals = (scores + running.view(-1, 1)).view(num_images, num_beams * vocab_size)
        best, places = totals.topk(2 * num_beams, dim=1)
        rows, tokens, running = _advance(input_ids, best, places, vocab_size, finished, rules)
        decoder.reorder(rows)
        input_ids = torch.cat([input_ids[rows], tokens[:, None]], dim=1)
    for index, image in enumerate(finished):
        if not image.is_done:
            for beam in range(num_beams):
                image.add(input_ids[index * num_beams + beam], float(running[index, beam]))
    return _padded([image.beams[-1][1] for image in finished], rules)


def _advance(
    input_ids: torch.Tensor,
    best: torch.Tensor,
    places: torch.Tensor,
    vocab_size: int,
    finished: list[_Finished],
    rules: Rules,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort the 2K candidates of each image into finished beams and the K that go on.

    Gives the rows they come from (images * K), their tokens (images * K) and their sums (images, K).
    """
    num_beams, length = rules.num_beams, input_ids.shape[1]
    rows: list[int] = []
    tokens: list[int] = []
    sums: list[list[float]] = []
    for index, image in enumerate(finished):
        if image.is_done:  # its rows run along unread
            rows += [index * num_beams] * num_beams
            tokens += [rules.pad_token_id] * num_beams
            sums.append([0.0] * num_beams)
            continue
        going_on: list[float] = []
        candidates = zip(best[index].tolist(), places[index].tolist(), strict=True)
        for rank, (total, place) in enumerate(candidates):
            row, token = index * num_beams + place // vocab_size, place % vocab_size
            if token == rules.eos_token_id:
                if rank < num_beams:
                    image.add(input_ids[row], total)
                continue
            rows.append(row)
            tokens.append(token)
            going_on.append(total)
            if len(going_on) == num_beams:
                break
        sums.append(going_on)
        image.is_done = image.is_beaten(float(best[index].max()), length)
    device = input_ids.device
    return torch.tensor(rows, device=device), torch.tensor(tokens, device=device), torch.tensor(sums, device=device)


def _padded(sequences: list[torch.Tensor], rules: Rules) -> torch.Tensor:
    """Stack sequences, each followed by one eos where it fits, then by pad."""
    longest = min(max(len(ids) for ids in sequences) + 1, rules.max_length)
    padded = sequences[0].new_full((len(sequences), longest), rules.pad_token_id)
    for row, ids in zip(padded, sequences, strict=True):
        row[: len(ids)] = ids
        if len(ids) < longest:
            row[len(ids)] = rules.eos_token_id
    return padded
