"""From one released layout to another: `convert`, which `lavish convert` calls.

Every conversion goes through the names of the Hugging Face release: the source's family reads its layout as those, and
the target is planned from them. Weights stream from file to file a tensor at a time; `checkpoints/output.py` writes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lavish.models as table
from lavish.checkpoints import hf, hub, sat
from lavish.checkpoints.output import (
    Output,
    TargetOptions,
    TargetPlan,
    check_destination,
    is_file_target,
    write_plan,
)
from lavish.checkpoints.placement import DTYPES
from lavish.checkpoints.rules import Optional, matches
from lavish.common.errors import CheckpointError, ConfigError, check_path, did_you_mean, shown
from lavish.inference.adapters import is_adapter
from lavish.inference.hf_target import plan_hf, tokenizer_files
from lavish.inference.lora import deltas, plan_adapter
from lavish.inference.source import Source, network_outputs, open_source

UNCOUNTED = "What was clamped before the run was stopped is not counted here; --verify counts all of it."
FILE_TARGETS = {"mindspore": ".ckpt", "lavis": ".pth"}
"""What can be one file, and by which suffix it is known again."""
TARGETS = ("hf", "sat", "lavis", "mindspore", "vlm_learning", "peft")
"""Layouts that `to=` names."""
WITH_TOKENIZER = ("hf", "sat", "mindspore")
"""Layouts into which `tokenizer=` is put: SAT and MindFormers keep it elsewhere, and lavish finds it there."""
SHARD_BYTES = 5_000_000_000
Progress = Callable[[str, int, int], None]
"""Called with "convert" or "verify", the bytes that are done and those of all."""


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    source: Path
    destination: Path
    family: str
    layout: str
    """Of the source."""
    to: str
    num_tensors: int
    num_bytes: int
    files: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]
    """Names of the source that were not written, and why."""
    made: tuple[tuple[str, str], ...]
    """Names that were written though the source has no such tensor, and why."""
    clamped: Mapping[str, int]
    """Tensors in which values were clamped, and how many."""
    notes: tuple[str, ...]
    resumed_bytes: int
    """How much a run that was stopped had written."""
    seconds: float
    is_verified: bool


@dataclass(frozen=True)
class _Job:
    """A conversion that is planned."""

    plan: TargetPlan
    family: str
    layout: str
    notes: list[str]
    source: Source | None
    files: tuple[Path, ...]
    """Weight files that are read."""


def convert(
    source: str | Path,
    destination: str | Path,
    to: str = "hf",
    *,
    dtype: str | torch.dtype | None = None,
    model_parallel: int = 1,
    max_shard_bytes: int = SHARD_BYTES,
    merge_lora: bool = False,
    verify: bool = False,
    clamp: bool = False,
    tokenizer: str | Path | None = None,
    base: str | Path | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    pieces: Mapping[str, str | Path] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a checkpoint in another layout, dtype or number of files.

    A run that is stopped leaves nothing at `destination`; the same call goes on where it ended.

    Args:
        source: any layout that `lavish.load` reads, or the folder of a PEFT adapter.
        destination: where nothing is yet: a folder, or one file of mindspore (`.ckpt`) or lavis (`.pth`).
        to: one of `TARGETS`.
        dtype: of floating-point tensors: "bf16", "fp16", "fp32"; None: as stored.
        model_parallel: ranks that the target is cut for.
        max_shard_bytes: the most bytes of tensors in a file of the Hugging Face layout.
        merge_lora: add a LoRA to the weights.
        verify: read the result back and compare it with the source, bit by bit.
        clamp: write the largest value of `dtype` in the place of those beyond it, which are an error else.
        tokenizer: folder or hub id of a tokenizer to put in, where the source has none.
        base: of a source that is an adapter; default: what it says itself.
        config: fields that the source does not record, as for `lavish.load`.
        pieces: of a release in pieces that are elsewhere, by name.
        progress: called from time to time with "convert" or "verify", bytes done and bytes of all.

    Raises:
        ConfigError: a wrong option, a destination that exists or lies in the source, or a layout that cannot hold the
            model; it says which can.
        CheckpointError: the source is not whole, values do not fit `dtype`, or what was written reads differently.
        OutputError: the disk is full.
    """
    started_s = time.monotonic()
    options = _options(dtype, model_parallel, max_shard_bytes, merge_lora, clamp)
    _check_target(to, model_parallel, merge_lora)
    if tokenizer is not None and to not in WITH_TOKENIZER:
        raise ConfigError(f"tokenizer= was given, and {to!r} has no place for one, or its own; leave it out.")
    check_path(source, "source")
    check_path(destination, "destination")
    for what, value in {"tokenizer": tokenizer, "base": base}.items():
        if value is not None:
            check_path(value, what)
    path, target = hub.resolve(source), Path(os.path.expanduser(destination))
    _check_suffix(target, to)
    _check_apart(sat.find_root(path) or path, target, *(hub.resolve(piece) for piece in (pieces or {}).values()))
    job = _plan(path, target, to, options, tokenizer, {"base": base, "config": config, "pieces": pieces})
    _check_apart(job.source.path if job.source is not None else path, target)
    asked = {"to": to, "dtype": options.dtype, "model_parallel": model_parallel, "max_shard_bytes": max_shard_bytes}
    asked |= {"merge_lora": merge_lora, "clamp": clamp, "tokenizer": None if tokenizer is None else str(tokenizer)}
    identity = {"source": str(path.resolve()), **asked, "files": [_state(file) for file in job.files]}
    tell = progress or _say_nothing
    resumed = write_plan(job.plan, target, identity=identity, progress=lambda done, total: tell("convert", done, total))
    if verify:
        _verify(job, target, to, options, tell)
    outputs = [output for file in job.plan.files for output in file.outputs]
    return Report(
        source=path,
        destination=target,
        family=job.family,
        layout=job.layout,
        to=to,
        num_tensors=len(outputs),
        num_bytes=job.plan.nbytes,
        files=tuple(file.name for file in job.plan.files),
        dropped=job.plan.dropped,
        made=job.plan.made,
        clamped=dict(options.clamped),
        notes=(*job.notes, *([UNCOUNTED] if resumed and clamp and not verify else [])),
        resumed_bytes=resumed,
        seconds=time.monotonic() - started_s,
        is_verified=verify,
    )


