"""What an evaluation was asked of: data and weights by their files, so that answers are never those of other ones.

A recipe names files, and files change under their names: a corrected question, a model that was trained further. Kept
beside the answers is a mark of each, and a run that goes on compares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lavish.common.config import Config, write_json
from lavish.common.errors import ConfigError
from lavish.common.registry import registry
from lavish.datasets.datasets.annotations import read_json
from lavish.inference.load import POCKET
from lavish.runners.evaluation_recipe import clear_folder, evaluated_only, is_loaded
from lavish.runners.evaluation_rows import Rows
from lavish.runners.evaluation_summary import METRICS_FILE, STATISTICS_FILE

INPUTS_FILE = "inputs.json"
MAX_READ_BYTES = 64 * 2**20
"""Files up to this size are marked by what they hold, larger ones by size and time of change: weights take long."""
OF_MODELS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".jinja", ".model", ".txt")
"""Suffixes of the files of a model's folder that count; a training leaves others beside them."""
_OWN = ("environment.json", INPUTS_FILE, METRICS_FILE, STATISTICS_FILE)  # of a training or of this run
_NO_PATHS = ("arch", "model_type", "dtype", "quantization", "rope", "revision", "ask")


def inputs_of(cfg: Config, datasets: Iterable[tuple[str, str, Any]]) -> dict[str, str]:
    """Give a mark for each split's number of samples, each annotation file, and each file of the model that is here.

    Args:
        cfg: the merged recipe.
        datasets: name, split and data set of what is evaluated; their files are here.
    """
    found, splits = {}, []
    for name, split, dataset in datasets:
        found[f"{name}/{split}"] = f"{len(dataset)} samples"
        splits.append(split)
    for name, section in evaluated_only(cfg, splits).datasets_cfg.items():
        for file in registry.get_builder_class(str(name))(section).annotation_files():
            found |= {str(path): mark_of(path) for path in files_at(file.path)}
    of_model = [path for place in _model_places(cfg) for path in files_at(place)]
    return found | {str(path): mark_of(path) for path in of_model if path.suffix in OF_MODELS and path.name not in _OWN}


def check_inputs(found: Mapping[str, str], rows: Rows, *, force: bool) -> None:
    """Compare with what the answers of a folder were asked of, and keep the marks there; main process only.

    Args:
        found: as `inputs_of` gives it.
        rows: of the folder.
        force: delete answers of other data or weights, instead of refusing.

    Raises:
        ConfigError: data or weights changed since.
    """
    path = rows.folder / INPUTS_FILE
    before = read_json(path) if path.is_file() and rows.read() else dict(found)
    changed = sorted(key for key in before.keys() | found.keys() if before.get(key) != found.get(key))
    if changed and not force:
        raise ConfigError(
            f"{rows.folder} holds answers of other data or weights: {len(changed)} changed since, first {changed[0]} "
            f"({before.get(changed[0], 'absent')} -> {found.get(changed[0], 'absent')}). Set another run.output_dir, "
            "or start anew with --force, which deletes them."
        )
    if changed:
        clear_folder(rows)
    write_json(found, path)


def files_at(place: Path) -> list[Path]:
    """Give the files of a path: itself, or those right in a folder; none where nothing is."""
    if place.is_dir():
        return sorted(path for path in place.iterdir() if path.is_file() and not path.name.startswith("."))
    return [place] if place.is_file() else []


def mark_of(path: Path) -> str:
    """Give what tells a file from another one of its name."""
    stat = path.stat()
    if stat.st_size > MAX_READ_BYTES:
        return f"{stat.st_size:,} bytes, changed at {stat.st_mtime_ns}"
    return f"{stat.st_size:,} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _model_places(cfg: Config) -> Iterator[Path]:
    """Give the paths that the section `model` names, of folders and files that are here."""
    section: Any = OmegaConf.to_container(cfg.model_cfg, resolve=True)
    if is_loaded(section) and section.get("path") is None:
        yield POCKET
    for value in _texts(section):
        place = Path(value).expanduser()
        if len(value) < 1024 and "\0" not in value and place.exists():
            yield place


def _texts(value: Any) -> Iterator[str]:
    """Give the texts of a section that may be paths, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if name not in _NO_PATHS:
                yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
