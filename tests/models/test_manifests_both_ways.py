"""The real-size lists of what is released, to our names and back: the same names, shapes and dtypes but for what the
rules drop, and what they drop is listed here. No weight is read but biases of the tower, which are a hole of a file.
"""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lavish.checkpoints.loading import stored_shape
from lavish.checkpoints.output import TargetOptions, TargetPlan
from lavish.checkpoints.rules import plan, reverse
from lavish.checkpoints.tensor_map import TensorInfo, TensorMap
from lavish.models.base_model import model_section
from lavish.models.blip.lavis import plan_target as plan_blip
from lavish.models.blip.samples import MODELS
from lavish.models.blip.weights import architecture_of, rules_for
from lavish.models.clip_qwen.vlm_learning import plan_target as plan_clip_qwen
from lavish.models.clip_qwen.weights import RULES as CLIP_QWEN_RULES
from lavish.models.glm4v_9b.weights import RULES as GLM4V_RULES
from lavish.models.gpt_dialogue.lavis import plan_target as plan_dialogue
from lavish.models.gpt_dialogue.weights import RULES as DIALOGUE_RULES
from lavish.models.minigpt4_qwen.lavis import plan_target as plan_minigpt4_qwen
from lavish.models.minigpt4_qwen.weights import RULES as MINIGPT4_QWEN_RULES

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
Listed = dict[str, tuple[tuple[int, ...], str]]
QWEN_7B = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "seq_length": 8192,
}
VIT_L = {"hidden_size": 1024, "image_size": 224, "patch_size": 14}


def read(path: str) -> Listed:
    listed = json.loads(gzip.decompress((FIXTURES / path).read_bytes()))
    return {name: (tuple(shape), str(dtype).removeprefix("torch.")) for name, (shape, dtype) in listed.items()}


def prefixed(prefix: str, listed: Listed) -> Listed:
    return {prefix + name: value for name, value in listed.items()}


def as_tensors(folder: Path, listed: Mapping[str, tuple[tuple[int, ...], str]]) -> TensorMap:
    """Give tensors of these shapes, all of them the same hole of a file."""
    file = folder / "hole"
    with file.open("wb") as handle:
        handle.truncate(1 << 40)
    return TensorMap(folder, {name: TensorInfo(shape, dtype, file, 0) for name, (shape, dtype) in listed.items()})


def to_ours(folder: Path, listed: Listed, rules: Any) -> TensorMap:
    """Give the tensors under the names of our network."""
    stored = as_tensors(folder, listed)
    places = plan(stored, rules)
    made = {
        name: (stored_shape(stored, places, name), stored.info(first).dtype) for name, first in places.sources.items()
    }
    assert len(made) >= len(listed) - len(places.dropped) - len(places.joined)
    return as_tensors(folder, made)


def written(made: TargetPlan) -> dict[str, Listed]:
    return {file.name: {one.name: (one.shape, one.dtype) for one in file.outputs} for file in made.files}


ENCODER, DECODER = "text_encoder.embeddings.position_ids", "text_decoder.bert.embeddings.position_ids"
BLIP = {
    "blip_caption/manifest_base_coco": (
        "BlipForConditionalGeneration",
        "base_coco",
        (DECODER,),
    ),
    "blip_caption/manifest_large_coco": (
        "BlipForConditionalGeneration",
        "large_coco",
        (DECODER,),
    ),
    "blip_vqa/manifest_vqav2": (
        "BlipForQuestionAnswering",
        "vqav2",
        (ENCODER, DECODER),
    ),
    "blip_feature_extractor/manifest_base": (
        "BlipForImageTextRetrieval",
        "base",
        ("temp", ENCODER),
    ),
}


@pytest.mark.parametrize("name", BLIP)
def test_blip(tmp_path: Path, name: str) -> None:
    """All come back but the temperature; the positions are counted anew."""
    architecture, model_type, dropped = BLIP[name]
    listed = read(f"{name}.json.gz")
    rules = rules_for(architecture, listed)
    assert sorted(plan(listed, rules).dropped) == sorted(dropped)
    section = model_section(MODELS[architecture].default_config_path(model_type))
    ours = to_ours(tmp_path, listed, rules)
    assert architecture_of(ours, "") == architecture
    made = plan_blip(section, ours, TargetOptions())
    (file,) = written(made).values()
    assert file == {key: value for key, value in listed.items() if key != "temp"}
    again = plan_blip(section, as_tensors(tmp_path, listed), TargetOptions())
    assert written(again) == written(made)


