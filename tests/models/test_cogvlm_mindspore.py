"""CogVLM2 in MindFormers' files: names and bytes both ways, the config, the prompt, and each fault of MindFormers."""

import gzip
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tolerance import ANGLES, close

import lavish
from lavish.checkpoints import hf, layouts, mindspore
from lavish.checkpoints.loading import Cut
from lavish.checkpoints.mindspore_format import MindSporeFormat
from lavish.checkpoints.output import Output, TargetOptions, TensorFile
from lavish.checkpoints.tensor_map import TensorMap
from lavish.common.errors import (
    CheckpointError,
    ConfigError,
    MissingKeys,
    ShapeMismatch,
    UnexpectedKeys,
    UnknownLayout,
)
from lavish.inference.convert import convert
from lavish.inference.parallel import cut_network, head_spans
from lavish.models.cogvlm.config import read_config
from lavish.models.cogvlm.manifest import read_sizes
from lavish.models.cogvlm.manifest import tensors as manifest_tensors
from lavish.models.cogvlm.mindspore import from_mindspore, open_release, plan_target
from lavish.models.cogvlm.mindspore_names import FREQS, LORA_PREFIX
from lavish.models.cogvlm.model import CogVLMForCausalLM
from lavish.models.cogvlm.processor import CogVLMProcessor
from lavish.models.cogvlm.routing import position_ids_from, vision_expert_mask
from lavish.models.cogvlm.weights import TENSOR_PARALLEL_PLAN
from lavish.processors.tokenizers import load_tokenizer

from mindspore_fixture import (  # isort: skip
    CARDS,
    EXPECTED,
    FIELDS,
    FIXTURE,
    HF,
    MS,
    encode,
    key_map,
    of_shapes,
    real_fields,
    released,
    tensors_in_file,
    write,
    write_tokenizer,
)

