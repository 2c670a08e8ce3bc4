"""MiniGPT4-Qwen on several processes: the released answers from shares of the weights."""

from pathlib import Path

import pytest
import torch
from minigpt4_qwen_fixture import chats, processor, shared_network
from tolerance import SAME_MATH, close
from warm import run_together

from lavish.checkpoints.rules import matches
from lavish.models.minigpt4_qwen.weights import TENSOR_PARALLEL_PLAN


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shares_answer_as_the_whole(tmp_path, num_processes):
    program = Path(__file__).parent / "minigpt4_qwen_shares.py"
    run = run_together(num_processes, program, tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    whole = {name: parameter.nbytes for name, parameter in shared_network().named_parameters()}
    for rank in range(num_processes):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["replies"] == [released["output_ids"] for _, released in chats()]
        for logits, (spoken, _) in zip(found["logits"], chats(), strict=True):
            with torch.no_grad():
                close(logits, shared_network()(**processor().apply_chat_template(spoken)).logits, SAME_MATH)
        for name, nbytes in found["bytes"].items():
            is_cut = matches((f"{pattern}.weight" for pattern in TENSOR_PARALLEL_PLAN), name)
            if is_cut:
                assert num_processes * nbytes == whole[name]
