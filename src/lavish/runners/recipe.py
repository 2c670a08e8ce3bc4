"""Recipes: one YAML that names a model, its data and how a run trains, in one or several stages.

    model:     {arch: cogvlm, config: {...}}          fields of the network's config.json
    datasets:  {scenes: {...}}
    run:       {task: scenes, ...}                     lavish.runners.schema.RunConfig
    stages:    [{name: tower, run: {...}, task: {...}}, ...]     optional; each stage is a run in <run.output_dir>/<name>

A stage's sections are layered over the shared ones. The whole recipe is checked before anything heavy starts, and the merged file is saved
beside the run's outputs. A stage that is complete is not run again; one that was killed continues from its newest checkpoint.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import DictConfig, OmegaConf

import lavish
from lavish.common import config as configs
from lavish.common.errors import ConfigError
from lavish.common.registry import registry
from lavish.inference.load import load
from lavish.runners.runner_base import Progress, RunnerBase
from lavish.runners.schema import RunConfig
from lavish.tasks.base_task import BaseTask

DONE_FILE = "done.json"
Report = Callable[[str, RunnerBase], Progress]


@dataclass
class Stage:
    """One run of a recipe."""

    name: str = field(metadata={"help": "Folder of the stage below run.output_dir."})
    run: dict[str, Any] = field(default_factory=dict, metadata={"help": "Keys layered over the recipe's `run:`."})
    task: dict[str, Any] = field(default_factory=dict, metadata={"help": "Keys layered over the recipe's `task:`."})
    datasets: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Keys layered over the recipe's `datasets:`."}
    )


@dataclass
class Recipe:
    """The sections of a recipe file."""

    model: dict[str, Any] = field(default_factory=dict, metadata={"help": "The network: `arch` and its config."})
    datasets: dict[str, Any] = field(default_factory=dict, metadata={"help": "One section a dataset."})
    task: dict[str, Any] = field(default_factory=dict, metadata={"help": "Settings of the task that `run.task` names."})
    run: RunConfig = field(default_factory=RunConfig, metadata={"help": "How the run trains."})
    stages: list[Stage] = field(default_factory=list, metadata={"help": "Runs that follow one another."})


@dataclass
class EvaluatedModel:
    """The `model:` section of an evaluation."""

    path: str | None = field(default=None, metadata={"help": "Folder or hub id; none: the bundled pocket model."})
    dtype: str = field(default="auto", metadata={"help": "As of `lavish.load`."})


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> DictConfig:
    """Read a recipe, layer dotted overrides over it and check its sections' keys and types.

    Raises:
        ConfigError: unknown key, wrong type, or a file that is not a recipe.
    """
    merged = configs.merge(configs.load_yaml(path), configs.parse_overrides(overrides or []))
    configs.check(merged, Recipe)
    return merged


def stage_configs(recipe: DictConfig) -> list[tuple[str, DictConfig]]:
    """Give (name, merged config) of each run of the recipe; a recipe without `stages` is one run."""
    shared = OmegaConf.create({key: value for key, value in recipe.items() if key != "stages"})
    if not recipe.get("stages"):
        return [("run", shared)]
    named = []
    for stage in recipe.stages:
        merged = configs.merge(shared, {key: value for key, value in stage.items() if key != "name"})
        merged.run.output_dir = str(Path(recipe.run.output_dir) / stage.name)
        named.append((str(stage.name), merged))
    return named


def setup_task(config: DictConfig) -> BaseTask:
    """Check one merged stage and build its task.

    Raises:
        ConfigError: no or unknown `run.task` or `run.runner`, or whatever the task finds wrong.
    """
    recipe = configs.check(config, Recipe)
    registry.get_runner_class(recipe.run.runner)
    if not recipe.run.task:
        raise ConfigError("The recipe has no run.task; name one, for example `run: {task: scenes}`.")
    return registry.get_task_class(recipe.run.task).setup_task(config)


def train(recipe: DictConfig, *, only: str | None = None, report: Report | None = None) -> list[Path]:
    """Run every stage of the recipe (or `only` one) and give their folders.

    All stages are checked before the first starts. `report(stage, runner)` is called when a stage starts and gives its
    progress callback.

    Raises:
        ConfigError: the recipe is wrong, or `only` names no stage of it.
    """
    stages = stage_configs(recipe)
    names = [name for name, _ in stages]
    if only is not None and only not in names:
        raise ConfigError(f"The recipe has no stage {only!r}; its stages are {', '.join(names)}.")
    for _, config in stages:
        setup_task(config)
    return [_run_stage(name, config, report) for name, config in stages if only in (None, name)]


def _run_stage(name: str, config: DictConfig, report: Report | None) -> Path:
    folder = Path(config.run.output_dir)
    if (folder / DONE_FILE).exists():
        return folder
    run = configs.check(config, Recipe).run
    task = setup_task(config)
    runner = registry.get_runner_class(run.runner)(run, task, task.build_model(), task.build_datasets())
    configs.save(config, folder / "config.yaml")
    runner.progress = report(name, runner) if report else None
    runner.train()
    task.finish(runner.model, folder)
    cost = {
        "num_samples": runner.step * runner.samples_per_step,
        "steps": runner.step,
        "wall_seconds": round(runner.seconds, 1),
        "cpu_seconds": round(runner.cpu_seconds, 1),
    }
    configs.write_json(cost, folder / DONE_FILE)
    return folder


def evaluate(recipe: DictConfig, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Score the model of `model.path` (none: the bundled pocket model) with the recipe's task.

    Writes `metrics.json` (scores and what they were measured with) and `config.yaml` into run.output_dir.
    """
    checked = configs.check(recipe, Recipe)
    source = configs.check(recipe.get("model") or {}, EvaluatedModel, "model")
    task = setup_task(recipe)
    vlm = load(source.path, dtype=source.dtype, device=checked.run.device)
    folder = Path(checked.run.output_dir)
    configs.save(recipe, folder / "config.yaml")
    started = time.perf_counter()
    summary = task.evaluation(vlm, folder, checked.run.batch_size_eval, progress)
    record = {
        "model": source.path or "the bundled pocket model",
        "dtype": str(next(vlm.model.parameters()).dtype).removeprefix("torch."),
        "device": str(next(vlm.model.parameters()).device),
        "wall_seconds": round(time.perf_counter() - started, 1),
        "versions": {
            "lavish": lavish.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    configs.write_json({**summary, "record": record}, folder / "metrics.json")
    return summary
