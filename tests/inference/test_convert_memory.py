"""A conversion holds a few tensors, whatever the size of the model."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SHARD, SLACK = 8_000_000, 32_000_000
CODE = """
import json, sys
from lavish.inference.convert import convert
def status(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) * 1024
convert(sys.argv[1], sys.argv[2] + ".small", dtype="bfloat16")
before = status("VmHWM")
convert(sys.argv[3], sys.argv[2], dtype="bfloat16", max_shard_bytes=int(sys.argv[4]), verify=True)
print(json.dumps(status("VmHWM") - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_peak_does_not_grow_with_the_model(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """90 MB go through in shards of 8; the peak is above what a small conversion, imports included, takes."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    made = importlib.import_module("_sat_checkpoint")
    monkeypatch.delitem(sys.modules, "_sat_checkpoint")
    fields = {**made.fields_for(12_000_000), "num_hidden_layers": 1}
    made.write_sat(tmp_path / "small-base", fields, dtype)
    num_bytes = made.write_sat(tmp_path / "large-base", made.fields_for(90_000_000), dtype)
    arguments = [tmp_path / "small-base", tmp_path / "hf", tmp_path / "large-base", SHARD]
    run = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) < SHARD + SLACK < num_bytes / 2
