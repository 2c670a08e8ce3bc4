"""The recipes in which tiny chat networks learn drawn scenes: a few steps of each, its evaluation, an answer."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import lavish
from lavish.common.config import Config
from lavish.runners import evaluation
from lavish.runners.recipe import open_recipe, train

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("clip_qwen", "glm4v_9b", "minigpt4_qwen")
SECTION = "datasets.scenes_conversations.build_info"
STEPS = 8


def scores(family: str, model: Path, output: Path, *more: str) -> dict[str, Any]:
    options = [f"model.path={model}", f"run.output_dir={output}", f"{SECTION}.annotations.test.num_samples=8", *more]
    evaluation.evaluate(Config(ROOT / f"projects/{family}/eval/scenes_eval.yaml", options))
    found = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    return found["splits"]["scenes_conversations/test"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_and_the_folder_is_opened(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sizes = {"run.max_iters": STEPS, "run.batch_size_train": 8, "run.warmup_steps": 2, "run.log_freq": 1}
    data = {f"{SECTION}.annotations.train.num_samples": 64, f"{SECTION}.annotations.val.num_samples": 8}
    settings = {**sizes, **data, "run.output_dir": tmp_path / "out", "run.iters_per_inner_epoch": STEPS}
    options = [f"{name}={value}" for name, value in settings.items()]
    (out,) = train(open_recipe(Path(f"projects/{family}/train/scenes.yaml"), options)).values()
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS
    assert losses[-1] < 0.7 * losses[0]
    assert scores(family, out, tmp_path / "scored")["num_samples"] == 8
    assert scores(family, out, tmp_path / "blank", f"{SECTION}.blank=true")["num_samples"] == 8
    vlm = lavish.load(out, device="cpu")
    said = [
        {"type": "image", "image": Image.new("RGB", (30, 20), "red")},
        {"type": "text", "text": "what shape is it?"},
    ]
    assert vlm.chat([{"role": "user", "content": said}], max_new_tokens=3).text is not None