IMAGE = MS / "cogvlm2-image_bf16.ckpt"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
PICTURE = Image.new("RGB", (80, 60), (200, 30, 30))
WHAT_SHAPES_DO_NOT_SAY = {
    "vision_config": {"num_heads": 3},
    "bos_token_id": 60,
    "eos_token_id": [61, 62],
    "pad_token_id": 63,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def vlm(tokenizer: Path):
    return lavish.load(IMAGE, tokenizer=tokenizer, config=HF / "config.json", device="cpu")


def asked(text: str, picture: Image.Image | None = PICTURE) -> list[dict]:
    content = [{"type": "text", "text": text}]
    return [{"role": "user", "content": [{"type": "image", "image": picture}, *content] if picture else content}]


def changed(tmp_path: Path, change) -> Path:
    """The bf16 file with `change(tensors)` applied."""
    stored = mindspore.read(IMAGE)
    tensors = {name: stored[name].clone() for name in stored}
    change(tensors)
    outputs = tuple(
        Output(name, tuple(value.shape), str(value.dtype).removeprefix("torch."), lambda value=value: value)
        for name, value in tensors.items()
    )
    (tmp_path / "changed.ckpt").write_bytes(encode(TensorFile("x", outputs, MindSporeFormat)))
    return tmp_path / "changed.ckpt"


# -- names -------------------------------------------------------------------------------------------------------------


def test_the_key_map_of_the_fixture_row_by_row() -> None:
    plan = plan_target(FIELDS, released(), TargetOptions())
    found = {output.sources[0]: output for output in plan.files[0].outputs}
    assert len(EXPECTED["key_map"]) == 69
    dropped = dict(plan.dropped)
    for row in EXPECTED["key_map"]:
        if row["ms"] is None:
            assert row["hf"] in dropped
            continue
        assert found[row["hf"]].name == row["ms"]
        if "reshape" in row:
            assert (*released().info(row["hf"]).shape,) == tuple(row["reshape"][0])
            assert found[row["hf"]].shape == tuple(row["reshape"][1])
    assert len(found) == EXPECTED["params"]["bf16"] == 68


def names_and_shapes(row: dict) -> list[tuple[str, list[int]]]:
    """MindSpore's side of a row: none, one, or the three of a split."""
    if row["ms"] is None:
        return []
    return list(zip(row["ms"], row["ms_shape"])) if isinstance(row["ms"], list) else [(row["ms"], row["ms_shape"])]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_real_key_map_to_mindspore(kind: str, tmp_path: Path) -> None:
    rows = key_map(kind)
    tensors = of_shapes({row["hf"]: tuple(row["hf_shape"]) for row in rows}, tmp_path / "x")
    plan = plan_target(real_fields(kind), tensors, TargetOptions())
    found = {output.name: (output.sources[0], list(output.shape)) for output in plan.files[0].outputs}
    expected = {}
    for row in rows:
        names, shapes = (
            (row["ms"], row["ms_shape"]) if isinstance(row["ms"], list) else ([row["ms"]], [row.get("ms_shape")])
        )
        expected |= {name: (row["hf"], shape) for name, shape in zip(names, shapes, strict=True) if name}
    assert found == expected
    assert [name for name, _ in plan.dropped] == sorted(row["hf"] for row in rows if row["ms"] is None)
    assert plan.made == ()


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_real_key_map_back(kind: str, tmp_path: Path) -> None:
    rows = key_map(kind)
    shapes: dict[str, tuple[int, ...]] = {}
    for row in rows:
        shapes |= {name: tuple(shape) for name, shape in names_and_shapes(row)}
    found = from_mindspore(tmp_path, of_shapes(shapes, tmp_path / "x").infos)
    expected = {row["hf"]: tuple(row["hf_shape"]) for row in rows if "inv_freq" not in row["hf"]}
    assert {name: info.shape for name, info in found.items()} == expected


def test_the_manifest_of_the_real_file(tmp_path: Path) -> None:
    with gzip.open(FIXTURE / "manifest_cogvlm2-llama3-chat-19B_ms_image.json.gz") as file:
        manifest = json.load(file)
    shapes = {tensor.name: tensor.shape for tensor in manifest_tensors(read_sizes(real_fields("image"), "x"))}
    plan = plan_target(real_fields("image"), of_shapes(shapes, tmp_path / "x"), TargetOptions())
    assert {output.name: list(output.shape) for output in plan.files[0].outputs} == {
        name: shape for name, (shape, _) in manifest.items()
    }
    assert len(manifest) == 1190
    assert plan.nbytes == 2 * 19_503_105_344


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_what_is_written_is_the_file_of_mindformers_byte_by_byte(name: str) -> None:
    plan = plan_target(FIELDS, released(), TargetOptions(dtype=DTYPES[name]))
    assert encode(plan.files[0]) == (MS / f"cogvlm2-image_{name}.ckpt").read_bytes()
    kept = plan_target(FIELDS, released(), TargetOptions())
    assert EXPECTED["keep_dtype_equals_bf16"]
    assert encode(kept.files[0]) == IMAGE.read_bytes()


@pytest.mark.parametrize("name", DTYPES)
def test_what_is_read_is_the_release(name: str) -> None:
    tensors = open_release(MS / f"cogvlm2-image_{name}.ckpt").tensors
    expected = {key: released()[key] for key in released() if "inv_freq" not in key}
    assert set(tensors) == set(expected)
    for key, value in expected.items():
        assert tensors[key].shape == value.shape
        assert torch.equal(tensors[key], value.to(getattr(torch, DTYPES[name]))), key


@pytest.mark.parametrize("name", DTYPES)
def test_there_and_back_is_the_same_file(name: str) -> None:
    file = MS / f"cogvlm2-image_{name}.ckpt"
    plan = plan_target(FIELDS, open_release(file).tensors, TargetOptions())
    assert [made for made, _ in plan.made] == [FREQS]
    found = {output.name: output.make() for output in plan.files[0].outputs}
    stored = mindspore.read(file)
    assert set(found) == set(stored)
    table, rounded = found.pop(FREQS), stored[FREQS]
    assert all(torch.equal(found[key], stored[key]) for key in found)
    # MindFormers wrote a table that bfloat16 had rounded; ours is computed, and the same in bfloat16.
    assert torch.equal(table.bfloat16(), rounded.bfloat16())
    assert torch.equal(table, rounded) == (name == "bf16")


def test_two_cards_are_written_as_mindspore_cuts_them(tmp_path: Path) -> None:
    plan = plan_target(FIELDS, released(), TargetOptions(dtype="float16", model_parallel=2))
    for rank, file in enumerate(plan.files):
        assert file.name == f"rank_{rank}/checkpoint_{rank}.ckpt"
        assert encode(file) == (CARDS / file.name).read_bytes()
    write(plan, tmp_path)
    assert mindspore.read_strategy(tmp_path) == mindspore.read_strategy(CARDS)
    merged, expected = mindspore.read(tmp_path), load_file(CARDS.parent.parent / "expected_fp16.safetensors")
    assert all(torch.equal(merged[name], value) for name, value in expected.items())


def test_a_number_of_cards_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="--model-parallel 3 does not divide vocab_size 64 and hidden_size 32"):
        plan_target(FIELDS, released(), TargetOptions(model_parallel=3))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The release with its tokenizer."""
    shutil.copytree(HF, tmp_path / "release")
    return write_tokenizer(tmp_path / "release")


def test_there_and_back_through_convert(whole: Path, tmp_path: Path) -> None:
    there = convert(whole, tmp_path / "ms", to="mindspore", verify=True)
    assert [name for name, _ in there.dropped] == ["model.layers.1.self_attn.rotary_emb.inv_freq"]
    assert (tmp_path / "ms" / "cogvlm2_image.ckpt").read_bytes() == IMAGE.read_bytes()
    back = convert(tmp_path / "ms", tmp_path / "hf", to="hf", verify=True)
    assert [name for name, _ in back.made] == [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
    stored, expected = hf.read(tmp_path / "hf"), released()
    assert set(stored) == set(expected)
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    again = convert(tmp_path / "hf", tmp_path / "again.ckpt", to="mindspore", verify=True)
    assert (tmp_path / "again.ckpt").read_bytes() == IMAGE.read_bytes()
    assert "config.json" in again.notes[0]  # a single file has no room for it
    loaded = lavish.load(tmp_path / "ms", device="cpu").chat(asked("what is it?"), max_new_tokens=6).token_ids
    for path in (tmp_path / "hf", tmp_path / "again.ckpt"):
        vlm = lavish.load(path, device="cpu", tokenizer=whole, config=HF / "config.json", rope="float32")
        assert vlm.chat(asked("what is it?"), max_new_tokens=6).token_ids == loaded


def test_a_file_of_another_dtype_by_what_shapes_do_not_say(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lacks vision_config\.num_heads"):
        convert(IMAGE, tmp_path / "fp32", to="mindspore", dtype="fp32")
    convert(IMAGE, tmp_path / "fp32", to="mindspore", dtype="fp32", config=WHAT_SHAPES_DO_NOT_SAY, verify=True)
    expected, found = load_file(IMAGE.parents[2] / "expected_fp32.safetensors"), mindspore.read(tmp_path / "fp32")
    assert all(torch.equal(found[name], expected[name]) for name in expected if name != FREQS)
    config = open_release(tmp_path / "fp32").fields
    assert (config["vision_config"]["num_heads"], config["vision_config"]["image_size"]) == (3, 56)
    assert (config["eos_token_id"], config["rope"]) == ([61, 62], "float32")


def test_ranks_become_a_folder_of_the_release_and_the_other_way(whole: Path, tmp_path: Path) -> None:
    convert(CARDS, tmp_path / "hf", to="hf", config=HF / "config.json", tokenizer=whole, verify=True)
    stored, expected = hf.read(tmp_path / "hf"), released()
    assert all(torch.equal(stored[name], expected[name].to(torch.float16)) for name in expected if "inv" not in name)
    convert(whole, tmp_path / "cards", to="mindspore", dtype="fp16", model_parallel=2, verify=True)
    for name in ("rank_0/checkpoint_0.ckpt", "rank_1/checkpoint_1.ckpt"):
        assert (tmp_path / "cards" / name).read_bytes() == (CARDS / name).read_bytes()
    assert (tmp_path / "cards" / "tokenizer.model").is_file()
    assert lavish.load(tmp_path / "cards", device="cpu").chat(asked("what is it?"), max_new_tokens=2).token_ids


def test_tables_that_differ_are_refused(tmp_path: Path) -> None:
    tensors = {name: released()[name].clone() for name in released()}
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] *= 2
    plan = plan_target(FIELDS, tensors_in_file(tmp_path / "x.safetensors", tensors), TargetOptions())
    with pytest.raises(CheckpointError, match=r"layers\.1\..*differs from layer 0's, and MindFormers keeps one table"):
        encode(plan.files[0])


def test_the_base_of_the_config_makes_the_table(tmp_path: Path) -> None:
    tensors = {name: released()[name] for name in released() if "inv_freq" not in name}
    stored = tensors_in_file(tmp_path / "x.safetensors", tensors)
    plan = plan_target({**FIELDS, "rope_theta": 10000.0}, stored, TargetOptions(dtype="float32"))
    table = next(output for output in plan.files[0].outputs if output.name == FREQS).make()
    close(table, torch.tensor([1.0, 0.1, 0.01, 0.001]))
    assert plan.made == ((FREQS, "1 / 10000^(2j / 8); the source stores none"),)


# -- the video model ---------------------------------------------------------------------------------------------------


def video() -> tuple[dict, dict[str, torch.Tensor]]:
    """The fixture without its image experts, as CogVLM2-Video is."""
    fields = {**FIELDS, "architectures": ["CogVLMVideoForCausalLM"]}
    tensors = released()
    return fields, {name: tensors[name] for name in tensors if "vision_expert" not in name and "vision_mlp" not in name}


def test_the_video_model_both_ways_at_its_own_sizes(tmp_path: Path, tokenizer: Path) -> None:
    """q, k and v are cut at 32 and 48 here, not at 4096 and 5120."""
    fields, expected = video()
    plan = plan_target(fields, tensors_in_file(tmp_path / "video.safetensors", expected), TargetOptions())
    shapes = {output.name: output.shape for output in plan.files[0].outputs}
    attention = "llm_model.model.layers.1.attention"
    assert [shapes[f"{attention}.{name}.weight"] for name in ("wq", "wk", "wv")] == [(32, 32), (16, 32), (16, 32)]
    folder = write(plan, tmp_path / "ms")
    assert plan.files[0].name == "cogvlm2_video.ckpt"
    found = open_release(folder).tensors
    assert set(found) == {name for name in expected if "inv_freq" not in name}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    loaded = lavish.load(folder, tokenizer=tokenizer, device="cpu")
    assert (loaded.model.config.is_video, loaded.model.config.rope) == (True, "float32")
    frames = [{"type": "video", "video": [PICTURE, PICTURE]}, {"type": "text", "text": "what is it?"}]
    assert loaded.chat([{"role": "user", "content": frames}], max_new_tokens=3).token_ids


def test_the_video_model_from_shapes_alone(tmp_path: Path) -> None:
    fields, tensors = video()
    plan = plan_target(fields, tensors_in_file(tmp_path / "video.safetensors", tensors), TargetOptions())
    (tmp_path / "x.ckpt").write_bytes(encode(plan.files[0]))
    found = open_release(tmp_path / "x.ckpt").fields
    assert found["architectures"] == ["CogVLMVideoForCausalLM"]
    assert (found["max_frames"], found["max_position_embeddings"], found["num_multi_query_heads"]) == (24, 2048, 2)
    with pytest.raises(ConfigError, match="how MindFormers cuts the video model is not known"):
        plan_target(fields, released_video(tmp_path), TargetOptions(model_parallel=2))


def released_video(tmp_path: Path) -> TensorMap:
    return hf.read(tmp_path / "video.safetensors")


def test_a_model_that_was_converted_for_lora_is_the_same(tmp_path: Path) -> None:
    fields, tensors = video()
    plan = plan_target(fields, tensors_in_file(tmp_path / "video.safetensors", tensors), TargetOptions())
    renamed = tuple(
        Output(o.name.replace("llm_model.", LORA_PREFIX, 1), o.shape, o.dtype, o.make) for o in plan.files[0].outputs
    )
    (tmp_path / "x.ckpt").write_bytes(encode(TensorFile("x", renamed, MindSporeFormat)))
    found = open_release(tmp_path / "x.ckpt")
    assert all(torch.equal(found.tensors[name], tensors[name]) for name in found.tensors)
    assert found.fields["num_attention_heads"] == 4  # of the table's length, under that prefix too


# -- the config --------------------------------------------------------------------------------------------------------


def test_sizes_come_from_the_shapes() -> None:
    found = open_release(IMAGE).fields
    expected = {**FIELDS, **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))}
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert found[name] == expected[name], name
    for name in ("num_multi_query_heads", "max_position_embeddings", "template_version", "bos_token_id"):
        assert found[name] == expected[name], name
    sizes = {name: FIELDS["vision_config"][name] for name in ("image_size", "patch_size", "hidden_size", "in_channels")}
    sizes |= {
        name: FIELDS["vision_config"][name] for name in ("intermediate_size", "num_hidden_layers", "num_positions")
    }
    assert found["vision_config"] == sizes


@pytest.mark.parametrize("kind", ["image", "video"])
def test_of_the_released_sizes_nothing_is_left_open(kind: str, tmp_path: Path) -> None:
    from lavish.models.cogvlm.mindspore_config import config_fields

    shapes = {tensor.name: tensor.shape for tensor in manifest_tensors(read_sizes(real_fields(kind), "x"))}
    table = shapes["model.layers.0.self_attn.rotary_emb.inv_freq"]
    infos = of_shapes(shapes, tmp_path / "x.ckpt").infos
    for freqs in (infos["model.layers.0.self_attn.rotary_emb.inv_freq"], None):
        config = read_config(config_fields(tmp_path / "x.ckpt", infos, freqs), "x.ckpt")
        assert (config.num_attention_heads, config.num_multi_query_heads, config.head_dim) == (32, 8, 2 * table[0])
        assert (config.tower.num_heads, config.tower.image_size) == (
            16,
            real_fields(kind)["vision_config"]["image_size"],
        )
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (128000, 128001, 128002)
        assert (config.is_video, config.rope, config.rope_theta) == (kind == "video", "float32", 500000.0)


def test_what_shapes_do_not_say_is_asked_for(tokenizer: Path) -> None:
    with pytest.raises(ConfigError, match=r"lacks vision_config\.num_heads\..*config=\.\.\."):
        lavish.load(IMAGE, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="bos"):
        lavish.load(IMAGE, tokenizer=tokenizer, config={"vision_config": {"num_heads": 3}})


def test_a_config_json_beside_the_file_is_read(tmp_path: Path) -> None:
    shutil.copy(IMAGE, tmp_path)
    shutil.copy(HF / "config.json", tmp_path)
    for path in (tmp_path, tmp_path / IMAGE.name):
        assert layouts.detect(path) == "mindspore"
        found = open_release(path).fields
        assert (found["eos_token_id"], found["vision_config"]["num_heads"], found["rope"]) == ([61, 62], 3, "float32")
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ConfigError, match="is of another model"):
        open_release(tmp_path)


def test_the_three_ways_to_give_a_config_are_one(tokenizer: Path, tmp_path: Path) -> None:
    yaml = tmp_path / "predict.yaml"
    yaml.write_text(
        "model:\n  arch: {type: CogVLM2ImageForCausalLM}\n  model_config:\n    vision_model:\n      model_config:\n"
        "        {num_attention_heads: 3}\n    llm_model:\n      model_config:\n"
        "        {bos_token_id: 60, eos_token_id: [61, 62], pad_token_id: 63}\n"
    )
    found = []
    for config in (HF / "config.json", WHAT_SHAPES_DO_NOT_SAY, yaml):
        vlm = lavish.load(IMAGE, tokenizer=tokenizer, config=config, device="cpu")
        found.append((vlm.chat(asked("what is it?"), max_new_tokens=8).token_ids, vlm.model.config.rope))
    assert found[0] == found[1] == found[2]
    assert found[0][1] == "float32"


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*(MS / f"cogvlm2-image_{name}.ckpt" for name in DTYPES), CARDS])
def test_every_file_answers_as_the_release_does(path: Path, tokenizer: Path) -> None:
    """The weights of all are the same bf16 values; in float32 the logits are equal bit by bit."""
    expected = lavish.load(HF, tokenizer=tokenizer, device="cpu", dtype="float32", rope="float32")
    found = lavish.load(path, tokenizer=tokenizer, config=HF / "config.json", device="cpu", dtype="float32")
    inputs = expected.processor.apply_chat_template(asked("what is it?"))
    with torch.inference_mode():
        assert torch.equal(found.model(**inputs).logits, expected.model(**inputs).logits)


def test_the_safetensors_variant_loads(tokenizer: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    stored = mindspore.read(MS / "cogvlm2-image_fp32.ckpt")
    save_file({name: stored[name].clone() for name in stored}, tmp_path / "x.safetensors", metadata={"format": "ms"})
    assert layouts.detect(tmp_path / "x.safetensors") == layouts.detect(tmp_path) == "mindspore"
    found = lavish.load(tmp_path / "x.safetensors", tokenizer=tokenizer, config=HF / "config.json", device="cpu")
    assert found.chat(asked("what is it?"), max_new_tokens=2).token_ids


def test_a_folder_that_was_converted_needs_nothing_more(tmp_path: Path, tokenizer: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(HF, source)
    shutil.copy(tokenizer / "tokenizer.model", source)
    (source / "generation_config.json").write_text('{"eos_token_id": [61, 59]}')
    plan = plan_target(FIELDS, hf.read(source), TargetOptions())
    folder = write(plan, tmp_path / "ms")
    assert set(plan.copies) == {"tokenizer.model", "generation_config.json"}
    for name, path in plan.copies.items():
        shutil.copy(path, folder / name)
    found = lavish.load(folder, device="cpu")
    assert found._eos_token_ids == {61, 59, 62}
    assert found.model.config.rope == "float32"


def test_what_a_training_run_saved_beside_the_weights_is_left_out(tmp_path: Path, caplog) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["epoch_num"] = torch.tensor(3)
        tensors["adam_m.llm_model.lm_head.weight"] = torch.zeros(64, 32)

    with caplog.at_level(logging.INFO):
        tensors = open_release(changed(tmp_path, add)).tensors
    assert len(tensors) == 67
    assert "2 entries of a training run are not read" in caplog.text


def test_a_lora_of_mindformers_is_refused(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["llm_model.model.layers.0.attention.wq.mindpet_delta_lora_a"] = torch.zeros(8, 32)

    with pytest.raises(CheckpointError, match=r"holds a LoRA of MindFormers \(1 parameters.*transform_ckpt_lora"):
        open_release(changed(tmp_path, add))


def test_other_models_in_mindspores_files(tmp_path: Path) -> None:
    with pytest.raises(UnknownLayout, match=r"no CogVLM2 of MindFormers.*12 parameters, first 'f32'"):
        open_release(MS / "dtypes.ckpt")
    with pytest.raises(UnknownLayout, match=r"no CogVLM2 of MindFormers"):
        lavish.load(MS / "dtypes.ckpt")


def test_cogvlm_v1_has_no_place_in_mindformers() -> None:
    fields = {**FIELDS}
    del fields["num_multi_query_heads"]
    with pytest.raises(ConfigError, match=r"a CogVLM v1, which MindFormers never had.*hf, sat"):
        plan_target(fields, released(), TargetOptions())


# -- the prompt --------------------------------------------------------------------------------------------------------

PROMPTS = json.loads((FIXTURE / "prompt" / "expected.json").read_text())


@pytest.mark.parametrize("case", PROMPTS["cases"], ids=lambda c: f"{c['image_size']}-{c['signal_type']}-{c['query']}")
def test_ids_positions_and_masks_are_those_of_mindformers(case: dict) -> None:
    special = PROMPTS["special_ids"]
    size, reserved = case["image_size"], special["<|reserved_special_token_2|>"]
    processor = CogVLMProcessor(
        load_tokenizer(FIXTURE / "prompt"),
        image_size=size,
        num_image_tokens=(size // 28) ** 2 + 2,
        bos_token_id=special["<|begin_of_text|>"],
        eos_token_id=special["<|end_of_text|>"],
        pad_token_id=special["<|reserved_special_token_0|>"],
    )
    messages = []
    for question, answer in case["history"]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": case["query"]}]
    messages[0] = asked(messages[0]["content"])[0]
    inputs = processor.apply_chat_template(messages, chat_template=case["signal_type"])
    text = processor.apply_chat_template(messages, chat_template=case["signal_type"], tokenize=False)
    marks = "<|reserved_special_token_3|><|reserved_special_token_4|>"
    assert marks + text == case["raw_text"]

    ids, types = inputs["input_ids"][0], inputs["token_type_ids"]
    length = len(case["input_ids"])
    assert types[0].nonzero().flatten().tolist() == case["image_context_pos"]
    slots = torch.where(types[0] == 1, torch.tensor(reserved), ids)  # MindFormers' id of a slot; neither is embedded
    assert slots.tolist() == case["input_ids"]
    # MindFormers pads the prompt and goes on with positions and the language expert; here padding is never a key.
    padded = torch.nn.functional.pad(types, (0, (case["pad_length"] or length) - length))
    assert position_ids_from(padded)[0].tolist() == case["position_ids"]
    mask = vision_expert_mask(padded)[0].long()
    assert mask.tolist() == case["vision_token_mask"]
    assert (1 - mask).tolist() == case["language_token_mask"]
    assert inputs["attention_mask"].all()


# -- the faults of MindFormers, in the order of its sheet --------------------------------------------------------------


def test_1_the_rotary_table_is_float32(tokenizer: Path) -> None:
    loaded = lavish.load(IMAGE, tokenizer=tokenizer, config=HF / "config.json", device="cpu")
    assert loaded.model.dtype == torch.bfloat16
    positions = torch.tensor([[100, 257, 4095]])
    head_dim = loaded.model.config.head_dim
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angles = positions[0, :, None].double() / 500000.0**exponent
    cos, sin = loaded.model.model.rotary(positions)
    torch.testing.assert_close(cos[0, :, 0].double(), angles.cos(), **ANGLES)
    torch.testing.assert_close(sin[0, :, 0].double(), angles.sin(), **ANGLES)
    wrong = lavish.load(IMAGE, tokenizer=tokenizer, config=HF / "config.json", device="cpu", rope="reference")
    assert (wrong.model.model.rotary(positions)[0][0, :, 0].double() - angles.cos()).abs().max() > 0.4
    assert lavish.load(HF, tokenizer=tokenizer, device="cpu").model.config.rope == "reference"


def test_2_the_stored_table_changes_nothing(vlm, tokenizer: Path, tmp_path: Path) -> None:
    def alter(tensors: dict[str, torch.Tensor]) -> None:
        tensors[FREQS] = torch.full((4,), 7.0, dtype=torch.bfloat16)

    altered = lavish.load(changed(tmp_path, alter), tokenizer=tokenizer, config=HF / "config.json", device="cpu")
    inputs = vlm.processor.apply_chat_template(asked("what is it?"))
    with torch.inference_mode():
        assert torch.equal(altered.model(**inputs).logits, vlm.model(**inputs).logits)


def test_3_a_prompt_of_5000_slots_without_padding(vlm) -> None:
    inputs = vlm.processor.apply_chat_template(asked("what is it? " * 420))
    assert inputs["input_ids"].shape[1] > 5000
    assert inputs["attention_mask"].all()
    reply = vlm.chat(asked("what is it? " * 420), max_new_tokens=2)
    assert reply.usage.prompt_tokens == inputs["input_ids"].shape[1]


def test_4_text_alone_begins_with_bos(vlm) -> None:
    inputs = vlm.processor.apply_chat_template(asked("what is it?", None))
    assert inputs["input_ids"][0, 0] == 60
    assert "pixel_values" not in inputs
    assert vlm.chat(asked("what is it?", None), max_new_tokens=2).token_ids


def test_5_the_second_turn_holds_the_first(vlm) -> None:
    messages = [
        *asked("what is it?"),
        {"role": "assistant", "content": "A box."},
        {"role": "user", "content": "where?"},
    ]
    text = vlm.processor.apply_chat_template(messages, tokenize=False)
    assert text == "Question: what is it? Answer: A box.\nQuestion: where? Answer:"


def test_6_a_batch_of_two_lengths_and_the_size_of_the_config(vlm, tokenizer: Path) -> None:
    conversations = [asked("what is it?"), asked("what is it? where is it?", None)]
    alone = [vlm.chat(messages, max_new_tokens=4).token_ids for messages in conversations]
    assert [reply.token_ids for reply in vlm.batch(conversations, max_new_tokens=4)] == alone
    assert vlm.processor.apply_chat_template(asked("x"))["pixel_values"].shape == (1, 3, 56, 56)
    larger = {**real_fields("image"), "vision_config": {**real_fields("image")["vision_config"], "image_size": 672}}
    assert read_config(larger, "x").num_image_tokens == (672 // 28) ** 2 + 2


def test_7_the_reply_is_the_answer_alone(vlm) -> None:
    reply = vlm.chat(asked("what is it?"), max_new_tokens=5)
    assert len(reply.token_ids) <= 5
    assert reply.text == vlm.processor.decode(reply.token_ids)
    assert "Answer:" not in reply.text


def test_8_every_id_of_eos_token_id_stops(vlm, tokenizer: Path) -> None:
    first = vlm.chat(asked("what is it?"), max_new_tokens=1).token_ids[0]
    assert first not in (61, 62)
    for stop in ([61, first], [first, 61]):
        config = {**WHAT_SHAPES_DO_NOT_SAY, "eos_token_id": stop}
        again = lavish.load(IMAGE, tokenizer=tokenizer, config=config, device="cpu")
        reply = again.chat(asked("what is it?"), max_new_tokens=8)
        assert (reply.finish_reason, reply.text) == ("stop", "")
        assert len(reply.token_ids) <= 1


def test_9_shares_hold_both_experts_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """MindFormers leaves 75 % of the decoder whole in each process; here a share is the n-th part plus small layers."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    config = read_config({**real_fields("image"), "num_hidden_layers": 2}, "x")
    config.vision_config.num_hidden_layers = 1
    with torch.device("meta"):
        network = CogVLMForCausalLM(config)
    whole = {name: value.numel() for name, value in network.state_dict().items()}
    cut_network(network, TENSOR_PARALLEL_PLAN)
    held = {name: value.numel() for name, value in network.state_dict().items()}
    mlp = [name for name in whole if ".mlp." in name and "vision." not in name]
    assert len(mlp) == 2 * 2 * 3
    assert all(held[name] * 2 == whole[name] for name in mlp)
    layers = [name for name in whole if name.startswith("model.layers.")]
    small = sum(whole[name] for name in layers if "layernorm" in name or "inv_freq" in name)
    assert sum(held[name] for name in layers) == (sum(whole[name] for name in layers) - small) // 2 + small


