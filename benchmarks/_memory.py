"""The peak of memory of a process: resident memory on a CPU (Linux), the allocator's own count on CUDA."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc gives freed memory back at once, so that what is resident is what is held."""


def held(device: str) -> int:
    """Give the bytes that are held now."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    return _resident("VmRSS")


def forget_peak(device: str) -> None:
    """Let the peak begin here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak(device: str) -> int:
    """Give the most bytes that were held since `forget_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}.")


def in_a_process(script: str, arguments: Sequence[str]) -> Any:
    """Run a script of these in a process of its own, and give what its last line says as JSON."""
    environment = {**os.environ, **GIVE_BACK}
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{Path(script).name} {' '.join(arguments)}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
