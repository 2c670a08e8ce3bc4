"""Where a network goes, and in which dtype."""

from __future__ import annotations

import logging

import torch

from lavish.common.errors import ConfigError, did_you_mean, shown

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def resolve_device(device: str | torch.device) -> torch.device:
    """Give a device that is there; "auto" is CUDA, else MPS, else CPU.

    Raises:
        ConfigError: no such device, here or at all.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:  # ValueError: a number beyond all
        raise ConfigError(f"No device {shown(device)}. Use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'.") from error
    available = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(found.type, 1)
    if available <= (found.index or 0) and found.type != "cpu":
        raise ConfigError(
            f"device={str(device)!r} was asked and this machine has {available} of that kind. Use 'auto'."
        )
    return found


def resolve_dtype(dtype: str | torch.dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Give the dtype of weights and activations; "auto" is the stored one, but float32 for float16 on a CPU.

    Raises:
        ConfigError: no such dtype.
    """
    if dtype == "auto":
        if stored not in DTYPES.values():
            return torch.float32
        if stored == torch.float16 and device.type == "cpu":
            logger.warning("The weights are float16, which is unusably slow on a CPU: loading as float32.")
            return torch.float32
        return stored
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        suggestion = did_you_mean(dtype, DTYPES) if isinstance(dtype, str) else ""
        raise ConfigError(f"No dtype {shown(dtype)}.{suggestion} Known: auto, {', '.join(DTYPES)}.")
    if found == torch.float16 and device.type == "cpu":
        logger.warning("float16 on a CPU was asked for; it is some hundred times slower than float32 or bfloat16.")
    return found
