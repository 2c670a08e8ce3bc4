"""A recipe of LAVIS runs unchanged: what it trains, validates and writes, how it goes on, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_lavis
import torch
from torch import nn
from warm import run_together

from lavish.cli import main
from lavish.common.config import Config
from lavish.common.errors import CheckpointError, ConfigError
from lavish.common.registry import registry
from lavish.models import load_model
from lavish.models.base_model import BaseModel
from lavish.runners.deepspeed_engine import read_settings
from lavish.runners.recipe import open_recipe, train
from lavish.runners.runner_base import RunnerBase
from lavish.runners.runner_iter import RunnerIter
from lavish.tasks.base_task import BaseTask


def run(folder: Path, *options: str, **changes: Any) -> Path:
    """Run the tiny caption recipe and give its output folder."""
    path = tiny_lavis.write(folder, tiny_lavis.caption_recipe(folder, **changes))
    (output,) = train(open_recipe(path, list(options))).values()
    return output


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(ours: Path, theirs: Path, name: str = "checkpoint_last.pth") -> bool:
    states = [torch.load(folder / name, weights_only=True)["model"] for folder in (ours, theirs)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


# -- as LAVIS's scripts are called


@pytest.mark.parametrize("options", [["run.max_epoch=1", "run.seed=3"], ["run.max_epoch", "1", "run.seed", "3"]])
def test_the_command_of_lavis(tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_lavis.write(tmp_path, tiny_lavis.caption_recipe(tmp_path))
    assert main(["train", "--cfg-path", str(path), "--options", *options]) == 0
    out = tmp_path / "out"
    assert f"run: {out}" in capsys.readouterr().out
    saved = Config(out / "config.yaml").run_cfg
    assert (saved.max_epoch, saved.seed) == (1, 3)
    written = {entry.name for entry in out.iterdir()}
    names = ("checkpoint_0.pth", "checkpoint_best.pth", "checkpoint_last.pth", "log.txt", "result", "evaluate.txt")
    assert written >= {*names, "environment.json", "log.jsonl", "validations.jsonl", "done.json"}


def test_the_checkpoints_are_those_of_lavis(tmp_path: Path) -> None:
    out = run(tmp_path)
    best = torch.load(out / "checkpoint_best.pth", weights_only=True)
    assert {"model", "optimizer", "config", "scaler", "epoch"} <= set(best)
    assert best["config"]["run"]["task"] == "captioning"
    assert torch.load(out / "checkpoint_last.pth", weights_only=True)["epoch"] == 1
    log = lines(out / "log.txt")
    assert log[0]["model"]["arch"] == "blip_caption"
    assert [line["epoch"] for line in log[1:]] == [0, 1, 0, 1, "best"]
    assert "train_loss" in log[1]
    assert "val_CIDEr" in log[3]
    assert "test_CIDEr" in log[5]


def test_training_learns_and_decides_by_validation(tmp_path: Path) -> None:
    out = run(tmp_path, max_epoch=6, init_lr=3e-3, dropout=0.0)
    losses = [line["loss"] for line in lines(out / "log.jsonl")]
    assert losses[-1] < 0.8 * losses[0]
    scored = [line for line in lines(out / "validations.jsonl") if line["split"] == "val"]
    assert [line["epoch"] for line in scored] == list(range(6))
    best = max(scored, key=lambda line: (line["agg_metrics"], -line["epoch"]))
    assert torch.load(out / "checkpoint_best.pth", weights_only=True)["epoch"] == best["epoch"]


# -- layers and keys


def test_large_coco_through_options_builds_the_large_vision_tower(tmp_path: Path) -> None:
    recipe = tiny_lavis.caption_recipe(tmp_path)
    recipe["model"] = {"arch": "blip_caption", "model_type": "base_coco"}
    path = tiny_lavis.write(tmp_path, recipe)
    config = open_recipe(path, ["model.model_type=large_coco", "model.vision_config.num_hidden_layers=1"])
    assert isinstance(config, Config)
    assert config.model_cfg.vision_config.hidden_size == 1024
    options = ["model.model_type=large_coco", "model.load_finetuned=false", "model.load_pretrained=false"]
    tokenizer = f"model.tokenizer={tiny_lavis.FIXTURES / 'blip_caption/open/checkpoint/bert-base-uncased'}"
    small = [f"model.{part}.num_hidden_layers=1" for part in ("vision_config", "text_config")]
    config = open_recipe(path, [*options, *small, tokenizer, "model.text_config.vocab_size=159"])
    model = registry.get_model_class("blip_caption").from_config(config.model_cfg)  # type: ignore[union-attr]
    assert max(parameter.shape[-1] for name, parameter in model.named_parameters() if "vision" in name) >= 1024


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("run.max_epochs=3", r"run\.max_epochs.*unknown key.*Did you mean 'max_epoch'"),
        ("run.inference_method=genearte", r"run\.inference_method.*'genearte' is not one of.*Did you mean 'generate'"),
        ("run.task=captionning", "Did you mean 'captioning'"),
        ("run.runner=runner_bas", "Did you mean 'runner_base'"),
        ("run.lr_sched=linear_warmup_cosine", "Did you mean 'linear_warmup_cosine_lr'"),
        ("run.dist_url=tcp://localhost:1", "torchrun tells processes"),
        ("run.init_lr=0", "init_lr is 0"),
        ("model.arch=blip_captoin", "Did you mean 'blip_caption'"),
        ("model.model_type=base_cocoo", "Did you mean 'base_coco'"),
        ("datasets.coco_captoin.type=default", "Did you mean 'coco_caption'"),
        ("datasets.coco_caption.vis_procesor=1", "Did you mean 'vis_processor'"),
        ("runn.x=1", "Did you mean 'run'"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_built(tmp_path: Path, option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        run(tmp_path, option)
    assert not (tmp_path / "out").exists()


def test_other_settings_than_before_are_refused(tmp_path: Path) -> None:
    run(tmp_path, "run.max_epoch=1")
    with pytest.raises(ConfigError, match=r"run\.max_epoch: 1 -> 2.*--force"):
        run(tmp_path, "run.max_epoch=2")


# -- the loop, on a task of a few numbers


class Points:
    """Rows of two numbers; `ids` name them."""

    def __init__(self, count: int, scale: float = 1.0):
        self.points = scale * torch.randn(count, 2, generator=torch.Generator().manual_seed(count))

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"points": self.points[index], "instance_id": str(index)}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "points": torch.stack([sample["points"] for sample in samples]),
            "instance_id": [sample["instance_id"] for sample in samples],
        }


class Swap(BaseModel):
    """Learns to swap two numbers; its first layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.layer = nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.2)

    def forward(self, samples: Any) -> dict[str, torch.Tensor]:
        points = samples["points"]
        loss = (self.layer(self.dropout(self.frozen(points))) - points.flip(1)).square().mean()
        return {"loss": loss, "loss_part": 0.5 * loss}


