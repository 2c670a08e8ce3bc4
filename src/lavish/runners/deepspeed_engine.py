"""Training by DeepSpeed's ZeRO: 1 shares the optimizer's state, 2 gradients too, 3 weights too (needs `deepspeed`).

Weights and optimizer states are gathered for checkpoints, so that any engine reads them. The optimizer is torch's AdamW
with the runner's groups: DeepSpeed's own compiles an extension when it is made.
"""

from __future__ import annotations

import atexit
import json
import math
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn

from lavish.common import dist
from lavish.common.errors import ConfigError, MissingDependency, TrainingError, shown
from lavish.runners.engines import MODEL_FILE, BuildOptimizer, Engine, Mismatch, check_names, trained
from lavish.runners.optim import OptimizerGroup
from lavish.runners.schema import RunConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
SHARED_MEMORY = "deepspeed_shm_comm"
DECIDED_HERE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
"""Settings that follow from the recipe."""


class DeepSpeedOptimizer(OptimizerGroup):
    """DeepSpeed's optimizer behind the interface of the runner's."""

    def __init__(self, engine: Any, optimizer: Any):
        super().__init__([optimizer])
        self.engine = engine

    def step(self) -> None:
        """Update the parameters, and drop the gradients.

        Raises:
            TrainingError: the gradients were no numbers.
        """
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        if norm is not None and not math.isfinite(norm):  # known only now; no checkpoint has taken it over
            raise TrainingError(
                f"The norm of the gradients is {float(norm)}: the run diverged. The last checkpoint before it is kept. "
                "Lower the learning rate, or set run.max_grad_norm, and start with another run.output_dir."
            )

    def zero_grad(self) -> None:
        """Nothing: `step` has dropped them."""


