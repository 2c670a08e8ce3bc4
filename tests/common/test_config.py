"""Layers, overrides, the typed check and what its errors say, saving, and the LAVIS-shaped Config."""

import json
import os
from argparse import Namespace
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from lavish.common import config as configs
from lavish.common.config import Config, check, load_yaml, merge, parse_overrides, save
from lavish.common.errors import ConfigError
from lavish.common.registry import Registry


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Optimizer:
    name: Literal["adamw", "muon"] = field(default="adamw", metadata={"help": "Which one."})
    init_lr: float = 1e-4
    """Peak learning rate,
    per step."""
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass
class Run:
    task: str
    """What is trained."""
    max_epoch: int = 1
    amp: bool = False
    device: str | None = None
    size: int | tuple[int, int] = 224
    splits: list[str] = field(default_factory=lambda: ["train"])
    extra: dict[str, Any] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    output_dir: Path = Path("output")
    colour: Colour = Colour.RED
    optimizer: Optimizer = field(default_factory=Optimizer)
    stages: list[Optimizer] = field(default_factory=list)
    sampler: Optimizer | None = None

    def __post_init__(self) -> None:
        if self.max_epoch < 0:
            raise ValueError(f"max_epoch is {self.max_epoch}; it counts from 0.")


def problems(values: dict[str, Any], section: str = "") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check({"task": "vqa", **values}, Run, section)
    return str(caught.value).splitlines()


# --- the typed check --------------------------------------------------------------------------------------------------


def test_check_gives_an_instance_with_the_defaults_filled_in() -> None:
    run = check(
        {
            "task": "vqa",
            "size": [224, 448],
            "output_dir": "runs/a",
            "colour": "blue",
            "optimizer": {"name": "muon", "init_lr": 1, "betas": [0.9, 0.98]},
            "stages": [{"init_lr": 0.5}, {}],
            "ratios": {"coco": 1},
            "extra": {"any": [1, {"thing": None}]},
            "sampler": {"name": "muon"},
        },
        Run,
    )
    assert run == Run(
        task="vqa",
        size=(224, 448),
        output_dir=Path("runs/a"),
        colour=Colour.BLUE,
        optimizer=Optimizer("muon", 1.0, (0.9, 0.98)),
        stages=[Optimizer(init_lr=0.5), Optimizer()],
        ratios={"coco": 1.0},
        extra={"any": [1, {"thing": None}]},
        sampler=Optimizer("muon"),
    )
    assert isinstance(run.optimizer.init_lr, float)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"max_epok": 3}, "run.max_epok: unknown key. Did you mean 'max_epoch'?"),
        ({"zzz": 3}, "run.zzz: unknown key. Known keys: task, max_epoch, amp, device,"),
        ({"optimizer": {"init_rl": 1}}, "run.optimizer.init_rl: unknown key. Did you mean 'init_lr'?"),
        ({"stages": [{}, {"nam": 1}]}, "run.stages.1.nam: unknown key. Did you mean 'name'?"),
        ({"sampler": {"nam": 1}}, "run.sampler.nam: unknown key. Did you mean 'name'?"),
        ({"max_epoch": "3"}, "run.max_epoch: '3' (str) where int is expected."),
        ({"max_epoch": 3.5}, "run.max_epoch: 3.5 (float) where int is expected."),
        ({"max_epoch": True}, "run.max_epoch: True (bool) where int is expected."),
        ({"max_epoch": None}, "run.max_epoch: None (NoneType) where int is expected."),
        ({"amp": 1}, "run.amp: 1 (int) where bool is expected."),
        ({"task": 7}, "run.task: 7 (int) where str is expected."),
        ({"device": 7}, "run.device: 7 (int) where str or null is expected."),
        ({"size": "big"}, "run.size: 'big' (str) where int or list of int is expected."),
        ({"splits": "train"}, "run.splits: 'train' (str) where a list is expected."),
        ({"splits": ["train", 3]}, "run.splits.1: 3 (int) where str is expected."),
        ({"ratios": {"coco": "x"}}, "run.ratios.coco: 'x' (str) where float is expected."),
        ({"extra": [1]}, "run.extra: [1] (list) where a section is expected."),
        ({"optimizer": 3}, "run.optimizer: 3 (int) where a section of Optimizer is expected."),
        (
            {"optimizer": {"name": "adam"}},
            "run.optimizer.name: 'adam' is not one of adamw, muon. Did you mean 'adamw'?",
        ),
        ({"optimizer": {"betas": [0.9]}}, "run.optimizer.betas: 1 items where 2 are expected."),
        ({"colour": "rde"}, "run.colour: 'rde' is not one of RED, BLUE. Did you mean 'RED'?"),
        ({"max_epoch": -1}, "run: max_epoch is -1; it counts from 0."),
        ({"task": "${nothing}"}, "run.task: Interpolation key 'nothing' not found."),
        ({"task": "???"}, "run.task: Missing mandatory value: task."),
    ],
)
def test_a_wrong_config_names_the_dotted_key(values: dict[str, Any], expected: str) -> None:
    found = problems(values, "run")
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check({"amp": "x", "optimizer": {"a": 1, "init_lr": "y"}}, Run)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "amp",
        "optimizer.a",
        "optimizer.init_lr",
        "task",
    ]
    assert "task: this key is needed (str)." in str(caught.value)


