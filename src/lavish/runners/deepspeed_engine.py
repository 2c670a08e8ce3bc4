"""Training by DeepSpeed's ZeRO: 1 shares the optimizer's state, 2 gradients too, 3 weights too (needs `deepspeed`).

Weights and optimizer states are gathered for checkpoints, so that any engine reads them. The optimizer is torch's AdamW
with the runner's groups; DeepSpeed's own one hangs on CPUs.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn

from lavish.common import dist
from lavish.common.errors import ConfigError, MissingDependency
from lavish.runners.engines import MODEL_FILE, BuildOptimizer, Engine, Mismatch, check_names, trained
from lavish.runners.optim import OptimizerGroup
from lavish.runners.schema import RunConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
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
        """Update the parameters, and drop the gradients."""
        self.engine.step()

    def zero_grad(self) -> None:
        """Nothing: `step` has dropped them."""


class DeepSpeedEngine(Engine):
    """Several processes with shares of a training.

    Raises:
        MissingDependency: deepspeed is not installed.
        ConfigError: settings that cannot be read, or Muon.
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
        self.settings = read_settings(run)
        self.called: Any = None
        self.zero: Any = None
        self.moments: Any = None
        self.groups: list[dict[str, Any]] = []
        """The optimizer's groups as they were built: ZeRO puts its own tensors into them."""

    def start(self, model: nn.Module, build: BuildOptimizer) -> tuple[nn.Module, OptimizerGroup]:
        """Give the module to DeepSpeed."""
        import deepspeed  # pyright: ignore[reportMissingImports]

        model = model.to(self.device)
        (optimizer,) = build(model).optimizers
        for group in optimizer.param_groups:
            settings = {name: value for name, value in group.items() if name != "params"}
            self.groups.append({"params": list(group["params"]), "settings": settings})
        self.called, wrapped, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.settings, dist_init_required=False
        )
        self.zero, self.moments = wrapped, optimizer
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

    def fill(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Put whole weights where each process has its share."""
        from deepspeed.utils import safe_set_full_fp32_param  # pyright: ignore[reportMissingImports]

        expected = trained(model)
        check_names({name: _whole_shape(one) for name, one in expected.items()}, tensors)
        for name, tensor in tensors.items():
            if isinstance(expected[name], nn.Parameter):
                safe_set_full_fp32_param(expected[name], tensor.to(self.device).float())
            else:
                expected[name].copy_(tensor)

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
        is_stage_3 = hasattr(self.zero, "fp32_partitioned_groups_flat")  # of ZeRO-3's optimizer alone
        partitions = self.zero.fp32_partitioned_groups_flat if is_stage_3 else self.zero.single_partition_of_fp32_groups
        for partition in partitions:
            if not self.moments.state.get(partition):
                moments = {kind: torch.zeros_like(partition) for kind in MOMENTS}
                self.moments.state[partition] = {"step": torch.tensor(0.0), **moments}
        if not is_stage_3:
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
        from deepspeed.utils import safe_set_full_optimizer_state  # pyright: ignore[reportMissingImports]

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
                    safe_set_full_optimizer_state(parameter, moments[kind].to(self.device).float(), kind)
        for moments in self.moments.state.values():
            moments["step"] = torch.tensor(float(steps))
        self.called.global_steps = steps


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
        taken = (*DECIDED_HERE, "optimizer", "scheduler", "fp16", "bf16")
        settings |= {name: value for name, value in run.deepspeed_config.items() if name not in taken}
    elif run.deepspeed_config is not None:
        path = Path(run.deepspeed_config)
        try:
            settings |= json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"run.deepspeed_config {path}: cannot be read as JSON: {error}") from error
        for name in (*DECIDED_HERE, "optimizer", "scheduler"):
            if settings.get(name, "auto") != "auto":
                raise ConfigError(
                    f"{path}: {name} follows from the recipe (batch_size_train, accum_grad_iters, max_grad_norm, "
                    'init_lr and others of `run:`); take it out, or set it to "auto".'
                )
            settings.pop(name, None)
    return settings | {
        "train_micro_batch_size_per_gpu": run.batch_size_train,
        "gradient_accumulation_steps": 1,  # the runner says where a step ends
        "gradient_clipping": run.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
