"""Intervals: seeded, right where they can be computed, paired where two runs are compared."""

import numpy as np
import pytest

from lavish.common.errors import DataError
from lavish.tasks.metrics.measure import Measure, compare, mean_of


def test_interval_of_a_share() -> None:
    """A share of 0.3 over 1000 samples: about 1.96 standard errors to each side."""
    scores = np.array([1.0] * 300 + [0.0] * 700)
    low, high = mean_of(scores).interval()
    error = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert low == pytest.approx(0.3 - error, abs=0.004)
    assert high == pytest.approx(0.3 + error, abs=0.004)
    assert mean_of(scores, 100).interval() == pytest.approx((100 * low, 100 * high))


def test_same_seed_same_interval() -> None:
    measure = mean_of(np.random.default_rng(0).random(50))
    assert measure.interval() == measure.interval()
    assert measure.interval(seed=1) != measure.interval(seed=2)


def test_resampling_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = mean_of(np.random.default_rng(0).random(40))
    whole = measure.resampled(64)
    monkeypatch.setattr("lavish.tasks.metrics.measure._DRAWS_AT_ONCE", 400)
    assert measure.resampled(64) == pytest.approx(whole, rel=1e-12)


def test_ratio_of_sums_is_no_mean_of_ratios() -> None:
    measure = Measure(np.array([[1.0, 1.0], [1.0, 9.0]]))
    assert measure.value == pytest.approx(0.2)


def test_a_small_steady_gain_is_seen_by_pairing() -> None:
    rng = np.random.default_rng(3)
    first = rng.random(400)
    second = first + 0.01 + 0.01 * rng.random(400)
    found = compare(mean_of(first), mean_of(second))
    assert found.difference == pytest.approx(0.015, abs=0.001)
    assert found.interval.low > 0.01
    assert found.p_value == 0.0
    unpaired_width = np.ptp(mean_of(first).interval())
    assert found.interval.high - found.interval.low < unpaired_width / 10


def test_p_value_of_one_gain_in_three() -> None:
    """A resample without the gain has a share of (2/3)^3, and p counts both sides."""
    found = compare(mean_of([0.0, 1.0, 1.0]), mean_of([1.0, 1.0, 1.0]))
    assert found.p_value == pytest.approx(2 * (2 / 3) ** 3, abs=0.06)  # of 1000 draws, four standard errors
    assert found.interval.low == 0
    single = compare(mean_of([0.5]), mean_of([0.75]))
    assert single == (0.25, (0.25, 0.25), 0.0)


def test_no_difference() -> None:
    same = mean_of([0.0, 1.0, 1.0])
    assert compare(same, same) == (0.0, (0.0, 0.0), 1.0)
    with pytest.raises(DataError, match="same samples: 3 and 2"):
        compare(same, mean_of([0.0, 1.0]))
