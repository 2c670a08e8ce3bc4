"""The fuzz script runs over every reader and knows a fault when it sees one."""

import random
import subprocess
import sys
from pathlib import Path

from script_module import load_script

ROOT = Path(__file__).resolve().parents[2]


def test_mutated_files_give_typed_errors() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/fuzz.py"), "--inputs", "900", "--seed", "7"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "900 inputs, 0 faults" in done.stdout
    assert "CheckpointError" in done.stdout


def test_a_fault_is_kept_and_told(tmp_path: Path) -> None:
    """A reader that raises what it should not is found, and the file that shows it is written down."""
    fuzz = load_script("fuzz")
    target = fuzz.targets()["mindspore"]
    clean = target.read

    def careless(path: Path):
        if path.read_bytes() != target.seed.read_bytes():
            raise IndexError("out of range")
        return clean(path)

    folder = tmp_path / "work"
    folder.mkdir()
    fuzzer = fuzz.Fuzzer("careless", fuzz.Target(careless, target.seed, target.patterns), folder, tmp_path / "faults")
    assert fuzzer.step(3, random.Random(1))
    names = sorted(file.name for file in (tmp_path / "faults").iterdir())
    assert names == ["careless-3-dtypes.ckpt", "careless-3.txt"]
    assert "IndexError" in (tmp_path / "faults/careless-3.txt").read_text()
