"""Answers to the first held-out samples, while a run goes on; the tasks of LAVIS are in test_projects.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_lavis
import torch
from test_lavis_recipe import SwapTask, lines, toy
from torch import nn

from lavish.common.errors import ConfigError
from lavish.runners.generations import as_markdown
from lavish.runners.recipe import open_recipe, train


class Sayer(SwapTask):
    """Says the step by the number of its calls, and draws from torch's generator."""

    calls = 0

    def answer_step(self, model: nn.Module, samples: dict[str, Any]) -> list[Any]:
        assert not model.training
        torch.rand(3)
        self.calls += 1
        return [f"{name} after {self.calls}" for name in samples["instance_id"]]


def sayer(folder: Path, **keys: Any) -> Any:
    runner = toy(folder, valid_splits=["val"], **keys)
    runner.task = Sayer()
    return runner


@pytest.fixture(autouse=True)
def scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SwapTask, "scores", [1.0, 2.0, 3.0])


def test_the_first_samples_are_answered_before_and_at_every_validation(tmp_path: Path) -> None:
    sayer(tmp_path / "plain").train()
    sayer(tmp_path / "said", sample_generations=2).train()
    found = [(row["step"], row["epoch"], row["index"], row["answer"]) for row in lines(tmp_path / "said/samples.jsonl")]
    moments = [(0, "before"), (3, 0), (6, 1), (9, 2)]
    assert found == [(*moment, at, f"{at} after {call}") for call, moment in enumerate(moments, 1) for at in (0, 1)]
    assert lines(tmp_path / "said/log.jsonl") == lines(tmp_path / "plain/log.jsonl"), "the training is not changed"


def test_a_killed_run_has_each_answer_once(tmp_path: Path) -> None:
    broken = sayer(tmp_path, sample_generations=1)

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    broken.folder.log_validation = die
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert [row["step"] for row in lines(tmp_path / "samples.jsonl")] == [0, 3]
    sayer(tmp_path, sample_generations=1).train()
    assert [row["step"] for row in lines(tmp_path / "samples.jsonl")] == [0, 3, 6, 9]


def test_what_cannot_be_answered_is_told_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing is validated.*run\.valid_splits"):
        toy(tmp_path / "a", sample_generations=1)
    runner = toy(tmp_path / "b", sample_generations=1, valid_splits=["val"])
    with pytest.raises(ConfigError, match=r"SwapTask gives no answers .*answer_step"):
        runner.train()
    assert runner.step == 0


def test_a_chat_model_answers(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from test_chat_learner import TINY, recipe, rows

    config = recipe(tmp_path, {**TINY["glm4v_9b"], "train": ["projector"]}, max_epoch=1, init_lr=1e-9)
    content = config.to_dict()
    annotations = content["datasets"]["conversations"]["build_info"]["annotations"]
    annotations["val"] = {"storage": rows(tmp_path)}
    content["run"] |= {"valid_splits": ["val"], "sample_generations": 2, "max_len": 3}
    train(open_recipe(tiny_lavis.write(tmp_path, content)))
    said = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["question"], row["reference"]) for row in said] == [
        (epoch, "Which colour?", color) for epoch in ("before", 0) for color in ("red", "green")
    ]
    assert all((tmp_path / "out" / row["picture"]).is_file() for row in said)
    assert [row["answer"] for row in said[:2]] == [row["answer"] for row in said[2:]] != ["", ""]


def test_markdown_holds_no_markup() -> None:
    text = as_markdown([{"index": 0, "question": None, "reference": "a|b", "answer": "<b>\nx"}])
    assert text.splitlines()[2] == "| 0 |  | a\\|b | &lt;b&gt; x"
