"""The scripts of examples/lavis run as they stand, on the fixtures' checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "lavis"
FIXTURES = ROOT / "tests" / "fixtures"
CONFIG = {
    "vision_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    "image_size": 64,
    "max_txt_len": 10,
}
RUNS = {
    "caption.py": ("blip_caption", ["greedy: ['", "3 beams: ['", "drawn: ['", "prompt: ['"]),
    "vqa.py": ("blip_vqa", ["greedy: ['old']", "3 beams: ['old']", "best of the list: ['"]),
    "features.py": (
        "blip_feature_extractor",
        [
            "multimodal: (1, 14, 32)",
            "for a classifier: (1, 32)",
            "image: (1, 17, 32) (1, 17, 16)",
            "text: (1, 14, 32) (1, 14, 16)",
            "similarity: [[",
        ],
    ),
}
QUESTIONS = {"vqa.py": ["--question", "What is this photo taken?"]}


def test_every_script_is_run() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_example*.py"))
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert set(RUNS) < scripts
    for name in scripts:
        assert f'"{name}"' in tests
        assert name in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", RUNS)
def test_example(script: str, tmp_path: Path) -> None:
    name, printed = RUNS[script]
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    case = FIXTURES / name / "open"
    command = [sys.executable, str(EXAMPLES / script), str(case / "inputs" / "img0.png")]
    command += ["--checkpoint", str(case / "checkpoint"), "--config", str(tmp_path / "config.json")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")}
    answer = subprocess.run(
        [*command, *QUESTIONS.get(script, [])], env=environment, capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert [line.startswith(start) for line, start in zip(lines, printed, strict=True)] == [True] * len(printed), lines