def _say_nothing(phase: str, done: int, total: int) -> None:
    """Take the place of a caller's progress."""


def _options(dtype: Any, model_parallel: Any, max_shard_bytes: Any, merge_lora: bool, clamp: bool) -> TargetOptions:
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    if name is not None and name not in DTYPES:
        suggestion = did_you_mean(name, DTYPES) if isinstance(name, str) else ""
        raise ConfigError(f"No dtype {shown(dtype)} to convert to.{suggestion} Known: {', '.join(DTYPES)}.")
    for what, value in {"model_parallel": model_parallel, "max_shard_bytes": max_shard_bytes}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{what} is {shown(value)}; it is a whole number above 0.")
    found = None if name is None else str(DTYPES[name]).removeprefix("torch.")
    return TargetOptions(found, model_parallel, max_shard_bytes, merge_lora, clamp)


def _check_target(to: Any, model_parallel: int, merge_lora: bool) -> None:
    if to not in TARGETS:
        suggestion = did_you_mean(to, TARGETS) if isinstance(to, str) else ""
        raise ConfigError(f"No layout {shown(to)} to convert to.{suggestion} Known: {', '.join(TARGETS)}.")
    if model_parallel != 1 and to not in ("sat", "mindspore"):
        raise ConfigError(f"model_parallel={model_parallel} was asked, and files of {to!r} are whole; leave it out.")
    if merge_lora and to == "peft":
        raise ConfigError("merge_lora adds the LoRA to the weights, and to='peft' writes it alone; give one of them.")


def _check_suffix(destination: Path, to: str) -> None:
    """Refuse what exists, and a file's name for a layout that is a folder, or that is known by another one."""
    check_destination(destination)
    if not is_file_target(destination) or destination.suffix == FILE_TARGETS.get(to):
        return
    layout = next((name for name, suffix in FILE_TARGETS.items() if suffix == destination.suffix), None)
    own = f"a folder, or a file that ends in {FILE_TARGETS[to]}" if to in FILE_TARGETS else "a folder"
    meant = f" A {destination.suffix} file is of the layout {layout!r}: did you mean that?" if layout else ""
    raise ConfigError(f"{destination}: the layout {to!r} is {own}, and this is a file's name.{meant}")


def _check_apart(source: Path, destination: Path, *pieces: Path) -> None:
    """Refuse a destination in the source's folder, or in a piece's: it would be taken for a part of it."""
    for piece in pieces:
        _check_apart(piece, destination)
    inside, here = source.resolve(), destination.parent.resolve() / destination.name
    if inside.is_file():
        if here == inside:
            raise ConfigError(f"{destination} is the source itself; give another destination.")
        return
    if here == inside or here.is_relative_to(inside):
        raise ConfigError(
            f"{destination} lies in the source {source}, where it would be taken for a part of it. Give a destination "
            f"elsewhere, such as {source.resolve().with_name(source.resolve().name + '-converted')}."
        )


def _plan(
    path: Path, target: Path, to: str, options: TargetOptions, tokenizer: Any, described: Mapping[str, Any]
) -> _Job:
    """Say what is written; `described` is what `open_source` takes."""
    base, pieces = described["base"], described["pieces"]
    if to == "peft" and is_adapter(path) and base is None and table.detect_composite(path, pieces or ()) is None:
        plan = plan_adapter(path, None, options, None)
        return _Job(plan, "peft", "peft", [], None, tuple(sorted(path.glob("adapter_model.*"))))
    source = open_source(path, **described)
    layout = "peft" if is_adapter(path) else source.layout
    beside = sorted(source.adapter.glob("adapter_*")) if isinstance(source.adapter, Path) else []
    files = (*source.tensors.files, *beside)
    _check_holds(source, to)
    if options.merge_lora and source.adapter is None:
        raise ConfigError(f"merge_lora was asked, and {path} has no LoRA; leave it out.")
    notes: list[str] = []
    if to == "peft":
        plan = _plan_peft(source, options, None if base is None else str(base))
    else:
        source.check()
        if to == "hf":
            plan, notes = plan_hf(source, options, tokenizer)
        else:
            _check_no_lora(source, to)
            plan = source.family.plan_target(to, source.fields, source.tensors, options)
            if tokenizer is not None:
                plan = replace(plan, copies={**plan.copies, **tokenizer_files(tokenizer)})
            if is_file_target(target) and (beside := [*plan.texts, *plan.copies]):
                notes.append(f"{target} is one file, so these are not written: {', '.join(beside)}.")
    return _Job(plan, source.family.name, layout, notes, source, files)


