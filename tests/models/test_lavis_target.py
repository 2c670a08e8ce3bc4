"""BLIP, GPTDialogue, MiniGPT4-Qwen and CLIP + Qwen written as they were released, and read back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lavish
from lavish.checkpoints import hf, lavis
from lavish.common.errors import CheckpointError, ConfigError
from lavish.inference.convert import convert

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
VISION = {
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
BLIP = {"vision_config": VISION}
HEADS = {"vision_config": {"num_attention_heads": 4}}
# peft 0.21 asks transformers 5.23 under the attribute's old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def source(name: str) -> Path:
    return FIXTURES / name / "open/checkpoint"


def assert_same(loaded: Any, other: Any) -> None:
    states = [getattr(one, "model", one).state_dict() for one in (loaded, other)]
    assert set(states[0]) == set(states[1])
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def assert_equal(found: Any, expected: Any, names: Any) -> None:
    for name in names:
        assert torch.equal(found[name], expected[name]), name
        assert found[name].dtype == expected[name].dtype, name


# -- BLIP --------------------------------------------------------------------------------------------------------------

KINDS = ("blip_caption", "blip_vqa", "blip_feature_extractor")


@pytest.mark.parametrize("kind", KINDS)
def test_blip_there_and_back(tmp_path: Path, kind: str) -> None:
    """LAVIS -> HF -> LAVIS: the same names and bytes, but for what LAVIS keeps of its pretraining."""
    report = convert(source(kind), tmp_path / "hf", "hf", config=BLIP)
    convert(tmp_path / "hf", tmp_path / "back", "lavis", verify=True)
    first, back = lavis.read(source(kind)), lavis.read(tmp_path / "back")
    lost = {name for name, _ in report.dropped}
    kept = set(first) - lost
    assert kept <= set(back)
    assert_equal(back, first, kept)
    assert all(name.endswith("position_ids") or name in first for name in back)
    network = ("visual_encoder", "text_decoder", "text_encoder", "vision_proj", "text_proj")
    assert all(name.endswith("position_ids") or not name.startswith(network) for name in lost)
    assert_same(lavish.load(source(kind), config=BLIP), lavish.load(tmp_path / "back"))


def test_blip_is_one_file_too(tmp_path: Path) -> None:
    """From one file of LAVIS to another in another precision."""
    convert(source("blip_caption"), tmp_path / "half.pth", "lavis", dtype="bf16", config=BLIP)
    first, made = lavis.read(source("blip_caption")), lavis.read(tmp_path / "half.pth")
    for name in made:
        if made[name].is_floating_point():
            assert torch.equal(made[name], first[name].bfloat16()), name
    stored = torch.load(tmp_path / "half.pth", weights_only=True)
    assert list(stored) == ["model"]
    assert set(stored["model"]) == set(made)


def test_blip_s_own_files_beside_it(tmp_path: Path) -> None:
    convert(source("blip_vqa"), tmp_path / "back", "lavis", config=BLIP)
    found = {str(file.relative_to(tmp_path / "back")) for file in (tmp_path / "back").rglob("*") if file.is_file()}
    assert {"checkpoint_best.pth", "med_config.json", "config.json", "bert-base-uncased/vocab.txt"} <= found
    med = json.loads((tmp_path / "back/med_config.json").read_text())
    released = json.loads((source("blip_vqa") / "med_config.json").read_text())
    shared = set(med) & set(released)
    assert {"encoder_width", "hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"} <= shared
    for name in ("encoder_width", "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"):
        assert med[name] == released[name], name


# -- GPTDialogue -------------------------------------------------------------------------------------------------------


def test_gpt_dialogue_there_and_back(tmp_path: Path) -> None:
    path = source("gpt_dialogue") / "checkpoint_best.pth"
    convert(path, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "back", "lavis", verify=True)
    assert_same(lavish.load(path), lavish.load(tmp_path / "back"))
    first, back = lavis.read(path), lavis.read(tmp_path / "back")
    masks = {name for name in first if name.endswith((".attn.bias", ".attn.masked_bias"))}
    assert set(back) == set(first) - masks
    assert_equal(back, first, back)


# -- MiniGPT4-Qwen -----------------------------------------------------------------------------------------------------


def test_minigpt4_qwen_there_and_back(tmp_path: Path) -> None:
    """Pieces -> HF -> pieces: each file has the names and bytes of the release's."""
    pieces = {"llm": FIXTURES / "qwen/llm"}
    convert(source("minigpt4qwen"), tmp_path / "hf", "hf", config=HEADS, pieces=pieces)
    report = convert(tmp_path / "hf", tmp_path / "back", "lavis", verify=True)
    assert not report.dropped
    files = {
        "eva/eva_vit_g.pth": "eva/eva_vit_g.pth",
        "blip2/blip2_pretrained_flant5xxl.pth": "blip2/blip2_pretrained_flant5xxl.pth",
        "checkpoint_9.pth": "checkpoint_9.pth",
    }
    for name, other in files.items():
        first, back = lavis.read(source("minigpt4qwen") / name), lavis.read(tmp_path / "back" / other)
        lost = {"Qformer.bert.embeddings.position_ids"} | {key for key in first if key.startswith("t5_proj.")}
        assert set(back) == set(first) - lost, name
        assert_equal(back, first, back)
    first, back = hf.read(FIXTURES / "qwen/llm"), hf.read(tmp_path / "back/llm")
    assert set(back) == set(first)
    assert_equal(back, first, back)
    said, meant = (
        json.loads((place / "config.json").read_text()) for place in (tmp_path / "back/llm", FIXTURES / "qwen/llm")
    )
    for name in meant:
        if name not in ("bf16", "fp16", "fp32", "onnx_safe", "transformers_version", "use_flash_attn"):
            assert said[name] == meant[name], name
    assert_same(lavish.load(source("minigpt4qwen"), config=HEADS, **pieces), lavish.load(tmp_path / "back"))


def test_minigpt4_qwen_from_its_own_pieces(tmp_path: Path) -> None:
    """From pieces to pieces, in another precision: what nothing reads is left out, and said."""
    pieces = {"llm": FIXTURES / "qwen/llm"}
    how = {"config": HEADS, "pieces": pieces, "max_shard_bytes": 20_000}
    report = convert(source("minigpt4qwen"), tmp_path / "half", "lavis", dtype="bf16", **how)
    assert {name for name, _ in report.dropped} >= {"Qformer.bert.embeddings.position_ids"}
    assert (tmp_path / "half/llm/model.safetensors.index.json").is_file()
    loaded = lavish.load(tmp_path / "half", dtype="float32")
    first = lavish.load(source("minigpt4qwen"), config=HEADS, **pieces)
    for name, value in first.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value.bfloat16().float()), name


def test_a_bias_of_the_keys_has_no_place(tmp_path: Path) -> None:
    loaded = lavish.load(source("minigpt4qwen"), config=HEADS, llm=FIXTURES / "qwen/llm")
    with torch.no_grad():
        loaded.model.vision_tower.encoder.layers[1].self_attn.qkv.bias[33] = 0.5
    loaded.model.save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.qkv\.bias.* has no place for it"):
        convert(tmp_path / "hf", tmp_path / "back", "lavis")


# -- CLIP + Qwen -------------------------------------------------------------------------------------------------------


def test_clip_qwen_there_and_back(tmp_path: Path) -> None:
    """The LoRA is merged on the way; tower and projector come back byte by byte."""
    convert(source("clip_qwen"), tmp_path / "hf", "hf", merge_lora=True)
    report = convert(tmp_path / "hf", tmp_path / "back", "vlm_learning", verify=True)
    assert {name for name, _ in report.made} == {f"vision_model.post_layernorm.{name}" for name in ("weight", "bias")}
    first = hf.read(source("clip_qwen") / "clip-vit-large-patch14")
    back = hf.read(tmp_path / "back/clip-vit-large-patch14")
    shared = {name for name in back if "post_layernorm" not in name}
    lost = {name for name in set(first) - set(back) if name.startswith("vision_model.")}
    assert lost <= {"vision_model.embeddings.position_ids"}
    assert_equal(back, first, shared)
    projector = "checkpoint-27000/other_params.bin"
    first, back = hf.read(source("clip_qwen") / projector), hf.read(tmp_path / "back/checkpoint/other_params.bin")
    assert set(first) == set(back)
    assert_equal(back, first, back)
    merged, again = lavish.load(tmp_path / "hf"), lavish.load(tmp_path / "back")
    assert_same(merged, again)
    assert again.model.config.system_prompt == merged.model.config.system_prompt
    assert again.model.config.shortest_edge == merged.model.config.shortest_edge


def test_a_lora_stays_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a LoRA that belongs to the model"):
        convert(source("clip_qwen"), tmp_path / "back", "vlm_learning")


@pytest.mark.parametrize(
    ("name", "to"), [("blip_caption", "sat"), ("clip_qwen", "lavis"), ("minigpt4qwen", "vlm_learning")]
)
def test_layouts_that_cannot_hold_it(tmp_path: Path, name: str, to: str) -> None:
    options: dict[str, Any] = {"config": BLIP} if name.startswith("blip") else {}
    if name == "minigpt4qwen":
        options = {"config": HEADS, "pieces": {"llm": FIXTURES / "qwen/llm"}}
    with pytest.raises(ConfigError, match=r"cannot hold .* These can: hf, "):
        convert(source(name), tmp_path / "back", to, **options)
