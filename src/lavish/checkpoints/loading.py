"""Stream a checkpoint into a network that stands on the meta device.

Names, shapes and counts are checked before the first weight is read; then the files are taken one after the other and
each tensor goes straight to its dtype and device, so that memory peaks at the weights plus one shard. Unlike
`from_pretrained`, nothing is re-initialised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from lavish.checkpoints.rules import Joined, Optional, Plan, Rule, matches, plan, without_surplus
from lavish.checkpoints.tensor_map import Assembled, MappedFile, Stored, TensorMap, view
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

    def assemble(self, tensors: TensorMap, info: Assembled) -> torch.Tensor:
        """Put the part together from the pieces that hold it; of the others nothing is read."""
        parts = [tensors.assemble(view(info, self.dim, start, stop)) for start, stop in self.spans]
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
    place: Callable[[str], torch.device] | None = None,
) -> list[str]:
    """Replace every parameter and persistent buffer of `module` by the checkpoint's tensor.

    Floating-point tensors are cast to `dtype` (None: as stored), as a cast of the whole model would do, persistent
    buffers included: a stored `inv_freq` keeps its rounding. Names that match `keep_dtype` (`*` is one dotted part)
    keep the stored dtype. Parameters that the module ties stay tied. Each tensor is copied out of the file, which may
    be overwritten or deleted afterwards. Of a name in `cuts` the module holds a part, and only that is read. `place`
    gives the device of each name instead of `device`.

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
    places = without_surplus(plan(tensors, rules), targets, rules)
    sources = places.sources
    tied = _tied(targets)
    _check_names(module, targets, tied, tensors, sources, rules)
    _check_shapes(targets, tensors, places, cuts)

    placed: dict[str, torch.Tensor] = {}  # by the first name of a tied group
    for file, names in _by_file(tensors, sources).items():
        mapped = tensors.open(file)
        for name in names:
            cast_to = None if matches(keep_dtype, name) else dtype
            target = device if place is None else place(name)
            what = f"{file}: {sources[name]!r}"
            info = None if name in places.joined else stored_info(tensors, places, name)
            if isinstance(info, Assembled):
                stored = tensors.assemble(info) if name not in cuts else cuts[name].assemble(tensors, info)
                value = _place(what, stored, cast_to, target, is_own=True)
            else:
                stored = mapped.tensor(info) if info is not None else read_joined(tensors, places.joined[name])
                if name in cuts:
                    stored = cuts[name].take(stored)
                value = _place(what, stored, cast_to, target)
                if info is not None:
                    mapped.forget(info)
            if tied[name] not in placed:
                placed[tied[name]] = _as_target(targets[name], value)
            elif device.type != "meta" and not _are_equal(placed[tied[name]], value):
                raise CheckpointError(
                    f"{tensors.path}: {name!r} and {tied[name]!r} differ, but this {_called(module)} ties them."
                )
        del mapped
    for name in targets:
        if tied[name] in placed:
            _assign(module, name, placed[tied[name]])
    everything = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, value in everything if value.is_meta and device.type != "meta"]


def stored_info(tensors: TensorMap, places: Plan, target: str) -> Stored:
    """Say where the tensor lies that becomes `target`: a whole stored tensor, or a part of one as a view of the file.

    Raises:
        ShapeMismatch: the stored tensor does not divide into the parts of a `Split`.
    """
    source = places.sources[target]
    info, part = tensors.info(source), places.parts.get(target)
    if part is None:
        return info
    span = part.span(info.shape)
    if span is None:
        raise ShapeMismatch(
            f"{tensors.path}: {source!r} is {info.shape} in {info.file.name} and becomes "
            f"{part.num_parts} parts of {part.sizes or 'equal size'} along dimension {part.dim}, first {target!r}."
        )
    return view(info, part.dim, *span)


def rearrange(tensors: Mapping[str, torch.Tensor], rules: Sequence[Rule]) -> dict[str, torch.Tensor]:
    """Rename, split and merge tensors that are in memory: views where a view does.

    Raises:
        CheckpointError: as `plan`; ShapeMismatch: a tensor does not divide, or parts do not fit each other.
    """
    places = plan(tensors, rules)
    made: dict[str, torch.Tensor] = {}
    for target, source in places.sources.items():
        value = tensors[source]
        if target in places.joined:
            joined = places.joined[target]
            made[target] = _joined_tensor(source, [None if n is None else tensors[n] for n in joined.names], joined)
        elif part := places.parts.get(target):
            span = part.span(value.shape)
            if span is None:
                raise ShapeMismatch(f"{source!r} is {tuple(value.shape)}; it does not divide: {part}.")
            made[target] = value.narrow(part.dim, span[0], span[1] - span[0])
        else:
            made[target] = value
    return made


def read_joined(tensors: TensorMap, joined: Joined) -> torch.Tensor:
    """Read the parts of a merged tensor, each from its own file.

    Raises:
        ShapeMismatch: they do not fit each other.
    """
    parts: list[torch.Tensor | None] = []
    maps: list[MappedFile] = []
    for name in joined.names:
        if name is None:
            parts.append(None)
            continue
        info = tensors.info(name)
        if isinstance(info, Assembled):
            parts.append(tensors.assemble(info))
            continue
        maps.append(tensors.open(info.file))
        parts.append(maps[-1].tensor(info))
    return _joined_tensor(next(name for name in joined.names if name is not None), parts, joined)


