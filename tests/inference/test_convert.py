"""Conversions between layouts through Python: equal bits, equal answers, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerance import MERGED_WEIGHT

import lavish
from lavish.checkpoints import hf
from lavish.checkpoints.output import JOURNAL, partial_folder
from lavish.common.errors import CheckpointError, ConfigError, MissingKeys, OutputError, UnknownLayout
from lavish.inference.convert import convert

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
V1, V2, GLM = (FIXTURES / name / "open" / "checkpoint" for name in ("cogvlm", "cogvlm2", "glm4v"))
MINIGPT4, CLIP_QWEN = (FIXTURES / name / "open" / "checkpoint" for name in ("minigpt4qwen", "clip_qwen"))
LLM, HEADS = FIXTURES / "qwen" / "llm", {"vision_config": {"num_attention_heads": 4}}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_equal_weights(left: Any, right: Any) -> None:
    one, other = left.model.state_dict(), right.model.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(bits(value), bits(other[name])), name


# -- Hugging Face to Hugging Face --------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [V1, V2, GLM], ids=["cogvlm", "cogvlm2", "glm4v"])
def test_other_files_hold_the_same_bits(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "new", max_shard_bytes=300_000, verify=True)
    before, after = hf.read(source), hf.read(tmp_path / "new")
    assert before.keys() == after.keys()
    assert all(torch.equal(bits(before[name]), bits(after[name])) for name in before)
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 300_000 for file in after.files)
    assert report.files == tuple(file.name for file in after.files)
    assert len(report.files) > 2
    assert report.dropped == ()
    assert report.num_bytes == before.nbytes
    assert report.is_verified
    small = {f.name for f in source.iterdir() if not f.name.startswith("model")}
    assert small <= {f.name for f in (tmp_path / "new").iterdir()}
    assert (tmp_path / "new" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize(("dtype", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), (torch.bfloat16, "bfloat16")])
def test_another_dtype_is_what_loading_in_it_gives(dtype: Any, name: str, tmp_path: Path) -> None:
    convert(V2, tmp_path / "new", dtype=dtype, verify=True)
    fields = json.loads((tmp_path / "new" / "config.json").read_text())
    assert fields["torch_dtype"] == name
    to: torch.dtype = getattr(torch, name)
    assert {tensor.dtype for tensor in hf.read(tmp_path / "new").values()} == {to}
    cast = lavish.load(V2, dtype=to, device="cpu")
    assert_equal_weights(lavish.load(tmp_path / "new", dtype=to, device="cpu"), cast)


def test_transformers_reads_the_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    lavish.register()
    convert(MINIGPT4, tmp_path / "new", pieces={"llm": LLM}, config=HEADS)
    network = AutoModelForImageTextToText.from_pretrained(tmp_path / "new")
    loaded = lavish.load(tmp_path / "new", device="cpu")
    for name, value in network.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name]), name


def test_the_pickle_of_a_bin_folder_becomes_safetensors(tmp_path: Path) -> None:
    source = tmp_path / "bin"
    shutil.copytree(V2, source, ignore=shutil.ignore_patterns("model*"))
    torch.save(dict(hf.read(V2)), source / "pytorch_model.bin")
    convert(source, tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.bin"))
    assert_equal_weights(lavish.load(tmp_path / "new", device="cpu"), lavish.load(V2, device="cpu"))


def test_config_fields_that_were_given_are_written(tmp_path: Path) -> None:
    convert(V1, tmp_path / "new", config={"template_version": "vqa"})
    assert json.loads((tmp_path / "new" / "config.json").read_text())["template_version"] == "vqa"


def test_a_tokenizer_goes_in_where_the_source_has_none(tmp_path: Path) -> None:
    source = tmp_path / "bare"
    shutil.copytree(V1, source, ignore=shutil.ignore_patterns("token*", "special*"))
    with pytest.raises(CheckpointError):
        lavish.load(source, device="cpu")
    convert(source, tmp_path / "new", tokenizer=V1)
    made = lavish.load(tmp_path / "new", device="cpu")
    text = "Describe the picture."
    assert made.processor.tokenizer(text) == lavish.load(V1, device="cpu").processor.tokenizer(text)


# -- releases in pieces ------------------------------------------------------------------------------------------------


def test_pieces_become_one_folder(tmp_path: Path) -> None:
    report = convert(MINIGPT4, tmp_path / "new", pieces={"llm": LLM}, config=HEADS, verify=True)
    assert dict(report.dropped)["t5_proj.weight"].startswith("the projection to the decoder that BLIP-2")
    assert_equal_weights(
        lavish.load(tmp_path / "new", device="cpu"), lavish.load(MINIGPT4, llm=LLM, config=HEADS, device="cpu")
    )


def test_pieces_answer_the_same_from_one_folder(tmp_path: Path) -> None:
    convert(MINIGPT4, tmp_path / "new", pieces={"llm": LLM}, config=HEADS)
    picture = FIXTURES / "minigpt4qwen" / "open" / "inputs" / "img0.png"
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    before = lavish.load(MINIGPT4, llm=LLM, config=HEADS, device="cpu").chat(messages, max_new_tokens=6)
    after = lavish.load(tmp_path / "new", device="cpu").chat(messages, max_new_tokens=6)
    assert before.token_ids == after.token_ids
    assert before.finish_reason == after.finish_reason


def test_a_lora_among_the_pieces_is_merged_or_written_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a LoRA that belongs to the model.*--merge-lora.*--to peft"):
        convert(CLIP_QWEN, tmp_path / "new")
    convert(CLIP_QWEN, tmp_path / "merged", merge_lora=True, verify=True)
    convert(CLIP_QWEN, tmp_path / "lora", to="peft", verify=True)
    from peft import PeftModel

    loaded = lavish.load(CLIP_QWEN, device="cpu")
    expected = loaded.model.merge_and_unload().state_dict()
    merged = lavish.load(tmp_path / "merged", device="cpu").model.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, **MERGED_WEIGHT)
    assert any(not torch.equal(merged[name], value) for name, value in hf_weights(tmp_path).items())
    base = lavish.load(tmp_path / "base", device="cpu")
    again = PeftModel.from_pretrained(base.model, tmp_path / "lora").merge_and_unload().state_dict()
    for name, value in expected.items():
        assert torch.equal(again[name], value), name


def hf_weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    """The same release without its LoRA, as a folder."""
    source = tmp_path / "without"
    shutil.copytree(CLIP_QWEN, source, ignore=shutil.ignore_patterns("adapter_*"))
    convert(source, tmp_path / "base")
    return dict(lavish.load(tmp_path / "base", device="cpu").model.state_dict())


# -- between layouts ---------------------------------------------------------------------------------------------------


def assert_equal_files(left: Path, right: Path) -> None:
    one, other = hf.read(left), hf.read(right)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(bits(one[name]), bits(other[name])), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model_parallel", [1, 2])
def test_hf_to_sat_and_back_is_equal_bit_by_bit(tmp_path: Path, dtype: str, model_parallel: int) -> None:
    convert(V1, tmp_path / "hf", dtype=dtype)
    there = convert(tmp_path / "hf", tmp_path / "sat", "sat", model_parallel=model_parallel, verify=True)
    assert len(there.files) == model_parallel
    assert all(why.startswith("equal to layer 0's") for _, why in there.dropped)
    back = convert(tmp_path / "sat", tmp_path / "back", tokenizer=V1, verify=True)
    assert (back.layout, back.notes) == ("sat", ())
    stored = hf.read(tmp_path / "hf")
    if any("inv_freq" in name for name in stored):
        assert_equal_files(tmp_path / "hf", tmp_path / "back")
    else:  # SAT holds the table, the release of v1 need not
        assert all(torch.equal(bits(stored[name]), bits(hf.read(tmp_path / "back")[name])) for name in stored)


def test_sat_to_hf_and_back_is_equal_bit_by_bit(tmp_path: Path) -> None:
    from lavish.checkpoints import sat

    source = FIXTURES / "cogvlm_sat" / "open" / "checkpoint"
    report = convert(source, tmp_path / "hf", verify=True)
    assert "has no tokenizer, so the folder has none either" in report.notes[0]
    assert_equal_files(tmp_path / "hf" / "model.safetensors", source.parent / "expected_hf" / "model.safetensors")
    for ranks in (1, 2):
        convert(tmp_path / "hf", tmp_path / f"sat{ranks}", "sat", model_parallel=ranks)
        before, after = sat.read(source), sat.read(tmp_path / f"sat{ranks}")
        assert before.keys() == after.keys()
        assert all(torch.equal(bits(before[name]), bits(after[name])) for name in before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model_parallel", [1, 2])
def test_hf_to_mindspore_and_back_is_equal_bit_by_bit(tmp_path: Path, dtype: str, model_parallel: int) -> None:
    source = as_released(tmp_path / "hf", dtype)
    there = convert(source, tmp_path / "ms", "mindspore", model_parallel=model_parallel, verify=True)
    assert len(there.files) == model_parallel
    back = convert(tmp_path / "ms", tmp_path / "back", verify=True)
    assert back.layout == "mindspore"
    assert {name for name, _ in back.made} == {name for name in hf.read(source) if "inv_freq" in name}
    assert_equal_files(source, tmp_path / "back")


def as_released(folder: Path, dtype: str) -> Path:
    """CogVLM2 in a dtype, its rotary tables computed in float32 and cast to it: what the way back from MindSpore gives.

    The release's own are built in bf16, and differ in 16 of 64 entries; built in fp16 they would be 1, 0, 0, 0 ...
    """
    from lavish.models.cogvlm.model import reference_inv_freq

    convert(V2, folder, dtype=dtype)
    weights = {name: value.clone() for name, value in hf.read(folder).items()}
    for name, value in weights.items():
        if "inv_freq" in name:
            weights[name] = reference_inv_freq(2 * len(value), 500000.0, torch.float32).to(value.dtype)
    save_file(weights, folder / "model.safetensors")
    return folder


def test_a_tokenizer_goes_beside_the_ranks_of_sat(tmp_path: Path) -> None:
    convert(V1, tmp_path / "sat", "sat", model_parallel=2, tokenizer=V1)
    assert (tmp_path / "sat" / "tokenizer.model").read_bytes() == (V1 / "tokenizer.model").read_bytes()
    messages = [{"role": "user", "content": "What is it?"}]
    before, after = (lavish.load(folder, device="cpu") for folder in (V1, tmp_path / "sat"))
    assert before.chat(messages, max_new_tokens=4).token_ids == after.chat(messages, max_new_tokens=4).token_ids
    with pytest.raises(ConfigError, match=r"no tokenizer; looked for tokenizer.model"):
        convert(V1, tmp_path / "new", "sat", tokenizer=tmp_path)
    with pytest.raises(ConfigError, match="'peft' has no place for one"):
        convert(V1, tmp_path / "new", "peft", tokenizer=V1)


def test_a_single_file_of_mindspore_says_what_is_not_in_it(tmp_path: Path) -> None:
    report = convert(V2, tmp_path / "cogvlm2.ckpt", "mindspore", verify=True)
    assert (tmp_path / "cogvlm2.ckpt").is_file()
    assert "is one file, so these are not written: config.json, tokenizer" in report.notes[0]
    convert(tmp_path / "cogvlm2.ckpt", tmp_path / "back", config=V2 / "config.json", tokenizer=V2)
    assert_equal_files(V2, tmp_path / "back")


@pytest.mark.parametrize(
    ("name", "to", "says"),
    [
        ("x.ckpt", "hf", "'hf' is a folder, and this is a file's name. A .ckpt file is of the layout 'mindspore'"),
        ("x.safetensors", "hf", "'hf' is a folder"),
        ("x.pth", "mindspore", "'mindspore' is a folder, or a file that ends in .ckpt.*layout 'lavis'"),
        ("x.ckpt", "sat", "'sat' is a folder"),
    ],
)
def test_a_file_is_named_as_its_layout_is(tmp_path: Path, name: str, to: str, says: str) -> None:
    """What forgets `--to mindspore` gets no 39 GB of safetensors under a name that nothing loads."""
    with pytest.raises(ConfigError, match=says):
        convert(V2, tmp_path / name, to)
    assert list(tmp_path.iterdir()) == []


def test_a_destination_beside_an_iteration_lies_in_the_source(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "cogvlm_sat" / "open" / "checkpoint", tmp_path / "sat")
    with pytest.raises(ConfigError, match="lies in the source"):
        convert(tmp_path / "sat" / "1", tmp_path / "sat" / "2")
    assert not (tmp_path / "sat" / "2").exists()


def test_a_single_file_of_gpt_dialogue_is_verified(tmp_path: Path) -> None:
    source = FIXTURES / "gpt_dialogue" / "open" / "checkpoint"
    convert(source, tmp_path / "hf", config={"n_head": 4})
    assert convert(tmp_path / "hf", tmp_path / "g.pth", "lavis", verify=True).is_verified


def test_a_single_file_of_lavis(tmp_path: Path) -> None:
    source = FIXTURES / "blip_caption" / "open" / "checkpoint"
    heads = {name: {"num_attention_heads": 4} for name in ("vision_config", "text_config")}
    convert(source, tmp_path / "hf", config=heads, verify=True)
    report = convert(tmp_path / "hf", tmp_path / "blip.pth", "lavis", verify=True)
    assert report.files == ("checkpoint_best.pth",)
    with pytest.raises(ConfigError, match="is the name of one file, and 4 are to be written"):
        convert(MINIGPT4, tmp_path / "one.pth", "lavis", pieces={"llm": LLM}, config=HEADS)


def test_the_shards_of_deepspeed_become_a_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "global_step2").mkdir(parents=True)
    (run / "latest").write_text("global_step2")
    weights = {name: value.clone() for name, value in hf.read(V2).items()}
    tree = {"module": weights, "dp_world_size": 1, "mp_world_size": 1, "ds_config": {}, "global_steps": 2}
    torch.save(tree, run / "global_step2" / "mp_rank_00_model_states.pt")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(V2 / name, run)
    with pytest.raises(ConfigError, match="hold no config"):
        convert(run, tmp_path / "hf")
    report = convert(run, tmp_path / "hf", config=V2 / "config.json", dtype="bf16", verify=True)
    assert report.layout == "deepspeed"
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert fields["torch_dtype"] == "bfloat16"
    cast = lavish.load(V2, dtype="bfloat16", device="cpu")
    assert_equal_weights(lavish.load(tmp_path / "hf", device="cpu"), cast)


def test_sat_has_no_way_to_mindspore_and_the_message_says_what_has(tmp_path: Path) -> None:
    source = FIXTURES / "cogvlm_sat" / "open" / "checkpoint"
    with pytest.raises(ConfigError, match=r"a CogVLM v1, which MindFormers never had.* hf, sat"):
        convert(source, tmp_path / "new", "mindspore")
    with pytest.raises(ConfigError, match=r"is of CogVLM2.*Convert it to hf or mindspore"):
        convert(V2, tmp_path / "new", "sat")
    assert list(tmp_path.iterdir()) == []


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on the tiny CogVLM2, its B matrices drawn."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    network = lavish.load(V2, device="cpu").model
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["language_expert_query_key_value", "fc1"], use_rslora=True)
    model = get_peft_model(network, config)
    draw = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=draw) * 0.1
    model.save_pretrained(folder)
    return folder


def test_an_adapter_is_merged_into_its_base(adapter: Path, tmp_path: Path) -> None:
    convert(adapter, tmp_path / "new", base=V2, merge_lora=True, verify=True)
    expected = lavish.load(V2, adapter=adapter, device="cpu").model.merge_and_unload().state_dict()
    found = lavish.load(tmp_path / "new", device="cpu").model.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **MERGED_WEIGHT)


def test_merging_rounds_once(adapter: Path, tmp_path: Path) -> None:
    """The sum is in float32 and rounded to bfloat16: not the sum of two rounded ones."""
    convert(adapter, tmp_path / "new", base=V2, merge_lora=True, dtype="bf16")
    exact = lavish.load(V2, adapter=adapter, device="cpu").model.merge_and_unload().state_dict()
    name = "model.layers.0.self_attn.language_expert_query_key_value.weight"
    found = hf.read(tmp_path / "new")[name]
    assert (found != exact[name].to(torch.bfloat16)).float().mean() < 0.01


def test_an_adapter_is_written_again(adapter: Path, tmp_path: Path) -> None:
    report = convert(adapter, tmp_path / "new", to="peft", dtype="fp16", verify=True)
    assert report.files == ("adapter_model.safetensors",)
    assert {tensor.dtype for tensor in hf.read(tmp_path / "new" / "adapter_model.safetensors").values()} == {
        torch.float16
    }
    lavish.load(V2, adapter=tmp_path / "new", device="cpu")


def test_what_an_adapter_does_not_go_with(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="belongs to the model"):
        convert(adapter, tmp_path / "new", base=V2)
    with pytest.raises(ConfigError, match="has no LoRA to write"):
        convert(V2, tmp_path / "new", to="peft")
    with pytest.raises(ConfigError, match=r"merge_lora was asked, and .* has no LoRA"):
        convert(V2, tmp_path / "new", merge_lora=True)
    with pytest.raises(ConfigError, match="give one of them"):
        convert(adapter, tmp_path / "new", to="peft", merge_lora=True)
    with pytest.raises(ConfigError, match=r"base= was given, but .* is no adapter"):
        convert(V2, tmp_path / "new", base=V2)
    with pytest.raises(CheckpointError, match="trained on another"):
        convert(adapter, tmp_path / "new", base=V1, merge_lora=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [({"use_dora": True}, "more than products of two matrices"), ({"r": 0}, "the rank 'r' is 0")],
)
def test_other_kinds_of_adapters_are_not_merged_wrongly(
    adapter: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(adapter, tmp_path / "odd")
    file = tmp_path / "odd" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "odd", tmp_path / "new", base=V2, merge_lora=True)


# -- values ------------------------------------------------------------------------------------------------------------


def with_large_values(tmp_path: Path) -> Path:
    source = tmp_path / "large"
    shutil.copytree(V2, source, ignore=shutil.ignore_patterns("model*"))
    weights = {name: value.clone() for name, value in hf.read(V2).items()}
    weights["lm_head.weight"][0, :3] = torch.tensor([1e5, -2e5, 3.0])
    save_file(weights, source / "model.safetensors")
    return source


def test_values_beyond_float16_are_an_error_that_names_them(tmp_path: Path) -> None:
    source = with_large_values(tmp_path)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight': 2 of \d+ values do not fit float16.*--clamp"):
        convert(source, tmp_path / "new", dtype="fp16")
    assert not (tmp_path / "new").exists()
    convert(source, tmp_path / "wide", dtype="bf16")


def test_values_are_clamped_on_request(tmp_path: Path) -> None:
    source = with_large_values(tmp_path)
    report = convert(source, tmp_path / "new", dtype="fp16", clamp=True, verify=True)
    assert dict(report.clamped) == {"lm_head.weight": 2}
    assert hf.read(tmp_path / "new")["lm_head.weight"][0, :3].tolist() == [65504.0, -65504.0, 3.0]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_layout_that_cannot_hold_the_model_is_refused_with_those_that_can(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'sat' cannot hold .* of the family 'glm4v_9b'.* can: hf"):
        convert(GLM, tmp_path / "new", to="sat")
    with pytest.raises(ConfigError, match="'lavis' cannot hold"):
        convert(V2, tmp_path / "new", to="lavis")


def test_wrong_options(tmp_path: Path) -> None:
    for options, message in [
        ({"to": "mindspor"}, "Did you mean 'mindspore'"),
        ({"dtype": "bf61"}, "No dtype 'bf61'"),
        ({"dtype": "int8"}, "No dtype 'int8'"),
        ({"model_parallel": 2}, "files of 'hf' are whole"),
        ({"model_parallel": 0}, "model_parallel is 0"),
        ({"max_shard_bytes": 0}, "max_shard_bytes is 0"),
        ({"tokenizer": 3}, "tokenizer must be a path"),
    ]:
        with pytest.raises(ConfigError, match=message):
            convert(V2, tmp_path / "new", **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="destination must be a path"):
        convert(V2, None)  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []


def test_a_destination_in_the_source_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(V2, source)
    (tmp_path / "link").symlink_to(source)
    for destination in (source / "new", source / "a" / "b", tmp_path / "link" / "new", source / ".." / "source" / "x"):
        with pytest.raises(ConfigError, match=r"lies in the source .*source-converted"):
            convert(source, destination)
    with pytest.raises(ConfigError, match="is there already"):
        convert(source, source)
    assert {entry.name for entry in source.iterdir()} == {entry.name for entry in V2.iterdir()}


def test_a_source_that_is_not_whole_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(V2, source)
    shard = next(iter(sorted(source.glob("*.safetensors"))))
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="truncated"):
        convert(source, tmp_path / "new")
    weights = {name: value.clone() for name, value in hf.read(V2).items()}
    for file in source.glob("model*"):
        file.unlink()
    save_file(
        {name: value for name, value in weights.items() if name != "lm_head.weight"}, source / "model.safetensors"
    )
    with pytest.raises(MissingKeys, match=r"1 tensor is missing, first lm_head.weight"):
        convert(source, tmp_path / "new")
    with pytest.raises(UnknownLayout):
        convert(tmp_path, tmp_path / "sub" / ".." / ".." / "elsewhere")
    assert {entry.name for entry in tmp_path.iterdir()} == {"source"}


def test_a_full_disk(tmp_path: Path) -> None:
    code = (
        "import resource, sys\nfrom lavish.common.errors import OutputError\n"
        "from lavish.inference.convert import convert\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
        "try:\n    convert(sys.argv[1], sys.argv[2])\nexcept OutputError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(V2), str(tmp_path / "new")], capture_output=True, text=True, timeout=120
    )
    assert "cannot be written (File too large)" in done.stdout, done.stderr
    assert not (tmp_path / "new").exists()
    convert(V2, tmp_path / "new")
    assert issubclass(OutputError, OSError)


def test_what_is_damaged_on_its_way_to_the_disk_is_found(tmp_path: Path) -> None:
    """A byte changes between writing and reading back: what `verify` is for."""
    target = tmp_path / "new"

    def spoil(phase: str, done: int, total: int) -> None:
        if phase == "verify" and not spoiled:
            spoiled.append(phase)
            file = target / "model.safetensors"
            raw = bytearray(file.read_bytes())
            raw[-1] ^= 1
            file.write_bytes(raw)

    spoiled: list[str] = []
    with pytest.raises(CheckpointError, match="reads differently than it was written"):
        convert(V2, target, verify=True, progress=spoil)


def test_a_source_that_changed_in_the_meantime_is_not_gone_on_with(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(V2, source)

    def stop(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", progress=stop)
    os.utime(next(source.glob("*.safetensors")), (1, 1))
    with pytest.raises(ConfigError, match=r"a file of the source has changed since.*or remove that folder"):
        convert(source, tmp_path / "new")


def test_a_small_file_that_leads_elsewhere_is_not_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(V2, source)
    (tmp_path / "secret.txt").write_text("secret")
    (source / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(CheckpointError, match=r"notes.txt: is a link to .*secret.txt, outside of the folder"):
        convert(source, tmp_path / "new")
    assert {entry.name for entry in tmp_path.iterdir()} == {"source", "secret.txt"}


def test_kill_9_then_the_same_call_goes_on(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom lavish.checkpoints import output\nfrom lavish.inference.convert import convert\n"
        "convert(sys.argv[1], sys.argv[2], max_shard_bytes=100_000, progress=lambda *_: time.sleep(0.03))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(V2), str(tmp_path / "new")], stderr=subprocess.PIPE)
    journal = partial_folder(tmp_path / "new") / JOURNAL
    deadline = time.monotonic() + 120
    while (journal.read_bytes().count(b'"is_done":true') if journal.exists() else 0) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError):
        lavish.load(partial_folder(tmp_path / "new"))
    with pytest.raises(ConfigError, match="begun with dtype=None and now has dtype='bfloat16'"):
        convert(V2, tmp_path / "new", max_shard_bytes=100_000, dtype="bf16")
    with pytest.raises(ConfigError, match="begun with source="):
        convert(V1, tmp_path / "new", max_shard_bytes=100_000)
    report = convert(V2, tmp_path / "new", max_shard_bytes=100_000, verify=True)
    assert report.resumed_bytes > 200_000
    assert_equal_weights(lavish.load(tmp_path / "new", device="cpu"), lavish.load(V2, device="cpu"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]
