"""The set-up script: its decisions, and what it says where it cannot go on. `make test` begins with the real thing."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from script_module import load_script

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def setup_venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, its `.venv` moved to a temporary folder."""
    module = load_script("setup_venv")
    monkeypatch.setattr(module, "VENV", tmp_path)
    monkeypatch.setattr(module, "STAMP", tmp_path / "setup.json")
    monkeypatch.setattr(module, "LOG", tmp_path / "setup.log")
    return module


def test_a_python_that_is_none_is_refused_with_advice(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": str(tmp_path / "python")}
    answer = subprocess.run([ROOT / "scripts" / "setup"], env=environment, capture_output=True, text=True)
    assert answer.returncode == 1
    assert "Python 3.11 or newer" in answer.stderr
    assert "apt install python3" in answer.stderr


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("Collecting torch==2.13.0\n", "resolving torch==2.13.0"),
        ("  Downloading numpy-2.4.6-cp311-manylinux.whl (16.9 MB)\n", "downloading numpy-2.4.6 (16.9 MB)"),
        ("Installing collected packages: a, b, c\n", "installing 3 packages"),
        ("Requirement already satisfied: a\n", ""),
        ("\n", ""),
    ],
)
def test_pip_step(setup_venv: ModuleType, line: str, step: str) -> None:
    assert setup_venv.pip_step(line) == step


def test_explain_names_the_network(setup_venv: ModuleType) -> None:
    output = (
        "WARNING: Retrying: Temporary failure in name resolution\nERROR: No matching distribution found for torch\n"
    )
    setup_venv.LOG = ROOT / ".venv" / "setup.log"
    assert "Check the network" in setup_venv.explain(output)
    assert "Check the network" not in setup_venv.explain("ERROR: resolution impossible\n")


def test_writing_packages_is_stamped_until_the_command_ends(setup_venv: ModuleType) -> None:
    code = f"print('Installing collected packages: a', flush=True); print(open({str(setup_venv.STAMP)!r}).read())"
    setup_venv.write_stamp(writing=False)
    slow = f"import time; print('Installing collected packages: a', flush=True); time.sleep(0.5); {code}"
    with setup_venv.Progress("test") as progress:
        status, output = setup_venv.run([sys.executable, "-c", slow], progress)
    assert status == 0
    assert '"writing": true' in output
    assert setup_venv.read_stamp() == {"writing": False}


def test_a_damaged_stamp_counts_as_none(setup_venv: ModuleType) -> None:
    setup_venv.STAMP.write_text('{"key": "ab', encoding="utf-8")
    assert setup_venv.read_stamp() == {}


@pytest.mark.parametrize(("choice", "is_cpu"), [("cpu", True), ("default", False)])
def test_the_build_of_torch_can_be_chosen(
    setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch, choice: str, is_cpu: bool
) -> None:
    monkeypatch.setenv("LAVISH_TORCH", choice)
    assert setup_venv.wants_cpu_torch() is is_cpu


def test_an_unknown_build_of_torch_is_refused(setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVISH_TORCH", "cuda")
    with pytest.raises(setup_venv.SetupError, match="neither 'cpu'"):
        setup_venv.wants_cpu_torch()


def test_torch_is_pinned_as_it_is_installed(setup_venv: ModuleType) -> None:
    import torch

    assert torch.__version__.split("+")[0] == setup_venv.pinned_torch()
