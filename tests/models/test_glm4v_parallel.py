"""GLM-4V-9B shared among processes: fused projections cut inside q, k, v and inside gate and up."""

from pathlib import Path

import pytest
import torch
from glm4v_fixture import CHECKPOINT, config, conversations, inputs
from safetensors.torch import load_file
from tolerance import GLM4V
from warm import run_together

import lavish
from lavish.models.glm4v_9b.model import Glm4v9bForCausalLM

PROGRAM = Path(__file__).with_name("glm4v_parallel_program.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network whose tower divides too (the fixture's has three heads); two key/value heads, as the release."""
    path = tmp_path_factory.mktemp("shared")
    torch.manual_seed(4)
    network = Glm4v9bForCausalLM(config(vision_config={"num_heads": 4}))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 1)
            )
    network.save_pretrained(path)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (path / name).write_bytes((CHECKPOINT / name).read_bytes())
    return path


@pytest.mark.parametrize("size", [2, 4])
def test_shares_give_the_whole_network_s_answers(folder, size, tmp_path):
    done = run_together(size, PROGRAM, folder, tmp_path)
    assert done.returncode == 0, done.stderr
    alone = lavish.load(folder)
    batch = inputs("multi_turn", "single_image", "text_only")
    with torch.no_grad():
        logits = alone.model(**batch).logits
    answers = alone.batch(
        [conversations()[case] for case in ("multi_turn", "text_only")], max_new_tokens=6, do_sample=False
    )
    real = batch["attention_mask"].bool()
    for rank in range(size):
        found = load_file(tmp_path / f"{rank}.safetensors")
        torch.testing.assert_close(found["logits"][real], logits[real], **GLM4V)
        for index, answer in enumerate(answers):
            assert found[f"tokens.{index}"].tolist() == answer.token_ids
        named = dict(alone.model.named_parameters())
        whole = sum(value.nbytes for value in named.values())
        uncut = sum(
            value.nbytes
            for name, value in named.items()
            if value.ndim == 1 or ("mlp" not in name and "attention" not in name and "output" not in name)
        )
        assert int(found["num_bytes"]) < (whole - uncut) / size * 1.3 + uncut