def test_gpt_dialogue(tmp_path: Path) -> None:
    """All come back but the causal masks."""
    listed = read("gpt_dialogue/manifest_gpt2_avsd.json.gz")
    made = plan_dialogue({}, to_ours(tmp_path, listed, DIALOGUE_RULES), TargetOptions())
    (file,) = written(made).values()
    masks = {name for name in listed if name.endswith((".attn.bias", ".attn.masked_bias"))}
    assert len(masks) == 24
    assert file == {name: value for name, value in listed.items() if name not in masks}


@pytest.mark.parametrize("size", ["7", "14"])
def test_minigpt4_qwen(tmp_path: Path, size: str) -> None:
    """Each piece comes back as the file that it was, but for the one stray buffer."""
    folder = "minigpt4qwen/manifest_"
    eva, llm = read(f"{folder}eva_vit_g_as_model.json.gz"), read(f"{folder}Qwen-{size}B-Chat.json.gz")
    blip2, trained = read(f"{folder}blip2_part_needed.json.gz"), read(f"{folder}trainable_{size}b.json.gz")
    listed = prefixed("visual_encoder.", eva) | prefixed("llm_model.", llm) | blip2 | trained
    stray = "Qformer.bert.embeddings.position_ids"
    assert plan(listed, MINIGPT4_QWEN_RULES).dropped == (stray,)
    ours = to_ours(tmp_path, listed, MINIGPT4_QWEN_RULES)
    made = written(plan_minigpt4_qwen({"text_config": QWEN_7B, "qformer_config": {}}, ours, TargetOptions()))
    assert made["eva/eva_vit_g.pth"] == eva
    assert made["blip2/blip2_pretrained_flant5xxl.pth"] == {n: value for n, value in blip2.items() if n != stray}
    assert made["checkpoint_9.pth"] == {name: value for name, value in trained.items() if name != stray}
    shards = [file for name, file in made.items() if name.startswith("llm/")]
    assert len(shards) > 1
    assert {name: value for shard in shards for name, value in shard.items()} == llm


def test_clip_qwen(tmp_path: Path) -> None:
    """Decoder and projector come back whole; of CLIP its vision, with the norm that nothing reads as one that does
    nothing."""
    folder = "clip_qwen/manifest_"
    llm, clip = read(f"{folder}Qwen-7B-Chat.json.gz"), read(f"{folder}clip-vit-large-patch14.json.gz")
    projector = read(f"{folder}other_params_Qwen-7B-Chat.json.gz")
    listed = llm | prefixed("vision_tower.", clip) | prefixed("projector.", projector)
    ours = to_ours(tmp_path, listed, CLIP_QWEN_RULES)
    plan_made = plan_clip_qwen({"text_config": QWEN_7B, "vision_config": VIT_L}, ours, TargetOptions())
    made = written(plan_made)
    assert made["checkpoint/other_params.bin"] == projector
    seen = {
        name: value for name, value in clip.items() if name.startswith("vision_model.") and "position_ids" not in name
    }
    assert made["clip-vit-large-patch14/model.safetensors"] == seen
    assert {name for name, _ in plan_made.made} == {f"vision_model.post_layernorm.{end}" for end in ("weight", "bias")}
    shards = [file for name, file in made.items() if name.startswith("Qwen-7B-Chat/")]
    assert {name: value for shard in shards for name, value in shard.items()} == llm


def test_glm4v(tmp_path: Path) -> None:
    """Its names are ours: the way there and the way back change nothing."""
    listed = read("glm4v/manifest_glm-4v-9b.json.gz")
    ours = to_ours(tmp_path, listed, GLM4V_RULES)
    back = plan(ours, reverse(GLM4V_RULES))
    assert {
        target: (ours.info(source).shape, ours.info(source).dtype) for target, source in back.sources.items()
    } == listed
    assert not back.dropped