class SwapTask(BaseTask):
    """Reports the negative loss, or with `higher_is_better` False the loss."""

    scores: list[float] = []

    def valid_step(self, model: nn.Module, samples: dict[str, Any]) -> list[Any]:
        return [{"instance_id": name} for name in samples["instance_id"]]

    def after_evaluation(self, val_result: Any = None, split_name: str = "", epoch: Any = None, **_: Any) -> Any:
        assert sorted(one["instance_id"] for one in val_result) == ["0", "1", "2"]
        return {"agg_metrics": self.scores[epoch]}


def toy(folder: Path, *, iters: bool = False, sets: dict[str, int] | None = None, **keys: Any) -> RunnerBase:
    torch.manual_seed(7)
    section = {"init_lr": 0.05, "batch_size_train": 2, "max_epoch": 3, "log_freq": 1, "device": "cpu", **keys}
    config = Config({"run": {"output_dir": str(folder), **section}})
    sizes = sets or {"points": 5}
    data = {name: {"train": Points(size)} for name, size in sizes.items()}
    next(iter(data.values()))["val"] = Points(3)
    return (RunnerIter if iters else RunnerBase)(config, SwapTask(), Swap(), data)


def test_the_logged_loss_is_the_models_also_for_leftover_passes(tmp_path: Path) -> None:
    """Five samples, two a pass, two passes a step: the third pass is a step of its own."""
    runner = toy(tmp_path, accum_grad_iters=2, max_epoch=1)
    losses: list[float] = []
    original = runner.task.train_step

    def step(model: nn.Module, samples: dict[str, Any]) -> Any:
        loss, parts = original(model, samples)
        losses.append(float(loss.detach()))
        return loss, parts

    runner.task.train_step = step  # type: ignore[method-assign]
    runner.train()
    logged = [line["loss"] for line in lines(tmp_path / "log.jsonl")]
    assert logged == pytest.approx([(losses[0] + losses[1]) / 2, losses[2]])
    assert [line["loss_part"] for line in lines(tmp_path / "log.jsonl")] == pytest.approx([loss / 2 for loss in logged])
    assert len(losses) == 3


