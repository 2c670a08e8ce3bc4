"""A network's tensors under the names of its release: the way back of a family's RULES, for what writes its layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lavish.checkpoints.hf import inside
from lavish.checkpoints.output import Output, TargetOptions
from lavish.checkpoints.rules import Drop, Plan, Rule, matches, plan, reasons, reverse
from lavish.checkpoints.tensor_map import TensorMap

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Released:
    """What a layout writes."""

    outputs: dict[str, Output]
    """By the release's name."""
    dropped: tuple[tuple[str, str], ...]
    """Names of the source that are not written, and why."""

    def named(self, prefix: str, instead: str = "") -> tuple[Output, ...]:
        """Give the tensors whose names begin so, with something else in that place."""
        return tuple(
            renamed(output, instead + name.removeprefix(prefix))
            for name, output in self.outputs.items()
            if name.startswith(prefix)
        )


def renamed(output: Output, name: str) -> Output:
    """Give the same tensor under another name: tied parameters, and pieces that leave a prefix out."""
    return Output(name, output.shape, output.dtype, output.make, output.sources, output.release)


def released(tensors: TensorMap, rules: Sequence[Rule], options: TargetOptions) -> Released:
    """Give every tensor under the release's name; `tensors` may have those names already, or the network's.

    Raises:
        CheckpointError: names that are neither, or parts of a tensor that are absent.
        ShapeMismatch: parts that do not fit each other.
    """
    forward = plan(tensors, rules)
    drops = [rule.source for rule in rules if isinstance(rule, Drop)]
    kept = [name for name in tensors if not matches(drops, name)]
    dropped = tuple(reasons(forward, rules))
    if forward.parts or forward.joined or any(new != old for new, old in forward.sources.items()):
        return Released({name: options.take(name, tensors, tensors.info(name), (name,)) for name in kept}, dropped)
    from lavish.checkpoints.loading import stored_info  # torch: only what writes needs it

    back = plan(kept, reverse(rules))
    outputs: dict[str, Output] = {}
    for name, first in back.sources.items():
        if name in back.joined:
            outputs[name] = _joined(name, tensors, back, options)
        else:
            outputs[name] = options.take(name, tensors, stored_info(tensors, back, name), (first,))
    return Released(outputs, dropped)


def _joined(name: str, tensors: TensorMap, back: Plan, options: TargetOptions) -> Output:
    from lavish.checkpoints.loading import read_joined, stored_shape

    names = tuple(part for part in back.joined[name].names if part is not None)
    dtype = options.dtype_of(tensors.info(names[0]).dtype)

    def make() -> torch.Tensor:
        return options.cast(name, read_joined(tensors, back.joined[name]), dtype)

    return Output(name, stored_shape(tensors, back, name), dtype, make, names)


def beside(tensors: TensorMap, names: Iterable[str], below: Iterable[str] = ("",)) -> dict[str, Path]:
    """Find small files, such as a tokenizer's, in the folders in which a checkpoint's files lie (and in folders `below`
    them); all from the first folder that holds any.
    """
    wanted = tuple(names)
    first = tensors.path if tensors.path.is_dir() else tensors.path.parent
    for folder in dict.fromkeys((first, *(file.parent for file in tensors.files))):
        for place in (folder / name if name else folder for name in below):
            found = {name: inside(place, name) for name in wanted if (place / name).is_file()}
            if found:
                return found
    return {}


def in_folder(folder: str, files: Mapping[str, Path]) -> dict[str, Path]:
    """Put files into a folder of the target."""
    return {f"{folder}/{name}": path for name, path in files.items()}
