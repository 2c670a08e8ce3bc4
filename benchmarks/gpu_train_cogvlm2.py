"""LoRA and QLoRA on a full-size CogVLM2 by lavish's runner on one GPU: peak memory and the time of a step.

One picture of 1344 x 1344 (2,306 tokens), 512 tokens of text and an answer of 512, one sample a step, as
projects/cogvlm2/train/{lora,qlora}.yaml train: rank 8 on the image experts' query_key_value, activations checkpointed.
Weights are random and made on the GPU, layer by layer; nothing is read or written but the runner's own folder. Beside
the time stands its bound: the operations of a step (torch's FlopCounterMode) over what products of matrices reach here.

`--estimate` needs no GPU: the same step on the meta device, each tensor followed as `lavish train --dry-run` does.
`--device cpu --tiny` runs all of the script on a toy.

Goals: LoRA <= 60 GB at the peak (the release needs 73 GB on each of 8 GPUs), QLoRA (nf4, needs bitsandbytes) <= 24 GB.
"""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import _measure as measure
import gpu_cogvlm2
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lavish.inference import quantization
from lavish.models.cogvlm import weights
from lavish.models.cogvlm.model import CogVLMForCausalLM
from lavish.nn.losses import NO_LOGITS
from lavish.runners.chat_learner import ChatLearner, ChatSettings, LoraSettings
from lavish.runners.dry_run import _Made
from lavish.runners.engines import checkpoint_activations
from lavish.runners.runner_iter import RunnerIter
from lavish.runners.schema import RunConfig
from lavish.tasks.image_text_pretrain import ImageTextPretrainTask

GOALS_GB = {"lora": 60.0, "qlora": 24.0}
LORA = LoraSettings(r=8, alpha=32, dropout=0.1, target_modules=["vision_expert_query_key_value"])
NF4_BYTES = 0.5 + 4 / 64
"""Of a weight: four bits, and a float32 scale for each block of 64."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=GOALS_GB, default=list(GOALS_GB))
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a toy of the same shape, to try the script")
    parser.add_argument("--estimate", action="store_true", help="follow a step on the meta device, without memory")
    parser.add_argument("--all-logits", action="store_true", help="of --estimate: as if the head ran on every token")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the layers to keep, in (0, 1]")
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--answer-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6, help="the first is not timed")
    measure.add_arguments(parser)
    options = parser.parse_args()
    if not options.estimate and options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "no CUDA device here (torch.cuda.is_available() is False). LoRA needs a GPU of 60 GB, QLoRA one of 24; "
            "`--estimate` needs none, and `--device cpu --tiny` tries the script."
        )
    if not options.estimate and options.device == "cpu" and not options.tiny:
        parser.error("--device cpu runs the toy only: add --tiny, or --estimate.")
    measure.set_up(options)
    for kind in options.kind:
        peak = (estimate if options.estimate else train)(kind, options) / 1e9
        if options.estimate or options.device == "cuda":
            print("  " + measure.verdict(f"{kind}, peak memory", peak, GOALS_GB[kind], "GB", is_lower_better=True))
    return 0


def layout(options: argparse.Namespace) -> CogVLMForCausalLM:
    return gpu_cogvlm2.tiny_layout() if options.tiny else gpu_cogvlm2.full_layout(options.scale)


class Sample:
    """One conversation as the processor makes it: bos, the picture's slots, text, and the answer, which is learnt."""

    def __init__(self, network: CogVLMForCausalLM, options: argparse.Namespace, pixels_on: str = "cpu"):
        slots, side = network.config.num_image_tokens, network.config.tower.image_size
        ids = torch.randint(3, network.config.vocab_size, (1, 1 + slots + options.text_tokens + options.answer_tokens))
        types = torch.zeros_like(ids)
        types[:, 1 : 1 + slots] = 1
        labels = torch.full_like(ids, -100)
        labels[:, -options.answer_tokens :] = ids[:, -options.answer_tokens :]
        pixels = torch.zeros(1, 3, side, side, dtype=torch.bfloat16, device=pixels_on)
        self.inputs = {"input_ids": ids, "token_type_ids": types, "attention_mask": torch.ones_like(ids)}
        self.inputs |= {"labels": labels, "pixel_values": pixels}

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"inputs": self.inputs}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {"messages": [], **samples[0]}


def learner_of(network: CogVLMForCausalLM) -> ChatLearner:
    """Put the recipe's LoRA on a network; the sample is made already, so there is no processor."""
    vlm: Any = SimpleNamespace(model=network, processor=None)
    learner = ChatLearner(vlm, ChatSettings(lora=LORA))
    learner.collator = None  # pyright: ignore[reportAttributeAccessIssue]
    return learner


# -- a run -------------------------------------------------------------------------------------------------------------


