"""Decoding with a CogVLM2-shaped network against transformers' own Llama of the same text size, in its `generate`.

Both have 1,154 tokens in the cache (one picture and 128 text tokens; the Llama as many text tokens) and generate one
token after the other, greedily. Ours is the loop of `lavish.inference`: as it is, with packed weights, and in int8.
The Llama runs as `generate` runs by default (eager, growing cache), and with `--compile` as well with its static cache
and a compiled step, as ours does then. Prompts are not timed: the clock runs from the first new token to the last.

Bound: the bytes of the weights and of the cache that one token reads, over the speed at which these cores read memory,
measured in the same rounds. Goal: 1.2 times the tokens of Llama's default a second.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import _measure as measure
import _networks as networks
import torch
from transformers import CompileConfig, GenerationMixin
from transformers.generation.streamers import BaseStreamer

from lavish.inference.cache import SliceCache
from lavish.inference.packing import pack
from lavish.inference.static_step import StaticStep
from lavish.inference.steps import CogVLMSteps, Prompt
from lavish.models.cogvlm.model import CogVLMForCausalLM
from lavish.nn.int8 import Int8Linear

GOAL = 1.2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEER = "Llama, generate"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(networks.SIZES), default="mid")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--text-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compiled steps of both too (needs a C++ compiler)")
    measure.add_arguments(parser)
    options = parser.parse_args()
    measure.set_up(options)
    for dtype in options.dtype:
        run(options.size, dtype, options.text_tokens, options.new_tokens, options.rounds, options.compile)
    return 0


def run(size: str, dtype: str, num_text: int, num_new: int, rounds: int, is_compiled: bool) -> None:
    """Measure one dtype and print its lines."""
    network = networks.cogvlm2(size, DTYPES[dtype])
    peer = networks.llama(size, DTYPES[dtype])
    peer.generation_config.eos_token_id = None  # so that it never stops early, without a processor that costs time
    num_prompt = network.config.num_image_tokens + num_text
    features = torch.randn(1, network.config.num_image_tokens, network.config.hidden_size).to(DTYPES[dtype]) * 0.02
    contenders: dict[str, Callable[[], object]] = {
        PEER: lambda: generate(peer, num_prompt, num_new),
        "lavish": answering(network, features, num_text, num_new),
        "lavish, packed": answering(packed(size, network), features, num_text, num_new),
        "lavish, int8": answering(quantized(size, network), features, num_text, num_new),
    }
    if is_compiled:
        static = compiled(networks.llama(size, DTYPES[dtype]))
        static.generation_config.eos_token_id = None
        contenders["Llama, static cache, compiled"] = lambda: generate(static, num_prompt, num_new, is_static=True)
        contenders["lavish, static cache, compiled"] = stepping(network, features, num_text, num_new)
    read, read_bytes = measure.read_memory(torch.device("cpu"), 1 if size == "tiny" else 512)
    seconds = measure.alternate({**contenders, "bound": read}, rounds)

    token_bytes = networks.bytes_per_token(network) + cache_bytes(network, num_prompt + num_new // 2)
    bandwidth = read_bytes / min(seconds["bound"])
    print(
        f"\n{dtype}: {networks.num_parameters(network) / 1e6:.0f} M parameters, Llama "
        f"{networks.num_parameters(peer) / 1e6:.0f} M; {num_prompt} tokens in the cache, {num_new} generated; bound "
        f"{bandwidth / token_bytes:.0f} tokens/s ({token_bytes / 1e6:.0f} MB at {bandwidth / 1e9:.0f} GB/s)"
    )
    for name in contenders:
        speed = 1 / measure.Spread.of(seconds[name]).median
        share = "" if "int8" in name else f", {speed * token_bytes / bandwidth:.0%} of the bound"
        print(f"  {name:32} {speed:6.1f} tokens/s{share}; x {measure.ratio(seconds, PEER, name)}")
    for name in ("lavish", "lavish, packed"):
        print("  " + measure.verdict(f"{dtype}, {name}", measure.ratio(seconds, PEER, name).median, GOAL))


def prompt(network: CogVLMForCausalLM, num_text: int) -> Prompt:
    """One picture after bos, and random words."""
    config = network.config
    words = torch.randint(3, config.vocab_size, (num_text - 1,), generator=torch.Generator().manual_seed(0)).tolist()
    slots = config.num_image_tokens
    return Prompt([config.bos_token_id] + [config.pad_token_id] * slots + words, [0] + [1] * slots + [0] * len(words))


def answering(network: CogVLMForCausalLM, features: torch.Tensor, num_text: int, num_new: int) -> Callable[[], float]:
    """The loop of `lavish.inference`: gives the seconds of a token."""
    steps, asked = CogVLMSteps(network), prompt(network, num_text)

    def answer() -> float:
        cache = SliceCache(steps.num_layers, len(asked) + num_new)
        logits, state = steps.prefill([asked], features, cache)
        token_id = int(logits.argmax())
        started = measure.now()
        for _ in range(num_new - 1):
            token_id = int(steps.decode([token_id], state, cache).argmax())
        return (measure.now() - started) / (num_new - 1)

    return answer


def stepping(network: CogVLMForCausalLM, features: torch.Tensor, num_text: int, num_new: int) -> Callable[[], float]:
    """The static step, compiled."""
    asked = prompt(network, num_text)
    step = StaticStep(network, len(asked) + num_new, is_compiled=True)

    def answer() -> float:
        token_id = int(step.prefill(asked, features).argmax())
        started = measure.now()
        for _ in range(num_new - 1):
            token_id = int(step.decode(token_id).argmax())
        return (measure.now() - started) / (num_new - 1)

    return answer


class Clock(BaseStreamer):
    """Note when the prompt and each new token come out of `generate`."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(measure.now())

    def end(self) -> None:
        pass


