"""ZeRO checkpoints of given tensors, laid out as deepspeed lays them, without deepspeed; `tests/checkpoints/
test_deepspeed.py` checks that the files say what deepspeed's own say."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Trees = dict[str, dict[str, Any]]


def write_zero(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    stage: int,
    num_processes: int = 2,
    frozen: tuple[str, ...] = (),
    buffers: tuple[str, ...] = (),
    shared: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    step: int = 2,
    change: Callable[[Trees], None] | None = None,
) -> Path:
    """Write `latest` and the step's files, and give `folder`. `change` may alter the files' trees by name before.

    `shared` maps second names to first ones; `dtype` is what the run computes in.
    """
    shared = dict(shared or {})
    trained = [name for name in tensors if name not in (*frozen, *buffers, *shared)]
    groups = [[n for n in trained if tensors[n].ndim > 1], [n for n in trained if tensors[n].ndim <= 1]]
    groups = [group for group in groups if group]
    trees: Trees = {}
    for rank in range(num_processes if stage == 3 else 1):
        name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
        kept = {n: _slices(tensors[n].to(dtype), num_processes)[rank] for n in frozen} if stage == 3 else {}
        trees[f"{name}_model_states.pt"] = {
            "module": {n: value if n in buffers else _computed(value, dtype, stage) for n, value in tensors.items()},
            "buffer_names": list(buffers),
            "optimizer": None,
            "param_shapes": [{n: tensors[n].shape for n in group} for group in groups] if stage else None,
            "frozen_param_shapes": {n: tensors[n].shape for n in frozen} if stage > 1 else None,
            "shared_params": shared if stage and not rank else {},
            "frozen_param_fragments": None if stage < 2 else kept or {n: tensors[n].to(dtype) for n in frozen},
            "lr_scheduler": None,
            "skipped_steps": 0,
            "global_steps": step,
            "global_samples": 4 * step,
            "dp_world_size": num_processes,
            "mp_world_size": 1,
            "ds_config": {"zero_optimization": {"stage": stage}},
            "ds_version": "0.19.8",
        }
    if stage:
        rows = [[tensors[n].float() for n in group] for group in groups]
        for rank in range(num_processes):
            prefix = "bf16_" if dtype == torch.bfloat16 else ""
            trees[f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = {
                "optimizer_state_dict": _share(rows, rank, num_processes, stage),
                "ds_config": {"zero_optimization": {"stage": stage}},
                "ds_version": "0.19.8",
            }
    if change is not None:
        change(trees)
    target = folder / f"global_step{step}"
    target.mkdir(parents=True)
    (folder / "latest").write_text(target.name)
    for name, tree in trees.items():
        torch.save(tree, target / name)
    return folder


def _computed(value: torch.Tensor, dtype: torch.dtype, stage: int) -> torch.Tensor:
    return torch.empty(0, dtype=dtype) if stage == 3 else value.to(dtype)


def _slices(value: torch.Tensor, num_processes: int) -> list[torch.Tensor]:
    """A parameter's slices under ZeRO 3, the last one padded."""
    length = math.ceil(value.numel() / num_processes)
    flat = torch.cat([value.flatten(), value.new_zeros(length * num_processes - value.numel())])
    return [part.clone() for part in flat.split(length)] if length else [flat] * num_processes


def _share(rows: list[list[torch.Tensor]], rank: int, num_processes: int, stage: int) -> dict[str, Any]:
    state: dict[str, Any] = {"overflow": False, "dynamic_loss_scale": False, "zero_stage": stage}
    if stage == 3:
        flat = [torch.cat([_slices(value, num_processes)[rank] for value in row]) for row in rows]
        return {**state, "partition_count": num_processes, "optimizer_state_dict": {}, "fp32_flat_groups": flat}
    flat = []
    for row in rows:
        whole = torch.cat([value.flatten() for value in row])
        length = math.ceil(whole.numel() / (2 * num_processes)) * 2  # cut as if padded, and the padding left away
        flat.append(whole[rank * length : (rank + 1) * length].clone())
    counts = [num_processes] * len(rows)
    return {**state, "partition_count": counts, "single_partition_of_fp32_groups": flat, "base_optimizer_state": {}}
