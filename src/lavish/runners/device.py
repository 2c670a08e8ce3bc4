"""The device that `run.device` names."""

from __future__ import annotations

import os

import torch

from lavish.checkpoints.placement import resolve_device
from lavish.common.errors import ConfigError
from lavish.runners.schema import RunConfig


def device_of(run: RunConfig) -> torch.device:
    """Give the device of a run; of several processes each has a GPU of its own, and it is the current one.

    Raises:
        ConfigError: it is not there; says what to type. Recipes of LAVIS name cuda.
    """
    try:
        found = resolve_device(run.device)
    except ConfigError as error:
        what = str(error) if str(error).startswith("No device") else f"{run.device!r} is not on this machine."
        raise ConfigError(
            f"run.device: {what} Add `--options run.device=cpu` to the command, or run.device=auto for the best device "
            "there is."
        ) from error
    if found.type == "cuda":
        found = found if found.index is not None else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(found)
    return found