@pytest.mark.parametrize(("higher", "best"), [(True, 1), (False, 2)])
def test_the_best_follows_the_tasks_direction_below_zero_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, higher: bool, best: int
) -> None:
    monkeypatch.setattr(SwapTask, "scores", [-2.0, -1.0, -3.0])
    monkeypatch.setattr(SwapTask, "higher_is_better", higher)
    toy(tmp_path, valid_splits=["val"]).train()
    assert torch.load(tmp_path / "checkpoint_best.pth", weights_only=True)["epoch"] == best


def test_validation_every_second_epoch_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SwapTask, "scores", [0.0] * 5)
    toy(tmp_path, valid_splits=["val"], val_freq=2, max_epoch=5).train()
    assert [line["epoch"] for line in lines(tmp_path / "validations.jsonl")] == [1, 3, 4]


def test_epochs_without_validation_are_all_saved(tmp_path: Path) -> None:
    toy(tmp_path).train()
    assert {path.name for path in tmp_path.glob("*.pth")} == {
        *(f"checkpoint_{epoch}.pth" for epoch in range(3)),
        "checkpoint_last.pth",
    }


def test_a_frozen_part_resumes_to_the_same_weights(tmp_path: Path) -> None:
    toy(tmp_path / "straight", max_epoch=4).train()
    broken = toy(tmp_path / "broken", max_epoch=4)

    def interrupt(step: int, *_: object) -> None:
        if step == 8:
            raise KeyboardInterrupt

    broken.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    toy(tmp_path / "broken", max_epoch=4).train()
    assert same(tmp_path / "broken", tmp_path / "straight")
    assert "frozen.weight" not in torch.load(tmp_path / "broken" / "checkpoint_last.pth", weights_only=True)["model"]
    assert lines(tmp_path / "broken" / "log.jsonl") == lines(tmp_path / "straight" / "log.jsonl")


@pytest.mark.parametrize("name", ["checkpoint_1.pth", "checkpoint_6"])
def test_resume_ckpt_path_goes_on_in_another_folder(tmp_path: Path, name: str) -> None:
    toy(tmp_path / "whole", max_epoch=4).train()
    toy(tmp_path / "half", max_epoch=2, lr_sched="constant_lr").train()
    whole = toy(tmp_path / "constant", max_epoch=4, lr_sched="constant_lr")
    whole.train()
    path = str(tmp_path / "half" / name)
    toy(tmp_path / "rest", max_epoch=4, lr_sched="constant_lr", resume_ckpt_path=path).train()
    assert same(tmp_path / "rest", tmp_path / "constant")


def test_a_file_of_weights_alone_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    torch.save({"model": Swap().state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"nothing of lavish to go on from.*model\.finetuned"):
        toy(tmp_path / "out", resume_ckpt_path=str(tmp_path / "weights.pth")).train()
    torch.save({"model": print}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        toy(tmp_path / "out", resume_ckpt_path=str(tmp_path / "code.pth")).train()


def test_a_validation_that_was_killed_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SwapTask, "scores", [1.0, 2.0, 3.0])
    broken = toy(tmp_path, valid_splits=["val"])

    def die(**_: Any) -> None:
        raise KeyboardInterrupt

    broken.task.before_evaluation = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    toy(tmp_path, valid_splits=["val"]).train()
    assert [line["epoch"] for line in lines(tmp_path / "validations.jsonl")] == [0, 1, 2]


def test_the_average_of_the_weights_is_kept_over_a_resume(tmp_path: Path) -> None:
    toy(tmp_path / "straight", ema_decay=0.9).train()
    toy(tmp_path / "plain").train()
    broken = toy(tmp_path / "broken", ema_decay=0.9)

    def interrupt(step: int, *_: object) -> None:
        if step == 7:
            raise KeyboardInterrupt

    broken.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    toy(tmp_path / "broken", ema_decay=0.9).train()
    assert same(tmp_path / "broken", tmp_path / "straight")
    assert not same(tmp_path / "plain", tmp_path / "straight")
    assert same(tmp_path / "plain", tmp_path / "straight", "checkpoint_1.pth"), "training itself is not changed"


def test_inner_epochs_of_runner_iter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SwapTask, "scores", [0.0, 1.0, 2.0])
    toy(tmp_path, iters=True, max_iters=6, iters_per_inner_epoch=2, valid_splits=["val"]).train()
    assert [line["step"] for line in lines(tmp_path / "validations.jsonl")] == [2, 4, 6]
    assert torch.load(tmp_path / "checkpoint_last.pth", weights_only=True)["iters"] == 6


