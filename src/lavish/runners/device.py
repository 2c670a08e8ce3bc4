"""The device that `run.device` names."""

from __future__ import annotations

import torch

from lavish.checkpoints.placement import resolve_device
from lavish.common.errors import ConfigError
from lavish.runners.schema import RunConfig


def device_of(run: RunConfig) -> torch.device:
    """Give the device of a run.

    Raises:
        ConfigError: it is not there; says what to type. Recipes of LAVIS name cuda.
    """
    try:
        return resolve_device(run.device)
    except ConfigError as error:
        what = str(error) if str(error).startswith("No device") else f"{run.device!r} is not on this machine."
        raise ConfigError(
            f"run.device: {what} Add `--options run.device=cpu` to the command, or run.device=auto for the best device "
            "there is."
        ) from error
