"""Recipes: one YAML that names a model, its data and how a run trains, in one or several stages.

    model:     {arch: cogvlm, config: {...}}          fields of the network's config.json
    datasets:  {scenes: {...}}
    task:      {...}                                  settings of the task that run.task names
    run:       {task: scenes, ...}                    lavish.runners.schema.RunConfig
    stages:    [{name: tower, run: {...}, task: {...}}, ...]    optional; each is a run in <run.output_dir>/<name>

or a recipe of LAVIS, which is one run:

    model:     {arch: blip_caption, model_type: base_coco, ...}     layered over the model type's YAML
    datasets:  {coco_caption: {vis_processor: ..., ...}}            each layered over its builder's YAML
    run:       {task: captioning, runner: runner_base, ...}         RunConfig, with LAVIS's defaults

A stage's sections are layered over the shared ones. The whole recipe is checked before anything heavy starts, and the
merged file is saved beside the run's outputs. A stage that is complete is not run again; one that was killed continues
from its newest checkpoint.
"""

import hashlib
import json
import logging
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from omegaconf import DictConfig, OmegaConf

from lavish import __version__
from lavish.checkpoints import hub
from lavish.common import config as configs
from lavish.common import dist
from lavish.common.config import Config
from lavish.common.errors import CheckpointError, ConfigError, did_you_mean
from lavish.common.registry import registry
from lavish.inference.load import POCKET, load
from lavish.models.base_model import BaseModel, check_model
from lavish.runners.device import device_of
from lavish.runners.parts import parts_of
from lavish.runners.report import write_report
from lavish.runners.runner_base import Progress, RunnerBase
from lavish.runners.schema import RunConfig, lavis_run_config
from lavish.tasks.base_task import BaseTask

logger = logging.getLogger(__name__)

CONFIG_FILE, DONE_FILE, METRICS_FILE = "config.yaml", "done.json", "metrics.json"
ENVIRONMENT_FILE = "environment.json"
CHANGEABLE = (
    *("output_dir", "device", "num_threads", "num_workers", "compile", "log_freq", "save_freq", "save_last"),
    "save_steps",
    *("engine", "deepspeed_config", "activation_checkpointing", "accum_grad_iters", "resume_ckpt_path"),
    *("batch_size_eval", "sample_generations", "use_dist_eval_sampler", "world_size", "dist_url", "distributed"),
    "model.feature_cache",
)
"""Keys of `run:` that a resumed run may have otherwise: they change how it runs, not what it gives."""


class Report(Protocol):
    """What a caller of `train` hears of."""

    def started(self, stage: str, runner: RunnerBase) -> Progress:
        """A stage starts or goes on; gives the callback for its steps."""
        ...

    def finished(self, stage: str, folder: Path, cost: "Cost", *, is_new: bool) -> None:
        """A stage is complete, now (`is_new`) or since an earlier call."""
        ...


@dataclass(frozen=True)
class Cost:
    """What a finished stage took, over all the processes that it ran in."""

    num_samples: int
    steps: int
    wall_seconds: float
    cpu_seconds: float


@dataclass
class Stage:
    """One run of a recipe."""

    name: str
    """Folder of the stage below run.output_dir."""
    run: dict[str, Any] = field(default_factory=dict)
    """Keys layered over the recipe's `run:`."""
    task: dict[str, Any] = field(default_factory=dict)
    """Keys layered over the recipe's `task:`."""
    datasets: dict[str, Any] = field(default_factory=dict)
    """Keys layered over the recipe's `datasets:`."""


@dataclass
class Recipe:
    """The sections of a recipe file."""

    model: dict[str, Any] = field(default_factory=dict)
    """The network: `arch` and its config; in an evaluation `path` and `dtype`."""
    datasets: dict[str, Any] = field(default_factory=dict)
    """One section a dataset."""
    task: dict[str, Any] = field(default_factory=dict)
    """Settings of the task that `run.task` names."""
    run: RunConfig = field(default_factory=RunConfig)
    """How the run trains."""
    stages: list[Stage] = field(default_factory=list)
    """Runs that follow one another."""


@dataclass
class EvaluatedModel:
    """The `model:` section of an evaluation."""

    path: str | None = None
    """Folder or hub id; none: the bundled pocket model."""
    dtype: str = "auto"
    """As of `lavish.load`."""


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> DictConfig:
    """Read a recipe with stages, layer dotted overrides over it, check keys and types, and fill in `run:`.

    Raises:
        ConfigError: unknown key, wrong type, or a file that is not a recipe.
    """
    merged = configs.merge(configs.load_yaml(path), configs.parse_overrides(overrides or []))
    checked = configs.check(merged, Recipe)
    run = {name: value for name, value in asdict(checked.run).items() if value is not None}
    return configs.merge({"run": run}, merged)