def generate(model: GenerationMixin, num_prompt: int, num_new: int, is_static: bool = False) -> float:
    """transformers' `generate`, greedy: gives the seconds of a token."""
    input_ids = torch.randint(3, model.config.vocab_size, (1, num_prompt), generator=torch.Generator().manual_seed(0))
    clock = Clock()
    fixed = {"cache_implementation": "static"} if is_static else {}
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=num_new,
        do_sample=False,
        streamer=clock,
        **fixed,
    )
    first, last = clock.times[1], clock.times[-1]  # the very first call brings the prompt
    return (last - first) / (len(clock.times) - 2)


def compiled(model):
    """Let `generate` compile its step on the CPU too; on its own it does so on a GPU only."""
    model.generation_config.compile_config = CompileConfig(fullgraph=True, mode="default")
    model.generation_config.compile_config._compile_all_devices = True
    return model


def packed(size: str, network: CogVLMForCausalLM) -> CogVLMForCausalLM:
    """A network of equal weights, packed."""
    other = networks.cogvlm2(size, network.dtype)
    threshold = {"min_bytes": 0} if size == "tiny" else {}  # tiny: so that the tests run it too
    pack(other, **threshold)
    return share_vision(other, network)


def quantized(size: str, network: CogVLMForCausalLM) -> CogVLMForCausalLM:
    """A network of equal weights with its decoder layers in int8, as `quantization="int8"` loads them."""
    other = share_vision(networks.cogvlm2(size, network.dtype), network)
    for layer in other.model.layers:
        for parent in (layer.self_attn, layer.mlp.language_mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear) and not name.startswith("vision"):
                    setattr(parent, name, Int8Linear.from_linear(linear))
    return other


def share_vision(other: CogVLMForCausalLM, network: CogVLMForCausalLM) -> CogVLMForCausalLM:
    """Let a network use another's tower and image experts, which decoding does not read: it spares memory."""
    other.model.vision = network.model.vision
    for layer, shared in zip(other.model.layers, network.model.layers, strict=True):
        layer.mlp.vision_mlp = shared.mlp.vision_mlp
        layer.self_attn.vision_expert_dense = shared.self_attn.vision_expert_dense
        layer.self_attn.vision_expert_query_key_value = shared.self_attn.vision_expert_query_key_value
    return other


def cache_bytes(network: CogVLMForCausalLM, num_tokens: int) -> int:
    """Bytes of the keys and values of so many tokens."""
    config = network.config
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * width * num_tokens * network.lm_head.weight.element_size()


if __name__ == "__main__":
    sys.exit(main())