def test_10_ranks_are_merged_before_heads_are_cut() -> None:
    """MindFormers cuts the fused rows as they follow each other: rank 0 has q alone. A share here has whole heads."""
    tensors, whole = open_release(CARDS).tensors, released()
    name = "model.layers.0.self_attn.vision_expert_query_key_value.weight"
    info = tensors.info(name)
    assert len(info.pieces) == 2
    for rank in range(2):
        spans = head_spans(4, 2, 64, rank, 2)
        assert [start for start, _ in spans] == [16 * rank, 32 + 8 * rank, 48 + 8 * rank]
        cut = Cut(0, spans, (64, 32))
        assert torch.equal(cut.assemble(tensors, info), cut.take(whole[name]).to(torch.float16))


def test_11_fp16_that_overflows_is_an_error_or_clamped_on_request(tmp_path: Path) -> None:
    tensors = {name: released()[name].clone() for name in released()}
    tensors["lm_head.weight"][0, 0] = 1e5
    stored = tensors_in_file(tmp_path / "x.safetensors", tensors)
    plan = plan_target(FIELDS, stored, TargetOptions(dtype="float16"))
    with pytest.raises(CheckpointError, match=r"'llm_model\.lm_head\.weight': 1 of 2048 values do not fit float16"):
        encode(plan.files[0])
    options = TargetOptions(dtype="float16", clamp=True)
    outputs = {output.name: output for output in plan_target(FIELDS, stored, options).files[0].outputs}
    assert outputs["llm_model.lm_head.weight"].make().max() == 65504
    assert options.clamped == {"llm_model.lm_head.weight": 1}


