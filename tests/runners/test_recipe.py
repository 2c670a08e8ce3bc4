"""Recipes: layers, stages, what is skipped and what goes on, and evaluations."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipe import evaluation, recipe, write

from lavish.common.errors import CheckpointError, ConfigError
from lavish.runners import recipe as recipes
from lavish.runners.recipe import Cost, load_recipe, read_cost, setup_task, stage_configs, train, weights_sha256
from lavish.runners.runner_base import Progress, RunnerBase

PROJECTS = Path(__file__).resolve().parents[2] / "projects" / "pocket"


class Heard:
    """A report that notes what it hears, and interrupts a stage at a step."""

    def __init__(self, interrupt: tuple[str, int] | None = None):
        self.interrupt = interrupt
        self.steps: list[tuple[str, int]] = []
        self.finished_stages: list[tuple[str, bool]] = []
        self.costs: dict[str, Cost] = {}

    def started(self, stage: str, runner: RunnerBase) -> Progress:
        def after_step(step: int, num_steps: int, losses: dict[str, float]) -> None:
            self.steps.append((stage, step))
            if (stage, step) == self.interrupt:
                raise KeyboardInterrupt

        return after_step

    def finished(self, stage: str, folder: Path, cost: Cost, *, is_new: bool) -> None:
        self.finished_stages.append((stage, is_new))
        self.costs[stage] = cost


# -- reading


@pytest.mark.parametrize("name", ["train.yaml", "evaluate.yaml"])
def test_the_recipes_of_the_pocket_model_are_right(name: str) -> None:
    loaded = load_recipe(PROJECTS / name)
    if name == "train.yaml":
        assert [stage for stage, _ in recipes.check(loaded)] == ["tower", "decoder", "text", "refine"]
    else:
        setup_task(loaded)
        assert loaded.datasets.scenes.seed != load_recipe(PROJECTS / "train.yaml").datasets.scenes.seed


def test_defaults_and_overrides_are_filled_in(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, "run.init_lr=0.5", "stages.1.run.max_iters=9")
    assert (loaded.run.init_lr, loaded.run.seed, loaded.run.batch_size_train) == (0.5, 42, 2)
    assert loaded.stages[1].run.max_iters == 9


def test_stages_are_layered_over_the_shared_sections(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, "stages.1.run.max_iters=9", "stages.1.datasets.scenes.seed=8")
    stages = dict(stage_configs(loaded))
    assert [stages[name].run.max_iters for name in ("tower", "decoder", "joint")] == [2, 9, 2]
    assert (stages["decoder"].datasets.scenes.seed, stages["decoder"].datasets.scenes.num_samples) == (8, 6)
    assert stages["joint"].run.output_dir == str(tmp_path / "out" / "joint")
    assert "stages" not in stages["joint"]


def test_a_recipe_without_stages_is_one_run(tmp_path: Path) -> None:
    loaded = recipe(tmp_path)
    del loaded["stages"]
    ((name, config),) = stage_configs(loaded)
    assert (name, config.run.output_dir) == ("run", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.max_itres=3", r"run\.max_itres.*unknown key.*Did you mean 'max_iters'"),
        ("run.max_iters=three", r"run\.max_iters.*'three'"),
        ("run.optimizer=adamm", r"run\.optimizer.*Did you mean 'adamw'"),
        ("run.batch_size_train=0", "batch_size_train is 0"),
        ("runs.max_iters=3", "Did you mean 'run'"),
        ("stages.0.task.stage=towr", r"task\.stage.*Did you mean 'tower'"),
        ("stages.0.run.max_itres=3", "Did you mean 'max_iters'"),
        ("stages.0.runn.max_iters=3", "Did you mean 'run'"),
        ("stages.0.name=decoder", "'decoder' is taken"),
        ("stages.0.name=../elsewhere", "no plain folder name"),
        ("run.task=scene", "Did you mean 'scenes'"),
        ("run.task=''", "no run.task"),
        ("run.runner=runner_itre", "Did you mean 'runner_iter'"),
        ("run.device=abacus", "No device 'abacus'"),
        ("model.config.hidden_size=33", "hidden_size"),
    ],
)
def test_what_is_wrong_is_found_before_anything_starts(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        train(recipe(tmp_path, override))
    assert not (tmp_path / "out").exists()


# -- training


def test_stages_run_in_order_and_leave_their_files(tmp_path: Path) -> None:
    heard = Heard()
    folders = train(recipe(tmp_path), report=heard)
    assert heard.steps == [(stage, step) for stage in ("tower", "decoder", "joint") for step in (1, 2)]
    assert heard.finished_stages == [("tower", True), ("decoder", True), ("joint", True)]
    for name, folder in folders.items():
        assert folder == tmp_path / "out" / name
        for file in ("config.yaml", "log.jsonl", "learner.safetensors", "model/config.json", "done.json"):
            assert (folder / file).is_file(), file
        cost = read_cost(folder)
        assert cost == heard.costs[name]
        assert cost is not None
        assert (cost.num_samples, cost.steps) == (4, 2)
        saved = load_recipe(folder / "config.yaml")
        assert saved.run.seed == 42
        assert setup_task(saved)


def test_finished_stages_are_skipped(tmp_path: Path) -> None:
    loaded = recipe(tmp_path)
    train(loaded, only="tower")
    before = (tmp_path / "out" / "tower" / "learner.safetensors").stat().st_mtime_ns
    heard = Heard()
    train(loaded, report=heard)
    assert heard.finished_stages == [("tower", False), ("decoder", True), ("joint", True)]
    assert {stage for stage, _ in heard.steps} == {"decoder", "joint"}
    assert (tmp_path / "out" / "tower" / "learner.safetensors").stat().st_mtime_ns == before
    (tmp_path / "out" / "tower" / "done.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"done\.json is damaged"):
        train(loaded)


def test_an_interrupted_stage_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """The decoder stage, whose code is blurred by torch's generator."""
    settings = "run.max_iters=4", "run.log_freq=3", "run.save_freq=2"
    (tmp_path / "straight").mkdir()
    (tmp_path / "broken").mkdir()
    train(recipe(tmp_path / "straight", *settings), only="decoder")
    with pytest.raises(KeyboardInterrupt):
        train(recipe(tmp_path / "broken", *settings), only="decoder", report=Heard(interrupt=("decoder", 3)))
    heard = Heard()
    train(recipe(tmp_path / "broken", *settings), only="decoder", report=heard)
    assert heard.steps == [("decoder", 3), ("decoder", 4)]
    states = [load_file(tmp_path / name / "out" / "decoder" / "learner.safetensors") for name in ("straight", "broken")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    logs = [(tmp_path / name / "out" / "decoder" / "log.jsonl").read_text() for name in ("straight", "broken")]
    assert logs[0] == logs[1]


def test_only_takes_a_stage_of_the_recipe_whose_start_is_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no stage 'jiont'\. Did you mean 'joint'"):
        train(recipe(tmp_path), only="jiont")
    with pytest.raises(ConfigError, match="'tower', which has not finished"):
        train(recipe(tmp_path), only="joint")


def test_other_settings_than_before_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(recipe(tmp_path), only="tower")
    with caplog.at_level(logging.WARNING, "lavish"):
        train(recipe(tmp_path, "run.num_threads=1"), only="tower")
        assert not caplog.records
        with pytest.raises(ConfigError, match=r"run\.max_iters: 2 -> 3.*--force"):
            train(recipe(tmp_path, "run.max_iters=3"), only="tower")
        train(recipe(tmp_path, "run.max_iters=3"), only="tower", force=True)
        train(recipe(tmp_path, "task.dense_weight=0.2"), only="tower", force=True)
    assert "run.max_iters: 2 -> 3" in caplog.text
    assert "task.dense_weight: 'not set' -> 0.2" in caplog.text


# -- evaluation


def test_an_evaluation_says_what_was_measured(tmp_path: Path) -> None:
    train(recipe(tmp_path), only="tower")
    model = tmp_path / "out" / "tower" / "model"
    summary = recipes.evaluate(evaluation(tmp_path, model), lambda done, total: None)
    folder = tmp_path / "out" / "evaluation"
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    record = metrics.pop("record")
    assert metrics == summary
    assert (record["dtype"], record["device"]) == ("bfloat16", "cpu")
    assert record["weights_sha256"] == weights_sha256(model)
    assert record["datasets"]["scenes"]["seed"] == 77
    assert set(record["versions"]) == {"lavish", "torch", "transformers"}
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 7


def test_the_digest_is_of_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"a")
    (tmp_path / "config.json").write_text("{}")
    first = weights_sha256(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert weights_sha256(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"b")
    assert weights_sha256(tmp_path) != first


def test_an_evaluation_takes_no_network_to_train(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.arch"):
        recipes.evaluate(load_recipe(write(tmp_path)), lambda done, total: None)
