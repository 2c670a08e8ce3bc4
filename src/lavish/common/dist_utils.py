"""LAVIS's names of what `lavish.common.dist` does, for tasks and runners that were written for it.

Source of the names: salesforce/LAVIS, lavis/common/dist_utils.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lavish.common.dist import is_main, rank, world_size

__all__ = ["get_rank", "get_world_size", "is_dist_avail_and_initialized", "is_main_process", "main_process"]


def get_rank() -> int:
    """Give the number of this process, from 0."""
    return rank()


def get_world_size() -> int:
    """Give the number of processes of the run."""
    return world_size()


def is_main_process() -> bool:
    """Say whether this process is the one that writes files and talks."""
    return is_main()


def is_dist_avail_and_initialized() -> bool:
    """Say whether several processes have found each other."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def main_process(func: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function that only the main process runs; in the others it gives None."""

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs) if is_main() else None

    return wrapper
