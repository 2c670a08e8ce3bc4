"""One network on several devices of one process: each block lies on one of them, and accelerate's hooks move what goes
from one block to the next.

A block (a decoder layer, a whole tower, the Q-Former, the projector, the embedding table) is never cut: inside one,
weights meet that no hook would bring together. Blocks on "cpu" beside a GPU, or on "disk", hold no memory of the GPU;
their weights come for each pass, which is slow. For speed on several GPUs there is parallel.py.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from lavish.checkpoints.loading import load_into
from lavish.checkpoints.placement import resolve_device
from lavish.checkpoints.tensor_map import TensorMap
from lavish.common.errors import ConfigError, MissingDependency, did_you_mean, shown
from lavish.models import Family

DISK = "disk"
DeviceMap = dict[str, torch.device | str]
"""Prefix of parameter names -> device, or "disk"."""
HEADROOM = 1.25
"""Memory that a network needs beside its weights on a single GPU: caches, and what a pass holds."""


def plan_for(
    family: Family, config: Any, dtype: torch.dtype, *, device: Any, device_map: Any, is_quantized: bool, pack: Any
) -> DeviceMap | None:
    """Give the devices of a network's blocks if it goes to several: a `device_map` asks for it, or device="auto" finds
    several GPUs and a network too large for the first. None: one device takes all.

    Raises:
        ConfigError: a device map beside a device, quantisation or packing, or as `plan`.
    """
    if device_map is None:
        if device != "auto" or is_quantized or torch.cuda.device_count() < 2:
            return None
        network = _on_meta(family, config)
        return plan(network, family, dtype, None) if _is_too_large(network, dtype) else None
    against = f"device={str(device)!r}" if device != "auto" else "pack=True" if pack is True else None
    if against is None and is_quantized:
        against = "a quantised network"
    if against is not None:
        raise ConfigError(f"device_map= and {against} contradict each other; give one of them.")
    return plan(_on_meta(family, config), family, dtype, device_map)


def load_split(
    family: Family, config: Any, tensors: TensorMap, device_map: DeviceMap, *, dtype: torch.dtype
) -> PreTrainedModel:
    """Load each block to its device. `dispatch` comes when all is loaded, adapters too.

    Raises: as `load_into`, before the first weight is read.
    """
    network = _on_meta(family, config)
    main = main_device(device_map)
    left = load_into(network, tensors, dtype=dtype, device=main, rules=family.rules, place=placement(device_map))
    family.complete(network, left)
    config.dtype = dtype
    return network.eval()


def plan(network: nn.Module, family: Family, dtype: torch.dtype, device_map: Any) -> DeviceMap:
    """Give each block of a network (on meta) its device. None and "auto" fill all GPUs evenly, then the CPU.

    Raises:
        ConfigError: a map that cuts a block, leaves one out, names what is not there, or does not keep the embedding
            table on a device; or too little memory in all.
        MissingDependency: accelerate is not installed.
    """
    check_accelerate()
    units = blocks(network, family)
    if device_map is None or device_map == "auto":
        found = _planned(network, units, dtype)
    elif isinstance(device_map, Mapping):
        found = {unit: _asked(unit, device_map) for unit in units}
        if unused := [name for name in device_map if not any(_is_under(unit, str(name)) for unit in units)]:
            inside = next((unit for unit in units if _is_under(str(unused[0]), unit)), None)
            why = f"cuts the block {inside!r}" if inside else f"is no part of it.{did_you_mean(str(unused[0]), units)}"
            raise ConfigError(f"device_map: {shown(unused[0])} {why} Blocks: {', '.join(units)}.")
    else:
        raise ConfigError(f"device_map must be 'auto' or a dict of names and devices, not {shown(device_map)}.")
    _check_kept(network, found)
    return found


def blocks(network: nn.Module, family: Family) -> list[str]:
    """Name what stays together, in the order in which a pass goes through it, tower first."""
    kinds = set(getattr(network, "_no_split_modules", None) or ())  # transformers' classes have it, and may say None
    towers = [name.removesuffix(".") for name in family.towers]
    units: dict[str, None] = {}

    def visit(prefix: str, module: nn.Module) -> None:
        for name, _ in module.named_parameters(prefix, recurse=False):
            units[name] = None
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            is_whole = path in towers or type(child).__name__ in kinds or not any(True for _ in child.children())
            if not any(True for _ in child.state_dict()):
                continue
            if is_whole:
                units[path] = None
            else:
                visit(path, child)

    visit("", network)
    return sorted(units, key=lambda name: name not in towers)


def placement(device_map: DeviceMap) -> Callable[[str], torch.device]:
    """Give the device on which a parameter is loaded; for "disk" that is the CPU, from where it goes on."""

    def place(name: str) -> torch.device:
        device = next(device for unit, device in device_map.items() if _is_under(name, unit))
        return torch.device("cpu" if device == DISK else device)

    return place


def dispatch(network: Any, device_map: DeviceMap) -> None:
    """Hook a loaded network, adapters included, so that each block computes where it lies."""
    from accelerate import dispatch_model

    if hasattr(network, "get_base_model"):  # a PeftModel replaces layers inside the network
        network = network.get_base_model()
    folder = None
    if DISK in device_map.values():
        folder = tempfile.mkdtemp(prefix="lavish-")
        weakref.finalize(network, shutil.rmtree, folder, ignore_errors=True)
    with warnings.catch_warnings():
        # A parameter of the network itself is in no module; accelerate puts it on the main device.
        warnings.filterwarnings("ignore", message="The following device_map keys do not match any submodules")
        dispatch_model(
            network,
            {name: str(device) for name, device in device_map.items()},
            main_device=cast(Any, str(main_device(device_map))),  # a name, as in the map
            offload_dir=folder,
            skip_keys=network._skip_keys_device_placement,
            force_hooks=True,
        )


def main_device(device_map: DeviceMap) -> torch.device:
    """Give where inputs go, and where offloaded blocks are computed: the first GPU of the map, else the CPU."""
    kept = [torch.device(device) for device in device_map.values() if device != DISK]
    return next((device for device in kept if device.type != "cpu"), torch.device("cpu"))


def check_accelerate() -> None:
    """Check that accelerate is there.

    Raises:
        MissingDependency: it is not.
    """
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "A network on several devices needs accelerate, which is not installed: pip install 'lavish[train]'. "
            "Or name one device, such as device='cuda:0'."
        ) from error


def _on_meta(family: Family, config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return family.model_class(config)


def _is_too_large(network: nn.Module, dtype: torch.dtype) -> bool:
    return HEADROOM * _num_bytes(network, dtype) > torch.cuda.mem_get_info(0)[0]


def _planned(network: nn.Module, units: list[str], dtype: torch.dtype) -> DeviceMap:
    """Fill the devices one after the other, each GPU up to its share: the order of the blocks is that of a pass."""
    from accelerate.utils import get_max_memory

    memory = get_max_memory()
    gpus = [index for index in memory if isinstance(index, int)]
    if not gpus:
        return dict.fromkeys(units, torch.device("cpu"))
    sizes = {unit: _unit_bytes(network, unit, dtype) for unit in units}
    usable = {index: memory[index] / HEADROOM for index in gpus}
    share = max(sum(sizes.values()) / len(gpus) + max(sizes.values()) / 2, 1)
    left = {index: min(usable[index], share) for index in gpus}
    found: DeviceMap = {}
    place = 0
    first = sorted(units, key=lambda unit: not _is_embedding(network, unit))  # inputs go where it is: never offloaded
    for unit in first:
        while place < len(gpus) and sizes[unit] > left[gpus[place]]:
            place += 1
        if place == len(gpus):
            found[unit] = torch.device("cpu")
            continue
        left[gpus[place]] -= sizes[unit]
        found[unit] = torch.device("cuda", gpus[place])
    needed = sum(sizes[unit] for unit, device in found.items() if device == torch.device("cpu"))
    if needed > memory["cpu"]:
        raise ConfigError(
            f"The weights take {sum(sizes.values()) / 1e9:.1f} GB, and the {len(gpus)} GPUs and the CPU have "
            f"{(sum(usable.values()) + memory['cpu']) / 1e9:.1f} GB left. Quantise them, or give a device_map with "
            "'disk'."
        )
    return found


def _asked(unit: str, device_map: Mapping[Any, Any]) -> torch.device | str:
    """Give the device of a block by the longest name of a map that it lies under."""
    names = sorted((str(name) for name in device_map if _is_under(unit, str(name))), key=len)
    if not names:
        raise ConfigError(f"device_map says nothing of {unit!r}. A name '' is for all that has no other.")
    device = device_map[names[-1]]
    if device == DISK:
        return DISK
    found = resolve_device(f"cuda:{device}" if isinstance(device, int) else device)
    return torch.device("cuda", 0) if found == torch.device("cuda") else found


def _check_kept(network: nn.Module, device_map: DeviceMap) -> None:
    """Refuse to offload the table of the ids, whose device tells where inputs go, and parameters without a module."""
    main = main_device(device_map)
    for unit, device in device_map.items():
        is_offloaded = device == DISK or (device == torch.device("cpu") and main.type != "cpu")
        is_alone = not isinstance(_found(network, unit), nn.Module)
        if is_offloaded and (is_alone or _is_embedding(network, unit)):
            raise ConfigError(f"device_map puts {unit!r} on {str(device)!r}; it has to be on a device that computes.")


def _is_embedding(network: Any, unit: str) -> bool:
    found = _found(network, unit)
    return found is network.get_input_embeddings() or not isinstance(found, nn.Module)


def _found(network: nn.Module, unit: str) -> Any:
    owner, _, leaf = unit.rpartition(".")
    return getattr(network.get_submodule(owner), leaf)


def _is_under(name: str, prefix: str) -> bool:
    return prefix in ("", name) or name.startswith(f"{prefix}.")


def _unit_bytes(network: nn.Module, unit: str, dtype: torch.dtype) -> int:
    found = _found(network, unit)
    return _num_bytes(found, dtype) if isinstance(found, nn.Module) else found.numel() * dtype.itemsize


def _num_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize
