"""What a model is before a weight is read: every family and layout of the fixtures."""

import json
import shutil
from pathlib import Path

import pytest

from lavish.common.errors import ConfigError
from lavish.inference.outline import outline
from lavish.models import FAMILIES, ZOO

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
LLM = {"llm": str(FIXTURES / "qwen/llm")}
HEADS = {"vision_config": {"num_attention_heads": 4}}
RELEASES = [
    ("cogvlm", "cogvlm/open/checkpoint", {}, {}),
    ("cogvlm", "cogvlm2/open/checkpoint", {}, {}),
    ("glm4v_9b", "glm4v/open/checkpoint", {}, {}),
    ("clip_qwen", "clip_qwen/open/checkpoint", {}, {}),
    ("clip_qwen", "clip_qwen/open/checkpoint/checkpoint-27000", {}, {}),
    ("minigpt4_qwen", "minigpt4qwen/open/checkpoint", HEADS, LLM),
    ("blip", "blip_caption/open/checkpoint", HEADS, {}),
    ("blip", "blip_caption/open/checkpoint/blip_coco_caption_base.pth", HEADS, {}),
    ("blip", "blip_vqa/open/checkpoint", HEADS, {}),
    ("blip", "blip_feature_extractor/open/checkpoint", HEADS, {}),
    ("gpt_dialogue", "gpt_dialogue/open/checkpoint", {}, {}),
    ("gpt_dialogue", "gpt_dialogue/open/checkpoint/checkpoint_best.pth", {}, {}),
]


def test_the_releases_are_of_all_families() -> None:
    assert {family for family, *_ in RELEASES} == {row.name for row in FAMILIES}


@pytest.mark.parametrize(("family", "path", "overrides", "pieces"), RELEASES)
def test_every_release_is_complete(family: str, path: str, overrides: dict, pieces: dict) -> None:
    seen = outline(FIXTURES / path, overrides, pieces)
    assert seen.family.name == family
    assert all(value.is_meta for value in seen.network.parameters())
    assert seen.problems() == {"missing": [], "unexpected": [], "misshaped": []}
    assert {name: info.shape for name, info in seen.stored().items()}.items() <= seen.shapes.items()


def test_a_folder_that_transformers_saved(tmp_path: Path) -> None:
    import lavish

    source = FIXTURES / "blip_caption/open/checkpoint"
    lavish.load(source, config=HEADS, device="cpu").samples.save_pretrained(tmp_path)
    seen = outline(tmp_path)
    assert (seen.family.name, seen.layout) == ("blip", "hf")
    assert not any(seen.problems().values())


def test_a_wrong_size_is_named_by_tensor() -> None:
    problems = outline(FIXTURES / "glm4v/open/checkpoint", {"num_layers": 1, "ffn_hidden_size": 8}).problems()
    assert any(".layers.1." in name for name in problems["unexpected"])
    assert any("mlp" in text and "stored" in text for text in problems["misshaped"])
    problems = outline(FIXTURES / "glm4v/open/checkpoint", {"num_layers": 5}).problems()
    assert any(".layers.4." in name for name in problems["missing"])


def test_a_config_without_weights(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "glm4v/open/checkpoint/config.json", tmp_path)
    seen = outline(tmp_path)
    assert seen.tensors is None
    assert not any(seen.problems().values())
    assert seen.config["num_layers"] == json.loads((tmp_path / "config.json").read_text())["num_layers"]


@pytest.mark.parametrize("name", [row.name for row in ZOO if row.family in ("blip", "minigpt4_qwen", "glm4v_9b")])
def test_layouts_of_the_zoo(name: str) -> None:
    entry = next(row for row in ZOO if row.name == name)
    seen = outline(name)
    assert seen.family.name == entry.family
    assert sum(value.numel() for value in seen.network.parameters()) == entry.num_parameters


def test_a_piece_that_is_absent_is_named() -> None:
    with pytest.raises(ConfigError, match="the piece 'llm' is absent"):
        outline(FIXTURES / "minigpt4qwen/open/checkpoint", HEADS)
