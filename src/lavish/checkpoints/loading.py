"""Stream a checkpoint into a network that stands on the meta device.

Names, shapes and counts are checked before the first weight is read; then the files are taken one after the other and
each tensor goes straight to its dtype and device, so that memory peaks at the weights plus one shard. Unlike
`from_pretrained`, nothing is re-initialised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from lavish.checkpoints.rules import Optional, Rule, matches, plan
from lavish.checkpoints.tensor_map import TensorMap
from lavish.common.errors import CheckpointError, MissingKeys, ShapeMismatch, UnexpectedKeys, did_you_mean

ONE_THREAD_NUMEL = 32_000
"""Below at::internal::GRAIN_SIZE (32768), from which on torch splits a copy among its threads."""


@dataclass(frozen=True)
class Cut:
    """The part of a stored tensor that one process of several keeps."""

    dim: int
    spans: tuple[tuple[int, int], ...]
    """(start, stop) along `dim`, in the order in which they lie in the part."""
    whole: tuple[int, ...]
    """Shape of the stored tensor."""

    def take(self, stored: torch.Tensor) -> torch.Tensor:
        """Cut the part out; of a memory-mapped tensor only its own pages are read."""
        parts = [stored.narrow(self.dim, start, stop - start) for start, stop in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)


def load_into(
    module: nn.Module,
    tensors: TensorMap,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device,
    rules: Sequence[Rule] = (),
    keep_dtype: Iterable[str] = (),
    cuts: Mapping[str, Cut] = MappingProxyType({}),
) -> list[str]:
    """Replace every parameter and persistent buffer of `module` by the checkpoint's tensor.

    Floating-point tensors are cast to `dtype` (None: as stored), as a cast of the whole model would do, persistent
    buffers included: a stored `inv_freq` keeps its rounding. Names that match `keep_dtype` (`*` is one dotted part)
    keep the stored dtype. Parameters that the module ties stay tied. Each tensor is copied out of the file, which may
    be overwritten or deleted afterwards. Of a name in `cuts` the module holds a part, and only that is read.

    Returns the names of what is left on the meta device, which the network has to compute itself: absent tensors that
    a rule calls `Optional`, and buffers that no file stores.

    Raises:
        MissingKeys, UnexpectedKeys, ShapeMismatch: checkpoint and module differ.
        CheckpointError: a tensor cannot be cast to `dtype`, or tied parameters differ in the file.
    """
    device = torch.device(device)
    keep_dtype = tuple(keep_dtype)
    targets = {
        name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)
    }
    sources = plan(tensors, rules).sources
    tied = _tied(targets)
    _check_names(module, targets, tied, tensors, sources, rules)
    _check_shapes(targets, tensors, sources, cuts)

    placed: dict[str, torch.Tensor] = {}  # by the first name of a tied group
    for file, names in _by_file(tensors, sources).items():
        mapped = tensors.open(file)
        for name in names:
            info = tensors.info(sources[name])
            cast_to = None if matches(keep_dtype, name) else dtype
            stored = mapped.tensor(info)
            if name in cuts:
                stored = cuts[name].take(stored)
            value = _place(f"{file}: {sources[name]!r}", stored, cast_to, device)
            mapped.forget(info)
            if tied[name] not in placed:
                placed[tied[name]] = _as_target(targets[name], value)
            elif device.type != "meta" and not torch.equal(placed[tied[name]].detach(), value):
                raise CheckpointError(
                    f"{tensors.path}: {name!r} and {tied[name]!r} differ, but this {_called(module)} ties them."
                )
        del mapped
    for name in targets:
        if tied[name] in placed:
            _assign(module, name, placed[tied[name]])
    everything = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, value in everything if value.is_meta and device.type != "meta"]


def _called(module: nn.Module) -> str:
    return type(module).__name__


def _tied(targets: dict[str, torch.Tensor]) -> dict[str, str]:
    """Give each name the first name under which the same parameter stands."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in targets.items()}


