"""A full-size CogVLM2 on one GPU: load time, prefill of one 1344 x 1344 picture, decoding at batch 1, peak memory.

Writes the 39 GB of the released layout once, with random weights (`--folder`; found there, it is used again), and
measures in one process, in turns. Beside each number stands its bound, from the matrix products and the copies that
this GPU does in the same rounds. `--scale` writes a smaller network of the same widths; `--device cpu --tiny` runs
all of the script on a toy in seconds, to try it.

Goals (one H200, 790 TFLOP/s and 4.3 TB/s): prefill <= 0.35 s, decoding >= 200 tokens/s, peak memory <= 41 GB.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import _measure as measure
import _networks as networks
import torch

from lavish.checkpoints import hf, writer
from lavish.checkpoints.loading import load_into
from lavish.inference.build import build
from lavish.inference.cache import SliceCache
from lavish.inference.static_step import StaticStep
from lavish.inference.steps import CogVLMSteps, Prompt
from lavish.models.cogvlm import weights
from lavish.models.cogvlm.config import CogVLMConfig
from lavish.models.cogvlm.model import CogVLMForCausalLM

PREFILL_GOAL_S, DECODE_GOAL, MEMORY_GOAL_GB = 0.35, 200.0, 41.0
RELEASE = "cogvlm2-llama3-chat-19B"
STEPS = ("eager", "graph", "compile")
POOL = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("cogvlm2-random"), help="where the checkpoint is, or goes")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a toy of the same shape, to try the script")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the layers to keep, in (0, 1]")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument(
        "--steps", nargs="+", choices=("eager", "graph", "compile"), help="ways to decode; default: all"
    )
    measure.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "no CUDA device here (torch.cuda.is_available() is False). Full size needs a GPU with 48 GB; "
            "`--device cpu --tiny` tries the script without one."
        )
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu runs the toy only: add --tiny.")
    measure.set_up(options)
    device = torch.device(options.device)
    layout = tiny_layout() if options.tiny else full_layout(options.scale)
    write_once(layout, options.folder)
    network = load(layout, options.folder, device)
    steps = options.steps or (list(STEPS) if device.type == "cuda" else ["eager"])
    prefill(network, device, options.text_tokens, options.rounds)
    decode(network, device, options.text_tokens, options.new_tokens, options.rounds, steps)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
        print(f"memory: {torch.cuda.max_memory_reserved() / 1e9:.1f} GB reserved at the peak")
        print("  " + measure.verdict("peak memory", peak, MEMORY_GOAL_GB, "GB", is_lower_better=True))
    return 0


# -- the checkpoint ----------------------------------------------------------------------------------------------------


def full_layout(scale: float) -> CogVLMForCausalLM:
    """The released layout on the meta device; `scale` keeps that share of the decoder's and the tower's layers."""
    cut = {"num_hidden_layers": max(1, round(32 * scale))}
    cut["vision_config"] = {"num_hidden_layers": max(1, round(63 * scale))}
    return build(RELEASE, dtype="bfloat16", device="meta", **({} if scale == 1.0 else cut))


def tiny_layout() -> CogVLMForCausalLM:
    with torch.device("meta"):
        network = CogVLMForCausalLM(CogVLMConfig(**networks.SIZES["tiny"], bos_token_id=1, eos_token_id=2))
    return network.to(torch.bfloat16)


class RandomTensors(Mapping[str, torch.Tensor]):
    """Random values for every tensor of a network, none of which is held: all are views of one pool.

    Matrices have std 1/64 (1/sqrt of the decoder's width), norms are 1, `inv_freq` is the network's own.
    """

    def __init__(self, network: CogVLMForCausalLM):
        self.targets = network.state_dict()
        largest = max(tensor.numel() for tensor in self.targets.values())
        drawn = (torch.randn(POOL, generator=torch.Generator().manual_seed(0)) / 64).bfloat16()
        self.pool = drawn.repeat(-(-largest // POOL))
        rotary = network.model.layers[0].self_attn.rotary_emb
        self.inv_freq = networks.reference_inv_freq(rotary.head_dim, rotary.base, torch.bfloat16)

    def __getitem__(self, name: str) -> torch.Tensor:
        target = self.targets[name]
        if name.endswith("inv_freq"):
            return self.inv_freq
        if target.ndim == 1 and name.endswith("weight"):
            return torch.ones_like(target, device="cpu")
        return self.pool[: target.numel()].view(target.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)


def write_once(layout: CogVLMForCausalLM, folder: Path) -> None:
    """Write the checkpoint unless the folder holds it: the same names and shapes."""
    wanted = {name: tuple(tensor.shape) for name, tensor in layout.state_dict().items()}
    nbytes = sum(tensor.nbytes for tensor in layout.state_dict().values())
    if folder.is_dir() and any(folder.glob("*.safetensors")):
        tensors = hf.read(folder)
        if {name: tensors.meta(name)[0] for name in tensors} == wanted:
            print(f"checkpoint: {folder} is there, {nbytes / 1e9:.1f} GB")
            return
        raise SystemExit(f"{folder} holds another checkpoint; give another --folder.")
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < nbytes * 1.02:
        raise SystemExit(f"{folder} needs {nbytes / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free.")
    started = time.perf_counter()
    writer.save_sharded(RandomTensors(layout), folder)
    layout.config.save_pretrained(folder)
    print(f"checkpoint: {nbytes / 1e9:.1f} GB written to {folder} in {time.perf_counter() - started:.0f} s")


def load(layout: CogVLMForCausalLM, folder: Path, device: torch.device) -> CogVLMForCausalLM:
    """Load the network, after its files were read once, so that both readings find them in memory if there is room."""
    buffer = bytearray(64 * 2**20)
    started = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    read_s = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    tensors = hf.read(folder)
    left = load_into(layout, tensors, dtype=torch.bfloat16, device=device, rules=weights.RULES)
    weights.complete(layout, left)
    measure.synchronize()
    spent = time.perf_counter() - started
    print(
        f"load: {spent:.1f} s, {tensors.nbytes / spent / 1e9:.1f} GB/s; bound, reading the files once: {read_s:.1f} s; "
        f"ratio {spent / read_s:.2f}"
    )
    return layout.eval()


# -- speed -------------------------------------------------------------------------------------------------------------


def prompt(network: CogVLMForCausalLM, num_text: int) -> Prompt:
    """One picture after bos, and random words."""
    config = network.config
    words = torch.randint(3, config.vocab_size, (num_text - 1,), generator=torch.Generator().manual_seed(0)).tolist()
    slots = config.num_image_tokens
    return Prompt([1] + [0] * slots + words, [0] + [1] * slots + [0] * len(words))


def tower_flops(network: CogVLMForCausalLM) -> float:
    """Operations of the tower, the merge and the projector for one picture."""
    vision = network.config.tower
    rows = vision.num_patches + 1
    layers = network.model.vision.transformer.layers
    matrices = sum(parameter.numel() for parameter in layers.parameters() if parameter.ndim == 2)
    attention = 4.0 * rows**2 * vision.hidden_size * vision.num_hidden_layers
    merged = network.config.num_image_tokens - 2
    others = [network.model.vision.conv, network.model.vision.linear_proj]
    after = sum(parameter.numel() for module in others for parameter in module.parameters() if parameter.ndim > 1)
    return 2.0 * rows * matrices + attention + 2.0 * merged * after


def prefill(network: CogVLMForCausalLM, device: torch.device, num_text: int, rounds: int) -> None:
    steps, asked = CogVLMSteps(network), prompt(network, num_text)
    side = network.config.tower.image_size
    pixel_values = torch.randn(1, 3, side, side, device=device).bfloat16()
    features = steps.image_features(pixel_values)

    def decoder() -> torch.Tensor:
        return steps.prefill([asked], features, SliceCache(steps.num_layers, len(asked)))[0]

    def whole() -> torch.Tensor:
        seen = steps.image_features(pixel_values)
        return steps.prefill([asked], seen, SliceCache(steps.num_layers, len(asked)))[0]

    product, product_flops = measure.multiply(torch.bfloat16, device, 8192 if device.type == "cuda" else 64)
    contenders = {"tower": lambda: steps.image_features(pixel_values), "decoder": decoder, "both": whole}
    seconds = measure.alternate({**contenders, "bound": product}, rounds, warmup=2)
    peak = product_flops / min(seconds["bound"])
    tower, text = tower_flops(network), networks.prefill_flops(network, len(asked))
    print(f"prefill: {len(asked)} tokens; products run at {peak / 1e12:.3g} TFLOP/s")
    for name, flops in (("tower", tower), ("decoder", text), ("both", tower + text)):
        spread = measure.Spread.of(seconds[name])
        bound = flops / peak
        share = bound / spread.median
        print(f"  {name:8} {spread.median:.3f} s; bound {bound:.3f} s ({flops / 1e12:.3g} TFLOP): {share:.0%} of it")
    median = measure.Spread.of(seconds["both"]).median
    if device.type == "cuda":
        print("  " + measure.verdict("prefill", median, PREFILL_GOAL_S, "s", is_lower_better=True))


def decode(
    network: CogVLMForCausalLM, device: torch.device, num_text: int, num_new: int, rounds: int, kinds: list[str]
) -> None:
    asked = prompt(network, num_text)
    features = torch.randn(1, network.config.num_image_tokens, network.config.hidden_size, device=device).bfloat16()
    contenders: dict[str, Callable[[], float]] = {}
    answers: dict[str, list[int]] = {}
    for kind in kinds:
        contenders[kind] = decoding(network, kind, asked, features, num_new, answers.setdefault(kind, []))
    read, read_bytes = measure.read_memory(device, 4096 if device.type == "cuda" else 1)
    seconds = measure.alternate({**contenders, "bound": read}, rounds)
    bandwidth = read_bytes / min(seconds["bound"])
    width = network.config.num_key_value_heads * network.config.head_dim
    cached = 4 * network.config.num_hidden_layers * width * (len(asked) + num_new // 2)
    token_bytes = networks.bytes_per_token(network) + cached
    print(
        f"decode: {len(asked)} tokens in the cache, {num_new} generated; bound {bandwidth / token_bytes:.0f} tokens/s "
        f"({token_bytes / 1e9:.3g} GB at {bandwidth / 1e12:.3g} TB/s)"
    )
    speeds = {}
    for kind in kinds:
        speeds[kind] = 1 / measure.Spread.of(seconds[kind]).median
        same = sum(one == other for one, other in zip(answers[kind], answers[kinds[0]], strict=True))
        print(
            f"  {kind:8} {speeds[kind]:6.1f} tokens/s, {speeds[kind] * token_bytes / bandwidth:.0%} of the bound; "
            f"{same} of {num_new} tokens as {kinds[0]}"
        )
    best = max(speeds, key=lambda kind: speeds[kind])
    if device.type == "cuda":
        print("  " + measure.verdict(f"decode ({best})", speeds[best], DECODE_GOAL, "tokens/s"))


def decoding(
    network: CogVLMForCausalLM, kind: str, asked: Prompt, features: torch.Tensor, num_new: int, answer: list[int]
) -> Callable[[], float]:
    """Give a loop that generates greedily, leaves the tokens in `answer`, and says the seconds of a token."""
    capacity = len(asked) + num_new
    if kind == "eager":
        steps = CogVLMSteps(network)
        cache = SliceCache(steps.num_layers, capacity)
    else:
        step = StaticStep(network, capacity, is_compiled=kind == "compile")

    def generate() -> float:
        answer.clear()
        if kind == "eager":
            cache.truncate(0)
            logits, state = steps.prefill([asked], features, cache)
        else:
            logits = step.prefill(asked, features)
        answer.append(int(logits.argmax()))
        started = measure.now()
        for _ in range(num_new - 1):
            logits = steps.decode([answer[-1]], state, cache) if kind == "eager" else step.decode(answer[-1])
            answer.append(int(logits.argmax()))
        return (measure.now() - started) / (num_new - 1)

    return generate


if __name__ == "__main__":
    sys.exit(main())
