"""Loading a CogVLM v1 straight from SAT's layout, against loading the Hugging Face folder that it converts to.

Writes a SAT checkpoint of `--size` GB (of one rank, or `--model-parallel N`), converts it to bfloat16, and loads both
onto the CPU in turns, each in a process of its own and from a warm cache, network and weights only. Goal: at most 1.3
times the time. Exit status 1 when it is missed at 1 GB or more; smaller sizes show that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from _measure import Spread

GIGABYTE = 1_000_000_000
GOAL = 1.3
CODE = """
import json, sys, time
import torch
from lavish.checkpoints.loading import load_into
from lavish.inference.load import open_release
from pathlib import Path
clock = time.process_time if sys.argv[2] == "cpu" else time.perf_counter
started_s = clock()
opened = open_release(Path(sys.argv[1]), {}, {})
with torch.device("meta"):
    network = opened.family.model_class(opened.config)
left = load_into(network, opened.tensors, dtype=torch.bfloat16, device="cpu", rules=opened.family.rules)
opened.family.complete(network, left)
print(json.dumps(clock() - started_s))
"""


def main() -> int:
    """Write and convert the checkpoint, load both in turns, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=2.0, metavar="GB", help="of the checkpoint")
    parser.add_argument("--model-parallel", type=int, default=1, metavar="N", help="ranks of the SAT checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="on which disk (default: the temporary folder's)")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: time of the process, for a busy machine"
    )
    options = parser.parse_args()
    from _sat_checkpoint import fields_for, write_sat

    from lavish.inference.convert import convert

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        sat, converted = Path(folder) / "cogvlm-base", Path(folder) / "hf"
        num_bytes = write_sat(sat, fields_for(round(options.size * GIGABYTE)), "bfloat16")
        convert(sat, converted)
        if options.model_parallel > 1:
            sat = Path(folder) / "cogvlm-base-ranks"
            convert(converted, sat, "sat", model_parallel=options.model_parallel)
        print(f"checkpoint: {num_bytes / GIGABYTE:.2f} GB bfloat16, {options.model_parallel} rank(s)")
        ratios = []
        for index in range(options.rounds):
            for path in (converted, sat):
                warm(path)
            hf_s, sat_s = (timed_load(path, options.threads, options.clock) for path in (converted, sat))
            ratios.append(sat_s / hf_s)
            print(f"round {index + 1}: Hugging Face {hf_s:.2f} s, SAT {sat_s:.2f} s, {ratios[-1]:.2f} of the time")
    spread = Spread.of(ratios)
    print(f"time against the converted folder: {spread}; goal <= {GOAL} {'ok' if spread.median <= GOAL else 'MISSED'}")
    return 1 if num_bytes >= GIGABYTE and spread.median > GOAL else 0


def warm(path: Path) -> None:
    """Read all of a checkpoint, so that the system holds it."""
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as handle:
                while handle.read(1 << 24):
                    pass


def timed_load(path: Path, threads: int, clock: str) -> float:
    """Load in a process of its own; gives the seconds of the load, imports not counted."""
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(path), clock],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    return json.loads(run.stdout)


if __name__ == "__main__":
    sys.exit(main())
