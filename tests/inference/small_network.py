"""A small CogVLM2 with random weights, and a prompt with a picture through its passes: what the tests of packing and of
the static step share."""

import torch

from lavish.inference.cache import SliceCache
from lavish.inference.steps import CogVLMSteps, Prompt
from lavish.models.cogvlm.config import CogVLMConfig
from lavish.models.cogvlm.model import CogVLMForCausalLM

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_multi_query_heads": 2,
    "vision_config": {
        "image_size": 56,
        "patch_size": 14,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_heads": 2,
    },
}


def make_network(device: str = "cpu") -> CogVLMForCausalLM:
    """Draw the matrices wide enough for mistakes to show."""
    made = CogVLMForCausalLM(CogVLMConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return made.to(device)


def prompt_and_features(network: CogVLMForCausalLM) -> tuple[Prompt, torch.Tensor]:
    """Ten tokens, six of them the picture's."""
    pixel_values = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1)).to(network.device)
    prompt = Prompt([1, *[0] * 6, 5, 6, 7], [0, *[1] * 6, 0, 0, 0], pixel_values)
    return prompt, CogVLMSteps(network).image_features(pixel_values)


def answer(network: CogVLMForCausalLM, num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Answer greedily with `CogVLMSteps`: tokens and the logits behind them, (tokens, vocab)."""
    steps = CogVLMSteps(network)
    prompt, features = prompt_and_features(network)
    cache = SliceCache(steps.num_layers)
    logits, state = steps.prefill([prompt], features, cache)
    rows = [logits]
    for _ in range(num_tokens - 1):
        rows.append(steps.decode([int(rows[-1].argmax())], state, cache))
    return [int(row.argmax()) for row in rows], torch.cat(rows)
