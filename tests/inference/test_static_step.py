"""The decoding step of fixed shape gives the logits of the flexible one: plain, compiled, and as a CUDA graph."""

import shutil

import pytest
import torch

from lavish.common.errors import PromptError
from lavish.inference.cache import SliceCache
from lavish.inference.static_step import StaticStep
from lavish.inference.steps import CogVLMSteps, Prompt
from lavish.models.cogvlm.config import CogVLMConfig
from lavish.models.cogvlm.model import CogVLMForCausalLM

NEW_TOKENS = 12
compiles = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's compiler imports it


def network(device: str = "cpu") -> CogVLMForCausalLM:
    config = CogVLMConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_multi_query_heads=2,
        vision_config={
            "image_size": 56,
            "patch_size": 14,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_heads": 2,
        },
    )
    made = CogVLMForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return made.to(device)


def prompt_and_features(made: CogVLMForCausalLM) -> tuple[Prompt, torch.Tensor]:
    pixel_values = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1)).to(made.device)
    prompt = Prompt([1, *[0] * 6, 5, 6, 7], [0, *[1] * 6, 0, 0, 0], pixel_values, None)
    return prompt, CogVLMSteps(made).image_features(pixel_values)


def flexible(made: CogVLMForCausalLM) -> tuple[list[int], torch.Tensor]:
    """Answer greedily with `CogVLMSteps`: tokens and the logits behind them."""
    steps = CogVLMSteps(made)
    prompt, features = prompt_and_features(made)
    cache = SliceCache(steps.num_layers)
    logits, state = steps.prefill([prompt], features, cache)
    rows = [logits]
    for _ in range(NEW_TOKENS - 1):
        rows.append(steps.decode([int(rows[-1].argmax())], state, cache))
    return [int(row.argmax()) for row in rows], torch.cat(rows)


def static(step: StaticStep, made: CogVLMForCausalLM, token_ids: list[int]) -> torch.Tensor:
    """Feed the same tokens through a static step."""
    prompt, features = prompt_and_features(made)
    rows = [step.prefill(prompt, features).clone()]
    rows += [step.decode(token_id).clone() for token_id in token_ids[:-1]]
    return torch.cat(rows)


def check(made: CogVLMForCausalLM, **how) -> None:
    token_ids, expected = flexible(made)
    step = StaticStep(made, 10 + NEW_TOKENS, **how)
    for _ in range(2):  # the second answer starts in a cache that the first one filled
        torch.testing.assert_close(static(step, made, token_ids), expected, rtol=1e-4, atol=1e-4)


def test_logits_are_those_of_the_flexible_steps():
    check(network())


def test_a_token_on_the_device_is_taken_as_it_is():
    made = network()
    _, expected = flexible(made)
    step = StaticStep(made, 64)
    prompt, features = prompt_and_features(made)
    logits = step.prefill(prompt, features)
    logits = step.decode(logits.argmax())
    torch.testing.assert_close(logits, expected[1:2], rtol=1e-4, atol=1e-4)


def test_a_full_cache_is_said():
    made = network()
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
    check(network(), is_compiled=True)


@pytest.mark.gpu
@compiles
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_recorded_graph(is_compiled):
    check(network("cuda"), is_compiled=is_compiled, is_graphed=True)
