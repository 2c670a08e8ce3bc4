"""Sampling against transformers' own logits processors, and its reproducibility."""

import pytest
import torch
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lavish.common.errors import NumericsError
from lavish.inference.options import parse_options
from lavish.inference.sampling import Sampler, keep_top_k, keep_top_p, likeliest, penalise_repetition


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(200, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("k", [1, 2, 17, 200, 1000])
def test_top_k_equals_transformers(logits, k):
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(torch.zeros(1, 1), logits[None])[0])


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.93, 1.0])
def test_top_p_equals_transformers(logits, p):
    expected = TopPLogitsWarper(p)(torch.zeros(1, 1), logits[None])[0] if p < 1 else logits
    assert torch.equal(keep_top_p(logits, p), expected)


def test_repetition_penalty_equals_transformers(logits):
    ids = torch.tensor([3, 9, 9, 150])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids[None], logits[None].clone())[0]
    assert torch.equal(penalise_repetition(logits, ids.unique(), 1.7), expected)


def test_greedy_ignores_the_seed_and_is_argmax(logits):
    sampler = Sampler(parse_options({"seed": 5}), [])
    assert sampler(logits) == int(logits.argmax())
    assert sampler.needs_only_argmax


def test_repetition_penalty_also_counts_generated_tokens():
    sampler = Sampler(parse_options({"repetition_penalty": 10.0}), [])
    logits = torch.tensor([1.0, 2.0, 3.0])
    assert [sampler(logits) for _ in range(3)] == [2, 1, 0]
    assert not sampler.needs_only_argmax


def test_draws_follow_the_distribution(logits):
    options = parse_options({"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 1})
    sampler = Sampler(options, [])
    counts = torch.zeros(200)
    for _ in range(4000):
        counts[sampler(logits)] += 1
    expected = TemperatureLogitsWarper(0.8)(torch.zeros(1, 1), logits[None])
    expected = TopPLogitsWarper(0.9)(torch.zeros(1, 1), TopKLogitsWarper(20)(torch.zeros(1, 1), expected))[0].softmax(
        -1
    )
    assert counts[expected == 0].sum() == 0
    assert (counts / 4000 - expected).abs().max() < 0.03


def test_the_same_seed_gives_the_same_tokens(logits):
    def draw(seed):
        sampler = Sampler(parse_options({"temperature": 1.3, "seed": seed}), [])
        return [sampler(logits) for _ in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_a_temperature_near_zero_is_nearly_greedy(temperature):
    options = parse_options({"temperature": temperature, "seed": 0})
    assert [Sampler(options, [])(torch.tensor([50.0, 100.0, 99.0])) for _ in range(3)] == [1] * 3


def test_a_token_without_probability_is_never_drawn():
    logits = torch.full((10,), -torch.inf)
    logits[4] = 0.0
    sampler = Sampler(parse_options({"temperature": 1.0, "seed": 0}), [])
    assert {sampler(logits) for _ in range(100)} == {4}


WRONG = {"nan": torch.nan, "inf": torch.inf}


@pytest.mark.parametrize("wrong", ["nan", "inf", "nothing"])
@pytest.mark.parametrize(
    "given",
    [{}, {"repetition_penalty": 1.2}, {"temperature": 0.7}, {"temperature": 1.0, "top_k": 5}, {"top_p": 0.5}],
    ids=str,
)
def test_logits_that_are_no_numbers_are_an_error(logits, given, wrong):
    """A network with broken weights answered '!!!', the token 0, without a word."""
    if wrong == "nothing":
        logits.fill_(-torch.inf)
    else:
        logits[17] = WRONG[wrong]
    with pytest.raises(NumericsError, match=r"NaN or infinity.*lavish inspect.*bfloat16.*float32"):
        Sampler(parse_options({**given, "seed": 0} if given else {}), [3])(logits)


def test_one_row_of_a_batch_that_is_no_number(logits):
    rows = torch.stack([logits, logits])
    assert likeliest(rows) == rows.argmax(-1).tolist()
    rows[1, 3] = -torch.inf  # a token that cannot be is no fault
    assert likeliest(rows) == rows.argmax(-1).tolist()
    rows[1, 3] = torch.nan
    with pytest.raises(NumericsError):
        likeliest(rows)
