"""What a composite release holds before its weights are read: the pieces of several files as one.

Each family of composite releases makes one in its `weights.py`:

    PIECES = ("vision_tower", "llm")     the keywords of lavish.load that name a piece which is elsewhere
    def open_release(path: Path, pieces: Mapping[str, Path]) -> Release

`path` is the folder that holds the pieces side by side, or the file or folder of the piece that was trained; `pieces`
holds those that were named, as paths that exist. torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavish.checkpoints.json_file import read_optional_object
from lavish.checkpoints.output import Output
from lavish.checkpoints.tensor_map import TensorMap
from lavish.common.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Lora:
    """A LoRA that lies in the same files as the weights that it changes (SAT)."""

    path: Path
    """Of the checkpoint."""
    fields: dict[str, Any]
    """As in an adapter_config.json of PEFT."""
    tensors: tuple[Output, ...]
    """Its matrices, under PEFT's names."""
    deltas: Mapping[str, Callable[[], torch.Tensor]]
    """Name of a weight of `Release.tensors` -> what is added to it when the LoRA is merged: a product in float32, which
    the release casts to the weight's dtype first."""

    def __str__(self) -> str:
        return f"what lies beside the weights of {self.path}"


@dataclass(frozen=True)
class Release:
    """A composite release: config, weights and tokenizer, none of them read yet but the config."""

    fields: dict[str, Any]
    """As in a config.json of the family: what `read_config` takes."""
    tensors: TensorMap
    """All pieces in one map, under the names that the family's RULES (or its network) know; see `merged`."""
    tokenizer: Path
    """Where the tokenizer's files are."""
    load_tokenizer: Callable[[Path], Any]
    """Read a tokenizer from there, or from the folder that `lavish.load(tokenizer=...)` names."""
    generation_config: dict[str, Any] = field(default_factory=dict)
    """Of a generation_config.json: eos_token_id, temperature, top_p ..."""
    adapter: Path | Lora | None = None
    """The LoRA that the release consists of too, a folder or in the same files; None: it has none."""
    notes: dict[str, str] = field(default_factory=dict)
    """What was guessed or is unusual: field of the config -> a sentence, for who does not set that field."""
    adapted: Callable[[Any], None] | None = None
    """Called with the network once an adapter is on it."""
    is_untrained: bool = False
    """The projector is in no file: it is to start random."""


def merged(path: Path, parts: Iterable[tuple[str, TensorMap]]) -> TensorMap:
    """Give several maps as one, each with a prefix before its names; of equal names the last one counts."""
    infos = {prefix + name: info for prefix, tensors in parts for name, info in tensors.infos.items()}
    return TensorMap(path, infos)


def with_config(folder: Path | None, model_type: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Lay a config.json that lavish put beside a release's pieces over the fields that the pieces say: it holds what no
    file of theirs does, such as head counts.

    Raises:
        CheckpointError: it is no JSON object.
    """
    beside = {} if folder is None else read_optional_object(folder / "config.json")
    if beside.get("model_type") != model_type:
        return dict(fields)
    laid: dict[str, Any] = {**fields, **beside}
    for name, section in fields.items():
        if isinstance(section, Mapping) and isinstance(beside.get(name), Mapping):
            laid[name] = {**section, **beside[name]}
    return laid


def find_piece(name: str, path: Path, pieces: Mapping[str, Path], here: Iterable[Path]) -> Path:
    """Give one piece of a release: the one that was named, or the one among `here` that exists.

    Raises:
        ConfigError: it was named and is in the folder too, two of `here` exist, or it is nowhere; says where it was
            looked for.
    """
    places = list(here)
    found = [place for place in places if place.exists()]
    if name in pieces and found:
        raise ConfigError(
            f"{name}={str(pieces[name])!r} was given, and {path} holds that piece too: {found[0]}. Leave {name}= out, "
            "or give the trained piece alone as the path."
        )
    if name in pieces:
        return pieces[name]
    if len(found) > 1:
        raise ConfigError(f"{path} holds the piece {name!r} twice: {found[0]} and {found[1]}. Name one: {name}=...")
    if not found:
        looked = ", ".join(str(place) for place in places)
        nothing = "nothing in that folder is one" if path.is_dir() else "such a file does not hold it"
        where = f"looked for {looked}" if looked else nothing
        raise ConfigError(f"{path}: the piece {name!r} is absent; {where}. Name it: {name}=...")
    return found[0]
