"""projects/*/tiny are what scripts/write_tiny_folders.py writes, and a network starts from each."""

import importlib.util
from pathlib import Path

import pytest

from lavish.datasets.scenes.world import COLOURS, SHAPES
from lavish.inference.random_start import random_model
from lavish.processors.tokenizers import encode_plain

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "write_tiny_folders.py"
FAMILIES = ("clip_qwen", "glm4v_9b", "minigpt4_qwen")
MOST_PARAMETERS = 1_500_000


def test_the_files_are_current() -> None:
    spec = importlib.util.spec_from_file_location("write_tiny_folders", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    wanted = script.folders()
    here = [path for family in (*FAMILIES, "gpt_dialogue") for path in (ROOT / "projects" / family / "tiny").iterdir()]
    assert set(here) == set(wanted)
    assert [path for path in here if path.read_bytes() != wanted[path]] == [], "run scripts/write_tiny_folders.py"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_word_of_the_scenes_is_one_token(family: str) -> None:
    vlm = random_model(ROOT / "projects" / family / "tiny")
    tokenizer = vlm.processor.tokenizer
    for word in (*COLOURS, *SHAPES):
        assert len(encode_plain(tokenizer, word)) == len(encode_plain(tokenizer, f" {word}")) == 1
    text = "Étrange 形 42 <|user|> <|im_start|>"
    assert vlm.processor.decode(encode_plain(tokenizer, text)) == text
    assert sum(weight.numel() for weight in vlm.model.parameters()) < MOST_PARAMETERS