def test_the_layer_of_a_wrong_value_is_named(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("task: vqa\nampp: true\nmax_epoch: 1\n")
    (tmp_path / "top.yaml").write_text("max_epoch: two\noptimizer: {init_lr: fast}\n")
    merged = merge(load_yaml(tmp_path / "base.yaml"), load_yaml(tmp_path / "top.yaml"), parse_overrides(["splits=x"]))
    with pytest.raises(ConfigError) as caught:
        check(merge({"device": None}, merged), Run)  # merged twice: the names stay
    lines = {line.split(" ")[0]: line for line in str(caught.value).splitlines()}
    assert f"(from {tmp_path / 'base.yaml'})" in lines["ampp"]
    assert f"(from {tmp_path / 'top.yaml'})" in lines["max_epoch"]
    assert f"(from {tmp_path / 'top.yaml'})" in lines["optimizer.init_lr"]
    assert "(from the command line)" in lines["splits"]


# --- layers and overrides ---------------------------------------------------------------------------------------------


def test_later_layers_win_and_lists_are_replaced() -> None:
    merged = merge({"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"c": [3]}}, {"d": {"e": 2}})
    assert OmegaConf.to_container(merged) == {"a": {"b": 1, "c": [3]}, "d": {"e": 2}}
    assert OmegaConf.to_container(merge()) == {}


def test_interpolations_are_resolved_after_merging() -> None:
    merged = merge({"a": 1, "b": "${a}"}, {"a": 2})
    assert merged.b == 2


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["run.max_epoch=3", "run.init_lr=1e-4"], {"run": {"max_epoch": 3, "init_lr": 1e-4}}),
        (["run.max_epoch", "3", "run.amp", "true"], {"run": {"max_epoch": 3, "amp": True}}),
        (
            ["a=[1, 2]", "b={c: 1}", "d=null", "e='3'", "f="],
            {"a": [1, 2], "b": {"c": 1}, "d": None, "e": "3", "f": None},
        ),
        (["a=x=y", "b=http://host/path"], {"a": "x=y", "b": "http://host/path"}),
        ([], {}),
    ],
)
def test_overrides_are_read(items: list[str], expected: dict) -> None:
    assert OmegaConf.to_container(parse_overrides(items)) == expected


@pytest.mark.parametrize("key", ["stages.1.name", "stages[1].name"])
def test_an_override_reaches_into_a_list(key: str) -> None:
    merged = merge({"stages": [{"name": "a"}, {"name": "b", "x": 1}]}, parse_overrides([f"{key}=c"]))
    assert OmegaConf.to_container(merged) == {"stages": [{"name": "a"}, {"name": "c", "x": 1}]}
    with pytest.raises(ConfigError, match=r"stages\.7: the list has 2 items, the last is stages\.1"):
        merge(merged, parse_overrides(["stages.7.name=c"]))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["=3"], "not of the form"),
        (["a..b=3"], "not of the form"),
        (["a=1", "b"], "not of the form"),
        (["a"], "has no value"),
        (["a=[1"], "no YAML"),
        (["a=${"], "no YAML"),
    ],
)
def test_an_override_that_cannot_be_read_says_why(items: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_overrides(items)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1\n- 2\n", "holds a list"),
        ("a: [1\n", "not a YAML file"),
        ("a: 1\na: 2\n", "not a YAML file"),
        ("a: !!python/object/apply:os.system ['true']\n", "not a YAML file"),
        (b"\xff\xfe\x00\x00a", "cannot be read|not a YAML file"),
    ],
)
def test_a_file_that_is_no_config_says_so(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        load_yaml(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 200 + ".yaml"])
def test_a_long_name_makes_no_long_message(name: str) -> None:
    with pytest.raises(ConfigError, match="config file") as error:
        load_yaml(name)
    assert len(str(error.value)) < 300


