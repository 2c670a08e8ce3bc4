"""Parameter groups, optimizers and schedules."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lavish.common.errors import ConfigError
from lavish.common.registry import registry
from lavish.runners.optim import build_optimizer, build_schedule, split_parameters
from lavish.runners.schema import RunConfig


class Everything(nn.Module):
    """A parameter of every kind that the groups tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(3, 4, 2)
        self.inner = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.row = nn.Parameter(torch.zeros(1, 1, 6))
        self.heads = nn.ModuleDict({"shape": nn.Linear(6, 3)})
        self.lm_head = nn.Linear(6, 5, bias=False)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def groups_by_name(model: nn.Module, run: RunConfig) -> dict[str, tuple[str, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[str, float]] = {}
    for optimizer in build_optimizer(model, run).optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert names[id(parameter)] not in found, "a parameter stands in two groups"
                found[names[id(parameter)]] = type(optimizer).__name__, group["weight_decay"]
    return found


def test_every_trainable_parameter_is_in_exactly_one_kind() -> None:
    model = Everything()
    matrices, tables, vectors = split_parameters(model)
    assert set(matrices) == {"inner.weight"}
    assert set(tables) == {"embed.weight", "conv.weight", "heads.shape.weight", "lm_head.weight"}
    assert set(vectors) == {"conv.bias", "inner.bias", "norm.weight", "norm.bias", "row", "heads.shape.bias"}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {*matrices, *tables, *vectors} == trainable


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_decay(optimizer: str) -> None:
    model = Everything()
    found = groups_by_name(model, RunConfig(optimizer=optimizer, weight_decay=0.3))  # type: ignore[arg-type]
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, (_, decay) in found.items() if decay} == {"inner.weight"}
    assert found["inner.weight"] == ("Muon" if optimizer == "muon" else "AdamW", 0.3)
    assert {kind for name, (kind, _) in found.items() if name != "inner.weight"} == {"AdamW"}


def test_a_tied_parameter_counts_once() -> None:
    model = Everything()
    model.lm_head = nn.Linear(4, 5, bias=False)
    model.lm_head.weight = model.embed.weight
    assert "lm_head.weight" not in split_parameters(model).tables
    assert len(groups_by_name(model, RunConfig())) == len(list(filter(lambda p: p.requires_grad, model.parameters())))


def test_a_module_of_matrices_alone_needs_no_adamw_beside_muon() -> None:
    (only,) = build_optimizer(nn.Linear(3, 3, bias=False), RunConfig(optimizer="muon")).optimizers
    assert isinstance(only, torch.optim.Muon)


def test_nothing_trainable_is_said() -> None:
    with pytest.raises(ConfigError, match="Linear has no trainable parameter"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), RunConfig())


def test_unknown_optimizer_is_suggested() -> None:
    with pytest.raises(ConfigError, match=r"'adamv'.*adamw, muon.*Did you mean 'adamw'"):
        build_optimizer(nn.Linear(2, 2), RunConfig(optimizer="adamv"))  # type: ignore[arg-type]


def test_learning_rates_keep_their_ratio() -> None:
    run = RunConfig(optimizer="muon", muon_lr=0.1, init_lr=0.01, lr_sched="linear_warmup_linear_lr")
    optimizer = build_optimizer(Everything(), run)
    set_rates = build_schedule(optimizer, run, 3, 3)
    assert [set_rates(0), set_rates(1)] == pytest.approx([0.01, 0.005])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.005, 0.005])


def shares(run: RunConfig, num_steps: int) -> list[float]:
    set_rates = build_schedule(build_optimizer(Everything(), run), run, num_steps, num_steps)
    return [set_rates(step) / run.init_lr for step in range(num_steps)]


def test_cosine_schedule_values() -> None:
    scale = shares(RunConfig(init_lr=1.0, min_lr=0.1, warmup_steps=4), 13)
    assert scale[:4] == [0.25, 0.5, 0.75, 1.0]
    for step in range(4, 13):
        done = (step - 4) / 8
        assert scale[step] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
    assert scale[4] == 1.0
    assert scale[12] == pytest.approx(0.1)