def _check_names(
    module: nn.Module,
    targets: dict[str, torch.Tensor],
    tied: dict[str, str],
    tensors: TensorMap,
    sources: dict[str, str],
    rules: Sequence[Rule],
) -> None:
    given = {tied[name] for name in sources if name in targets}
    optional = [rule.target for rule in rules if isinstance(rule, Optional)]
    missing = [name for name in targets if tied[name] not in given and not matches(optional, name)]
    unexpected = [name for name in sources if name not in targets]
    if missing:
        near = did_you_mean(missing[0], [sources[name] for name in unexpected])
        raise MissingKeys(
            f"{tensors.path}: {len(missing)} of {len(targets)} tensors that this {_called(module)} needs are absent, "
            f"first {missing[0]!r}.{near}{tensors.shards_sentence() or _found(tensors)}"
        )
    if unexpected:
        source = sources[unexpected[0]]
        raise UnexpectedKeys(
            f"{tensors.path}: {len(unexpected)} of {len(tensors)} tensors have no place in this "
            f"{_called(module)}, first {source!r} "
            f"in {tensors.info(source).file.name}.{did_you_mean(unexpected[0], targets)} Do config and weights "
            "belong together?"
        )


def _found(tensors: TensorMap) -> str:
    return f" Found: {len(tensors)} tensors in {', '.join(file.name for file in tensors.files[:4]) or 'no file'}."


def _check_shapes(
    targets: dict[str, torch.Tensor], tensors: TensorMap, sources: dict[str, str], cuts: Mapping[str, Cut]
) -> None:
    expected = {name: cuts[name].whole if name in cuts else tuple(targets[name].shape) for name in sources}
    wrong = [name for name in sources if tensors.info(sources[name]).shape != expected[name]]
    if wrong:
        info = tensors.info(sources[wrong[0]])
        raise ShapeMismatch(
            f"{tensors.path}: {len(wrong)} of {len(targets)} tensors have another shape than the config says, "
            f"first {sources[wrong[0]]!r}: "
            f"{info.shape} in {info.file.name}, {expected[wrong[0]]} by the config. Do config and "
            "weights belong together?"
        )
    for name, source in sources.items():
        stored = tensors.meta(source)[1]
        if stored.is_floating_point != targets[name].is_floating_point():
            raise CheckpointError(
                f"{tensors.path}: {source!r} is stored as {tensors.info(source).dtype} where the network has "
                f"{targets[name].dtype}: "
                "weights that another program quantised. Fetch the unquantised release."
            )


def _by_file(tensors: TensorMap, sources: dict[str, str]) -> dict[Path, list[str]]:
    """Group target names by file, each in the order in which the file holds them: the disk is read forwards."""
    files: dict[Path, list[str]] = {}
    for name in sorted(
        sources, key=lambda name: (tensors.info(sources[name]).file, tensors.info(sources[name]).offset)
    ):
        files.setdefault(tensors.info(sources[name]).file, []).append(name)
    return files


def _place(what: str, stored: torch.Tensor, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
    """Copy a view of the file to the device and cast it there; on the CPU and for float64, which not every device has,
    cast first."""
    cast_to = dtype if dtype is not None and stored.is_floating_point() else stored.dtype
    if device.type == "cpu" or stored.dtype == torch.float64:
        value = _copy(stored, cast_to).to(device)
    else:
        value = stored.to(device).to(cast_to).contiguous()
    if cast_to == torch.float16 and stored.dtype != torch.float16 and device.type != "meta":
        overflow = value.isinf().any() and not stored.isinf().any()
        if overflow:
            raise CheckpointError(
                f"{what} is too large for float16 (stored as {stored.dtype}); load as bfloat16 or float32."
            )
    return value


def _copy(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Copy and cast with one thread, contiguous.

    torch's threads wait for each other at the end of every tensor: on busy cores that was 20 times slower.
    """
    value = torch.empty(stored.shape, dtype=dtype)
    to, source = value.view(-1), stored.reshape(-1)
    if stored.dtype == dtype:
        to.view(torch.uint8).numpy()[:] = source.view(torch.uint8).numpy()
    else:
        for part, source_part in zip(to.split(ONE_THREAD_NUMEL), source.split(ONE_THREAD_NUMEL), strict=True):
            part.copy_(source_part)
    return value


def _as_target(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(value, requires_grad=target.requires_grad) if isinstance(target, nn.Parameter) else value


def _assign(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(
        module.get_submodule(owner), leaf, value
    )  # nn.Module files it as the parameter or buffer that has this name