def test_an_absent_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert OmegaConf.to_container(load_yaml(tmp_path / "empty.yaml")) == {}


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "config.yaml"
    save(merge({"a": {"b": 1}, "c": "${a.b}", "d": "红"}), path)
    assert OmegaConf.to_container(load_yaml(path)) == {"a": {"b": 1}, "c": 1, "d": "红"}
    run = check({"task": "vqa", "output_dir": "x", "colour": "blue"}, Run)
    save(run, path)
    assert check(load_yaml(path), Run) == run
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~current_umask())


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "done.json"
    configs.write_json({"a": 1}, path)
    before = path.read_text()
    with pytest.raises(TypeError):
        configs.write_json({"a": object()}, path)
    with pytest.raises(UnicodeEncodeError):
        configs.write_text("\ud800", path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["done.json"]


def test_half_a_character_is_kept(tmp_path: Path) -> None:
    configs.write_json({"a": "\ud800 é"}, tmp_path / "done.json")
    text = (tmp_path / "done.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": "\ud800 é"}
    assert "é" in text


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_is_taken_from_metadata_and_docstrings() -> None:
    entries = {entry.key: entry for entry in configs.field_help(Run, "run")}
    assert entries["run.task"] == ("run.task", "str", None, "What is trained.")
    assert entries["run.optimizer.name"] == ("run.optimizer.name", "adamw | muon", "adamw", "Which one.")
    assert entries["run.optimizer.init_lr"].help.startswith("Peak learning rate,")
    assert entries["run.device"][1:3] == ("str or null", "null")
    assert entries["run.amp"].default == "false"
    assert entries["run.max_epoch"].default == "1"
    text = configs.help_text(Run, "run")
    assert "run.task  str, needed\n    What is trained." in text
    assert "run.optimizer.init_lr  float = 0.0001\n    Peak learning rate, per step." in text


# --- the LAVIS-shaped Config ------------------------------------------------------------------------------------------


@pytest.fixture
def names(tmp_path: Path) -> Registry:
    (tmp_path / "base.yaml").write_text(
        "model: {image_size: 384, drop: 0.1, vit: base}\npreprocess: {vis: 1}\nother: 1\n"
    )
    (tmp_path / "large.yaml").write_text("model: {image_size: 384, vit: large}\n")
    (tmp_path / "coco.yaml").write_text("datasets: {coco: {data_type: images, storage: here}}\n")
    (tmp_path / "odd.yaml").write_text("datasets: {something_else: {}}\n")
    found = Registry()

    @found.register_model("blip")
    class Model:
        PRETRAINED_MODEL_CONFIG_DICT = {"base": str(tmp_path / "base.yaml"), "large": str(tmp_path / "large.yaml")}

    @found.register_builder("coco")
    class Builder:
        DATASET_CONFIG_DICT = {"default": str(tmp_path / "coco.yaml"), "odd": str(tmp_path / "odd.yaml")}

    return found


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {arch: blip, model_type: base, drop: 0.2}\n"
        "datasets: {coco: {storage: there}}\nrun: {task: vqa, max_epoch: 5}\n"
    )
    return path


def test_defaults_are_weaker_than_the_recipe_and_options_are_strongest(recipe: Path, names: Registry) -> None:
    config = Config(recipe, ["run.max_epoch=7", "model.drop=0.3"], names=names)
    assert config.model_cfg == {"arch": "blip", "model_type": "base", "drop": 0.3, "image_size": 384, "vit": "base"}
    assert config.datasets_cfg == {"coco": {"data_type": "images", "storage": "there"}}
    assert config.run_cfg == {"task": "vqa", "max_epoch": 7}
    assert config.preprocess_cfg == {"vis": 1}
    assert set(config.to_dict()) == {"model", "preprocess", "datasets", "run"}
    assert "max_epoch: 7" in config.pretty()
    assert config.get_config() is config.config


def test_a_model_type_given_as_an_option_brings_its_own_defaults(recipe: Path, names: Registry) -> None:
    assert Config(recipe, ["model.model_type=large"], names=names).model_cfg.vit == "large"


def test_the_arguments_of_a_lavis_script_are_taken(recipe: Path, names: Registry) -> None:
    arguments = Namespace(cfg_path=str(recipe), options=["run.max_epoch", "9"])
    assert Config(arguments, names=names).run_cfg.max_epoch == 9
    assert Config(Namespace(cfg_path=str(recipe), options=None), names=names).run_cfg.max_epoch == 5


def test_a_section_is_checked_with_the_layer_named(recipe: Path, names: Registry) -> None:
    assert Config(recipe, names=names).check("run", Run).max_epoch == 5
    with pytest.raises(
        ConfigError, match=r"run\.max_epok \(from the command line\): unknown key. Did you mean 'max_epoch'"
    ):
        Config(recipe, ["run.max_epok=1"], names=names).check("run", Run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["modle.x=1"], "Unknown section 'modle'. Did you mean 'model'"),
        (["datasets=3"], "datasets: 3 where keys and values are expected"),
        (["model.arch=blipp"], "No model is named 'blipp'. Did you mean 'blip'"),
        (["model.model_type=bass"], "model.model_type of 'blip' is 'bass'. Did you mean 'base'"),
        (["datasets.cocoo.x=1"], "No builder is named 'cocoo'. Did you mean 'coco'"),
        (["datasets.coco.type=x"], "datasets.coco.type is 'x'. Known: default, odd"),
        (["datasets.coco.type=odd"], "has no section datasets.coco"),
    ],
)
def test_an_unknown_name_in_a_recipe_suggests(recipe: Path, names: Registry, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(recipe, options, names=names)


def test_a_recipe_without_sections_has_empty_ones() -> None:
    config = Config({"run": {"task": "x"}})
    assert config.model_cfg == {}
    assert config.datasets_cfg == {}


def test_a_model_of_the_built_in_table_has_no_default_files() -> None:
    with pytest.raises(ConfigError, match=r"model\.model_type of 'cogvlm' is 'cogvlm2'\. Known: none"):
        Config({"model": {"arch": "cogvlm", "model_type": "cogvlm2"}})
    assert Config({"model": {"arch": "cogvlm"}}).model_cfg == {"arch": "cogvlm"}
