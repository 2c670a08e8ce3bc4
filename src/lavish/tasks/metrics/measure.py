"""A measured value with its interval: every metric here is a function of sums over the samples.

So one resampling serves all: draw samples with replacement, add up their statistics, and take the function. The draws
depend on the seed and the number of samples alone; two runs over the same samples are therefore resampled alike, and
the interval of their difference is that of the paired bootstrap. Source of the method: Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, the percentile interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from lavish.common.errors import DataError

NUM_RESAMPLES, CONFIDENCE, SEED = 1000, 0.95, 20261120
_DRAWS_AT_ONCE = 4_000_000  # numbers held at a time

MAX_N = 4
"""The longest n-grams of BLEU and CIDEr."""
_TINY, _SMALL = 1e-15, 1e-9  # keep BLEU of an empty caption at 0 instead of an error, as the released scorer


class Interval(NamedTuple):
    """The ends of a confidence interval."""

    low: float
    high: float


def ratio(sums: np.ndarray) -> np.ndarray:
    """Give the first sum over the second: a mean, where the second counts. Shapes: (..., 2) -> (...)."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] != 0)


def exp_ratio(sums: np.ndarray) -> np.ndarray:
    """Give the exponential of the ratio: a perplexity, of losses and tokens. Shapes: (..., 2) -> (...)."""
    return np.exp(ratio(sums))


def bleu_of(sums: np.ndarray, n: int) -> np.ndarray:
    """Give BLEU-n of lengths, closest reference lengths, and right and all n-grams of 1 to 4 words: (..., 10) -> (...).

    Source of the formula: Papineni et al. 2002, with the constants of salaniz/pycocoevalcap, bleu/bleu_scorer.py.
    """
    right, total = sums[..., 2 : 2 + n], sums[..., 2 + MAX_N : 2 + MAX_N + n]
    score = ((right + _TINY) / (total + _SMALL)).prod(-1) ** (1 / n)
    lengths = (sums[..., 0] + _TINY) / (sums[..., 1] + _SMALL)
    return score * np.exp(np.minimum(0.0, 1 - 1 / lengths))


FORMULAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ratio": ratio,
    "exp_ratio": exp_ratio,
    **{f"bleu_{n}": partial(bleu_of, n=n) for n in range(1, MAX_N + 1)},
}
"""What makes a value of sums, by the name under which a run's folder keeps it."""


@dataclass(frozen=True)
class Measure:
    """One metric over a set of samples."""

    stats: np.ndarray
    """(samples, statistics), float64."""
    formula: str = "ratio"
    """Which of `FORMULAS` makes the value of the sums."""
    scale: float = 1.0
    """What the value is multiplied by, 100 for percentages."""
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if self.stats.ndim != 2 or not len(self.stats):
            raise DataError("There is nothing to measure: no sample has a result and a reference.")

    @property
    def value(self) -> float:
        """The metric over all samples."""
        return float(FORMULAS[self.formula](self.stats.sum(0))) * self.scale

    @property
    def per_sample(self) -> np.ndarray:
        """The metric of each sample alone: (samples,)."""
        return FORMULAS[self.formula](self.stats) * self.scale

    def resampled(self, num: int = NUM_RESAMPLES, seed: int = SEED) -> np.ndarray:
        """Give the metric over `num` resamples: (num,)."""
        parts = [counts @ self.stats for counts in _draws(len(self.stats), num, seed)]
        return FORMULAS[self.formula](np.concatenate(parts)) * self.scale

    def interval(self, num: int = NUM_RESAMPLES, confidence: float = CONFIDENCE, seed: int = SEED) -> Interval:
        """Give the percentile interval."""
        return _ends(self.resampled(num, seed), confidence)


def mean_of(scores: Sequence[float] | np.ndarray, scale: float = 1.0, *, higher_is_better: bool = True) -> Measure:
    """Give the measure of a mean of scores."""
    values = np.asarray(scores, dtype=np.float64)
    return Measure(np.stack([values, np.ones_like(values)], axis=-1), "ratio", scale, higher_is_better)


class Difference(NamedTuple):
    """What `compare` gives."""

    difference: float
    """Second minus first."""
    interval: Interval
    p_value: float
    """Share of resamples on the far side of no difference, doubled; at most 1."""


def compare(
    first: Measure, second: Measure, num: int = NUM_RESAMPLES, confidence: float = CONFIDENCE, seed: int = SEED
) -> Difference:
    """Give the paired difference of one metric over the same samples in the same order.

    Raises:
        DataError: different numbers of samples.
    """
    if len(first.stats) != len(second.stats):
        raise DataError(f"A paired difference needs the same samples: {len(first.stats)} and {len(second.stats)}.")
    differences = second.resampled(num, seed) - first.resampled(num, seed)
    below, above = float((differences <= 0).mean()), float((differences >= 0).mean())
    return Difference(second.value - first.value, _ends(differences, confidence), min(1.0, 2 * min(below, above)))


def _draws(num_samples: int, num: int, seed: int) -> Iterator[np.ndarray]:
    """Give how often each sample is drawn, (some resamples, samples) at a time, `num` resamples in all."""
    rng = np.random.default_rng([seed, num_samples])
    at_once = max(1, _DRAWS_AT_ONCE // num_samples)
    for start in range(0, num, at_once):
        rows = min(at_once, num - start)
        drawn = rng.integers(num_samples, size=(rows, num_samples)) + np.arange(rows)[:, None] * num_samples
        yield np.bincount(drawn.ravel(), minlength=rows * num_samples).reshape(rows, num_samples).astype(np.float64)


def _ends(values: np.ndarray, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))
