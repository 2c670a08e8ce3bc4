"""The old rules of decoding on toy networks: tables of log-probabilities that can be searched by hand or through."""

import itertools
import math

import pytest
import torch

from lavish.models.blip.beam_search import Rules, _beam_search, _draw, _one_by_one, _processed

VOCAB, EOS, PAD = 4, 1, 0


class Table:
    """Gives the logits of the next token by the last one: `logits[last]`, (VOCAB)."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
        self.steps = 0

    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return self.logits[input_ids[:, -1]]

    def reorder(self, rows: torch.Tensor) -> None:
        """There is no cache: the ids tell all."""


def rules(**options) -> Rules:
    return Rules(**{"max_length": 6, "min_length": 0, "eos_token_id": EOS, "pad_token_id": PAD, **options})


def every_sequence(log_probabilities: torch.Tensor, prompt: list[int], given: Rules) -> list[tuple[float, list[int]]]:
    """Score all sequences by the rule: sum over the length, prompt counted and eos not."""
    found = []
    for count in range(given.max_length - len(prompt) + 1):
        for tokens in itertools.product([token for token in range(VOCAB) if token != EOS], repeat=count):
            ids = [*prompt, *tokens]
            total = sum(
                float(log_probabilities[last, token]) for last, token in itertools.pairwise([prompt[-1], *tokens])
            )
            if len(ids) < given.max_length:
                if len(ids) < given.min_length:
                    continue
                total += float(log_probabilities[ids[-1], EOS])
            found.append((total / len(ids) ** given.length_penalty, ids))
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, {"min_length": 4}, {"length_penalty": 2.0}, {"length_penalty": 0.0}])
def test_with_enough_beams_nothing_is_missed(seed: int, options: dict) -> None:
    logits = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    given = rules(num_beams=400, max_length=6, **options)
    found = _beam_search(Table(logits), torch.tensor([[2, 3]]), given)[0].tolist()
    _, best = max(every_sequence(logits.log_softmax(-1), [2, 3], given))
    assert found == [*best, *([EOS] if len(best) < given.max_length else [])]


def logits_of(rows: dict[int, list[float]]) -> torch.Tensor:
    """Give the table of probabilities by the last token; the others are even."""
    return torch.tensor([rows.get(last, [1 / VOCAB] * VOCAB) for last in range(VOCAB)]).log()


def test_an_end_of_low_rank_is_not_taken() -> None:
    """With two beams the third candidate is dropped when it is an end, and kept otherwise."""
    logits = logits_of({2: [0.4, 0.19, 0.01, 0.4], 0: [0.97, 0.01, 0.01, 0.01], 3: [0.01, 0.01, 0.01, 0.97]})
    found = _beam_search(Table(logits), torch.tensor([[2]]), rules(num_beams=2, max_length=4))
    assert found.tolist() in ([[2, 0, 0, 0]], [[2, 3, 3, 3]])


def test_the_search_stops_when_no_open_beam_can_win() -> None:
    logits = logits_of({2: [0.005, 0.49, 0.005, 0.5], 3: [0.005, 0.98, 0.005, 0.01]})
    table = Table(logits)
    found = _beam_search(table, torch.tensor([[2]]), rules(num_beams=2, max_length=50))
    assert table.steps < 6
    assert found.shape[1] < 6
    assert found[0, -1] == EOS


def test_rows_of_unequal_length_end_in_eos_and_pad() -> None:
    logits = logits_of({2: [0.001, 0.997, 0.001, 0.001], 3: [0.001, 0.001, 0.001, 0.997]})
    found = _beam_search(Table(logits), torch.tensor([[2], [3]]), rules(num_beams=2, max_length=5))
    assert found.tolist() == [[2, EOS, PAD, PAD, PAD], [3, 3, 3, 3, 3]]
    greedy = _one_by_one(Table(logits), torch.tensor([[2], [3]]), rules(max_length=5), lambda scores: scores.argmax(-1))
    assert torch.equal(greedy, found)


def test_repetition_and_least_length() -> None:
    scores = torch.tensor([[2.0, 1.0, -1.0, 0.5]])
    ids = torch.tensor([[0, 2]])
    processed = _processed(scores, ids, rules(repetition_penalty=2.0, min_length=3))
    assert processed.tolist() == [[1.0, -math.inf, -2.0, 0.5]]
    assert torch.equal(scores, torch.tensor([[2.0, 1.0, -1.0, 0.5]])), "the logits themselves stay"
    assert torch.equal(_processed(scores, ids, rules(min_length=2)), scores)


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        ({"top_k": 2}, {0, 3}),
        ({"top_k": 0, "top_p": 0.5}, {0}),
        ({"top_k": 0, "top_p": 0.85}, {0, 3}),
        ({"top_k": 0, "temperature": 0.01}, {0}),
        ({"top_k": 0}, {0, 1, 2, 3}),
    ],
)
def test_what_may_be_drawn(options: dict, drawn: set[int]) -> None:
    scores = torch.tensor([[0.6, 0.05, 0.05, 0.3]]).log().repeat(400, 1)
    found = _draw(scores, rules(do_sample=True, **options), torch.Generator().manual_seed(0))
    assert set(found.tolist()) == drawn