class DeepSpeedEngine(Engine):
    """Several processes with shares of a training.

    Raises:
        MissingDependency: deepspeed is not installed.
        ConfigError: settings that cannot be read, Muon, or a mean of the weights.
    """

    shares_weights = True

    def __init__(self, run: RunConfig, device: torch.device):
        super().__init__(run, device)
        if find_spec("deepspeed") is None:
            raise MissingDependency(
                "run.engine deepspeed needs deepspeed, which is not installed: pip install 'lavish[deepspeed]'. "
                "run.engine fsdp2 shares a training without it."
            )
        if run.optimizer != "adamw":
            raise ConfigError(f"run.engine deepspeed trains with adamw, not {run.optimizer}; use ddp.")
        if run.ema_decay:
            raise ConfigError("run.engine deepspeed keeps no mean of the weights (run.ema_decay); use fsdp2.")
        self.settings = read_settings(run)
        self.called: Any = None
        self.zero: Any = None
        self.moments: Any = None
        self.groups: list[dict[str, Any]] = []
        """The optimizer's groups as they were built: ZeRO puts its own tensors into them."""

    def start(self, model: nn.Module, build: BuildOptimizer) -> tuple[nn.Module, OptimizerGroup]:
        """Give the module to DeepSpeed."""
        import deepspeed  # pyright: ignore[reportMissingImports]

        _leave_out_shared_memory()
        model = model.to(self.device)
        (optimizer,) = build(model).optimizers
        for group in optimizer.param_groups:
            settings = {name: value for name, value in group.items() if name != "params"}
            self.groups.append({"params": list(group["params"]), "settings": settings})
        self.called, wrapped, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.settings, dist_init_required=False
        )
        self.zero, self.moments = wrapped, optimizer
        atexit.register(_leave)
        return cast(nn.Module, self.called), DeepSpeedOptimizer(self.called, wrapped)

    def accumulate(self, module: nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
        """Say where a step ends."""
        self.called.set_gradient_accumulation_boundary(is_boundary=is_last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients of a pass."""
        self.called.backward(loss, scale_wrt_gas=False)

    def clip(self, model: nn.Module, max_norm: float) -> float | None:
        """Nothing: DeepSpeed clips in its step, to `gradient_clipping`."""
        return None

    @property
    def _is_stage_3(self) -> bool:
        return hasattr(self.zero, "fp32_partitioned_groups_flat")  # of ZeRO-3's optimizer alone

    def _partitions(self) -> list[torch.Tensor]:
        """Give this process's shares of the weights in float32, one of each group."""
        zero = self.zero
        return list(zero.fp32_partitioned_groups_flat if self._is_stage_3 else zero.single_partition_of_fp32_groups)

    # -- whole weights

    def full(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gather a weight from all processes, which all call it."""
        from deepspeed.utils import safe_get_full_fp32_param  # pyright: ignore[reportMissingImports]

        if not isinstance(tensor, nn.Parameter) or not tensor.requires_grad:
            return self._whole_frozen(tensor)
        return safe_get_full_fp32_param(tensor).detach()

    def _whole_frozen(self, tensor: torch.Tensor) -> torch.Tensor:
        import deepspeed  # pyright: ignore[reportMissingImports]

        if not hasattr(tensor, "ds_id"):  # of what ZeRO-3 does not share: buffers, and all of ZeRO-1 and -2
            return tensor.detach()
        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()

    @torch.no_grad()
    def fill(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Put whole weights where each process has its share: into the weights that compute, and those that learn."""
        from deepspeed.utils import (  # pyright: ignore[reportMissingImports]
            safe_set_full_fp32_param,
            safe_set_local_fp32_param,
        )

        expected = trained(model)
        check_names({name: _whole_shape(one) for name, one in expected.items()}, tensors)
        for name, tensor in tensors.items():
            place, whole = expected[name], tensor.to(self.device)
            if place.shape == whole.shape:  # not where ZeRO-3 has given the weight back
                place.copy_(whole)
            if not isinstance(place, nn.Parameter):
                continue
            if _is_shared(place):
                share = _share(place, whole)
                cast(Any, place).ds_tensor.copy_(share)
                safe_set_local_fp32_param(place, share.float())
            else:
                safe_set_full_fp32_param(place, whole.float())

    def holding(self, model: nn.Module) -> list[torch.Tensor]:
        """Give what this process holds of the weights that learn: those that compute, and the shares that learn."""
        held: list[torch.Tensor] = []
        for tensor in trained(model).values():
            held.append(tensor)
            held += [cast(Any, tensor).ds_tensor] if _is_shared(tensor) else []
        return [*held, *self._partitions()]

    @torch.no_grad()
    def make_whole(self, model: nn.Module) -> None:
        """Gather each weight in turn; the other processes keep none of it."""
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                whole = self.full(parameter).to(parameter.dtype)
                if dist.is_main():
                    module.register_parameter(name, nn.Parameter(whole.cpu().clone(), parameter.requires_grad))
        self.called.destroy()

    # -- checkpoints

    def _link_moments(self) -> None:
        """Make the optimizer's states that no step has made yet, and let DeepSpeed find them by weight.

        Trap: ZeRO-1 and -2 link the states of all groups after the step of the first group, when the others have none.
        """
        partitions = self._partitions()
        for partition in partitions:
            if not self.moments.state.get(partition):
                moments = {kind: torch.zeros_like(partition) for kind in MOMENTS}
                self.moments.state[partition] = {"step": torch.tensor(0.0), **moments}
        if not self._is_stage_3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def save(self, folder: Path, model: nn.Module, optimizer: OptimizerGroup) -> dict[str, Any]:
        """Write whole weights, and give the optimizer's whole state as torch's AdamW has it."""
        from deepspeed.utils import safe_get_full_optimizer_state  # pyright: ignore[reportMissingImports]

        self._link_moments()
        tensors = {name: self.full(tensor).cpu().contiguous().clone() for name, tensor in trained(model).items()}
        state, groups, number = {}, [], 0
        step = torch.tensor(float(self.called.global_steps))
        for group in self.groups:
            numbers = []
            for parameter in group["params"]:
                moments = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
                state[number] = {"step": step.clone(), **{kind: one.cpu().clone() for kind, one in moments.items()}}
                numbers.append(number)
                number += 1
            groups.append({**group["settings"], "params": numbers})
        if dist.is_main():
            save_file(tensors, folder / MODEL_FILE)
        return {"optimizer": {"optimizers": [{"state": state, "param_groups": groups}]}}

    def load_optimizer(self, model: nn.Module, optimizer: OptimizerGroup, state: dict[str, Any]) -> None:
        """Put a whole state where each process has its share."""
        self._link_moments()
        (saved,) = state["optimizers"]
        groups = self.groups
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved["param_groups"]]:
            raise Mismatch("optimizer", "its groups hold other numbers of weights.")
        steps = 0
        for group, stored in zip(groups, saved["param_groups"], strict=True):
            for parameter, number in zip(group["params"], stored["params"], strict=True):
                moments = saved["state"][number]
                steps = int(moments["step"])
                for kind in MOMENTS:
                    _put_moment(parameter, kind, moments[kind].to(self.device).float())
        for moments in self.moments.state.values():
            moments["step"] = torch.tensor(float(steps))
        self.called.global_steps = steps


def _leave() -> None:
    """Leave the processes of the run, and let go what DeepSpeed holds of them; gloo's threads must not outlive it."""
    from deepspeed import comm  # pyright: ignore[reportMissingImports]

    if torch.distributed.is_initialized():
        comm.destroy_process_group()


def _leave_out_shared_memory() -> None:
    """Let DeepSpeed exchange by gloo alone on CPUs.

    Trap: it else compiles an extension when a run starts, which takes a minute and waits for ever for the lock of a
    build that was killed; and a killed run leaves its segments in shared memory, where the next one waits on them.
    """
    from deepspeed.ops import __compatible_ops__  # pyright: ignore[reportMissingImports]

    __compatible_ops__[SHARED_MEMORY] = False


def _is_shared(tensor: torch.Tensor) -> bool:
    """Tell whether a weight is shared out, as ZeRO-3 does."""
    return hasattr(tensor, "ds_tensor")


def _share(place: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Cut this process's share of a weight of ZeRO-3 from a whole tensor, and fill it up with zeros.

    Trap: DeepSpeed's own way to set a whole tensor does not know that the last share may be filled up.
    """
    size = int(cast(Any, place).ds_tensor.numel())
    own = whole.flatten()[size * dist.rank() :][:size]
    return torch.nn.functional.pad(own, (0, size - own.numel()))


def _put_moment(parameter: nn.Parameter, kind: str, whole: torch.Tensor) -> None:
    """Put a whole state of the optimizer where this process has its share."""
    from deepspeed.utils import (  # pyright: ignore[reportMissingImports]
        safe_set_full_optimizer_state,
        safe_set_local_optimizer_state,
    )

    if _is_shared(parameter):
        safe_set_local_optimizer_state(parameter, _share(parameter, whole), kind)
    else:
        safe_set_full_optimizer_state(parameter, whole, kind)


def _whole_shape(tensor: torch.Tensor) -> torch.Tensor:
    """Give a tensor of the shape that a weight has when it is whole."""
    shape = getattr(tensor, "ds_shape", tensor.shape)  # only ZeRO-3's weights have it
    return torch.empty(tuple(shape), device="meta")


def read_settings(run: RunConfig) -> dict[str, Any]:
    """Give DeepSpeed's settings: ZeRO-2, under those of `run.deepspeed_config`, under what the recipe decides.

    Raises:
        ConfigError: no such file, no JSON, or a setting that the recipe decides.
    """
    settings: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    if isinstance(run.deepspeed_config, dict):  # what it says of the recipe's keys was read with them
        taken = (*DECIDED_HERE, "optimizer", "scheduler", "bf16")
        settings |= {name: value for name, value in run.deepspeed_config.items() if name not in taken}
    elif run.deepspeed_config is not None:
        path = Path(run.deepspeed_config)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"run.deepspeed_config {path}: cannot be read as JSON: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"run.deepspeed_config {path}: holds {shown(found)}; an object is expected.")
        settings |= found
        if _is_on(settings.pop("bf16", None)):
            raise ConfigError(f"{path}: bf16 is a key of the recipe: take it out, and set run.amp=true.")
        for name in (*DECIDED_HERE, "optimizer", "scheduler"):
            if settings.get(name, "auto") != "auto":
                raise ConfigError(
                    f"{path}: {name} follows from the recipe (batch_size_train, accum_grad_iters, max_grad_norm, "
                    'init_lr and others of `run:`); take it out, or set it to "auto".'
                )
            settings.pop(name, None)
    if _is_on(settings.pop("fp16", None)):
        raise ConfigError(
            "run.deepspeed_config: fp16 is on, and a run with deepspeed computes in bfloat16 (run.amp=true) or "
            "float32; take it out."
        )
    return settings | {
        "train_micro_batch_size_per_gpu": run.batch_size_train,
        "gradient_accumulation_steps": 1,  # the runner says where a step ends
        "gradient_clipping": run.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _is_on(section: Any) -> bool:
    """Say whether DeepSpeed's `fp16` or `bf16` is asked for; "auto" leaves it to the recipe."""
    return isinstance(section, dict) and section.get("enabled") is True
