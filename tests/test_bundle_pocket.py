"""`scripts/bundle_pocket.py`: a finished and evaluated run becomes a model folder with a card; nothing else does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipe import evaluation, recipe

from lavish.inference.load import load
from lavish.runners.recipe import evaluate, read_cost, train

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "src" / "lavish" / "pocket"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny recipe, with scores."""
    folder = tmp_path_factory.mktemp("pocket")
    train(recipe(folder))
    evaluate(evaluation(folder, folder / "out" / "joint" / "model"), lambda done, total: None)
    return folder / "out"


def bundle(*arguments: object) -> "subprocess.CompletedProcess[str]":
    stage = () if "--stage" in arguments else ("--stage", "joint")
    command = [sys.executable, str(ROOT / "scripts" / "bundle_pocket.py"), *map(str, arguments), *stage]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_run_is_published_with_its_numbers(run: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").write_bytes(b"kept")
    answer = bundle(run, "--target", tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "pictures" / "one.png").read_bytes() == b"kept"
    vlm = load(tmp_path, device="cpu")
    assert (vlm.grounding, vlm.model.config.rope) == (True, "float32")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    num_parameters = sum(parameter.numel() for parameter in vlm.model.parameters())
    assert f"of {num_parameters / 1e6:.2f} M parameters" in card
    assert f"{sum(metrics['counts'].values())} questions" in card
    for task, score in metrics["tasks"].items():
        assert f"| {task} | " in card
        assert f" | {metrics['counts'][task]} | {score:.1%} | " in card
    for stage in ("tower", "decoder", "joint"):
        cost = read_cost(run / stage)
        assert cost is not None
        assert f"| {stage} | {cost.num_samples:,} | {cost.steps:,} | {cost.cpu_seconds / 3600:.2f} | " in card
    assert "| all | 12 | 6 | " in card
    assert "{" not in card


def test_scores_of_other_weights_are_refused(run: Path, tmp_path: Path) -> None:
    answer = bundle(run, "--stage", "tower", "--target", tmp_path)
    assert answer.returncode == 2
    assert "holds the scores of other weights" in answer.stderr
    assert "lavish evaluate" in answer.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_without_scores_or_end_is_refused(run: Path, tmp_path: Path) -> None:
    answer = bundle(run, "--metrics", tmp_path / "metrics.json", "--target", tmp_path)
    assert (answer.returncode, "has no scores yet" in answer.stderr) == (2, True)
    answer = bundle(tmp_path, "--target", tmp_path)
    assert (answer.returncode, "is the stage finished?" in answer.stderr) == (2, True)


def test_the_bundled_model_is_the_one_of_its_card() -> None:
    from lavish.runners.recipe import weights_sha256

    metrics = json.loads((POCKET / "metrics.json").read_text())
    assert metrics["record"]["weights_sha256"] == weights_sha256(POCKET)
    assert (POCKET / "model.safetensors").stat().st_size <= 16_000_000
    card = (POCKET / "README.md").read_text(encoding="utf-8")
    for name in ("vqa", "box_hit", "caption_f1"):
        assert f"**{metrics[name]:.1%}**" in card
