"""Several processes of one training run, as torchrun starts them: who am I, add up gradients, wait for one another.

Without torchrun there is one process and nothing here does anything. torch is imported on use.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from lavish.common.errors import ConfigError

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")


def world_size() -> int:
    """Give the number of processes of the run: torchrun's WORLD_SIZE, else 1."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Give the number of this process, from 0: torchrun's RANK, else 0."""
    return _number("RANK", 0)


def is_main() -> bool:
    """Say whether this process is the one that writes files and talks."""
    return rank() == 0


def start(device_type: str) -> None:
    """Join the processes of the run, once: NCCL for tensors on CUDA, gloo for those on the CPU.

    Raises:
        ConfigError: WORLD_SIZE is set and the rest of what torchrun sets is not.
    """
    import torch.distributed as dist

    if world_size() == 1 or dist.is_initialized():
        return
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        raise ConfigError(
            f"WORLD_SIZE is {world_size()}, but {', '.join(absent)} is not set. Start the run with torchrun, "
            "or unset WORLD_SIZE."
        )
    dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
    atexit.register(leave)


def leave() -> None:
    """Leave the processes of the run. At the end of Python: gloo's threads that outlive it abort the process."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def add_up(tensors: Iterable[torch.Tensor]) -> None:
    """Replace each tensor by its sum over the processes, in one exchange."""
    import torch
    import torch.distributed as dist

    if world_size() == 1:
        return
    parts = list(tensors)
    flat = torch.cat([part.detach().flatten().float() for part in parts])
    dist.all_reduce(flat)
    for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.detach().copy_(total.view_as(part))


def total(value: float) -> float:
    """Give the sum of a number over the processes."""
    import torch

    summed = torch.tensor([value], dtype=torch.float64)
    add_up([summed])
    return float(summed)


def gather(value: Value) -> list[Value]:
    """Give what every process gave, in their order; each process gets all of it. The values must be picklable."""
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    gathered: list[Value | None] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered  # pyright: ignore[reportReturnType]


def on_main(compute: Callable[[], Value]) -> Value:
    """Compute in the main process alone and give the result to all; what it raises, all raise."""
    import torch.distributed as dist

    if world_size() == 1:
        return compute()
    outcome: list[tuple[Value | None, Exception | None]] = [(None, None)]
    if is_main():
        try:
            outcome = [(compute(), None)]
        except Exception as error:  # noqa: BLE001 - the others wait; they are told, and all raise it
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0)
    value, error = outcome[0]
    if error is not None:
        raise error
    return value  # pyright: ignore[reportReturnType]


def wait_for_all() -> None:
    """Return when every process has come here."""
    import torch.distributed as dist

    if world_size() > 1:
        dist.barrier()


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    if not value:
        return default
    if not value.isdecimal():
        raise ConfigError(f"The environment variable {name} is {value!r}; torchrun sets it to a whole number.")
    return int(value)
