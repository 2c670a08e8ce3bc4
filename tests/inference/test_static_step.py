"""The decoding step of fixed shape gives the logits of the flexible one: plain, compiled, and as a CUDA graph."""

import shutil

import pytest
import torch
from small_network import answer, make_network, prompt_and_features
from tolerance import SAME_MATH, close

from lavish.common.errors import PromptError
from lavish.inference.static_step import StaticStep
from lavish.models.cogvlm.model import CogVLMForCausalLM

NEW_TOKENS = 12
compiles = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's compiler imports it


def static(step: StaticStep, made: CogVLMForCausalLM, token_ids: list[int]) -> torch.Tensor:
    """Feed the same tokens through a static step."""
    prompt, features = prompt_and_features(made)
    rows = [step.prefill(prompt, features).clone()]
    rows += [step.decode(token_id).clone() for token_id in token_ids[:-1]]
    return torch.cat(rows)


def check(made: CogVLMForCausalLM, **how) -> None:
    token_ids, expected = answer(made, NEW_TOKENS)
    step = StaticStep(made, 10 + NEW_TOKENS, **how)
    for _ in range(2):  # the second answer starts in a cache that the first one filled
        close(static(step, made, token_ids), expected, SAME_MATH)


def test_logits_are_those_of_the_flexible_steps():
    check(make_network())


def test_a_token_on_the_device_is_taken_as_it_is():
    made = make_network()
    _, expected = answer(made, 2)
    step = StaticStep(made, 64)
    prompt, features = prompt_and_features(made)
    logits = step.prefill(prompt, features)
    logits = step.decode(logits.argmax())
    close(logits, expected[1:2], SAME_MATH)


def test_a_full_cache_is_said():
    made = make_network()
    step = StaticStep(made, 11)
    prompt, features = prompt_and_features(made)
    step.prefill(prompt, features)
    step.decode(5)
    with pytest.raises(PromptError, match="All 11 slots"):
        step.decode(5)
    with pytest.raises(PromptError, match="has 10 tokens, image slots included, and this step was made for 9"):
        StaticStep(made, 9).prefill(prompt, features)


@pytest.mark.slow
@compiles
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="compiling needs a C++ compiler")
def test_a_compiled_step():
    check(make_network(), is_compiled=True)


@pytest.mark.gpu
@compiles
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_recorded_graph(is_compiled):
    check(make_network("cuda"), is_compiled=is_compiled, is_graphed=True)
