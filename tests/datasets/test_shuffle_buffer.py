"""Rows of a stream in another order."""

import random

from lavish.datasets.datasets.shuffle_buffer import drawn


def test_rows_are_drawn_from_a_buffer_that_is_kept_full() -> None:
    assert list(drawn(range(6), 0, random.Random(0))) == list(range(6))
    found = list(drawn(range(100), 10, random.Random(0)))
    assert sorted(found) == list(range(100)) != found
    assert all(row <= place + 10 for place, row in enumerate(found))