def _joined_tensor(what: str, parts: Sequence[torch.Tensor | None], joined: Joined) -> torch.Tensor:
    shapes = [None if part is None else tuple(part.shape) for part in parts]
    if _joined_shape(shapes, joined) is None:
        raise ShapeMismatch(f"{what!r} and the tensors to lay behind it along {joined.dim} do not fit: {shapes}.")
    model = next(part for part in parts if part is not None)
    filled: list[torch.Tensor] = []
    for index, part in enumerate(parts):
        if part is None:
            shape = list(model.shape)
            shape[joined.dim] = joined.sizes[index] if joined.sizes else shape[joined.dim]
            part = model.new_zeros(shape)
        filled.append(part)
    return torch.cat(filled, dim=joined.dim)


def _joined_shape(shapes: Sequence[tuple[int, ...] | None], joined: Joined) -> tuple[int, ...] | None:
    """Give the shape of the parts behind each other; None where they do not fit."""
    model = next(shape for shape in shapes if shape is not None)
    if joined.dim >= len(model):
        return None
    lengths: list[int] = []
    for index, shape in enumerate(shapes):
        here = shape or model
        if shape is None and joined.sizes:
            here = tuple(joined.sizes[index] if dim == joined.dim else size for dim, size in enumerate(model))
        rest = [size for dim, size in enumerate(here) if dim != joined.dim]
        if rest != [size for dim, size in enumerate(model) if dim != joined.dim]:
            return None
        if joined.sizes and here[joined.dim] != joined.sizes[index]:
            return None
        if not joined.sizes and here[joined.dim] != model[joined.dim]:
            return None  # equal parts, as `Split` cuts them; else the way back would cut elsewhere
        lengths.append(here[joined.dim])
    return tuple(sum(lengths) if dim == joined.dim else size for dim, size in enumerate(model))


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.detach(), other.to(one.device))


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


def _check_shapes(targets: dict[str, torch.Tensor], tensors: TensorMap, places: Plan, cuts: Mapping[str, Cut]) -> None:
    sources = places.sources
    expected = {name: cuts[name].whole if name in cuts else tuple(targets[name].shape) for name in sources}
    found = {name: stored_shape(tensors, places, name) for name in sources}
    wrong = [name for name in sources if found[name] != expected[name]]
    if wrong:
        info = tensors.info(sources[wrong[0]])
        raise ShapeMismatch(
            f"{tensors.path}: {len(wrong)} of {len(targets)} tensors have another shape than the config says, "
            f"first {sources[wrong[0]]!r}{_which(places, wrong[0])}: "
            f"{found[wrong[0]]} in {info.file.name}, {expected[wrong[0]]} by the config. Do config and "
            "weights belong together?"
        )
    for name in sources:
        for source in _all_sources(places, name):
            stored = tensors.meta(source)[1]
            if stored.is_floating_point != targets[name].is_floating_point():
                raise CheckpointError(
                    f"{tensors.path}: {source!r} is stored as {tensors.info(source).dtype} where the network has "
                    f"{targets[name].dtype}: "
                    "weights that another program quantised. Fetch the unquantised release."
                )


def stored_shape(tensors: TensorMap, places: Plan, name: str) -> tuple[int, ...]:
    """Give the shape of the tensor that becomes `name`, by the headers.

    Raises:
        ShapeMismatch: a tensor does not divide, or parts do not fit each other.
    """
    if name not in places.joined:
        return stored_info(tensors, places, name).shape
    joined = places.joined[name]
    shapes = [None if source is None else tensors.info(source).shape for source in joined.names]
    shape = _joined_shape(shapes, joined)
    if shape is None:
        raise ShapeMismatch(
            f"{tensors.path}: {places.sources[name]!r} and the tensors to lay behind it along dimension {joined.dim} "
            f"as {name!r} do not fit each other: {shapes}."
        )
    return shape


def _all_sources(places: Plan, name: str) -> list[str]:
    if name in places.joined:
        return [source for source in places.joined[name].names if source is not None]
    return [places.sources[name]]


def _which(places: Plan, name: str) -> str:
    if name in places.joined:
        return f" with {len(places.joined[name].names) - 1} behind it"
    part = places.parts.get(name)
    return "" if part is None else f", part {part.index + 1} of {part.num_parts}"


def _by_file(tensors: TensorMap, sources: dict[str, str]) -> dict[Path, list[str]]:
    """Group target names by file, each in the order in which the file holds them: the disk is read forwards."""
    files: dict[Path, list[str]] = {}
    for name in sorted(
        sources, key=lambda name: (tensors.info(sources[name]).file, tensors.info(sources[name]).offset)
    ):
        files.setdefault(tensors.info(sources[name]).file, []).append(name)
    return files


def _place(
    what: str, stored: torch.Tensor, dtype: torch.dtype | None, device: torch.device, *, is_own: bool = False
) -> torch.Tensor:
    """Copy a view of the file to the device and cast it there; on the CPU and for float64, which not every device has,
    cast first. A tensor that is its `own` memory and no view needs no copy."""
    cast_to = dtype if dtype is not None and stored.is_floating_point() else stored.dtype
    if is_own and stored.dtype == cast_to:
        value = stored.to(device)
    elif device.type == "cpu" or stored.dtype == torch.float64:
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
