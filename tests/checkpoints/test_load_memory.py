"""The memory benchmark at a small size: its bound holds, and it prints what it claims."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "load_memory.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_the_weights_plus_one_shard(tmp_path: Path) -> None:
    options = ["--gigabytes", "0.064", "--shards", "4", "--folder", str(tmp_path), "--no-peer"]
    run = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(" ok\n") == 2
    assert "checkpoint: 0.063 GB bfloat16" in run.stdout
    assert list(tmp_path.iterdir()) == []
