"""`lavish train` and `lavish evaluate`: what they print, where it goes, and how they end."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipe import evaluation, write

from lavish.cli import main

ROOT = Path(__file__).resolve().parents[2]
RUN_CLI = "import sys; from lavish.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_imports_no_torch(command: str) -> None:
    code = f"{RUN_CLI.rpartition('sys.exit')[0]}main(['{command}', '--help']); print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "False"
    assert "--set" in answer.stdout


def test_help_lists_the_keys_of_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("run.max_iters (int = 1000) Optimizer steps of", "run.optimizer (adamw | muon = adamw)", "run.amp"):
        assert part in text


def test_check_only_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(write(tmp_path)), "--check"]) == 0
    assert f"joint: to do, in {tmp_path / 'out' / 'joint'}" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main(["train", str(write(tmp_path)), "--check", "--set", "run.max_itres=3"]) == 2
    assert "Did you mean 'max_iters'" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "absent.yaml")]) == 2
    assert "no such config file" in capsys.readouterr().err


def test_train_then_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", str(write(tmp_path)), "--set", "run.seed=3", "run.max_iters=3", "--only", "tower"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    model = tmp_path / "out" / "tower" / "model"
    assert f"tower: {model}" in shown.out
    assert "CPU-hours" in shown.out
    assert shown.out.split("tower")[1].split()[:2] == ["6", "3"]  # samples, steps
    assert "tower: step 3 of 3, loss " in shown.err
    assert "samples/s" in shown.err
    assert main(arguments) == 0
    assert "finished before" in capsys.readouterr().err

    evaluation(tmp_path, model)
    assert main(["evaluate", str(tmp_path / "evaluate.yaml"), "--set", "datasets.scenes.num_questions=9"]) == 0
    shown = capsys.readouterr()
    folder = tmp_path / "out" / "evaluation"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert sum(metrics["counts"].values()) == 9
    for task, count in metrics["counts"].items():
        row = next(line.split() for line in shown.out.splitlines() if line.startswith(f"{task} "))
        assert row[1:3] == [str(count), f"{metrics['tasks'][task]:.1%}"]
    assert str(folder / "answers.jsonl") in shown.out
    assert str(folder / "metrics.json") in shown.out
    assert "evaluate: 9 of 9" in shown.err


def interrupt(process: "subprocess.Popen[str]") -> str:
    """Press Ctrl-C until it ends (Python drops one that comes inside a destructor); give what it still said."""
    for _ in range(10):
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=20)[1]
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    return process.communicate()[1]


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background shell ignores it
    arguments = ["train", str(write(tmp_path)), "--set", "run.max_iters=100000"]
    command = [sys.executable, "-c", heard + RUN_CLI, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("tower: step"):
                break
        rest = interrupt(process)
    assert process.returncode == 130, rest
    assert "The same command goes on from the newest checkpoint" in rest
