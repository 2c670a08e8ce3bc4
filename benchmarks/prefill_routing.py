"""Prefill of a CogVLM2-shaped network, one picture of 1,024 tokens and 128 text tokens: lavish against the release.

The peer is the release's way of routing (`_release_routing.py`) with the same weights; that both give the same last
logits is checked before anything is timed. Two prompts: one row, where the release finds a plain triangle and uses
fused attention as we do; and a left-padded batch of two, where it adds its mask to all scores. The peer has two lines:
as it is (its head runs over every token), and with its head on the last token only, as ours. The last line adds the
tower, which is the same in both.

Goal: 1.5 times as fast, with one row, in float32 and in bfloat16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import _measure as measure
import _networks as networks
import _release_routing as release
import torch

from lavish.inference.cache import SliceCache
from lavish.inference.steps import CogVLMSteps, Prompt
from lavish.models.cogvlm.model import CogVLMForCausalLM

GOAL = 1.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 2e-5, "bf16": 0.05}  # of the largest logit; two bf16 programs round differently


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(networks.SIZES), default="mid")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--text-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pack", action="store_true", help="run ours with packed weights too (CPU)")
    measure.add_arguments(parser)
    options = parser.parse_args()
    measure.set_up(options)
    for dtype in options.dtype:
        run(options.size, dtype, options.text_tokens, options.rounds, options.pack)
    return 0


def run(size: str, dtype: str, num_text: int, rounds: int, is_packed: bool) -> None:
    """Measure one dtype and print its lines."""
    network = networks.cogvlm2(size, DTYPES[dtype])
    vision = network.config.tower
    pixel_values = torch.randn(1, 3, vision.image_size, vision.image_size).to(DTYPES[dtype])
    features = CogVLMSteps(network).image_features(pixel_values)
    print(
        f"\n{dtype}: {networks.num_parameters(network) / 1e6:.0f} M parameters, "
        f"{features.shape[1]} image slots + {num_text} text tokens"
    )
    for name, lengths in (("one row", [num_text]), ("two rows, one padded", [num_text, num_text // 2])):
        prompts = [prompt(network, length, seed) for seed, length in enumerate(lengths)]
        contenders = pair(network, prompts, torch.cat([features] * len(prompts)))
        check(contenders, TOLERANCE[dtype])
        if is_packed:
            contenders["lavish, packed"] = packed(size, dtype, prompts, features)
        report(network, dtype, name, contenders, prompts, rounds)
    tower = CogVLMSteps(network).image_features
    prompts = [prompt(network, num_text, 0)]
    contenders = pair(network, prompts, features)
    lavish, peer = contenders["lavish"], contenders["release"]
    seconds = measure.alternate(
        {"lavish": lambda: (tower(pixel_values), lavish()), "release": lambda: (tower(pixel_values), peer())}, rounds
    )
    print(f"  one row, the tower included: release / lavish {measure.ratio(seconds, 'release', 'lavish')}")


def prompt(network: CogVLMForCausalLM, num_text: int, seed: int) -> Prompt:
    """One picture after bos, and random words."""
    config = network.config
    words = torch.randint(3, config.vocab_size, (num_text - 1,), generator=torch.Generator().manual_seed(seed)).tolist()
    slots = config.num_image_tokens
    return Prompt([config.bos_token_id] + [config.pad_token_id] * slots + words, [0] + [1] * slots + [0] * len(words))


def pair(
    network: CogVLMForCausalLM, prompts: list[Prompt], features: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    """Give the contenders; each call gives the float32 logits of the last tokens, (batch, vocab)."""
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    input_ids = torch.tensor([[0] * pad + prompt.token_ids for pad, prompt in zip(pads, prompts, strict=True)])
    types = torch.tensor([[0] * pad + prompt.token_type_ids for pad, prompt in zip(pads, prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * len(prompt) for pad, prompt in zip(pads, prompts, strict=True)])

    def released(is_head_last_only: bool) -> torch.Tensor:
        return release.prefill(network, input_ids, types, mask, features, is_head_last_only)[:, -1]

    return {
        "lavish": ours(network, prompts, features),
        "release": lambda: released(False),
        "release, head on the last token": lambda: released(True),
    }


def ours(network: CogVLMForCausalLM, prompts: list[Prompt], features: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The prefill of `lavish.inference`, into a fresh cache each time."""
    steps = CogVLMSteps(network)
    width = max(map(len, prompts))
    return lambda: steps.prefill(prompts, features, SliceCache(steps.num_layers, width))[0]


def packed(size: str, dtype: str, prompts: list[Prompt], features: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Ours with the weights in the CPU's own layout (the same values)."""
    from lavish.inference.packing import pack

    network = networks.cogvlm2(size, DTYPES[dtype])
    pack(network, **({"min_bytes": 0} if size == "tiny" else {}))  # tiny: so that the tests run it too
    return ours(network, prompts, torch.cat([features] * len(prompts)))


def check(contenders: dict[str, Callable[[], torch.Tensor]], tolerance: float) -> None:
    """Raise unless all contenders give the same logits."""
    expected = contenders["release"]()
    for name, contender in contenders.items():
        worst = (contender() - expected).abs().max().item() / expected.abs().max().item()
        if not worst <= tolerance:
            raise RuntimeError(f"{name}: logits differ by {worst:.1e} of the largest; at most {tolerance:.0e} is right")


def report(network, dtype: str, name: str, contenders, prompts: list[Prompt], rounds: int) -> None:
    product, flops = measure.multiply(
        DTYPES[dtype], torch.device("cpu"), 64 if network.config.hidden_size < 256 else 1536
    )
    seconds = measure.alternate({**contenders, "bound": product}, rounds)
    peak = flops / min(seconds["bound"])
    needed = sum(networks.prefill_flops(network, len(prompt)) for prompt in prompts)
    fastest = min(seconds["lavish"])
    print(
        f"  {name}: lavish {fastest * 1e3:.0f} ms at best; bound {needed / peak * 1e3:.0f} ms "
        f"({needed / 1e9:.0f} GFLOP at {peak / 1e9:.0f} GFLOP/s): {needed / peak / fastest:.0%} of it"
    )
    for key in contenders:
        if key != "lavish":
            print(f"    {key} / lavish: {measure.ratio(seconds, key, 'lavish')}")
    if len(prompts) == 1:
        for key in contenders:
            if key.startswith("lavish"):
                median = measure.ratio(seconds, "release", key).median
                print("    " + measure.verdict(f"{dtype}, one row, {key}", median, GOAL))


if __name__ == "__main__":
    sys.exit(main())
