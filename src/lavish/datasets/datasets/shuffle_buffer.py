"""A stream in another order: rows are drawn from a buffer that the stream fills."""

import random
from collections.abc import Iterable, Iterator
from typing import Any


def drawn(rows: Iterable[Any], size: int, draw: random.Random) -> Iterator[Any]:
    """Draw rows from a buffer of `size` that is kept full; 0 gives them as they come."""
    buffer: list[Any] = []
    for row in rows:
        buffer.append(row)
        if len(buffer) > size:
            at = draw.randrange(len(buffer))
            buffer[at], buffer[-1] = buffer[-1], buffer[at]
            yield buffer.pop()
    draw.shuffle(buffer)
    yield from buffer
