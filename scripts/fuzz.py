"""Feed mutated checkpoints to every reader; anything but a typed error, a slow answer or a crash is a fault.

    python scripts/fuzz.py [--inputs 100000] [--seed 0] [--reader sat]

Seeds are the small whole files of the tests' fixtures. A mutation flips, cuts, repeats or overwrites bytes, often with
numbers that break arithmetic, at random places of one file, more of them in headers than in weights. What still opens
is read whole. Faults are written to output/fuzz/ with the file that shows them, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lavish.checkpoints import deepspeed, hf, lavis, layouts, mindspore, sat
from lavish.checkpoints.tensor_map import TensorMap
from lavish.common.errors import LavishError

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests/fixtures"
MAX_SECONDS = 2.0
"""CPU seconds of one input."""
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1)


@dataclass(frozen=True)
class Target:
    """A reader, a whole checkpoint, and those of its files that are mutated."""

    read: Callable[[Path], TensorMap]
    seed: Path
    patterns: tuple[str, ...]


def targets() -> dict[str, Target]:
    """Every reader with its seed."""
    ms = FIXTURES / "mindspore_ckpt/open/checkpoint"
    return {
        "safetensors": Target(hf.read, ms / "hf", ("*.safetensors", "*.json")),
        "torch": Target(lavis.read, FIXTURES / "blip_caption/open/checkpoint", ("*.pth",)),
        "sat": Target(sat.read, FIXTURES / "cogvlm_sat/open/checkpoint_mp2", ("*/*.pt", "latest", "*.json")),
        "deepspeed 2": Target(deepspeed.read, FIXTURES / "deepspeed/zero2", ("*/*.pt", "latest")),
        "deepspeed 3": Target(deepspeed.read, FIXTURES / "deepspeed/zero3", ("*/*.pt", "latest")),
        "mindspore": Target(mindspore.read, ms / "ms/dtypes.ckpt", ("*.ckpt",)),
        "mindspore slices": Target(mindspore.read, ms / "ms/sliced.ckpt", ("*.ckpt",)),
        "mindspore crc": Target(mindspore.read, ms / "ms/crc.ckpt", ("*.ckpt",)),
        "mindspore ranks": Target(mindspore.read, ms / "ms_2cards", ("*/*.ckpt",)),
    }


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change some bytes; half of the places lie in the first or last 4 kB, where headers and directories are."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        size = max(len(changed), 1)
        edge = min(4096, size)
        place = rng.choice((rng.randrange(edge), size - 1 - rng.randrange(edge), rng.randrange(size)))
        kind = rng.randrange(7)
        if kind == 0 and changed:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and changed:
            changed[place] = rng.randrange(256)
        elif kind == 2:
            del changed[place:]
        elif kind == 3:
            del changed[place : place + rng.choice((1, 2, 8, 64))]
        elif kind == 4:
            changed[place:place] = changed[place : place + rng.choice((1, 2, 8, 64, 512))]
        elif kind == 5:
            code = rng.choice(["<B", "<H", "<I", "<Q", ">I", ">Q"])
            number = rng.choice(NUMBERS) & ((1 << 8 * struct.calcsize(code)) - 1)
            value = struct.pack(code, number)
            changed[place : place + len(value)] = value
        else:
            other = rng.randrange(size)
            length = rng.choice((4, 16, 128))
            changed[place : place + length] = changed[other : other + length]
    return bytes(changed)


def read_whole(target: Target, path: Path) -> str:
    """Open a checkpoint and read all of its tensors; give what came of it."""
    try:
        layouts.detect(path)
        tensors = target.read(path)
        for name in tensors:
            value = tensors[name]
            value.reshape(-1)[-1:].tolist()
            if tensors.info(name).nbytes < 1 << 20:
                value.contiguous().flatten().sum()
        return "opened"
    except LavishError as error:
        str(error).encode("utf-8", "surrogatepass")
        return type(error).__name__


class Fuzzer:
    """Mutates the files of one target in a folder of its own."""

    def __init__(self, name: str, target: Target, folder: Path, faults: Path) -> None:
        self.name, self.target, self.faults = name, target, faults
        if target.seed.is_dir():
            self.path = folder / "seed"
            shutil.copytree(target.seed, self.path)
        else:
            self.path = folder / target.seed.name
            shutil.copy(target.seed, self.path)
        base = self.path if self.path.is_dir() else folder
        self.files = sorted(file for pattern in target.patterns for file in base.glob(pattern))
        for file in self.files:
            file.chmod(0o600)
        self.originals = {file: file.read_bytes() for file in self.files}
        self.outcomes: Counter[str] = Counter()
        self.slowest = 0.0
        if (found := read_whole(target, self.path)) != "opened":
            raise SystemExit(f"the seed of {name!r} does not open: {found}")

    def step(self, number: int, rng: random.Random) -> bool:
        """Try one mutation; tell whether it showed a fault."""
        file = rng.choice(self.files)
        content = mutate(self.originals[file], rng)
        file.write_bytes(content)
        started = time.process_time()
        fault = ""
        try:
            self.outcomes[read_whole(self.target, self.path)] += 1
        except Exception:  # noqa: BLE001 - each is a fault to be told
            fault = traceback.format_exc()
        seconds = time.process_time() - started
        self.slowest = max(self.slowest, seconds)
        if seconds > MAX_SECONDS:
            fault = fault or f"took {seconds:.1f} CPU seconds"
        file.write_bytes(self.originals[file])
        if fault:
            self.faults.mkdir(parents=True, exist_ok=True)
            stem = f"{self.name.replace(' ', '_')}-{number}"
            (self.faults / f"{stem}-{file.name}").write_bytes(content)
            (self.faults / f"{stem}.txt").write_text(fault)
            print(f"{stem}: {fault.strip().splitlines()[-1]}", flush=True)
        return bool(fault)


def main() -> int:
    """Share the inputs out among the readers; give 1 if any showed a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="mutated inputs, over all readers")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    parser.add_argument("--reader", help="one reader by name; default: all")
    options = parser.parse_args()
    chosen = {name: target for name, target in targets().items() if options.reader in (None, name)}
    if not chosen:
        parser.error(f"no reader {options.reader!r}; there are {', '.join(targets())}")
    faults, started, num_faults, total = ROOT / "output/fuzz", time.perf_counter(), 0, 0
    share = -(-options.inputs // len(chosen))
    for name, target in chosen.items():
        with tempfile.TemporaryDirectory() as folder:
            fuzzer = Fuzzer(name, target, Path(folder), faults)
            rng = random.Random(f"{options.seed} {name}")
            num_faults += sum(fuzzer.step(number, rng) for number in range(share))
        total += share
        outcomes = ", ".join(f"{outcome} {count}" for outcome, count in fuzzer.outcomes.most_common())
        print(f"{name}: {share} inputs, slowest {fuzzer.slowest:.2f} s: {outcomes}", flush=True)
    print(f"{total} inputs, {num_faults} faults, {time.perf_counter() - started:.0f} s")
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
