"""Training a LoRA by lavish's runner against peft on a plain loop: the same network, data, dtype, threads, optimizer.

The plain loop is what a script for peft does: `get_peft_model` on the model of `lavish.load`, and for each batch the
processor, `model(**batch).loss.backward()`, `clip_grad_norm_`, `AdamW.step`, `zero_grad`. lavish's side is a whole
`runner.train()`, with its checks, log and progress; its time is that between two steps, and its checkpoint at the end
is not in it. Both are trained in turns, round by round; the first losses of the two have to agree. Memory is measured
in processes of their own, over what they held before the network was made (`_memory.py`). Over bfloat16 weights the
plain loop runs in two ways: as peft does by itself (it casts what comes into an adapter to float32), and under
autocast, as transformers' Trainer with `bf16=True`. The goals are held against the better of the two.

The bound is the operations of one step of the plain loop (torch's FlopCounterMode) over what products of matrices reach
in the same rounds. Goal: no slower (ratio of times at most 1, the spread aside), no bigger.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import _measure as measure
import _memory as memory
import batch_speed
import numpy as np
import torch
from _networks import num_parameters
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import lavish
from lavish.runners.chat_learner import ChatLearner, ChatSettings, LoraSettings, _decoder_linears
from lavish.runners.order import ShuffledEpochs
from lavish.runners.runner_iter import RunnerIter
from lavish.runners.schema import RunConfig
from lavish.tasks.image_text_pretrain import ImageTextPretrainTask

RANK, ALPHA, RATE, MAX_NORM = 8, 32, 1e-4, 1.0
SAME = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far the first losses of the two may be apart, as a share: autocast rounds otherwise than peft's own casts."""
SIDES = ("lavish", "peft", "autocast")
"""lavish; peft on a plain loop; the same under autocast."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_arguments(parser)
    parser.add_argument("--family", choices=batch_speed.RELEASES, default="glm4v_9b")
    parser.add_argument(
        "--size", choices=("100m", "tiny"), default="100m", help="tiny: Python's own time is most of it"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the frozen weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--words", type=int, default=40, help="of each answer")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        torch.set_num_threads(options.threads or 1)
        print(json.dumps(peak_of(options.memory_of, options)))
        return 0
    measure.set_up(options)
    names = SIDES if options.dtype == "bfloat16" else SIDES[:2]
    with TemporaryDirectory() as folder:
        compare_times(names, options, Path(folder))
    compare_memory(names, options)
    return 0


def compare_times(names: tuple[str, ...], options: argparse.Namespace, folder: Path) -> None:
    sides = {name: SIDE[name](options, folder) for name in names}
    firsts = {name: side(1)[1] for name, side in sides.items()}
    dtype = getattr(torch, options.dtype)
    if max(abs(first / firsts["peft"] - 1) for first in firsts.values()) > SAME[dtype]:
        raise SystemExit(f"The two do not train the same: their first losses are {firsts}.")
    with FlopCounterMode(display=False) as counter:
        sides["peft"](1)
    flops = counter.get_total_flops()
    product, product_flops = measure.multiply(
        dtype, torch.device(options.device), 2048 if options.size == "100m" else 64
    )
    contenders: dict[str, Callable[[], object]] = {
        name: lambda side=side: side(options.steps + 1)[0] for name, side in sides.items()
    }
    seconds = measure.alternate({**contenders, "bound": product}, options.rounds)
    peak = product_flops / min(seconds["bound"])
    print(
        f"{options.family}, {options.dtype}: batches of {options.batch}; first losses {firsts['lavish']:.5f} and "
        f"{firsts['peft']:.5f}; a step is {flops / 1e9:.3g} GFLOP, products run at {peak / 1e9:.0f} GFLOP/s"
    )
    for name in names:
        spread = measure.Spread.of([1000 * one for one in seconds[name]])
        print(f"  {name:8} {spread} ms a step, {flops / peak * 1000 / spread.median:.0%} of the bound")
    ratios = {name: measure.ratio(seconds, "lavish", name) for name in names[1:]}
    for name, spread in ratios.items():
        print(f"  {spread} of the time of {name}")
    worst = max(spread.median for spread in ratios.values())
    print("  " + measure.verdict("step time", worst, 1.0, is_lower_better=True))


def compare_memory(names: tuple[str, ...], options: argparse.Namespace) -> None:
    peaks = {}
    kept = ("family", "size", "dtype", "device", "batch", "words")
    arguments = [part for key in kept for part in (f"--{key}", str(getattr(options, key)))]
    for name in names:
        threads = ["--threads", str(torch.get_num_threads())]
        peaks[name] = memory.in_a_process(__file__, [*arguments, *threads, "--memory-of", name])
        print(
            f"  {name:7} {peaks[name]['peak'] / 1e6:.0f} MB at the peak, {peaks[name]['weights'] / 1e6:.0f} of weights"
        )
    ratio = peaks["lavish"]["peak"] / min(peaks[name]["peak"] for name in names[1:])
    print("  " + measure.verdict("peak memory", ratio, 1.0, is_lower_better=True))


def peak_of(name: str, options: argparse.Namespace) -> dict[str, int]:
    """Train some steps in this process; what a toy leaves was there before."""
    toy = argparse.Namespace(**{**vars(options), "size": "tiny"})
    with TemporaryDirectory() as folder:
        SIDE[name](toy, Path(folder) / "toy")(2)
        before = memory.held(options.device)
        side = SIDE[name](options, Path(folder))
        weights = memory.held(options.device) - before
        memory.forget_peak(options.device)
        side(3)
        return {"peak": memory.peak(options.device) - before, "weights": weights}


# -- data --------------------------------------------------------------------------------------------------------------


class Conversations:
    """Conversations of equal length, each about a picture of its own."""

    def __init__(self, count: int, num_words: int):
        drawn = np.random.default_rng(0)
        self.pictures = drawn.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
        self.answer = "red and green " * (num_words // 3)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        content = [
            {"type": "image", "image": Image.fromarray(self.pictures[index])},
            {"type": "text", "text": "What do you see?"},
        ]
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": self.answer}]}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {"messages": [sample["messages"] for sample in samples]}


def make(options: argparse.Namespace) -> tuple[lavish.VLM, Conversations]:
    dtype = getattr(torch, options.dtype)
    vlm = batch_speed.make(options.family, options.size == "tiny", dtype, options.device)
    return vlm, Conversations(options.batch * (options.steps + 1), options.words)


# -- the two sides: each gives what trains some steps, and says the seconds of one and the first loss ------------------


def lavish_side(options: argparse.Namespace, folder: Path) -> Callable[[int], tuple[float, float]]:
    vlm, data = make(options)
    torch.manual_seed(0)
    learner = ChatLearner(vlm, ChatSettings(lora=LoraSettings(r=RANK, alpha=ALPHA)))
    print_once(vlm, learner)
    runs: list[int] = []

    def train(num_steps: int) -> tuple[float, float]:
        runs.append(num_steps)
        run = RunConfig(
            max_iters=num_steps,
            batch_size_train=options.batch,
            init_lr=RATE,
            lr_sched="constant_lr",
            max_grad_norm=MAX_NORM,
            optimizer="adamw",
            device=options.device,
            output_dir=str(folder / f"run{len(runs)}"),
        )
        times, losses = [], []

        def watch(step: int, of: int, values: dict[str, float]) -> None:
            times.append(measure.now())
            losses.append(values["loss"])

        RunnerIter(run, ImageTextPretrainTask(), learner, {"train": data}, progress=watch).train()
        return (times[-1] - times[0]) / max(num_steps - 1, 1), losses[0]

    return train


def print_once(vlm: lavish.VLM, learner: ChatLearner) -> None:
    learns = sum(weight.numel() for weight in learner.parameters() if weight.requires_grad)
    print(f"{num_parameters(vlm.model) / 1e6:.0f} million parameters, of which {learns / 1e6:.2f} learn")


def peft_side(
    options: argparse.Namespace, folder: Path, is_autocast: bool = False
) -> Callable[[int], tuple[float, float]]:
    from peft import LoraConfig, get_peft_model

    vlm, data = make(options)
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=_decoder_linears(vlm.model), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(vlm.model, config).to(options.device).train()
    order = ShuffledEpochs(len(data), RunConfig().seed)
    learning = [weight for weight in model.parameters() if weight.requires_grad]

    def train(num_steps: int) -> tuple[float, float]:
        optimizer = torch.optim.AdamW(learning, lr=RATE)
        times, losses = [], []
        for step in range(num_steps):
            rows = [order.index(step * options.batch + row) for row in range(options.batch)]
            messages = [data[row]["messages"] for row in rows]
            batch = vlm.processor.apply_chat_template(
                messages, add_generation_prompt=False, padding_side="right", return_labels=True
            )
            batch = {key: one.to(options.device) if torch.is_tensor(one) else one for key, one in batch.items()}
            with torch.autocast(options.device, torch.bfloat16, enabled=is_autocast):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            times.append(measure.now())
        return (times[-1] - times[0]) / max(num_steps - 1, 1), losses[0]

    return train


SIDE = {"lavish": lavish_side, "peft": peft_side, "autocast": partial(peft_side, is_autocast=True)}


if __name__ == "__main__":
    sys.exit(main())
