"""Peak memory while a checkpoint is loaded, against the bound: the weights plus one shard.

Writes a bfloat16 checkpoint of `--gigabytes` in `--shards` shards to a temporary folder, loads it in a process of its
  own into a network on
the meta device, and prints what that process held at its peak (VmHWM of /proc, sampled RssAnon and RssFile), less
  what it held before. Peer:
the usual way, all of `safetensors.torch.load_file` and then `load_state_dict` into a network with random weights.
Exit status 1 when the bound is broken. Linux only, since it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

WIDTH = 1024
GIGABYTE = 1_000_000_000


def main() -> int:
    """Write the checkpoint, load it both ways, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--shards", type=int, default=2, help="number of files")
    parser.add_argument("--folder", help="where to write it (default: a temporary folder, removed afterwards)")
    parser.add_argument("--no-peer", action="store_true", help="only the two loads that have a bound")
    parser.add_argument("--measure", choices=["lavish", "cast", "peer"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.folder), options.measure)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        weights, shard = write_checkpoint(Path(folder), options.gigabytes, options.shards)
        print(f"checkpoint: {weights / 1e9:.3f} GB bfloat16, largest shard {shard / 1e9:.3f} GB")
        kept = True
        for how, what, held in (
            ("lavish", "load_into, bfloat16", weights),
            ("cast", "load_into, cast to float32", 2 * weights),
            ("peer", "load_file + load_state_dict", None),
        ):
            if how == "peer" and options.no_peer:
                continue
            run = subprocess.run(
                [sys.executable, __file__, "--measure", how, "--folder", folder],
                capture_output=True,
                text=True,
                check=True,
            )
            kept &= report(what, json.loads(run.stdout), held, weights, shard)
        return 0 if kept else 1


def report(what: str, found: dict[str, float], held: int | None, weights: int, shard: int) -> bool:
    """Print one line; tell whether the bound (None: no claim) is kept."""
    bound = None if held is None else held + shard
    slack = 0.02 * weights + 30e6  # allocator and interpreter: what loading needs apart from tensors
    kept = bound is None or found["peak"] <= bound + slack
    claim = (
        ""
        if bound is None
        else f"; bound {bound / 1e9:.3f}, ratio {found['peak'] / bound:.2f} {'ok' if kept else 'BROKEN'}"
    )
    print(
        f"{what:28} peak {found['peak'] / 1e9:.3f} GB ({found['peak'] / weights:.2f} x the weights), "
        f"anonymous {found['RssAnon'] / 1e9:.3f}, file-backed {found['RssFile'] / 1e9:.3f}, "
        f"{found['seconds']:.2f} s{claim}"
    )
    return kept


def build(num_layers: int):
    """Give a plain tree of linears, `WIDTH` x `WIDTH` each."""
    from torch import nn

    return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(num_layers))})


def write_checkpoint(folder: Path, gigabytes: float, num_shards: int) -> tuple[int, int]:
    """Write random weights in shards; gives the bytes of all tensors and of the largest shard."""
    import torch

    from lavish.checkpoints import hf, writer

    num_layers = max(num_shards, round(gigabytes * GIGABYTE / (2 * WIDTH * (WIDTH + 1))))
    drawn = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    state = {}
    for layer in range(num_layers):
        state[f"layers.{layer}.weight"] = drawn  # the same values: only the bytes count, and they are written each time
        state[f"layers.{layer}.bias"] = drawn[0]
    total = sum(value.nbytes for value in state.values())
    writer.save_sharded(state, folder, max_shard_bytes=-(-total // num_shards) + drawn.nbytes)
    tensors = hf.read(folder)
    by_file = dict.fromkeys(tensors.files, 0)
    for name in tensors:
        by_file[tensors.info(name).file] += tensors.info(name).nbytes
    return total, max(by_file.values())


def measure(folder: Path, how: str) -> dict[str, float]:
    """Load in this process; gives bytes beyond what it held before, and seconds."""
    import torch

    from lavish.checkpoints import hf

    num_layers = len(hf.read(folder)) // 2
    with torch.device("meta"):
        net = build(num_layers)
    before = status()
    with Sampler() as sampler:
        start = time.perf_counter()
        if how == "peer":
            from safetensors.torch import load_file

            net = net.to_empty(device="cpu").bfloat16()
            state = {
                name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()
            }
            net.load_state_dict(state)
            del state
        else:
            hf.load_into(net, hf.read(folder), dtype=torch.float32 if how == "cast" else torch.bfloat16, device="cpu")
        seconds = time.perf_counter() - start
    assert all(parameter.sum().isfinite() for parameter in net.parameters())
    after = status()
    peak = max(after["VmHWM"] - before["VmRSS"], 0)
    return {"peak": peak, "seconds": seconds} | {key: sampler.peak[key] - before[key] for key in ("RssAnon", "RssFile")}


def status() -> dict[str, int]:
    """Read this process's memory from /proc, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1] == "kB"}


class Sampler:
    """Keep the highest RssAnon and RssFile of this process, looked at every 5 ms."""

    def __enter__(self) -> Sampler:
        self.peak = status()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = {key: max(value, self.peak.get(key, 0)) for key, value in status().items()}

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":
    sys.exit(main())
