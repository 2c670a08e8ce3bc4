"""Batches of a loader, whose worker processes tell what is wrong as the process itself would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lavish.common.errors import LavishError

_FROM_WORKER = "Original Traceback"


def batches_of(loader: Iterable[Any]) -> Iterator[Any]:
    """Give the batches of a loader.

    torch hands on what a worker raised with the worker's traceback as its message; here the message is its own.

    Raises:
        LavishError: what the data set raises.
    """
    try:
        yield from loader
    except LavishError as error:
        text, kind = str(error), f"{type(error).__module__}.{type(error).__qualname__}: "
        if _FROM_WORKER not in text or kind not in text:
            raise
        raise type(error)(text.rpartition(kind)[2].strip()) from error
