"""Runners: the life cycle of a training run (steps, schedule, checkpoints, resume, plot). They know no model family.

The classes are imported on first use, so that reading `lavish.runners.schema` for a help text needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavish.runners.runner_base import RunnerBase
    from lavish.runners.runner_iter import RunnerIter

__all__ = ["RunnerBase", "RunnerIter"]

_LAZY = {"RunnerBase": "lavish.runners.runner_base", "RunnerIter": "lavish.runners.runner_iter"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lavish.runners' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_LAZY[name]), name)