def test_ratios_of_data_sets(tmp_path: Path) -> None:
    sets = {"few": 4, "many": 4}
    runner = toy(tmp_path, iters=True, sets=sets, max_iters=200, train_dataset_ratios={"few": 1, "many": 3})
    drawn = [[index for _, index in pairs] for pairs in _pairs(runner, 200)]
    from_many = [all(index >= 4 for index in indices) for indices in drawn]
    assert all(len({index >= 4 for index in indices}) == 1 for indices in drawn), "a pass is of one set"
    assert 130 < sum(from_many) < 170
    later = _pairs(runner, 200)[150:]
    assert later == _pairs(
        toy(tmp_path / "b", iters=True, sets=sets, train_dataset_ratios={"few": 1, "many": 3}), 200, 150
    )
    for ratios, message in (({"few": 1}, "'many' is absent"), ({"few": 1, "mny": 1}, "Did you mean 'many'")):
        with pytest.raises(ConfigError, match=message):
            toy(tmp_path / "c", iters=True, sets=sets, train_dataset_ratios=ratios).train()
    with pytest.raises(ConfigError, match=r"is of run\.runner runner_iter"):
        toy(tmp_path / "d", sets=sets, train_dataset_ratios={"few": 1, "many": 3}).train()


def _pairs(runner: RunnerBase, end: int, start: int = 0) -> list[list[tuple[int, int]]]:
    from lavish.runners.order import Passes

    return list(Passes(runner.order(), (part for step in range(start, end) for part, _ in runner.passes(step))))


def test_several_sets_are_one_epoch(tmp_path: Path) -> None:
    runner = toy(tmp_path, sets={"few": 2, "many": 4})
    assert runner.steps_per_epoch == 3
    assert sorted(index for pairs in _pairs(runner, 3) for _, index in pairs) == list(range(6))


def test_samples_of_like_length_share_a_batch(tmp_path: Path) -> None:
    from lavish.runners.order import GroupedEpochs

    lengths = [1, 9, 2, 8, 1, 9, 2, 8, 5]
    order = GroupedEpochs(lengths, seed=3, batch_size=2)
    epoch = [order.index(position) for position in range(9)]
    assert sorted(epoch) == list(range(9))
    batches = [sorted(lengths[index] for index in epoch[start : start + 2]) for start in range(0, 8, 2)]
    assert sorted(batches) == [[1, 1], [2, 2], [5, 8], [8, 9]]
    assert [order.index(position) for position in range(9, 18)] != epoch
    with pytest.raises(ConfigError, match="does not tell the lengths"):
        toy(tmp_path, group_by_length=True).train()


def test_the_samples_of_a_loss_that_is_no_number_are_named(tmp_path: Path) -> None:
    runner = toy(tmp_path)
    cast_points: Any = runner.dataset
    cast_points.points[3] = float("nan")
    with pytest.raises(Exception, match=r"loss is nan .*bad_batch\.json"):
        runner.train()
    bad = json.loads((tmp_path / "bad_batch.json").read_text())
    assert "3" in bad["passes"][0]["instance_id"]
    assert 3 in bad["passes"][0]["index"]


def test_too_little_memory_names_the_key_to_change(tmp_path: Path) -> None:
    runner = toy(tmp_path)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    runner.task.train_step = full  # type: ignore[method-assign]
    with pytest.raises(Exception, match=r"Out of memory with run\.batch_size_train=2.*batch_size_train=1 with run\.a"):
        runner.train()


def test_what_a_data_set_draws_does_not_depend_on_workers(tmp_path: Path) -> None:
    class Noisy(Points):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"points": self.points[index] + torch.rand(2), "instance_id": str(index)}

    for workers in (0, 2):
        runner = toy(tmp_path / str(workers), num_workers=workers)
        runner.dataset = runner.parts["points"] = Noisy(5)  # type: ignore[assignment]
        runner.train()
    assert same(tmp_path / "0", tmp_path / "2")


def test_evaluate_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SwapTask, "after_evaluation", lambda self, **given: {"agg_metrics": 1.0})
    runner = toy(tmp_path, evaluate=True, test_splits=["val"])
    before = runner.model.layer.weight.clone()  # type: ignore[union-attr]
    runner.train()
    assert torch.equal(runner.model.layer.weight, before)  # type: ignore[union-attr,arg-type]
    assert [line["split"] for line in lines(tmp_path / "validations.jsonl")] == ["val"]


def trained(folder: Path, processes: int, *, by_torchrun: bool = False, **keys: Any) -> Path:
    """Run the tiny recipe by the command line, eight samples, without dropout; give its output folder."""
    folder.mkdir()
    path = tiny_lavis.write(folder, tiny_lavis.caption_recipe(folder, dropout=0.0, count=8, **keys))
    command = ["-m", "lavish", "train", "--cfg-path", str(path)]
    if by_torchrun:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run([*start, *command], capture_output=True, text=True)
    else:
        done = run_together(processes, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"run: {folder / 'out'}") == 1, "one process talks"
    return folder / "out"


