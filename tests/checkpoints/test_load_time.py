"""The load-time benchmark at a small size runs to its verdict."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "load_time.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="reads getrusage")
def test_the_benchmark_reaches_its_verdict(tmp_path: Path) -> None:
    options = ["--gigabytes", "0.05", "--rounds", "1", "--folder", str(tmp_path)]
    run = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "wall time to the first token: " in run.stdout
    assert "goal <= 1.5 x" in run.stdout