# 12: test_the_video_model_both_ways_at_its_own_sizes


def test_13_a_file_in_which_the_table_alone_is_renamed(tmp_path: Path, caplog) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors[LORA_PREFIX + "model.freqs_mgr.freqs"] = tensors.pop(FREQS)

    with caplog.at_level(logging.WARNING):
        assert len(open_release(changed(tmp_path, rename)).tensors) == 67
    assert "--modal image --sft lora, which renames the rotary table alone" in caplog.text

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        tensors[LORA_PREFIX + "lm_head.weight"] = tensors.pop("llm_model.lm_head.weight")

    with pytest.raises(CheckpointError, match=r"1 parameters begin with .* two conversions in one file"):
        open_release(changed(tmp_path, mix))


def test_14_missing_and_unknown_parameters_are_named(tmp_path: Path, tokenizer: Path) -> None:
    options = {"tokenizer": tokenizer, "config": HF / "config.json", "device": "cpu"}
    with pytest.raises(MissingKeys, match=r"1 of 69 .* absent, first 'model\.norm\.weight'"):
        lavish.load(changed(tmp_path, lambda tensors: tensors.pop("llm_model.model.norm_out.weight")), **options)

    def misspell(tensors: dict[str, torch.Tensor]) -> None:
        tensors["llm_model.model.norm_outt.weight"] = tensors.pop("llm_model.model.norm_out.weight")

    with pytest.raises(
        UnexpectedKeys, match=r"'llm_model\.model\.norm_outt\.weight'\. Did you mean 'llm_model\.model\.norm_out"
    ):
        lavish.load(changed(tmp_path, misspell), **options)

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["llm_model.model.norm_out.weight"] = tensors["llm_model.model.norm_out.weight"][:-1]

    with pytest.raises(ShapeMismatch, match=r"\(31,\)"):
        lavish.load(changed(tmp_path, cut), **options)
    with pytest.raises(ShapeMismatch, match="should be of 1 x rows x width"):
        open_release(changed(tmp_path, lambda tensors: tensors.update({"vision_encoder.cls_token": torch.ones(1, 24)})))


