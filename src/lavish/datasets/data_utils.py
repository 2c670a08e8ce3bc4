"""LAVIS's name of what moves a batch to the device, for tasks that were written for it.

Source of the name: salesforce/LAVIS, lavis/datasets/data_utils.py. There it always asks for CUDA.
"""

from __future__ import annotations

from typing import Any

import torch


def prepare_sample(samples: Any, cuda_enabled: bool = True) -> Any:
    """Give a batch with its tensors, also those in lists and dicts, on the GPU, if there is one and it is asked for."""
    if not cuda_enabled or not torch.cuda.is_available():
        return samples
    return _moved(samples, torch.device("cuda"))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: _moved(part, device) for name, part in value.items()}
    return [_moved(part, device) for part in value] if isinstance(value, list) else value
