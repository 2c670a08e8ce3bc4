"""What can be known of a model before a weight is read: from its config and the headers of its files.

torch is not imported. Printing it is in inspect.py.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import lavish.models as table
from lavish.checkpoints import deepspeed, hf, hub, lavis, layouts
from lavish.checkpoints.pickles import remembered
from lavish.checkpoints.rules import matches
from lavish.checkpoints.tensor_map import ITEM_BYTES, Stored, TensorInfo, TensorMap
from lavish.cli import layout_facts
from lavish.cli.loading import resolve_model
from lavish.common.errors import ConfigError, MissingKeys, UnknownLayout

LORA_RANK = 16
TEXT_TOKENS = 512
"""Tokens of question and answer that the estimate of training memory counts with, beside one image."""
SAVED_INT8 = "lavish_int8"  # quantization.METHOD; that module imports torch


@dataclass(frozen=True)
class Part:
    """A part of the network: its tensors, their elements and bytes."""

    name: str
    num_tensors: int
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True)
class Memory:
    """An estimate in bytes; `total` is what it adds up to, `terms` says of what."""

    what: str
    terms: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all terms."""
        return sum(self.terms.values())


@dataclass(frozen=True)
class Inspection:
    """What `lavish inspect` shows."""

    path: str
    family: str
    version: int
    layout: str | None
    """None: only the config is known, and no file was looked at."""
    config: dict[str, Any]
    sizes: Any
    """None for a family without a manifest."""
    parts: list[Part]
    dtypes: dict[str, int]
    """Bytes by dtype."""
    files: int
    absent_files: list[str]
    has_weights: bool
    missing: list[str]
    unexpected: list[str]
    misshaped: list[str]
    memory: list[Memory]
    notes: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    """What the layout says beside the tensors: step, processes, LoRA."""
    commands: list[str] = field(default_factory=list)
    """What loads or converts it."""
    is_part: bool = False
    """True where no network can be made of what is there alone, and the tensors are listed by the files' names."""

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(part.num_parameters for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def is_complete(self) -> bool:
        """True if every tensor that the config asks for is there, and no other."""
        return not (self.has_problems or self.is_part)

    @property
    def has_problems(self) -> bool:
        """True if files or tensors are absent, or others are there than the config asks for."""
        return bool(self.missing or self.unexpected or self.misshaped or self.absent_files)

    def as_dict(self) -> dict[str, Any]:
        """Give everything as plain values for JSON."""
        names = ("path", "family", "version", "layout", "files", "absent_files", "dtypes", "facts", "commands")
        problems = ("missing", "unexpected", "misshaped")
        return {
            **{name: getattr(self, name) for name in names},
            "num_parameters": self.num_parameters,
            "num_bytes": self.num_bytes,
            **({} if self.sizes is None else {"num_image_tokens": self.sizes.num_image_tokens}),
            "parts": [vars(part) for part in self.parts],
            "memory": [{"what": row.what, "total": row.total, **row.terms} for row in self.memory],
            "has_weights": self.has_weights,
            "is_complete": self.has_weights and self.is_complete,
            **{name: getattr(self, name) for name in problems},
            "notes": self.notes,
            "config": self.config,
        }


def look(
    name_or_path: str, overrides: Mapping[str, Any] | None = None, pieces: Mapping[str, str] | None = None
) -> Inspection:
    """Inspect a checkpoint of any layout, or the released config of a model of the zoo (its folder in the hub's cache,
    where it is there).

    Families without a manifest, and releases in `pieces`, take torch: their network is built without memory. Where no
    network can be made of what is there, the tensors are listed as they stand in the files.

    Raises:
        ConfigError: no such folder or name, or a config without its sizes.
        UnknownLayout, CheckpointError: a folder that is no checkpoint, or a damaged file.
    """
    path = Path(os.path.expanduser(name_or_path))
    changes, given = dict(overrides or {}), dict(pieces or {})
    if not name_or_path.strip() or not os.path.exists(path) or path.name == "config.json":
        return _of_network_or_config(name_or_path, changes, given)
    with remembered():
        return _look(name_or_path, path, changes, given)


def _look(name_or_path: str, path: Path, changes: dict[str, Any], given: dict[str, str]) -> Inspection:
    layout = layouts.detect(path)
    facts = layout_facts.facts_of(path, layout)
    try:
        if layout == "peft":
            raise ConfigError("An adapter alone; the sizes of the model are its base's.")
        if layout in ("sat", "mindspore"):
            seen = _of_release(path, layout, changes)
        elif layout == "deepspeed" and not (layouts.config_folder(path) / "config.json").is_file() and not given:
            raise ConfigError(f"{path}: DeepSpeed's shards hold no config; give that of the network they are of.")
        else:
            seen = _of_network_or_config(name_or_path, changes, given)
    except (ConfigError, UnknownLayout, MissingKeys) as error:
        if layout == "hf" or changes or given:
            raise
        seen = _of_files(path, layout, str(error))
    family = next((row for row in table.FAMILIES if row.name == seen.family), None)
    commands: list[str] = []
    if seen.has_weights and not seen.has_problems:
        reason = seen.notes[0] if seen.is_part else ""
        commands = layout_facts.commands_of(path, layout, family, given, version=seen.version, reason=reason)
    return replace(seen, layout=layout, facts=facts, commands=commands)


def _of_network_or_config(name_or_path: str, overrides: dict[str, Any], pieces: dict[str, str]) -> Inspection:
    path = Path(os.path.expanduser(name_or_path))
    if name_or_path.strip() and is_without_config(path, pieces):
        return _by_network(path, overrides, pieces)
    fields, where, folder = find(name_or_path)
    family = family_in(fields, where)
    if not family.has_manifest or pieces:
        place = path if folder is not None and deepspeed.is_run(path) else folder or name_or_path
        return _by_network(place, overrides, pieces)
    stored = _read_headers(path, folder) if folder is not None and not overrides else None
    seen = _by_manifest(family, fields, where, overrides, stored)
    return replace(
        seen,
        path=name_or_path if folder is None else str(folder),
        layout=None if folder is None else "hf",
        notes=[*_notes(folder, stored, overrides), *seen.notes],
    )


def _of_release(path: Path, layout: str, overrides: dict[str, Any]) -> Inspection:
    """Inspect a layout that only CogVLM is held in, and that comes without a config.json."""
    family = table.detect_composite(path, ())
    if family is None or not family.has_manifest:
        raise UnknownLayout(f"{path}: of no model that lavish knows in the layout {layout!r}.")
    if layout == "mindspore":  # its readers would compare checksums, for which all weights are read
        release = import_module(f"{family.package}.mindspore").open_release(path, verify=False)
    else:
        release = family.open_release(path, {})
    stored = None if overrides else release.tensors
    seen = _by_manifest(family, release.fields, str(path), overrides, stored)
    notes = _tokenizer_note(release.tokenizer) if stored is not None else _notes(path, None, overrides)
    return replace(seen, path=str(path), notes=[*notes, *release.notes.values(), *seen.notes])


def _by_manifest(
    family: table.Family, fields: Mapping[str, Any], where: str, overrides: Mapping[str, Any], stored: TensorMap | None
) -> Inspection:
    """Compare what is stored with what the config asks for, without torch."""
    manifest = import_module(f"{family.package}.manifest")
    sizes = manifest.read_sizes(fields, where, overrides)
    expected = {tensor.name: tensor for tensor in _saved(manifest.tensors(sizes), fields)}
    problem = None if stored is None else manifest.version_problem(sizes.version, stored)
    kind = str(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    infos = _as_infos(expected, kind if kind in ITEM_BYTES else "bfloat16") if stored is None else stored.infos
    dtypes: Counter[str] = Counter()
    for info in infos.values():
        dtypes[info.dtype] += info.nbytes
    return Inspection(
        path=where,
        family=family.name,
        version=sizes.version,
        layout=None,
        config={name: value for name, value in fields.items() if name not in ("family", "auto_map")},
        sizes=sizes,
        parts=_parts(infos, expected, manifest.PARTS),
        dtypes=dict(dtypes.most_common()),
        files=0 if stored is None else len(stored.files),
        absent_files=[] if stored is None else list(stored.absent),
        has_weights=stored is not None,
        missing=[] if stored is None else [n for n, t in expected.items() if n not in infos and not t.is_optional],
        unexpected=[name for name in infos if name not in expected],
        misshaped=[
            f"{name}: {info.shape} stored, {expected[name].shape} by the config"
            for name, info in infos.items()
            if name in expected and info.shape != expected[name].shape
        ],
        memory=_memory(sizes, list(expected.values())),
        notes=[problem] if problem else [],
    )


def _of_files(path: Path, layout: str, reason: str) -> Inspection:
    """List what the files hold, under their own names, where no network can be made of them; `reason` says why."""
    files = layout_facts.headers(path, layout)
    names = [name for infos in files.values() for name in infos]
    stored = TensorMap(path, {f"{file}: {name}": infos[name] for file, infos in files.items() for name in infos})
    family = table.detect_composite(path, ()) or table.detect_by_keys(names)
    groups: dict[str, list[Stored]] = {}
    for file, infos in files.items():
        for name, info in infos.items():
            part = file if len(files) > 1 else name.removeprefix("base_model.model.").partition(".")[0]
            groups.setdefault(part, []).append(info)
    dtypes: Counter[str] = Counter()
    for rows in groups.values():
        for info in rows:
            dtypes[info.dtype] += info.nbytes
    absent = list(deepspeed.survey(path).absent) if layout == "deepspeed" and deepspeed.is_run(path) else []
    return Inspection(
        path=str(path),
        family="unknown" if family is None else family.name,
        version=0,
        layout=layout,
        config={},
        sizes=None,
        parts=[_part(name, rows) for name, rows in groups.items()],
        dtypes=dict(dtypes.most_common()),
        files=len(stored.files),
        absent_files=absent,
        has_weights=True,
        missing=[],
        unexpected=[],
        misshaped=[],
        memory=[],
        notes=[reason],
        is_part=True,
    )


def _part(name: str, rows: Sequence[Stored]) -> Part:
    return Part(name, len(rows), sum(info.numel for info in rows), sum(info.nbytes for info in rows))


def _by_network(*arguments: Any) -> Inspection:
    from lavish.cli.network_inspection import look as look_at_network

    return look_at_network(*arguments)


def is_without_config(path: Path, pieces: Iterable[str]) -> bool:
    """Tell whether a path is a release that no config.json describes: in pieces, or a single file of LAVIS."""
    if not os.path.exists(path):
        return False
    if table.detect_composite(path, pieces) is not None:
        return True
    if path.is_file():
        return path.suffix in hf.PICKLE_SUFFIXES
    is_other = any((path / name).exists() for name in hf.WEIGHT_FILES)
    return not is_other and any(path.glob(f"*{lavis.SUFFIX}"))


def family_in(fields: Mapping[str, Any], where: str) -> table.Family:
    """Give the family of a config.json, or of a layout that lavish has, which names it or a model of LAVIS."""
    if "family" in fields:
        return table.family(fields["family"])
    if "model" in fields and "architectures" not in fields:
        return table.family_of_layout(fields, where)
    return table.detect_family(fields, where)


def find(name_or_path: str) -> tuple[dict[str, Any], str, Path | None]:
    """Give the config's fields, where they stand, and the folder, if there is one.

    A hub id is never downloaded: its folder in the hub's cache is taken, else the layout that lavish has of it.
    """
    path = Path(os.path.expanduser(name_or_path))
    if not name_or_path.strip():
        raise ConfigError("No model was named: give its folder, or a name or hub id of `lavish zoo`.")
    if os.path.exists(path):
        if path.is_file() and path.name != "config.json":
            layouts.detect(path)  # says what the file is, where it is nothing of a checkpoint
        folder = layouts.config_folder(path)
        folder = folder if folder.is_dir() else folder.parent
        return layouts.read_config_json(folder), str(folder / "config.json"), folder
    hub_id, entry = resolve_model(name_or_path)
    cached = _cached(hub_id) if hub_id is not None and hub.is_id(hub_id) else None
    if cached is not None:
        return layouts.read_config_json(cached), str(cached / "config.json"), cached
    if hub_id is None:
        pocket = Path(str(files("lavish") / "pocket"))
        return layouts.read_config_json(pocket), str(pocket / "config.json"), pocket
    if entry is None and not hub.is_id(hub_id):
        raise ConfigError(f"{name_or_path!r}: no such file or folder, and not a hub id (org/name).")
    if entry is None:
        repo_id, _, revision = hub_id.partition("@")
        how = f"hf download {repo_id}{f' --revision {revision}' if revision else ''}"
        if repo_id.startswith(hub.MODELSCOPE):
            how = f"modelscope download {repo_id.removeprefix(hub.MODELSCOPE)}"
        raise ConfigError(
            f"{name_or_path!r}: no such folder, not in the hub's cache, and not in `lavish zoo`. Nothing is downloaded "
            f"to be inspected: fetch it first ({how})."
        )
    where = Path(str(files("lavish") / "configs" / "models" / f"{entry.name}.yaml"))
    from lavish.common.config import load_yaml  # OmegaConf, which folders do without

    return _plain(load_yaml(where)), str(where), None


def _plain(config: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True)


def _cached(hub_id: str) -> Path | None:
    """Give the folder of a hub id in the local cache, if it holds a config."""
    if ":" in hub_id:
        return None
    repo_id, _, revision = hub_id.partition("@")
    found = hub.cached_config(repo_id, revision or None)
    return None if found is None else found[1].parent


def _read_headers(path: Path, folder: Path) -> TensorMap | None:
    if layouts.detect(path if path.exists() else folder) == "deepspeed":
        return layouts.read_weights(path)
    has_weights = any((folder / name).is_file() for name in hf.WEIGHT_FILES) or list(folder.glob("*-of-*.*"))
    return hf.read(folder, allow_absent=True) if has_weights else None


def _saved(tensors: Any, fields: Mapping[str, Any]) -> list[Any]:
    """Give the tensors as they lie on disk: a network that was saved in int8 has a scale beside each matrix."""
    from dataclasses import replace

    rows, saved = list(tensors), fields.get("quantization_config")
    if not isinstance(saved, dict) or saved.get("quant_method") != SAVED_INT8:
        return rows
    prefixes = ("model.layers.", "model.vision.") if saved.get("quantize_vision") else ("model.layers.",)
    found = []
    for row in rows:
        found.append(row)
        if row.is_linear and row.name.startswith(prefixes):
            found.append(replace(row, name=f"{row.name}_scale", shape=row.shape[:1], is_linear=False))
    return found


def _as_infos(expected: Mapping[str, Any], dtype: str) -> dict[str, TensorInfo]:
    nowhere = Path()
    return {name: TensorInfo(tensor.shape, dtype, nowhere, 0) for name, tensor in expected.items()}


def _parts(infos: Mapping[str, Stored], expected: Mapping[str, Any], order: tuple[str, ...]) -> list[Part]:
    groups: dict[str, list[Stored]] = {name: [] for name in (*order, "unexpected")}
    for name, info in infos.items():
        groups[expected[name].part if name in expected else "unexpected"].append(info)
    return [_part(name, rows) for name, rows in groups.items() if rows]


# --- memory ---------------------------------------------------------------------------------------------------------

FORMULA = (
    "cache: 2 x layers x key/value heads x head width x context x 2 bytes. working set: activations of the widest "
    "layer for one image, tokens x (4 x hidden + 3 x intermediate) x 2 bytes. int8: 1 byte a weight of the decoder's "
    "linears and 2 a row; nf4: 0.5625. LoRA: "
    f"rank {LORA_RANK}, all linears of both experts, batch 1 of one image and {TEXT_TOKENS} tokens, checkpointed "
    "layers, frozen tower. adapters: 16 bytes a weight (itself, gradient, AdamW). activations: layers x tokens x "
    "hidden x 2 bytes, 3 working sets of a decoder layer, tokens x vocabulary x 8 bytes (logits and gradient)."
)
DECODER_LINEARS = ("model.layers.*.*.*.weight", "model.layers.*.*.*.*.weight")


def _memory(sizes: Any, tensors: list[Any]) -> list[Memory]:
    """Estimate the memory of inference (one image, the context full) and of LoRA training at batch 1."""
    cache = 4 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim * sizes.max_position_embeddings
    tower = sizes.num_patches * (4 * sizes.vision["hidden_size"] + 2 * sizes.vision["intermediate_size"]) * 2
    per_token = (4 * sizes.hidden_size + 3 * sizes.intermediate_size) * 2
    working = max(tower, sizes.num_image_tokens * per_token)
    total = sum(math.prod(tensor.shape) for tensor in tensors)
    linears = [tensor for tensor in tensors if tensor.is_linear and matches(DECODER_LINEARS, tensor.name)]
    quantized = sum(math.prod(tensor.shape) for tensor in linears)
    rows = sum(tensor.shape[0] for tensor in linears)
    inference = {"cache": cache, "working set": working}
    weights = {
        "bfloat16": 2 * total,
        "int8": 2 * (total - quantized) + quantized + 2 * rows,
        "nf4": 2 * (total - quantized) + quantized * 9 // 16,
    }
    found = [Memory(f"inference, {kind}", {"weights": count, **inference}) for kind, count in weights.items()]
    tokens = sizes.num_image_tokens + TEXT_TOKENS
    training = {
        "adapters": 16 * LORA_RANK * sum(sum(tensor.shape) for tensor in linears),
        "activations": sizes.num_hidden_layers * tokens * sizes.hidden_size * 2
        + max(tower, 3 * tokens * per_token)
        + tokens * sizes.vocab_size * 8,
    }
    for kind in ("bfloat16", "nf4"):
        name = "LoRA" if kind == "bfloat16" else "QLoRA"
        found.append(Memory(f"{name}, {kind} base", {"weights": weights[kind], **training}))
    return found


def _notes(folder: Path | None, stored: TensorMap | None, overrides: Mapping[str, Any] | None) -> list[str]:
    if folder is None:
        return ["Nothing of it is on this machine: sizes are those of the released config, in bfloat16."]
    if overrides:
        return ["Sizes are those of the changed config; the weights of the folder were not looked at."]
    if stored is None:
        return ["The folder has a config and no weights."]
    notes = _tokenizer_note(folder)
    code = sorted(path.name for path in folder.glob("*.py"))
    if code:
        notes.append(f"Python files ({', '.join(code[:3])}{' ...' if len(code) > 3 else ''}) are never run.")
    return notes


def _tokenizer_note(folder: Path) -> list[str]:
    if any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")):
        return []
    return ["The folder has no tokenizer: name one with --tokenizer (CogVLM v1: a Vicuna-7B folder)."]