def _plan_peft(source: Source, options: TargetOptions, base: str | None) -> TargetPlan:
    if source.adapter is None:
        raise ConfigError(f"{source.path} has no LoRA to write as a PEFT adapter; --to hf writes the whole model.")
    native = source.family.native_adapter if source.opened is not None else None
    deltas(source.adapter, native, source.places.sources)  # says where it does not fit
    return plan_adapter(source.adapter, native, options, base)


def _check_holds(source: Source, to: str) -> None:
    known = [*source.family.layouts, "peft"]
    if to not in known:
        raise ConfigError(
            f"The layout {to!r} cannot hold {source.path}, which is of the family {source.family.name!r}. "
            f"{'These can' if len(known) > 2 else 'Only these can'}: {', '.join(known[:-1])}; and peft, its LoRA."
        )


def _check_no_lora(source: Source, to: str) -> None:
    if source.adapter is not None:
        raise ConfigError(
            f"{source.adapter} is a LoRA that belongs to the model. Convert to hf with --merge-lora first, and that "
            f"folder to {to}."
        )


def _state(file: Path) -> list[Any]:
    """Tell a file from one that was changed in the meantime."""
    found = file.stat()
    return [str(file.resolve()), found.st_size, found.st_mtime_ns]


# -- reading back ------------------------------------------------------------------------------------------------------


def _verify(job: _Job, destination: Path, to: str, options: TargetOptions, tell: Progress) -> None:
    """Read what was written and compare it with the source, tensor by tensor.

    Raises:
        CheckpointError: they differ.
    """
    for file in [destination] if destination.is_file() else sorted(destination.rglob("*")):
        if file.is_file():
            _forget_cached(file)
    if to == "peft":
        expected = [output for file in job.plan.files for output in file.outputs]
        stored = hf.read(destination / job.plan.files[0].name)
        found = {
            name: Output(name, info.shape, info.dtype, lambda name=name: stored[name])
            for name, info in stored.infos.items()
        }
    else:
        assert job.source is not None  # only an adapter alone is planned without
        added = {}
        if job.source.adapter is not None:
            native = job.source.family.native_adapter if job.source.opened is not None else None
            added = deltas(job.source.adapter, native, job.source.places.sources)
        expected = network_outputs(job.source, options, added)
        written = open_source(destination, config=_untold(job.source, destination, to))
        found = {output.name: output for output in network_outputs(written, TargetOptions())}
        # What the network computes itself, a layout may leave out, or its reader.
        optional = [rule.target for rule in job.source.rules if isinstance(rule, Optional)]
        expected = [output for output in expected if output.name in found or not matches(optional, output.name)]
    _compare(expected, found, destination, options, tell)


def _untold(source: Source, destination: Path, to: str) -> dict[str, Any] | None:
    """Give the fields that what was written does not say of itself."""
    if to == "sat" or (destination / "config.json").is_file():
        return None
    if source.opened is not None:
        return source.fields
    nested = {name: _heads(value) for name, value in source.fields.items() if isinstance(value, Mapping)}
    return _heads(source.fields) | {name: found for name, found in nested.items() if found}


def _heads(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Give the numbers of heads, which no tensor shows."""
    return {name: fields[name] for name in ("num_attention_heads", "n_head") if name in fields}


def _compare(
    expected: list[Output], found: dict[str, Output], destination: Path, options: TargetOptions, tell: Progress
) -> None:
    if absent := [output.name for output in expected if output.name not in found]:
        raise CheckpointError(f"{destination}: {len(absent)} tensors cannot be read back, first {absent[0]!r}.")
    total, done = sum(output.nbytes for output in expected), 0
    for output in expected:
        other = found[output.name]
        before, after = output.make(), other.make()
        if before.dtype != after.dtype:  # of a layout that keeps one dtype where another was asked
            before = options.cast(output.name, before, other.dtype)
        if before.shape != after.shape or not torch.equal(_bits(before), _bits(after)):
            raise CheckpointError(
                f"{destination}: {output.name!r} reads differently than it was written: a fault of the disk or of the "
                "memory. Remove it and convert again, to another disk if that does not help."
            )
        del before, after
        output.release()
        other.release()
        done += output.nbytes
        tell("verify", done, total)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Give the elements as whole numbers: NaN is equal to itself, and -0 is not 0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def _forget_cached(file: Path) -> None:
    """Let the system forget a file's pages, so that what comes back was on the disk."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
