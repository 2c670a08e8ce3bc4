"""Every point of the releases' schedules and their parameter groups, against the fixture."""

import json
from pathlib import Path
from typing import Any

import pytest

from lavish.common.registry import registry
from lavish.runners.optim import lavis_groups, layer_decay_groups

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "lavis_optim" / "open"
RUNS = json.loads((FIXTURES / "schedules.json").read_text())
GROUPS = json.loads((FIXTURES / "param_groups.json").read_text())
RTOL = json.loads((FIXTURES / "facts.json").read_text())["tolerance"]["rtol"]


class Described:
    def __init__(self, name: str, shape: list[int], requires_grad: bool):
        self.name, self.shape, self.requires_grad = name, shape, requires_grad


class Optimizer:
    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0, "lr_scale": 1.0}, {"lr": 0.0, "lr_scale": 0.5}]


@pytest.mark.parametrize("run", RUNS, ids=[f"{at}-{run['library']}-{run['scheduler']}" for at, run in enumerate(RUNS)])
def test_the_releases_rates_are_met(run: dict[str, Any]) -> None:
    optimizer = Optimizer()
    compat = {"LAVIS": "lavis", "MPP-LLaVA": "mpp"}[run["library"]]
    scheduler = registry.get_lr_scheduler_class(run["scheduler"])(optimizer, **run["args"], compat=compat)
    for epoch, step, *expected in run["values"]:
        scheduler.step(cur_epoch=epoch, cur_step=step)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected, rel=RTOL, abs=0)


def test_all_points_are_looked_at() -> None:
    assert sum(len(run["values"]) for run in RUNS) == 1344


@pytest.mark.parametrize(("name", "rule"), [("base_model", lavis_groups), ("blip2_eva", layer_decay_groups)])
def test_the_releases_groups_are_met(name: str, rule: Any) -> None:
    case = GROUPS[name]
    parameters = [(entry[0], Described(*entry)) for entry in case["named_parameters"]]
    depth = {"depth": case["vit_depth"]} if "vit_depth" in case else {}
    found = rule(parameters, case["weight_decay"], case["lr_scale_argument"], **depth)
    told = [{**group, "params": [parameter.name for parameter in group["params"]]} for group in found]
    assert told == case["groups"]


def test_names_that_hold_bn_or_ln_decay_by_default() -> None:
    from torch import nn

    from lavish.models.base_model import BaseModel

    model = BaseModel()
    model.subnet, model.balance, model.ln_final = nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.LayerNorm(2)
    decayed, spared = model.get_optimizer_params(0.05)
    assert [tuple(one.shape) for one in decayed["params"]] == [(2, 2), (2, 2)]
    assert len(spared["params"]) == 3