def open_recipe(path: str | Path, overrides: list[str] | None = None) -> DictConfig | Config:
    """Read a recipe of either kind; one whose `model:` names a model type, and that has no stages, is LAVIS's.

    Raises:
        ConfigError: unknown key, wrong type, unknown model, type or data set, or a file that is not a recipe.
    """
    merged = configs.merge(configs.load_yaml(path), configs.parse_overrides(overrides or []))
    model = merged.get("model")
    is_lavis = isinstance(model, DictConfig) and "model_type" in model and not {"stages", "task"} & set(merged)
    return Config(path, overrides or []) if is_lavis else load_recipe(path, overrides)


def stage_configs(recipe: DictConfig | Config) -> list[tuple[str, Any]]:
    """Give (name, merged config) of each run of the recipe; one without `stages` is one run, in run.output_dir itself.

    Raises:
        ConfigError: a stage's name is no plain folder name, or there twice.
    """
    if isinstance(recipe, Config):
        return [("run", recipe)]
    shared = OmegaConf.create({key: value for key, value in recipe.items() if key != "stages"})
    if not recipe.get("stages"):
        return [("run", shared)]
    named: dict[str, DictConfig] = {}
    for stage in recipe.stages:
        name = str(stage.name)
        if name in named or name != Path(name).name or name.startswith("."):
            raise ConfigError(f"The stage name {name!r} is taken or no plain folder name; give each stage its own.")
        merged = configs.merge(shared, {key: value for key, value in stage.items() if key != "name"})
        merged.run.output_dir = str(Path(recipe.run.output_dir) / name)
        named[name] = merged
    return list(named.items())


def run_config(config: DictConfig | Config) -> RunConfig:
    """Give the typed `run:` section of one run.

    Raises:
        ConfigError: an unknown key or a wrong value, or no or an unknown `run.task`.
    """
    if not isinstance(config, Config):
        return configs.check(config, Recipe).run
    name = config.run_cfg.get("task")
    return lavis_run_config(config, registry.get_task_class(name) if name else BaseTask)


def setup_task(config: DictConfig | Config) -> BaseTask:
    """Check one merged stage and build its task.

    Raises:
        ConfigError: no or unknown `run.task` or `run.runner`, no such device, or whatever the task finds wrong.
    """
    run = run_config(config)
    registry.get_runner_class(run.runner)
    registry.get_lr_scheduler_class(run.lr_sched)
    device_of(run)
    if not run.task:
        raise ConfigError("The recipe has no run.task; name one, for example `run: {task: scenes}`.")
    return registry.get_task_class(run.task).setup_task(config)


def check_data(config: Config) -> None:
    """Check the data sections of a LAVIS recipe as far as that fetches nothing.

    Raises:
        ConfigError: no data, an unknown key, or a wrong value.
        DataError: a file is absent and has no URL.
    """
    if not config.datasets_cfg:
        raise ConfigError("The recipe has no datasets; name one, for example `datasets: {coco_caption: ...}`.")
    for name, section in config.datasets_cfg.items():
        registry.get_builder_class(str(name))(section).check()


def check(recipe: DictConfig | Config, *, only: str | None = None) -> list[tuple[str, Any]]:
    """Check every stage of the recipe as far as that needs nothing heavy; give those to run, as `stage_configs` does.

    Raises:
        ConfigError: the recipe is wrong, or `only` names no stage of it.
    """
    stages = stage_configs(recipe)
    names = [name for name, _ in stages]
    if only is not None and only not in names:
        raise ConfigError(
            f"The recipe has no stage {only!r}.{did_you_mean(only, names)} Its stages are {', '.join(names)}."
        )
    for _, config in stages:
        setup_task(config).check_training()
        if isinstance(config, Config):
            check_model(config.model_cfg)
            check_data(config)
    return [(name, config) for name, config in stages if only in (None, name)]


def train(
    recipe: DictConfig | Config, *, only: str | None = None, report: Report | None = None, force: bool = False
) -> dict[str, Path]:
    """Run every stage of the recipe, or `only` one, and give their folders by name; all are checked before the first.

    Args:
        recipe: as `open_recipe` gives it.
        only: the stage to run.
        report: hears of what happens.
        force: go on in a folder that was begun with other settings.

    Raises:
        ConfigError: the recipe is wrong, `only` names no stage of it, a stage starts from one that is not finished, or
            a folder was begun with other settings.
        CheckpointError: a folder holds a run of another model.
    """
    return {name: _run_stage(name, config, report, force) for name, config in check(recipe, only=only)}


