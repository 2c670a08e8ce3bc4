"""Training on a CUDA device: the losses of the CPU, exact resume, LoRA in bfloat16, the memory of a dry run."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_lavis
import torch
from tolerance import LOSS_ON_CUDA
from toy_task import config, runner, weights

from lavish.runners.dry_run import plan
from lavish.runners.recipe import check, open_recipe, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions use TensorFloat-32 unless told otherwise, which has ten bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_losses_are_those_of_the_cpu(tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        content = tiny_lavis.caption_recipe(tmp_path, dropout=0.0, device=device, output_dir=str(tmp_path / device))
        train(open_recipe(tiny_lavis.write(tmp_path, content)))
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=LOSS_ON_CUDA)


def test_a_run_with_noise_resumes_exactly(tmp_path: Path) -> None:
    for folder, ends in ((tmp_path / "straight", [7]), (tmp_path / "paused", [4, 7])):
        for end in ends:
            run = config(folder, max_iters=end, device="cuda", lr_sched="constant_lr", optimizer="adamw")
            runner(run, noise=0.5).train()
    assert weights(tmp_path / "straight") == weights(tmp_path / "paused")


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_lora_in_bfloat16_with_checkpointed_activations(tmp_path: Path, quantization: str | None) -> None:
    pytest.importorskip("peft")
    if quantization:
        pytest.importorskip("bitsandbytes")
    from test_chat_learner import TINY, recipe

    model: dict[str, Any] = {**TINY["cogvlm"], "dtype": "bfloat16", "lora": {"r": 4}, "quantization": quantization}
    told = recipe(tmp_path, model, device="cuda", activation_checkpointing=True, max_epoch=8)
    ((_, checked),) = check(told)
    estimated = plan(checked).memory_bytes
    torch.cuda.reset_peak_memory_stats()
    train(told)
    found = losses(tmp_path / "out")
    assert found[-1] < found[0]
    assert estimated > 0.5 * torch.cuda.max_memory_allocated()  # a toy's peak is of single buffers, so no nearer
