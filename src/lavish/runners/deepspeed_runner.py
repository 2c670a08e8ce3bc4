"""MPP-LLaVA's runner by its name: epochs, trained by DeepSpeed where several processes run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lavish.common import dist
from lavish.runners.runner_base import RunnerBase
from lavish.runners.schema import RunConfig, lavis_run_config


class DeepSpeedRunner(RunnerBase):
    """`RunnerBase` with `run.engine: deepspeed`; in one process, where there is nothing to share, without.

    Source of the name: Coobiw/MPP-LLaVA, lavis/runners/deepspeed_runner.py.
    """

    def typed(self, cfg: Any, task_class: type) -> RunConfig:
        """Give the typed run config."""
        run = cfg if isinstance(cfg, RunConfig) else lavis_run_config(cfg, task_class)
        return replace(run, engine="deepspeed" if dist.world_size() > 1 else "auto")