def train(kind: str, options: argparse.Namespace) -> float:
    """Train some steps; give the most bytes that were allocated, 0 on a CPU."""
    device = torch.device(options.device)
    network = random_network(layout(options), device, is_nf4=kind == "qlora")
    learner = learner_of(network)
    sample = Sample(network, options)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    counter = FlopCounterMode(display=False)

    def watch(step: int, of: int, values: dict[str, float]) -> None:
        measure.synchronize()
        times.append(measure.now())

    with TemporaryDirectory() as folder:
        run = RunConfig(
            max_iters=options.steps,
            batch_size_train=1,
            init_lr=1e-4,
            optimizer="adamw",
            activation_checkpointing=True,
            device=str(device),
            output_dir=str(Path(folder) / "out"),
        )
        runner = RunnerIter(run, ImageTextPretrainTask(), learner, {"train": sample}, progress=watch)
        runner.train()
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        with counter:
            runner.maker.forward(runner.called, {"inputs": sample.inputs})["loss"].backward()
    flops = counter.get_total_flops()
    product, product_flops = measure.multiply(torch.bfloat16, device, 8192 if device.type == "cuda" else 64)
    speed = product_flops / min(measure.alternate({"bound": product}, 3)["bound"])
    spread = measure.Spread.of([after - before for before, after in pairwise(times)])
    tokens = sample.inputs["input_ids"].shape[1]
    print(
        f"{kind}: {tokens} tokens; a step {spread} s; "
        f"bound {flops / speed:.3f} s ({flops / 1e12:.3g} TFLOP at {speed / 1e12:.3g} TFLOP/s): "
        f"{flops / speed / spread.median:.0%} of it"
    )
    return peak


def random_network(network: CogVLMForCausalLM, device: torch.device, is_nf4: bool) -> CogVLMForCausalLM:
    """Fill a network of the meta device with random weights, its decoder's matrices in nf4 where that is asked."""
    values = gpu_cogvlm2.RandomTensors(network)
    values.pool = values.pool.to(device)
    names = quantization.quantized_layers(network) if is_nf4 else []
    names = [name for name in names if quantization._suits_nf4(network.get_submodule(name))]
    quantized = {f"{name}.weight" for name in names}
    for name in values:
        if name in quantized:
            continue
        owner, _, leaf = name.rpartition(".")
        module, value = network.get_submodule(owner), values[name].to(device).clone()
        if leaf in module._parameters:
            module.register_parameter(leaf, nn.Parameter(value))
        else:
            module.register_buffer(leaf, value)
    for name in names:
        layer = network.get_submodule(name)
        made = quantization._empty_nf4(layer, torch.bfloat16)
        made.bias = layer.bias  # pyright: ignore[reportArgumentType]
        quantization._fill_nf4(made, values[f"{name}.weight"], torch.bfloat16, device)
        quantization._replace(network, name, made)
    weights.complete(network)
    return network.eval()


# -- an estimate -------------------------------------------------------------------------------------------------------


def estimate(kind: str, options: argparse.Namespace) -> float:
    """Follow one step on the meta device; give the most bytes that it would hold on a GPU."""
    network = layout(options)
    frozen, parts = sum(weight.nbytes for weight in network.parameters()), ""
    if kind == "qlora":
        matrices: list[Any] = [network.get_submodule(name).weight for name in quantization.quantized_layers(network)]
        largest = max(weight.nbytes for weight in matrices)
        frozen += largest + sum(int(weight.numel() * NF4_BYTES) - weight.nbytes for weight in matrices)
        parts = f" with {largest / 1e9:.2f} for the matrix that is multiplied"
    with torch.device("meta"):
        learner = learner_of(network)
    checkpoint_activations(learner)
    states = 3 * sum(weight.nbytes for weight in learner.parameters() if weight.requires_grad)
    sample = Sample(network, options, pixels_on="meta")
    made = _Made([*learner.parameters(), *learner.buffers(), *sample.inputs.values()])
    with fused_attention(), made:
        keep = 0 if options.all_logits else NO_LOGITS
        learner.train().network(**sample.inputs, logits_to_keep=keep).loss.backward()
    peak = frozen + states + made.most_bytes
    tokens = sample.inputs["input_ids"].shape[1]
    print(
        f"{kind}, estimated: {tokens} tokens; frozen weights {frozen / 1e9:.2f} GB{parts}, "
        f"adapter with its states {states / 1e9:.3f}, a pass {made.most_bytes / 1e9:.2f}"
    )
    return peak


class FusedAttention(torch.autograd.Function):
    """What a GPU's fused attention holds: its inputs and its output. Values are not computed."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


def fused_attention() -> Any:
    """Let attention on the meta device hold what CUDA's kernels do, not the matrices of its plain form."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return FusedAttention.apply(query, key, value)

    return mock.patch("torch.nn.functional.scaled_dot_product_attention", attend)


if __name__ == "__main__":
    sys.exit(main())
