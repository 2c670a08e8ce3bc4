"""What an import or a `--help` may pull in: nothing heavy. Each case runs in a fresh Python."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CLI = Path(__file__).resolve().parent.parent / "src" / "lavish" / "cli"
HEAVY = ["torch", "transformers", "peft", "accelerate", "matplotlib", "tokenizers", "huggingface_hub"]
COMMANDS = ["chat", "predict", "train", "evaluate", "convert", "inspect", "serve", "zoo"]
FOUNDATIONS = ["errors", "registry", "config", "messages", "media", "grounding"]

RUN_COMMAND = """
import sys
sys.argv = ["lavish", *{arguments!r}]
from lavish.cli import main
try:
    status = main()
except SystemExit as end:
    status = end.code
assert not status, status
"""


def heavy_modules(code: str, heavy: list[str]) -> tuple[list[str], str]:
    """Run `code` in a fresh Python; give the modules of `heavy` that it imported, and what it printed."""
    report = f"\nimport json, sys\nprint('\\n@' + json.dumps([name for name in {heavy!r} if name in sys.modules]))"
    answer = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    printed, _, found = answer.stdout.rpartition("\n@")
    return json.loads(found), printed


def test_importing_lavish_is_light() -> None:
    found, _ = heavy_modules("import lavish; lavish.__version__; dir(lavish)", [*HEAVY, "numpy", "PIL", "omegaconf"])
    assert found == []


@pytest.mark.parametrize("name", FOUNDATIONS)
def test_foundations_are_light(name: str) -> None:
    found, _ = heavy_modules(f"import lavish.common.{name}", HEAVY)
    assert found == []


def test_help_is_light_and_lists_the_commands() -> None:
    found, printed = heavy_modules(RUN_COMMAND.format(arguments=["--help"]), HEAVY)
    assert found == []
    for command in COMMANDS:
        assert (command in printed) == (CLI / f"{command}.py").exists(), command


@pytest.mark.parametrize("command", [name for name in COMMANDS if (CLI / f"{name}.py").exists()])
def test_help_of_each_command_is_light(command: str) -> None:
    found, printed = heavy_modules(RUN_COMMAND.format(arguments=[command, "--help"]), HEAVY)
    assert found == []
    assert "Usage" in printed


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.stem)
def test_modules_of_the_command_line_are_light(path: Path) -> None:
    name = "lavish.cli" if path.stem == "__init__" else f"lavish.cli.{path.stem}"
    found, _ = heavy_modules(f"import {name}", HEAVY)
    assert found == []


def test_loading_imports_nothing_that_only_some_models_need() -> None:
    unneeded = ["peft", "matplotlib", "omegaconf", "bitsandbytes", "datasets"]
    found, _ = heavy_modules("import lavish.inference.load", unneeded)
    assert found == []
