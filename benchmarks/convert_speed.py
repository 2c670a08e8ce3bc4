"""Converting a SAT checkpoint to a Hugging Face folder in bfloat16, against copying the same bytes; and its memory.

Writes a CogVLM v1 of `--size` GB in SAT's layout. Each round copies its file (`shutil.copyfile`, then fsync) and
converts it, each from a cold cache to the same disk, the conversion in a process of its own, whose imports are not
counted; the ratio is taken inside the round. With `--stored float16` every number is cast on its way. Bounds: 70 % of
the copy's throughput, and a peak of resident memory (VmHWM, interpreter and torch included) of one shard and 1 GB. Exit
status 1 when a bound is broken at 1 GB or more; smaller sizes show that it runs. Linux only, since it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _measure import Spread

GIGABYTE = 1_000_000_000
SHARE = 0.7
CODE = """
import json, sys, time
from lavish.inference.convert import convert
small, source, destination, shard = *sys.argv[1:4], int(sys.argv[4])
convert(small, small + "-hf", dtype="bfloat16")  # imports what any conversion does
started_s = time.perf_counter()
report = convert(source, destination, dtype="bfloat16", max_shard_bytes=shard)
seconds = time.perf_counter() - started_s
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({"seconds": seconds, "bytes": report.num_bytes, "peak": int(status["VmHWM"].split()[0]) * 1024}))
"""


def main() -> int:
    """Write the checkpoint, copy and convert it in turns, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=4.0, metavar="GB", help="of the checkpoint")
    parser.add_argument("--shard-size", type=float, default=None, metavar="GB", help="default: a quarter of --size")
    parser.add_argument("--stored", default="bfloat16", choices=["bfloat16", "float16"], help="dtype of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="on which disk (default: the temporary folder's)")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    from _sat_checkpoint import fields_for, write_sat

    shard = round((options.shard_size or options.size / 4) * GIGABYTE)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "sat"
        write_sat(Path(folder) / "small", fields_for(1), options.stored)
        num_bytes = write_sat(source, fields_for(round(options.size * GIGABYTE)), options.stored)
        file = next(source.glob("1/*.pt"))
        print(f"checkpoint: {num_bytes / GIGABYTE:.2f} GB {options.stored}, one rank; shards of {shard / 1e9:.2f} GB")
        ratios, copies, peak = [], [], 0
        for index in range(options.rounds):
            copy_s = timed_copy(file, Path(folder) / "copy")
            found = timed_convert(source, Path(folder) / "hf", file, shard, options.threads)
            ratios.append(copy_s / found["seconds"])
            copies.append(num_bytes / copy_s / 1e6)
            peak = max(peak, int(found["peak"]))
            print(
                f"round {index + 1}: copy {copy_s:.2f} s, convert {found['seconds']:.2f} s "
                f"({found['bytes'] / found['seconds'] / 1e6:.0f} MB/s), {ratios[-1]:.2f} of the copy's throughput"
            )
    bound = shard + GIGABYTE
    spread, is_kept = Spread.of(ratios), peak <= bound
    held = f"{peak / 1e9:.2f} GB; bound, one shard and 1 GB: {bound / 1e9:.2f} {'ok' if is_kept else 'BROKEN'}"
    print(f"copy: {Spread.of(copies).median:.0f} MB/s")
    print(f"throughput against the copy: {spread}; goal >= {SHARE} {'ok' if spread.median >= SHARE else 'MISSED'}")
    print(f"peak memory: {held}")
    return 1 if num_bytes >= GIGABYTE and (spread.median < SHARE or not is_kept) else 0


def timed_copy(file: Path, copy: Path) -> float:
    """Copy a file and wait for the disk; gives seconds."""
    forget(file)
    started_s = time.perf_counter()
    shutil.copyfile(file, copy)
    with copy.open("rb") as handle:
        os.fsync(handle.fileno())
    seconds = time.perf_counter() - started_s
    copy.unlink()
    return seconds


def timed_convert(source: Path, destination: Path, file: Path, shard: int, threads: int) -> dict[str, float]:
    """Convert in a process of its own; gives seconds of the call, bytes written and peak memory."""
    forget(file)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    run = subprocess.run(
        [sys.executable, "-c", CODE, str(source.with_name("small")), str(source), str(destination), str(shard)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    shutil.rmtree(destination)
    shutil.rmtree(source.with_name("small-hf"))
    return json.loads(run.stdout)


def forget(file: Path) -> None:
    """Let the system forget what it holds of a file, so that it is read from the disk."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
