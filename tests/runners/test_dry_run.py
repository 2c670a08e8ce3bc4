"""What a run would take: counts and bytes that can be worked out by hand, a probe, and nothing written."""

from pathlib import Path

import pytest
import tiny_lavis
import tiny_recipe
import torch
from test_lavis_recipe import Swap
from torch import nn

from lavish.cli import main
from lavish.runners.dry_run import GPUS_GIB, Plan, _Made, _Saved, plan
from lavish.runners.parts import Part, part_name, parts_of
from lavish.runners.recipe import check, open_recipe


def test_parts_are_counted_by_hand() -> None:
    parts = parts_of(Swap(), "adamw")
    assert parts["frozen"] == Part(trained=0, frozen=6, weight_bytes=24)
    assert parts["layer"] == Part(trained=6, weight_bytes=24, gradient_bytes=24, optimizer_bytes=48)
    assert parts_of(nn.Sequential(nn.Linear(2, 3)), "muon")["0"].optimizer_bytes == 4 * (6 + 2 * 3)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("network.vision_model.encoder.layers.0.mlp.fc1.weight", "vision_model"),
        ("network.base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight", "layers (LoRA)"),
        ("network.model.vision.transformer.layers.0.x.weight", "vision.transformer"),
        ("network.lm_head.weight", "lm_head"),
        ("layer.weight", "layer"),
    ],
)
def test_parts_have_names(name: str, part: str) -> None:
    assert part_name(name) == part


def test_what_the_backward_pass_keeps_is_counted_once_and_without_weights() -> None:
    layer = nn.Linear(8, 8)
    rows = torch.randn(4, 8, requires_grad=True)
    with _Saved(layer) as saved:
        out = layer(rows)
        (out * out).sum()
    assert saved.num_bytes == rows.nbytes + out.nbytes


def test_the_peak_of_a_pass_is_followed() -> None:
    layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    rows = torch.randn(4, 8)
    with _Made([*layers.parameters(), rows]) as made:
        summed = layers(rows).sum()
        assert made.most_bytes == 2 * rows.nbytes + summed.nbytes
        assert made.now_bytes == rows.nbytes + summed.nbytes, "the second layer's output is not kept"
        summed.backward()
    del summed
    gradients = sum(weight.nbytes for weight in layers.parameters())
    assert made.now_bytes == gradients
    assert made.most_bytes > gradients


def test_memory_and_the_gpus_that_it_fits_on() -> None:
    part = Part(trained=1, weight_bytes=20 * 2**30, gradient_bytes=2**30, optimizer_bytes=2 * 2**30)
    one = Plan("run", "cpu", {"all": part}, 10, 40, 1, 2**30, 1.0, pass_bytes=2 * 2**30, update_bytes=2**29)
    assert one.memory_bytes == 24 * 2**30
    updating = Plan("run", "cpu", {"all": part}, 10, 40, 1, 2**30, 1.0, pass_bytes=2**30, update_bytes=2 * 2**30)
    assert updating.memory_bytes == 25 * 2**30
    saving = Plan("run", "cpu", {"all": part}, 10, 40, 1, 2**30, 1.0, average_bytes=2**30, save_bytes=4 * 2**30)
    assert saving.memory_bytes == 27 * 2**30
    assert one.fits == [name for name, gib in GPUS_GIB.items() if gib > 24]


def test_a_lavis_recipe_is_probed_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_lavis.write(tmp_path, tiny_lavis.caption_recipe(tmp_path, accum_grad_iters=2))
    ((name, config),) = check(open_recipe(path))
    one = plan(config, name)
    assert (one.num_steps, one.num_samples, one.passes_per_step) == (4, 12, 2)
    assert one.pass_bytes > one.activation_bytes > 0
    assert one.step_seconds > 0
    assert main(["train", "--cfg-path", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for part in ("vision_model", "text_decoder", "memory of one process: about", "fits on: T4", "4 steps, 12 samples"):
        assert part in shown
    assert not (tmp_path / "out").exists()


def test_every_stage_is_probed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tiny_recipe.write(tmp_path)), "--only", "tower", "--dry-run"]) == 0
    assert "2 steps, 4 samples" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
