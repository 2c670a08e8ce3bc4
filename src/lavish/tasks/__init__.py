"""Tasks: what one training step computes and how a model is scored. One file a task."""

from typing import Any

from lavish.common.errors import ConfigError
from lavish.common.registry import registry

__all__ = ["setup_task"]


def setup_task(cfg: Any) -> Any:
    """Build the task that `run.task` of a merged config names, as LAVIS's scripts do.

    Raises:
        ConfigError: none is named, or whatever the task finds wrong.
    """
    name = cfg.run_cfg.get("task")
    if not name:
        raise ConfigError("The recipe has no run.task; name one, for example `run: {task: captioning}`.")
    return registry.get_task_class(name).setup_task(cfg=cfg)
