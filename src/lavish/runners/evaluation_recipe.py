"""The recipe of an evaluation: read, checked as far as that needs neither data nor weights, and kept in its folder."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lavish.common import config as configs
from lavish.common.config import Config
from lavish.common.errors import ConfigError, DataError
from lavish.common.registry import registry
from lavish.datasets.builders.base_dataset_builder import SPLITS
from lavish.models.base_model import check_model
from lavish.runners.device import device_of
from lavish.runners.evaluation_report import REPORT_FILE
from lavish.runners.evaluation_rows import Rows
from lavish.runners.evaluation_summary import METRICS_FILE, MODEL_FILE, RESULT_FOLDER, STATISTICS_FILE
from lavish.runners.schema import RunConfig, lavis_run_config
from lavish.tasks import setup_task
from lavish.tasks.base_task import BaseTask

logger = logging.getLogger(__name__)

CONFIG_FILE, CHAT = "config.yaml", "chat"
ANYHOW = (
    *("output_dir", "device", "num_workers", "num_threads", "batch_size_eval", "batch_size_train", "log_freq"),
    *("world_size", "dist_url", "distributed", "use_dist_eval_sampler"),
)
"""Keys of `run` that change how an evaluation runs, and not what it gives."""
SCORING = ("annotation_file", "report_metric")
"""Keys of `run` that change what is scored, and not what is answered."""


@dataclass
class LoadedModel:
    """The section `model` of an evaluation of any model that `lavish.load` opens."""

    path: str | None = None
    """Folder, file or hub id; none: the bundled pocket model."""
    dtype: str = "auto"
    """As of `lavish.load`, and so are the next."""
    quantization: str | None = None
    adapter: str | None = None
    base: str | None = None
    tokenizer: str | None = None
    config: str | dict[str, Any] | None = None
    revision: str | None = None
    rope: str | None = None
    pieces: dict[str, str] = field(default_factory=dict)
    """Parts of the release that are elsewhere, by name."""
    ask: dict[str, dict[str, Any]] = field(default_factory=dict)
    """How questions are put, by kind: {vqa: {text: "{question} Answer briefly."}}."""


def open_evaluation(path: str | Path, overrides: Sequence[str] = ()) -> Config | None:
    """Read a recipe; None where its task scores models of `lavish.load` by itself, as `scenes` does.

    Raises:
        ConfigError: a file that is no recipe, an unknown task, or whatever `Config` finds wrong.
    """
    merged = configs.merge(configs.load_yaml(path), configs.parse_overrides(overrides))
    name = OmegaConf.select(merged, "run.task")
    if name and registry.get_task_class(name).scores_loaded_models:
        return None
    return Config(path, overrides)


def check(cfg: Config) -> tuple[RunConfig, BaseTask]:
    """Check the recipe as far as that needs neither data nor weights, and build its task.

    Raises:
        ConfigError: an unknown key, a wrong value, a model, task or data set that is not there.
        DataError: files of the data sets that are neither here nor known where to fetch.
    """
    task = setup_task(cfg)
    run = lavis_run_config(cfg, type(task))
    if not splits_of(run):
        raise ConfigError("The recipe names no split to evaluate; set run.test_splits, for example [val].")
    if not cfg.datasets_cfg:
        raise ConfigError("The recipe has no datasets; name one, for example `datasets: {coco_caption: {...}}`.")
    section = cfg.model_cfg
    if is_loaded(section):
        chat_section(cfg)
    elif section.get("arch") is None:
        raise ConfigError(
            "The recipe names no model: model.arch and model.model_type of a registered one, or model.path, a folder "
            "or hub id that `lavish.load` opens."
        )
    else:
        check_model(section)
    for name, dataset in evaluated_only(cfg, splits_of(run)).datasets_cfg.items():
        registry.get_builder_class(str(name))(dataset).check()
    device_of(run)
    check_ground_truth(run)
    return run, task


def check_ground_truth(run: RunConfig) -> None:
    """Check that the files of `run.annotation_file` are here: they are read when all is answered.

    Raises:
        DataError: one is not.
    """
    given = run.annotation_file
    by_split = given if isinstance(given, Mapping) else {} if given is None else dict.fromkeys(splits_of(run), given)
    for split, path in by_split.items():
        if not Path(path).is_file():
            raise DataError(f"{path}: no such file of ground truth (run.annotation_file, split {split!r}).")


def splits_of(run: RunConfig) -> list[str]:
    """Name the splits to evaluate."""
    return list(run.test_splits or run.valid_splits)


def evaluated_only(cfg: Config, splits: Sequence[str]) -> Config:
    """Give the recipe without the annotations of other splits, so that none of them is fetched or read.

    Raises:
        ConfigError: a data set without one of the splits.
    """
    pruned = copy.deepcopy(cfg)
    for name, section in pruned.datasets_cfg.items():
        annotations = OmegaConf.select(section, "build_info.annotations")
        if not annotations:
            continue  # a builder that knows its files without them
        for split in splits:
            if annotations.get(split) is None:
                known = ", ".join(str(key) for key in annotations if key in SPLITS)
                raise ConfigError(f"datasets.{name} has no split {split!r} (run.test_splits). Its splits: {known}.")
        for split in SPLITS:
            if split in annotations and split not in splits:
                annotations[split] = None
    return pruned


def is_loaded(section: Mapping[str, Any]) -> bool:
    """Say whether a section `model` names what `lavish.load` opens; `path: null` is the bundled pocket model."""
    return section.get("path") is not None or ("path" in section and section.get("arch") is None)


def chat_section(cfg: Config) -> LoadedModel:
    """Read the section `model` of a model that `lavish.load` opens; what a registered model would need is left out."""
    plain: Any = OmegaConf.to_container(cfg.model_cfg, resolve=True)
    if plain.get("arch") is not None:
        if plain["arch"] != CHAT:
            logger.warning("model.path is evaluated; model.arch %r of the recipe is not.", plain["arch"])
        known = LoadedModel.__dataclass_fields__
        plain = {name: value for name, value in plain.items() if name in known}
    return configs.check(plain, LoadedModel, "model")


def begin_folder(cfg: Config, rows: Rows, *, force: bool) -> None:
    """Save the recipe into the folder, or check that it is the one that was evaluated there before.

    Raises:
        ConfigError: it is another one, or the folder is that of a training.
    """
    path = rows.folder / CONFIG_FILE
    if any(rows.folder.glob("checkpoint_*")):
        raise ConfigError(
            f"{rows.folder} is the folder of a training, whose files stay as they are; set run.output_dir to another "
            f"one, such as {rows.folder / 'evaluation'}."
        )
    if path.exists():
        anyhow = (*ANYHOW, *SCORING)
        before, now = recipe_of(configs.load_yaml(path), anyhow), recipe_of(cfg.get_config(), anyhow)
        changed = sorted(key for key in before | now if before.get(key) != now.get(key))
        is_used = bool(rows.read()) or (rows.folder / METRICS_FILE).exists()  # a run that failed early left nothing
        if changed and is_used and not force:
            shown = "; ".join(
                f"{key}: {before.get(key, 'not set')!r} -> {now.get(key, 'not set')!r}" for key in changed
            )
            raise ConfigError(
                f"{rows.folder} holds the results of another recipe ({shown}). Set another run.output_dir, or start "
                "anew with --force, which deletes them."
            )
        if changed:
            clear_folder(rows)
    configs.save(cfg.get_config(), path)


def clear_folder(rows: Rows) -> None:
    """Delete what an evaluation left in its folder, metrics first: a folder without them is no finished one."""
    folder = rows.folder
    for name in (METRICS_FILE, STATISTICS_FILE, REPORT_FILE, MODEL_FILE, "evaluate.txt"):
        (folder / name).unlink(missing_ok=True)
    rows.clear()
    for path in folder.glob(f"{RESULT_FOLDER}_leaderboard_*.json"):
        path.unlink()
    shutil.rmtree(folder / RESULT_FOLDER, ignore_errors=True)


def recipe_of(config: Any, leave_out: Sequence[str] = ANYHOW) -> dict[str, Any]:
    """Give the keys of a recipe that decide what it gives, flat; keys of `run` in `leave_out` do not."""
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, Mapping) and value:
            for name, part in value.items():
                walk(part, f"{key}.{name}" if key else str(name))
        elif not key.startswith("run.") or key.split(".")[1] not in leave_out:
            flat[key] = value

    walk(OmegaConf.to_container(OmegaConf.create(config), resolve=True), "")
    return flat


def config_sha256(config: Any) -> str:
    """Give the digest of a recipe, of what decides what it gives."""
    return hashlib.sha256(json.dumps(recipe_of(config), sort_keys=True, default=str).encode()).hexdigest()