def test_15_bin_files_are_a_source_too(tmp_path: Path) -> None:
    tensors = released()
    torch.save({name: tensors[name].clone() for name in tensors}, tmp_path / "pytorch_model.bin")
    plan = plan_target(FIELDS, hf.read(tmp_path), TargetOptions())
    assert encode(plan.files[0]) == IMAGE.read_bytes()


PEAK = """
import sys
from pathlib import Path
import torch
from lavish.checkpoints import hf, output
from lavish.checkpoints.mindspore_format import MindSporeFormat
from lavish.checkpoints.output import TargetOptions, TargetPlan, TensorFile, write_plan
output.AHEAD_BYTES = 24_000_000  # in the proportion that it has to a model's largest tensor
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
tensors = hf.read(sys.argv[1])
torch.zeros(1).to(torch.float16)
before = peak()
for dtype in (None, "float16"):
    options = TargetOptions(dtype=dtype)
    outputs = tuple(options.take(name, tensors, info, (name,)) for name, info in tensors.infos.items())
    plan = TargetPlan((TensorFile("x.ckpt", outputs, MindSporeFormat),))
    write_plan(plan, Path(sys.argv[2], f"{dtype}.ckpt"), identity={})
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_15_the_peak_is_below_three_times_the_largest_tensor(tmp_path: Path) -> None:
    largest = 100_000_000
    tensors = {f"layer.{index}": torch.full((6_000_000,), index / 7).to(torch.bfloat16) for index in range(6)}
    tensors["embedding"] = torch.ones(largest // 2, dtype=torch.bfloat16)
    tensors_in_file(tmp_path / "x.safetensors", tensors)
    del tensors
    command = [sys.executable, "-c", PEAK, tmp_path / "x.safetensors", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = [int(line) for line in done.stdout.split()]
    assert len(peaks) == 2
    assert max(peaks) < 3 * largest
    assert len(mindspore.read(tmp_path / "float16.ckpt")) == 7


# 16: tests/cli/test_mindformers.py