def test_two_processes_of_torchrun_give_what_one_gives(tmp_path: Path) -> None:
    """Each has its own batches: two with one pass each equal one with two, at every of twenty steps."""
    keys = {"max_epoch": 10, "valid_splits": [], "test_splits": [], "save_freq": 10}
    one = trained(tmp_path / "one", 1, accum_grad_iters=2, **keys)
    two = trained(tmp_path / "two", 2, by_torchrun=True, **keys)
    losses = [[line["loss"] for line in lines(out / "log.jsonl")] for out in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(losses[0]) == 20


def test_processes_that_share_weights_validate_as_one(tmp_path: Path) -> None:
    """Three held-out pictures and two processes: scores, best checkpoint and what the run leaves are those of one."""
    rate = 1e-6
    keys = {"max_epoch": 1, "init_lr": rate, "sample_generations": 2}
    one = trained(tmp_path / "one", 1, accum_grad_iters=2, **keys)
    two = trained(tmp_path / "two", 2, engine="fsdp2", **keys)
    assert lines(two / "samples.jsonl") == lines(one / "samples.jsonl")
    assert lines(two / "validations.jsonl") == lines(one / "validations.jsonl")
    for name in ("checkpoint_best.pth", "checkpoint_last.pth"):
        ours, theirs = (torch.load(out / name, weights_only=True)["model"] for out in (two, one))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            # Where a gradient is nothing but rounding, Adam's step has either sign, and is no longer than the rate.
            assert (ours[key] - tensor).abs().max() <= 2.1 * rate
    assert (two / "report.html").is_file()


def test_a_checkpoint_has_the_names_of_the_release_and_is_loaded_as_one(tmp_path: Path) -> None:
    out = run(tmp_path, max_epoch=1)
    held = torch.load(out / "checkpoint_last.pth", weights_only=True)["model"]
    released = torch.load(tmp_path / "blip" / "blip_coco_caption_base.pth", weights_only=True)
    unused = {"text_decoder.bert.embeddings.position_ids"}
    assert set(held) - unused == set(released.get("model", released)) - unused
    section = tiny_lavis.blip_section(tmp_path, "blip_caption", "base_coco")
    config = {name: section[name] for name in ("vision_config", "image_size", "max_txt_len")}
    med = json.loads((tmp_path / "blip" / "med_config.json").read_text())
    config["text_config"] = {"num_attention_heads": med["num_attention_heads"]}
    model = load_model(
        "blip_caption",
        "base_coco",
        checkpoint=out / "checkpoint_last.pth",
        config=config,
        tokenizer=section["tokenizer"],
    )
    name = "text_decoder.bert.embeddings.word_embeddings.weight"
    assert torch.equal(model.network.state_dict()[name], held[name])


def test_counts_may_be_written_as_lavis_writes_them(tmp_path: Path) -> None:
    runner = toy(tmp_path, iters=True, max_iters=2e4, iters_per_inner_epoch=2e3, warmup_steps=1e3)
    assert (runner.num_steps, runner.steps_per_epoch, runner.run.warmup_steps) == (20_000, 2_000, 1_000)
    with pytest.raises(ConfigError, match=r"max_iters.*2\.5"):
        toy(tmp_path, max_iters=2.5)


def test_keys_of_mpp_llava_are_obeyed(tmp_path: Path) -> None:
    """As in its lavis/projects/deepspeed/*.yaml: DeepSpeed's settings inside the recipe say keys of the run."""
    settings = {
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0.1}},
        "zero_optimization": {"stage": 1},
    }
    run_keys = toy(tmp_path, deepspeed_config=settings, weight_decay=0.2, resume_ckpt_tag=None, fsdp=False).run
    assert (run_keys.accum_grad_iters, run_keys.max_grad_norm, run_keys.amp, run_keys.beta2) == (4, 0.5, True, 0.99)
    assert run_keys.weight_decay == 0.2, "the recipe's own key counts"
    assert read_settings(run_keys)["zero_optimization"] == {"stage": 1}
    with pytest.raises(ConfigError, match="give a checkpoint of lavish as resume_ckpt_path"):
        toy(tmp_path, resume_ckpt_load_dir="x")


def test_a_task_of_ones_own_may_read_more_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"run\.my_key.*unknown key"):
        toy(tmp_path, my_key=3)
    monkeypatch.setattr(SwapTask, "run_keys", ("my_key",), raising=False)
    assert toy(tmp_path, my_key=3).config.run_cfg.my_key == 3
