"""Perplexity: the exponential of the mean loss over all label tokens of a set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lavish.tasks.metrics.measure import Measure


def mean_loss(losses: Sequence[float], num_tokens: Sequence[float]) -> Measure:
    """Give the mean loss over tokens, from each sample's mean loss and its number of label tokens."""
    tokens = np.asarray(num_tokens, dtype=np.float64)
    return Measure(np.stack([np.asarray(losses, dtype=np.float64) * tokens, tokens], axis=-1), higher_is_better=False)


def perplexity(losses: Sequence[float], num_tokens: Sequence[float]) -> Measure:
    """Give the perplexity, from each sample's mean loss (natural logarithm) and its number of label tokens."""
    return Measure(mean_loss(losses, num_tokens).stats, "exp_ratio", higher_is_better=False)
