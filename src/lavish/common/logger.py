"""LAVIS's names of what keeps the means of a loop, for tasks that were written for it.

Source of the names: salesforce/LAVIS, lavis/common/logger.py. What is told goes to Python's logging; the runners of
lavish have a log of their own (`log.jsonl`).
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

logger = logging.getLogger(__name__)

__all__ = ["MetricLogger", "SmoothedValue"]


class SmoothedValue:
    """A number over the steps of a loop: the last `window_size` of its values, and the mean of all."""

    def __init__(self, window_size: int = 20, fmt: str = "{median:.4f} ({global_avg:.4f})") -> None:
        self.fmt, self.total, self.count = fmt, 0.0, 0
        self._window: deque[float] = deque(maxlen=window_size)

    def update(self, value: float, n: int = 1) -> None:
        """Take a value in, as often as `n` says."""
        self._window.append(value)
        self.total += value * n
        self.count += n

    def synchronize_between_processes(self) -> None:
        """Make the mean of all that of all processes, which all call it."""
        from lavish.common import dist

        self.total, self.count = dist.total(self.total), round(dist.total(float(self.count)))

    @property
    def value(self) -> float:
        """The newest value."""
        return self._window[-1] if self._window else 0.0

    @property
    def median(self) -> float:
        """The lower median of the window."""
        return statistics.median_low(self._window) if self._window else 0.0

    @property
    def avg(self) -> float:
        """The mean of the window."""
        return statistics.fmean(self._window) if self._window else 0.0

    @property
    def max(self) -> float:
        """The largest of the window."""
        return max(self._window, default=0.0)

    @property
    def global_avg(self) -> float:
        """The mean of all values."""
        return self.total / max(self.count, 1)

    def __str__(self) -> str:
        names = ("median", "avg", "global_avg", "max", "value")
        return self.fmt.format(**{name: getattr(self, name) for name in names})


class MetricLogger:
    """Numbers by name over the steps of a loop; one is also an attribute."""

    def __init__(self, delimiter: str = "\t") -> None:
        self.delimiter = delimiter
        self.meters: dict[str, SmoothedValue] = {}

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Keep a number in a way of its own."""
        self.meters[name] = meter

    def update(self, **values: Any) -> None:
        """Take the values of a step in; tensors of one number too."""
        for name, value in values.items():
            number = value.item() if hasattr(value, "item") else value  # tensors and numpy's numbers have it
            self.meters.setdefault(name, SmoothedValue()).update(float(number))

    def __getattr__(self, name: str) -> SmoothedValue:
        try:
            return self.__dict__["meters"][name]
        except KeyError as error:
            raise AttributeError(f"{type(self).__name__} has no number {name!r}.") from error

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def global_avg(self) -> str:
        """Give the means of all steps as one text."""
        return self.delimiter.join(f"{name}: {meter.global_avg:.4f}" for name, meter in self.meters.items())

    def synchronize_between_processes(self) -> None:
        """Make the means those of all processes, which all call it."""
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def log_every(self, iterable: Iterable[Any], print_freq: int, header: str = "") -> Iterator[Any]:
        """Give the items one by one, and log the numbers after every `print_freq` of them."""
        started = time.perf_counter()
        for at, item in enumerate(iterable):
            yield item
            if at % print_freq == 0:
                logger.info("%s [%d] %s (%.1f s)", header, at, str(self), time.perf_counter() - started)
