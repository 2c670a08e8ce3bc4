"""A pass of training on conversations of unlike lengths, with `model.packing` and without.

LoRA on the bundled pocket model, forward and backward, over the same batch; that both give the same loss is said.
Without it a row is as long as the longest conversation; what share of the slots is padding is said too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import _measure as measure
import torch

from lavish.common.registry import registry
from lavish.nn.joined_rows import JoinedRows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="a chat model's folder; default: the bundled pocket model")
    parser.add_argument("--words", type=int, nargs="+", default=[4, 8, 8, 16, 16, 32, 64, 128], help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    measure.add_arguments(parser)
    options = parser.parse_args()
    measure.set_up(options)
    models = {name: learner(options.path, name == "joined") for name in ("padded", "joined")}
    batch = models["padded"].collator({"messages": [conversation(count) for count in options.words]})
    mask = batch["inputs"]["attention_mask"]
    rows = JoinedRows.of(mask)
    losses = [step(model, batch) for model in models.values()]
    print(f"losses {abs(losses[1] - losses[0]) / losses[0]:.1e} apart, relative")
    print(
        f"padded: {tuple(mask.shape)}, {1 - mask.float().mean():.0%} of it padding; joined: {tuple(rows.index.shape)}"
    )
    contenders: dict[str, Callable[[], object]] = {
        name: partial(discard, model, batch) for name, model in models.items()
    }
    seconds = measure.alternate(contenders, options.rounds)
    print(f"  padded / joined {measure.ratio(seconds, 'padded', 'joined')}")
    return 0


def learner(path: str | None, is_joined: bool) -> Any:
    """A LoRA on the decoder, in training mode."""
    torch.manual_seed(0)
    return registry.get_model_class("chat").from_config({"path": path, "lora": {"r": 8}, "packing": is_joined}).train()


def conversation(count: int) -> list[dict[str, Any]]:
    """A short question and an answer of so many words."""
    return [{"role": "user", "content": "what"}, {"role": "assistant", "content": " ".join(["shape"] * count)}]


def step(model: Any, batch: dict[str, Any]) -> float:
    """One pass forward and backward; gives the loss."""
    loss = model({**batch})["loss"]
    loss.backward()
    model.zero_grad()
    return float(loss.detach())


def discard(model: Any, batch: dict[str, Any]) -> None:
    """Call `step` without a result, which would be taken for seconds."""
    step(model, batch)


if __name__ == "__main__":
    sys.exit(main())
