"""How a module is trained by one process or by several: alone, as copies (DDP), in shares (FSDP2), or by DeepSpeed.

An engine wraps the module, says when gradients are exchanged, and writes and reads what a checkpoint holds of weights
and optimizer. What one engine wrote another reads, at any number of processes.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from lavish.common import dist
from lavish.common.errors import CheckpointError, ConfigError
from lavish.runners.optim import OptimizerGroup
from lavish.runners.schema import RunConfig

MODEL_FILE, SHARDS = "model.safetensors", "shards"
CALLED_BESIDES_FORWARD = ("generate", "predict_answers", "predict_class", "extract_features", "predict", "rank_answers")
"""Methods of registered models that compute with the weights, as `forward` does."""


BuildOptimizer = Callable[[nn.Module], OptimizerGroup]


class Mismatch(ValueError):
    """A whole checkpoint of something else than what is trained."""

    def __init__(self, what: str, why: object):
        super().__init__(" ".join(str(why).split()))
        self.what = what


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Give what a checkpoint keeps of a module: the trained weights, a tied one once, and the buffers.

    Frozen weights are those that the run started from, and stay out.
    """
    buffers = model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found: dict[str, torch.Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return found | {name: tensor for name, tensor in model.named_buffers() if name in buffers}


class Engine:
    """One process with one device."""

    shares_weights = False

    def __init__(self, run: RunConfig, device: torch.device):
        self.run, self.device = run, device

    def start(self, model: nn.Module, build: BuildOptimizer) -> tuple[nn.Module, OptimizerGroup]:
        """Put the module where it is trained; give what is called in its place, and the optimizer of its weights."""
        called = self.prepare(model)
        return called, build(model)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Put the module where it is trained, and give what is called in its place."""
        return model.to(self.device)

    def scaler(self, *, is_half: bool) -> torch.amp.GradScaler:
        """Give what scales the loss of a pass in float16; without one of float16 it changes nothing.

        Raises:
            ConfigError: weights are shared, where one process would not know of the overflows of another.
        """
        if is_half and self.shares_weights:
            raise ConfigError(f"run.engine {self.run.engine} computes in bfloat16 or float32, not float16; use ddp.")
        return torch.amp.GradScaler(self.device.type, enabled=is_half)

    @property
    def loss_scale(self) -> float:
        """What a process multiplies its share of the loss with: gradients are averaged, and are to be added up."""
        return float(dist.world_size())

    def accumulate(self, module: nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
        """Give the context of a forward and backward pass; gradients are exchanged in the last one of a step."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients of a pass."""
        loss.backward()

    def clip(self, model: nn.Module, max_norm: float) -> float | None:
        """Clip the gradients to a norm over all of them, and give what it was; None where it is not known yet."""
        from torch.distributed.tensor import DTensor

        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def full(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give a weight whole, in every process."""
        return tensor.detach()

    def share(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Give this process's part of a whole tensor, as that of `like`."""
        return whole

    def fill(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Copy whole weights into the module.

        Raises:
            Mismatch: they are of another one.
        """
        fill(model, tensors)

    def settle(self, model: nn.Module) -> None:
        """Let go what a forward pass without a backward pass has gathered; weights may be read and written then."""

    def holding(self, model: nn.Module) -> list[torch.Tensor]:
        """Give what this process holds of the weights that learn."""
        return [weight for weight in model.parameters() if weight.requires_grad]

    @contextmanager
    def kept(self, model: nn.Module) -> Iterator[None]:
        """Put the weights back that learn, after others were filled in for a while."""
        before = [tensor.detach().clone() for tensor in self.holding(model)]
        yield
        for tensor, value in zip(self.holding(model), before, strict=True):
            if tensor.shape == value.shape:
                tensor.detach().copy_(value)

    def make_whole(self, model: nn.Module) -> None:
        """Put whole weights into the module of the main process, at the end of a run; all processes call it."""

    # -- checkpoints

    def save(self, folder: Path, model: nn.Module, optimizer: OptimizerGroup) -> dict[str, Any]:
        """Write the weights into a checkpoint's folder, and give the optimizer's state; all processes call it."""
        if dist.is_main():
            tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in trained(model).items()}
            save_file(tensors, folder / MODEL_FILE)
        return {"optimizer": optimizer.state_dict()}

    def load(self, folder: Path, model: nn.Module, optimizer: OptimizerGroup | None, state: dict[str, Any]) -> None:
        """Take over a checkpoint of any engine; without an optimizer the weights alone.

        Raises:
            CheckpointError: damaged.
            Mismatch: of another model or optimizer.
        """
        if (folder / SHARDS).is_dir():
            load_shards(folder / SHARDS, model, optimizer)
            return
        self.fill(model, read_tensors(folder))
        if optimizer is not None:
            self.load_optimizer(model, optimizer, state["optimizer"])

    def load_optimizer(self, model: nn.Module, optimizer: OptimizerGroup, state: dict[str, Any]) -> None:
        """Take over an optimizer's whole state.

        Raises:
            Mismatch: of another optimizer.
        """
        try:
            optimizer.load_state_dict(state)
        except (ValueError, KeyError) as error:
            raise Mismatch("optimizer", f"{error}; the recipe's is {self.run.optimizer!r}.") from error


class DDPEngine(Engine):
    """Several processes with a copy of the module each; torch exchanges the gradients."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Wrap the module in DistributedDataParallel."""
        from torch.nn.parallel import DistributedDataParallel

        model = model.to(self.device)
        devices = [self.device] if self.device.type == "cuda" else None
        # A batch may leave weights unused: pictures are absent, a process has no pass of a short last step.
        return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)

    def accumulate(self, module: nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients in the last pass of a step only."""
        return nullcontext() if is_last else cast(Any, module).no_sync()


class FSDP2Engine(Engine):
    """Several processes with a share each of every weight, gradient and optimizer state (torch's `fully_shard`)."""

    shares_weights = True

    def prepare(self, model: nn.Module) -> nn.Module:
        """Share out the module: each block of its layer lists by itself, then the rest.

        Raises:
            ConfigError: Muon, which needs whole matrices.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        if self.run.optimizer == "muon":
            raise ConfigError("run.engine fsdp2 shares out matrices, and run.optimizer muon needs them whole; use ddp.")
        # Nothing here changes what a module gives in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        model = model.to(self.device)
        mesh = init_device_mesh(self.device.type, (dist.world_size(),))
        for block in _blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for name in CALLED_BESIDES_FORWARD:
            if callable(getattr(model, name, None)):  # what a model can do besides its loss differs
                register_fsdp_forward_method(model, name)
        return model

    def accumulate(self, module: nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients in the last pass of a step only."""
        cast(Any, module).set_requires_gradient_sync(is_last)
        return nullcontext()

    def full(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gather a weight from all processes, which all call it."""
        tensor = tensor.detach()
        return cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a buffer is whole

    def share(self, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Cut a whole tensor as `like` is cut."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        return distribute_tensor(whole, like.device_mesh, like.placements) if isinstance(like, DTensor) else whole

    def fill(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Copy each process's share of whole weights into its module."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        check_names(trained(model), tensors)
        set_model_state_dict(model, cast(Any, tensors), options=StateDictOptions(full_state_dict=True, strict=False))

    def settle(self, model: nn.Module) -> None:
        """Give the gathered weights back: a forward pass leaves those of the outermost module whole."""
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def make_whole(self, model: nn.Module) -> None:
        """Gather each weight in turn; the other processes keep none of it."""
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                whole = self.full(parameter)
                if dist.is_main():
                    module.register_parameter(name, nn.Parameter(whole.cpu(), parameter.requires_grad))

    def save(self, folder: Path, model: nn.Module, optimizer: OptimizerGroup) -> dict[str, Any]:
        """Write the shares of weights and optimizer with torch.distributed.checkpoint."""
        import torch.distributed.checkpoint as dcp

        dcp.save(_shared_state(model, optimizer), checkpoint_id=folder / SHARDS)
        return {}

    def load_optimizer(self, model: nn.Module, optimizer: OptimizerGroup, state: dict[str, Any]) -> None:
        """Take over this process's share of a whole state."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        try:
            named = _by_name(model, optimizer, state)
        except (ValueError, KeyError) as error:
            raise Mismatch("optimizer", f"{error}; the recipe's is {self.run.optimizer!r}.") from error
        set_optimizer_state_dict(model, optimizer.optimizers, named, options=StateDictOptions(full_state_dict=True))


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Give the layers of the outermost layer lists."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from _blocks(child)


def _shared_state(model: nn.Module, optimizer: OptimizerGroup | None) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state: dict[str, Any] = {"model": {name: tensor.detach() for name, tensor in trained(model).items()}}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer.optimizers)
    return state


def load_shards(folder: Path, model: nn.Module, optimizer: OptimizerGroup | None) -> None:
    """Fill a module, whole or shared out, and its optimizer from shares, at any number of processes.

    Raises:
        CheckpointError: damaged, or of another model.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    state = _shared_state(model, optimizer)
    try:
        with warnings.catch_warnings():  # of a single process, which is what is wanted
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(state, checkpoint_id=folder, no_dist=dist.world_size() == 1)
    except (CheckpointException, OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise CheckpointError(f"{folder}: these shares cannot be read, or are of another model: {error}") from error
    if optimizer is not None:  # the model's own tensors were filled in place
        set_optimizer_state_dict(model, optimizer.optimizers, state["optimizer"])


def _by_name(model: nn.Module, optimizer: OptimizerGroup, saved: dict[str, Any]) -> Any:
    """Give an optimizer state by the names of the parameters, as torch.distributed.checkpoint keeps it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for one, stored in zip(optimizer.optimizers, saved["optimizers"], strict=True):
        for group, stored_group in zip(one.param_groups, stored["param_groups"], strict=True):
            own = [names[id(parameter)] for parameter in group["params"]]
            groups.append({**stored_group, "params": own})
            for name, number in zip(own, stored_group["params"], strict=True):
                if number in stored["state"]:
                    state[name] = stored["state"][number]
    return {"state": state, "param_groups": groups}


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a checkpoint that was written whole.

    Raises:
        CheckpointError: absent or damaged.
    """
    try:
        return load_file(folder / MODEL_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / MODEL_FILE}: cannot be read ({error}).") from error


def check_names(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Check that weights are those of the module, and of its shapes.

    Raises:
        Mismatch: they are not.
    """
    for what, names in (("absent", expected.keys() - found.keys()), ("unknown", found.keys() - expected.keys())):
        if names:
            raise Mismatch("model", f"{len(names)} tensors are {what}, first {min(names)!r}.")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise Mismatch("model", f"{name!r} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}.")


def fill(model: nn.Module, found: dict[str, torch.Tensor]) -> None:
    """Copy weights into a module.

    Raises:
        Mismatch: they are of another module.
    """
    expected = trained(model)
    check_names(expected, found)
    with torch.no_grad():
        for name, tensor in found.items():
            expected[name].copy_(tensor)


def checkpoint_activations(model: nn.Module) -> None:
    """Let each layer compute its activations again in the backward pass, and keep only its inputs."""
    for block in _blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def build_engine(run: RunConfig, device: torch.device) -> Engine:
    """Give the engine that the recipe names.

    Raises:
        ConfigError: an engine of several processes with one.
    """
    if run.engine in ("fsdp2", "deepspeed"):
        if dist.world_size() == 1:
            raise ConfigError(
                f"run.engine {run.engine} shares weights among processes, and there is one; start it with "
                "python -m torch.distributed.run --nproc_per_node=N -m lavish train ..., or leave run.engine out."
            )
        if run.engine == "fsdp2":
            return FSDP2Engine(run, device)
        from lavish.runners.deepspeed_engine import DeepSpeedEngine  # which stands on this module

        return DeepSpeedEngine(run, device)
    if dist.world_size() > 1:
        return DDPEngine(run, device)
    return Engine(run, device)