def _run_stage(name: str, config: DictConfig | Config, report: Report | None, force: bool) -> Path:
    run, merged = run_config(config), config.config if isinstance(config, Config) else config
    folder = Path(run.output_dir)
    _refuse_changes(merged, folder, force)
    cost = read_cost(folder)
    is_new = cost is None
    if cost is None:
        seed_all(run.seed)
        task = setup_task(config)
        model = task.build_model(config)
        datasets = task.build_datasets(config)
        told = config if isinstance(config, Config) else run
        runner: RunnerBase = registry.get_runner_class(run.runner)(told, task, model, datasets)
        if dist.is_main():
            configs.save(merged, folder / CONFIG_FILE)
            configs.write_json(environment(), folder / ENVIRONMENT_FILE)
            runner.progress = report.started(name, runner) if report else None
        runner.train()
        seconds = round(runner.seconds, 1), round(runner.cpu_seconds, 1)
        cost = Cost(runner.num_samples, runner.step, *seconds)
        runner.engine.make_whole(runner.model)
        if dist.is_main() and not run.evaluate:
            task.finish(runner.model, folder)
            if isinstance(runner.model, BaseModel):
                runner.model.save_trained(folder)
            yaml = OmegaConf.to_yaml(merged, resolve=True)
            write_report(runner.folder, parts_of(runner.model, run.optimizer), asdict(cost), yaml)
            configs.write_json(asdict(cost), folder / DONE_FILE)
        dist.wait_for_all()
    if report and dist.is_main():
        report.finished(name, folder, cost, is_new=is_new)
    return folder


def read_cost(folder: Path) -> Cost | None:
    """Give what a run took, or None while it is not complete.

    Raises:
        CheckpointError: the file that says so is damaged.
    """
    path = folder / DONE_FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Cost(**{name: values[name] for name in Cost.__dataclass_fields__})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it, and the run is finished anew.") from error


def seed_all(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, in all processes alike."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def environment() -> dict[str, Any]:
    """Give what a run was made with: versions, machine, command, and the git revision of the working folder."""
    try:
        asked = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10)
        revision = asked.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        revision = None
    return {
        "command": sys.argv,
        "git_revision": revision,
        "processes": dist.world_size(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {"lavish": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "devices": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }


def _refuse_changes(config: DictConfig, folder: Path, force: bool) -> None:
    """Refuse a folder that was begun with other settings, unless it is to go on under the new ones.

    Raises:
        ConfigError: says what differs.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        return
    before, now = _flat(configs.load_yaml(path)), _flat(config)
    is_lavis = "model.model_type" in now
    keys = [key for key in before | now if key.removeprefix("run.") not in CHANGEABLE]
    changed = [
        f"{key}: {before.get(key, 'not set')!r} -> {now.get(key, 'not set')!r}"
        for key in keys
        if before.get(key) != now.get(key)
        # Recipes with stages save `run:` with its defaults: a key that is absent is of another version of lavish.
        and (is_lavis or not key.startswith("run.") or (key in before and key in now))
    ]
    if not changed:
        return
    difference = f"{folder} was begun with other settings ({'; '.join(changed)})."
    if not force:
        raise ConfigError(
            f"{difference} Set another run.output_dir, delete the folder to start anew, or go on under the new "
            "settings with --force; what is finished stays as it is."
        )
    logger.warning("%s What is finished there stays as it is, and the rest goes on with the new ones.", difference)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, DictConfig):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def evaluate(recipe: DictConfig, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Score the model of `model.path` (none: the bundled pocket model) with the recipe's task and give the summary.

    Writes `metrics.json` (the summary, and as `record` what was measured, and with what) and `config.yaml` into
    run.output_dir, beside what the task writes there.

    Raises:
        ConfigError: the recipe is wrong.
        CheckpointError: the model cannot be loaded.
    """
    run = configs.check(recipe, Recipe).run
    source = configs.check(recipe.get("model") or {}, EvaluatedModel, "model")
    task = setup_task(recipe)
    weights = POCKET if source.path is None else hub.resolve(source.path)
    vlm = load(source.path, dtype=source.dtype, device=run.device)
    folder = Path(run.output_dir)
    configs.save(recipe, folder / CONFIG_FILE)
    started = time.perf_counter()
    summary = task.evaluation(vlm, folder, run.batch_size_eval, progress)  # pyright: ignore[reportCallIssue] - scenes
    weight = next(vlm.model.parameters())
    record = {
        "model": source.path or "pocket",
        "weights_sha256": weights_sha256(weights),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "wall_seconds": round(time.perf_counter() - started, 1),
        "datasets": OmegaConf.to_container(recipe.get("datasets") or OmegaConf.create({}), resolve=True),
        "versions": {"lavish": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    configs.write_json({**summary, "record": record}, folder / METRICS_FILE)
    return summary


def weights_sha256(folder: Path) -> str:
    """Give the digest of a model folder's weight files, names and bytes, by which a score is known to be of them."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
