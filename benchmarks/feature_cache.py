"""An epoch of training on the bundled pocket model, its tower frozen, with `model.feature_cache` and without.

Passes forward and backward of LoRA on the decoder, over the same prepared batches. `kept`: every picture is in the
folder, as from the second epoch on. `first`: the folder is empty, as in the first epoch. The losses are compared too:
how far apart they are, and that those of `kept` and `first` are the same.

What a larger model gains is the share of its tower in a pass: `--picture-only` leaves the shortest text, 1 token.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _measure as measure
import torch
from PIL import Image

from lavish.common.registry import registry

SIZE = 224


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="a chat model's folder; default: the bundled pocket model")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--picture-only", action="store_true", help="one word of question and answer")
    measure.add_arguments(parser)
    options = parser.parse_args()
    measure.set_up(options)
    with tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder))
    return 0


def run(options: argparse.Namespace, folder: Path) -> None:
    """Measure and print the lines."""
    text = "a" if options.picture_only else "what is to be seen in this picture of a few shapes"
    samples = conversations(options.pictures, text)
    parts = [samples[start : start + options.batch_size] for start in range(0, len(samples), options.batch_size)]
    models = {
        "without": learner(options.path, None),
        "kept": learner(options.path, folder / "kept"),
        "first": learner(options.path, folder / "first"),
    }
    batches = {name: [model.collator({"messages": part}) for part in parts] for name, model in models.items()}

    def epoch(name: str) -> list[float]:
        if name == "first":
            shutil.rmtree(folder / "first", ignore_errors=True)
        return [step(models[name], batch) for batch in batches[name]]

    losses = {name: epoch(name) for name in models}
    again = epoch("kept")
    print(f"losses of a cold and a warm folder the same: {losses['first'] == losses['kept'] == again}")
    apart = max(abs(ours - theirs) / theirs for ours, theirs in zip(again, losses["without"], strict=True))
    print(f"losses with and without: at most {apart:.1e} apart, relative")
    contenders = {name: partial(discard, epoch, name) for name in models}
    seconds = measure.alternate(contenders, options.rounds)
    size = models["kept"].features.entry_bytes
    print(f"{options.pictures} pictures in batches of {options.batch_size}; {size / 2**20:.2f} MiB of disk a picture")
    print(f"  without / kept  {measure.ratio(seconds, 'without', 'kept')}")
    print(f"  without / first {measure.ratio(seconds, 'without', 'first')}")


def discard(epoch: Callable[[str], list[float]], name: str) -> None:
    """Call without a result, which would be taken for seconds."""
    epoch(name)


def learner(path: str | None, cache: Path | None) -> Any:
    """A LoRA on the decoder, in training mode."""
    torch.manual_seed(0)
    section = {"path": path, "lora": {"r": 8}, "feature_cache": None if cache is None else str(cache)}
    return registry.get_model_class("chat").from_config(section).train()


def conversations(count: int, text: str) -> list[Any]:
    """Questions about pictures of noise, with answers."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        pixels = torch.randint(0, 256, (SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
        image = {"type": "image", "image": Image.fromarray(pixels.numpy())}
        asked = {"role": "user", "content": [image, {"type": "text", "text": text}]}
        found.append([asked, {"role": "assistant", "content": text}])
    return found


def step(model: Any, batch: dict[str, Any]) -> float:
    """One pass forward and backward; gives the loss."""
    loss = model({name: dict(value) if isinstance(value, dict) else value for name, value in batch.items()})["loss"]
    loss.backward()
    model.zero_grad()
    return float(loss.detach())


if __name__ == "__main__":
    sys.exit(main())
