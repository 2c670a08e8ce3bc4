"""The recipes by which GPTDialogue and the pocket model learn drawn scenes: a few steps of each, then what it knows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import lavish
from lavish.common.config import Config
from lavish.runners import evaluation
from lavish.runners.recipe import open_recipe, train

ROOT = Path(__file__).resolve().parents[2]


def overrides(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()]


def learn(recipe: str, folder: Path, **values: Any) -> list[float]:
    settings = {"run.output_dir": folder, "run.log_freq": 1, "run.batch_size_train": 8, **values}
    train(open_recipe(ROOT / "projects" / recipe, overrides({**settings, "run.warmup_steps": 1})))
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def measure(recipe: str, folder: Path, **values: Any) -> dict[str, Any]:
    evaluation.evaluate(Config(ROOT / "projects" / recipe, overrides({"run.output_dir": folder, **values})))
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["splits"]


def test_gpt_dialogue_learns_drawn_dialogues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sizes = "datasets.scenes_dialogue.build_info.annotations"
    few = {f"{sizes}.train.num_samples": 40, f"{sizes}.val.num_samples": 4, "run.max_epoch": 2}
    losses = learn("gpt_dialogue/train/scenes.yaml", tmp_path / "out", **few)
    assert losses[-1] < 0.6 * losses[0]
    # Trap 9 of LAVIS: it keeps the weights of the highest validation loss as the best.
    first, second = map(json.loads, (tmp_path / "out/validations.jsonl").read_text().splitlines())
    assert second["agg_metrics"] < first["agg_metrics"]
    assert torch.load(tmp_path / "out/checkpoint_best.pth", weights_only=True)["epoch"] == second["epoch"]
    trained = {"model.finetuned": tmp_path / "out/checkpoint_best.pth", f"{sizes}.test.num_samples": 8}
    splits = measure("gpt_dialogue/eval/scenes_eval.yaml", tmp_path / "scored", **trained)
    found = splits["scenes_dialogue/test"]
    assert found["num_samples"] == 8
    assert 0 <= found["metrics"]["exact_match"]["value"] <= 100


# peft 0.21 asks transformers 5.23 under the attribute's old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_pocket_model_learns_a_new_colour(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    sizes = "datasets.scenes_new_colour.build_info.annotations"
    few = {f"{sizes}.train.num_samples": 8, "run.max_iters": 6}  # the same eight in every step
    losses = learn("pocket/train/new_colour.yaml", tmp_path / "out", **few)
    assert losses[-1] < losses[0]
    trained = {"model.path": tmp_path / "out", **{f"{sizes}.{split}.num_samples": 4 for split in ("val", "test")}}
    splits = measure("pocket/eval/new_colour.yaml", tmp_path / "scored", **trained)
    assert {name: found["num_samples"] for name, found in splits.items()} == {
        "scenes_new_colour/val": 4,
        "scenes_new_colour/test": 4,
    }
    vlm = lavish.load(tmp_path / "out", device="cpu")
    assert vlm.adapters == ("default",)
    said = [
        {"type": "image", "image": Image.new("RGB", (112, 112), "white")},
        {"type": "text", "text": "What do you see?"},
    ]
    assert vlm.chat([{"role": "user", "content": said}], max_new_tokens=4).text is not None
