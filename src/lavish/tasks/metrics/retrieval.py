"""Recalls of image-text retrieval from matrices of scores. Source: salesforce/LAVIS, lavis/tasks/retrieval.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lavish.common.errors import DataError

DEPTHS = (1, 5, 10)


def ranks(scores: np.ndarray, right: Mapping[int, int | Sequence[int]] | Sequence[int | Sequence[int]]) -> np.ndarray:
    """Give the place of the best right candidate of each query, 0 is first: (queries,).

    Of equal scores the right candidate counts as the last, so that a model that tells nothing apart earns nothing.

    Args:
        scores: (queries, candidates).
        right: the candidates, or the one, that belong to each query.

    Raises:
        DataError: a score that is not a number, or a query without a right candidate.
    """
    if np.isnan(scores).any():
        raise DataError("The retrieval scores hold values that are not a number.")
    found = np.empty(len(scores), dtype=np.int64)
    for query, row in enumerate(scores):
        targets = np.atleast_1d(np.asarray(right[query], dtype=np.int64))
        if not targets.size:
            raise DataError(f"Query {query} has no right candidate.")
        best = row[targets].max()
        equals = (row[targets] == best).sum()
        found[query] = (row > best).sum() + (row == best).sum() - equals
    return found


def recalls(places: np.ndarray) -> dict[int, np.ndarray]:
    """Give for each depth whether a query's right candidate is within it: (queries,) of 0 and 1."""
    return {depth: (places < depth).astype(np.float64) for depth in DEPTHS}