def test_linear_and_constant_schedules() -> None:
    assert shares(RunConfig(lr_sched="linear_warmup_linear_lr"), 5) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert shares(RunConfig(lr_sched="constant_lr", warmup_steps=2), 5) == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0])


def test_a_run_of_one_step_has_a_schedule() -> None:
    assert shares(RunConfig(), 1) == [1.0]


def test_warm_up_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run.warmup_steps is 5, but the run has 5 steps"):
        shares(RunConfig(warmup_steps=5), 5)


def test_unknown_schedule_is_suggested() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'linear_warmup_cosine_lr'"):
        shares(RunConfig(lr_sched="linear_warmup_cosine"), 5)


def test_layer_decay_gives_each_vision_layer_its_rate() -> None:
    model = nn.ModuleDict({"vision_tower": nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(2))})})
    model["head"] = nn.Linear(2, 2)
    run = RunConfig(init_lr=1.0, lr_layer_decay=0.5)
    optimizer = build_optimizer(model, run)
    build_schedule(optimizer, run, 1, 1)(0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(one)]: group["lr"] for group in optimizer.param_groups for one in group["params"]}
    assert rates["vision_tower.layers.0.weight"] == rates["vision_tower.layers.0.bias"] == 0.25
    assert (rates["vision_tower.layers.1.weight"], rates["head.weight"]) == (0.5, 1.0)


def test_lavis_by_name_has_one_rate_for_all() -> None:
    run = RunConfig(init_lr=1.0, lr_layer_decay=0.5, compat="lavis")
    optimizer = build_optimizer(Everything(), run)
    build_schedule(optimizer, run, 4, 2)(0)
    assert {group["lr"] for group in optimizer.param_groups} == {1.0}


@pytest.mark.parametrize("accum_grad_iters", [1, 2])
def test_a_release_counts_forward_passes(accum_grad_iters: int) -> None:
    """The rate is set at each pass, and the last pass of a step makes it."""
    run = RunConfig(compat="lavis", init_lr=1.0, warmup_lr=0.0, warmup_steps=4, accum_grad_iters=accum_grad_iters)
    set_rates = build_schedule(build_optimizer(Everything(), run), run, 8, 4)
    found = [set_rates(step) for step in range(5)]
    first = [0.0, 0.25, 0.5, 0.75] if accum_grad_iters == 1 else [0.25, 0.75, 1.0, 1.0]
    assert found == pytest.approx([*first, 0.5 * (1 + math.cos(math.pi / 2))])


def test_a_users_schedule_is_called_as_lavis_calls_it() -> None:
    calls = []

    class Mine:
        def __init__(self, optimizer, max_epoch, min_lr, init_lr, decay_rate, warmup_start_lr, warmup_steps) -> None:
            self.optimizer = optimizer

        def step(self, cur_epoch: int, cur_step: int) -> None:
            calls.append((cur_epoch, cur_step))
            for group in self.optimizer.param_groups:
                group["lr"] = 0.125

    registry.register_lr_scheduler("of_a_test")(Mine)
    run = RunConfig(lr_sched="of_a_test")
    set_rates = build_schedule(build_optimizer(Everything(), run), run, 4, 2)
    assert [set_rates(step) for step in range(3)] == [0.125] * 3
    assert calls == [(0, 0), (0, 1), (1, 0)]
    with pytest.raises(ConfigError, match="'constant_lr' is taken"):
        registry.register_lr_scheduler("constant_lr")(Mine)


@pytest.mark.parametrize(
    ("key", "value"),
    [("batch_size_train", 0), ("log_freq", 0), ("warmup_steps", -1), ("init_lr", 0.0), ("beta2", 1.0), ("min_lr", 1.0)],
)
def test_numbers_that_no_run_can_have(key: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=key):
        RunConfig(**{key: value})
