"""Eight mixed requests in one batch against eight single runs, for a network of 100 million parameters of each chat
family: the goal is at least 3 times faster per request.

The requests are of different lengths, half of them with a picture, as `vlm.batch` and `vlm.chat` take them; tokenizers
and the size of the pictures are those of the tiny releases under tests/fixtures, the weights are random. The bound
printed beside each ratio: a decoding step reads all weights once, however many rows it has, so eight rows can be at
most eight times faster where reading is what a step waits for. On a CPU in float32 it is not: one thread does the
product of eight rows in 2.6 times the time of one row by `nn/linear.py` (768 to 2,048 features), so 3.1 is the bound.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _measure as measure
import numpy as np
import torch
from _networks import fill, num_parameters
from PIL import Image

import lavish
from lavish.models import family_of

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
NUM_REQUESTS, GOAL = 8, 3.0
WIDE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
RELEASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cogvlm": (
        "cogvlm2/open/checkpoint",
        {},
        {**WIDE, "num_hidden_layers": 7, "intermediate_size": 2048, "num_multi_query_heads": 4},
    ),
    "glm4v_9b": (
        "glm4v/open/checkpoint",
        {},
        {**WIDE, "num_layers": 14, "num_hidden_layers": 14, "kv_channels": 64, "ffn_hidden_size": 2048},
    ),
    "clip_qwen": ("clip_qwen/open/checkpoint", {}, {"text_config": {**WIDE, "intermediate_size": 2560}}),
    "minigpt4_qwen": (
        "minigpt4qwen/open/checkpoint",
        {"llm": FIXTURES / "qwen/llm", "config": {"vision_config": {"num_attention_heads": 4}}},
        {"text_config": {**WIDE, "intermediate_size": 2560}},
    ),
}


def make(name: str, is_tiny: bool, dtype: torch.dtype, device: str) -> lavish.VLM:
    """Make the network of a family with the processor of its tiny release."""
    folder, options, sizes = RELEASES[name]
    loaded = lavish.load(FIXTURES / folder, device=device, dtype=dtype, **options)
    loaded.unload_adapters()
    family = family_of(loaded.model)
    network = loaded.model
    if not is_tiny:
        fields = loaded.model.config.to_dict()
        if "text_config" in fields:  # which transformers derives, for the tiny sizes
            fields["text_config"] = {
                key: value
                for key, value in fields["text_config"].items()
                if key not in ("layer_types", "num_key_value_heads", "max_window_layers")
            }
        config = family.read_config(fields, folder, **sizes)
        network = fill(family.model_class, config, dtype, device)
        # Buffers that no file holds stand there unfilled.
        family.complete(
            network, [key for key, _ in network.named_buffers() if key.endswith(("inv_freq", "position_ids"))]
        )
    return lavish.VLM(network, loaded.processor, name=name, eos_token_ids=[], max_feature_bytes=0, max_conversations=0)


def requests() -> list[list[dict[str, Any]]]:
    """Eight conversations of one question each, every second one with a picture of its own."""
    drawn = np.random.default_rng(0)
    made = []
    for index in range(NUM_REQUESTS):
        content: list[dict[str, Any]] = [{"type": "text", "text": "What is there? " * (1 + index % 3)}]
        if index % 2:
            pixels = drawn.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            content.insert(0, {"type": "image", "image": Image.fromarray(pixels)})
        made.append([{"role": "user", "content": content}])
    return made


def main() -> int:
    """Run the benchmark; gives 0 also where the goal is missed, which is printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_arguments(parser)
    parser.add_argument("--family", choices=RELEASES, action="append", help="default: all")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=("100m", "tiny"), default="100m", help="tiny: for the test of this script")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: as released")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    measure.set_up(options)
    conversations, generation = requests(), {"max_new_tokens": options.new_tokens, "do_sample": False}
    for name in options.family or RELEASES:
        vlm = make(name, options.size == "tiny", getattr(torch, options.dtype), options.device)

        def single(vlm: lavish.VLM = vlm) -> None:
            for messages in conversations:
                vlm.chat(messages, **generation)

        def batch(vlm: lavish.VLM = vlm) -> None:
            vlm.batch(conversations, batch_size=NUM_REQUESTS, **generation)

        seconds = measure.alternate({"single": single, "batch": batch}, options.rounds)
        ratio = measure.Spread.of([one / many for one, many in zip(seconds["single"], seconds["batch"], strict=True)])
        verdict = "reached" if ratio.median >= GOAL else "missed"
        print(
            f"{name} ({num_parameters(vlm.model) / 1e6:.0f} million parameters, {options.new_tokens} new tokens each): "
            f"a batch of {NUM_REQUESTS} is {ratio} x faster per request than single runs; bound {NUM_REQUESTS} x, "
            f"goal >= {GOAL:g} x {verdict}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
