"""lavish.load: what it makes of a folder, and every way in which a folder can be wrong."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lavish
from lavish.common.errors import (
    CheckpointError,
    ConfigError,
    MissingDependency,
    MissingKeys,
    ShapeMismatch,
    UnexpectedKeys,
    UnknownLayout,
)

ASK = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def folder(release, tmp_path) -> Path:
    """A copy of the release's folder, to spoil."""
    return Path(shutil.copytree(release.folder, tmp_path / "checkpoint"))


def edit_config(folder: Path, *, drop=(), **fields) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in drop}))


def merge_shards(folder: Path, change=lambda tensors: tensors) -> None:
    """Write all shards as one file, changed."""
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


# -- what loads ------------------------------------------------------------------------------------------------------


def test_everything_is_in_place(release):
    vlm = release.loaded
    assert type(vlm.model).__name__ == "CogVLMForCausalLM"
    assert not vlm.model.training
    assert not any(t.is_meta for t in [*vlm.model.parameters(), *vlm.model.buffers()])
    assert vlm.device == torch.device("cpu")
    assert {p.dtype for p in vlm.model.parameters()} == {torch.float32}
    assert release.name in repr(vlm)


@pytest.mark.parametrize("name", ["bfloat16", "bf16", torch.bfloat16])
def test_dtype_by_name(v2, name):
    vlm = lavish.load(v2.folder, device="cpu", dtype=name)
    assert {p.dtype for p in vlm.model.parameters()} == {torch.bfloat16}
    assert vlm.model.model.layers[0].self_attn.rotary_emb.inv_freq.dtype == torch.bfloat16
    assert len(vlm.chat(ASK, max_new_tokens=3).token_ids) == 3


def test_dtype_auto_is_the_stored_one_but_never_float16_on_a_cpu(folder, caplog):
    merge_shards(folder, lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    assert lavish.load(folder, device="cpu").model.dtype == torch.bfloat16
    shutil.move(folder / "model.safetensors", folder / "old")
    save_file(
        {n: t.half() for n, t in load_file(folder / "old").items()}, folder / "model.safetensors", {"format": "pt"}
    )
    with caplog.at_level(logging.WARNING):
        assert lavish.load(folder, device="cpu").model.dtype == torch.float32
    assert "float16" in caplog.text


def test_rope_is_switched(v2):
    assert lavish.load(v2.folder, device="cpu").model.config.rope == "reference"
    vlm = lavish.load(v2.folder, device="cpu", rope="float32")
    assert vlm.model.config.rope == "float32"
    messages, template = v2.prompts["chat_image"]
    # In float32 both are the same table.
    assert vlm.chat(messages, max_new_tokens=10, chat_template=template).token_ids == v2.greedy_ids["chat_image"]
    with pytest.raises(ConfigError, match="rope='exact'"):
        lavish.load(v2.folder, rope="exact")


def test_a_tokenizer_apart_from_the_weights(folder, release, tmp_path):
    apart = tmp_path / "tokenizer"
    apart.mkdir()
    for path in [*folder.glob("tokenizer*"), *folder.glob("special_tokens*")]:
        path.rename(apart / path.name)
    with pytest.raises(CheckpointError, match="tokenizer="):
        lavish.load(folder)
    messages, template = release.prompts["chat_image"]
    vlm = lavish.load(folder, tokenizer=apart, device="cpu")
    reply = vlm.chat(messages, max_new_tokens=10, chat_template=template)
    assert reply.token_ids == release.greedy_ids["chat_image"]


def test_config_fields_are_replaced_by_dict_or_file(v2, tmp_path):
    assert lavish.load(v2.folder, config={"template_version": "vqa"}).processor.template_version == "vqa"
    (tmp_path / "fields.yaml").write_text("template_version: base\n")
    (tmp_path / "fields.json").write_text('{"template_version": "base"}')
    for name in ("fields.yaml", "fields.json"):
        assert lavish.load(v2.folder, config=tmp_path / name).model.config.template_version == "base"
    with pytest.raises(ConfigError, match=r"'template_versio'.*Did you mean 'template_version'"):
        lavish.load(v2.folder, config={"template_versio": "vqa"})
    with pytest.raises(ConfigError, match="cannot be read"):
        lavish.load(v2.folder, config=tmp_path / "absent.yaml")


def test_generation_config_gives_eos_and_sampling_defaults(folder, release):
    path = folder / "generation_config.json"
    ids = release.greedy_ids["chat_image"]
    path.write_text(json.dumps({"eos_token_id": [ids[2]], "do_sample": True, "temperature": 0.6, "top_p": 0.9}))
    vlm = lavish.load(folder, device="cpu")
    messages, template = release.prompts["chat_image"]
    reply = vlm.chat(messages, max_new_tokens=10, chat_template=template)
    assert (reply.token_ids, reply.finish_reason) == (ids[:3], "stop")  # greedy, as the released demos are
    assert vlm._sampling_defaults == {"temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize("value", ["</s>", [449, None], 1.5, True, {"id": 1}])
def test_an_eos_that_is_no_id(folder, value):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ConfigError, match=r"eos_token_id of config\.json or generation_config\.json holds"):
        lavish.load(folder, device="cpu")


def test_grounding_is_on_by_name_or_config(release, tmp_path):
    named = Path(shutil.copytree(release.folder, tmp_path / "cogvlm-grounding-generalist-hf"))
    assert lavish.load(named).grounding
    assert not release.loaded.grounding
    edit_config(named, grounding=False)
    assert not lavish.load(named).grounding


def test_stored_inv_freq_may_be_absent(folder, release):
    merge_shards(folder, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("inv_freq")})
    messages, template = release.prompts["chat_image"]
    reply = lavish.load(folder, device="cpu").chat(messages, max_new_tokens=10, chat_template=template)
    assert reply.token_ids == release.greedy_ids["chat_image"]


def test_the_bundled_model_or_a_clear_word(monkeypatch, tmp_path):
    monkeypatch.setattr("lavish.inference.load.POCKET", tmp_path)
    with pytest.raises(CheckpointError, match="pocket model is not in this installation"):
        lavish.load()


def test_a_bundled_model_is_loaded_without_a_name(monkeypatch, v2):
    monkeypatch.setattr("lavish.inference.load.POCKET", v2.folder)
    assert lavish.load(device="cpu").name == "pocket"


# -- no code of a checkpoint runs ------------------------------------------------------------------------------------

BLOCKED = """
import sys
for name in ("triton", "xformers", "torchvision", "einops"):
    sys.modules[name] = None
sys.path.insert(0, {folder!r})
import lavish
lavish.register()
vlm = lavish.load({folder!r}, device="cpu")
print(vlm.chat([{{"role": "user", "content": "Hello"}}], max_new_tokens=5).token_ids)
hostile = ("modeling_", "configuration_cogvlm", "transformers_modules")
assert not [name for name in sys.modules if name.startswith(hostile)]
"""


def test_hostile_code_beside_the_weights_is_not_run(folder, release):
    marker = folder / "ran"
    for name in ("modeling_cogvlm.py", "configuration_cogvlm.py", "tokenization_cogvlm.py"):
        (folder / name).write_text(f"open({str(marker)!r}, 'w').close()\nraise SystemExit('hostile')\n")
    edit_config(
        folder,
        auto_map={
            "AutoConfig": "configuration_cogvlm.CogVLMConfig",
            "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
            "AutoTokenizer": ["tokenization_cogvlm.T", None],
        },
    )
    code = BLOCKED.format(folder=str(folder))
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == str(release.loaded.chat(ASK, max_new_tokens=5).token_ids)
    assert not marker.exists()


# -- what is wrong with a folder -------------------------------------------------------------------------------------


def test_no_folder_a_file_an_empty_folder_and_no_config(folder, tmp_path):
    with pytest.raises(ConfigError, match="no such file or folder"):
        lavish.load(tmp_path / "absent")
    with pytest.raises(UnknownLayout, match="is a file"):
        lavish.load(folder / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnknownLayout, match="found nothing"):
        lavish.load(tmp_path / "empty")
    (folder / "config.json").unlink()
    with pytest.raises(UnknownLayout, match=r"no config.json"):
        lavish.load(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": 1'])
def test_a_config_that_is_no_json_object(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        lavish.load(folder)


def test_an_unknown_architecture(folder):
    edit_config(folder, architectures=["CogVLMForCausalLMs"])
    with pytest.raises(UnknownLayout, match="Did you mean 'CogVLMForCausalLM'"):
        lavish.load(folder)
    edit_config(folder, drop=["architectures"])
    with pytest.raises(UnknownLayout, match="model_type None"):
        lavish.load(folder)
    edit_config(folder, model_type="cogvlm")
    assert lavish.load(folder).chat(ASK, max_new_tokens=2)


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size", "vision_config"])
def test_a_config_without_a_size_is_not_guessed(folder, name):
    edit_config(folder, drop=[name])
    with pytest.raises(ConfigError, match=name):
        lavish.load(folder)


def test_a_config_of_the_other_version_names_the_field_that_decides(folder, release):
    if release.name == "cogvlm2":
        edit_config(folder, drop=["num_multi_query_heads"])
        expected = "no num_multi_query_heads and is read as CogVLM v1, but .* is CogVLM2's"
    else:
        edit_config(folder, num_multi_query_heads=4)
        expected = "read as CogVLM2, but .* absent"
    with pytest.raises(CheckpointError, match=expected):
        lavish.load(folder)


def test_a_missing_shard(folder):
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(MissingKeys, match=gone.name):
        lavish.load(folder)


def test_a_truncated_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=shard.name):
        lavish.load(folder)


def test_a_missing_tensor_is_never_made_up(folder):
    merge_shards(folder, lambda tensors: {n: t for n, t in tensors.items() if n != "model.norm.weight"})
    with pytest.raises(MissingKeys, match=r"model\.norm\.weight"):
        lavish.load(folder)
    with pytest.raises(MissingKeys, match=r"model\.norm\.weight"):
        lavish.load(folder, quantization="int8")


def test_a_tensor_too_many_and_one_of_another_shape(folder):
    merge_shards(folder, lambda tensors: {**tensors, "model.extra.weight": torch.zeros(3)})
    with pytest.raises(UnexpectedKeys, match=r"model\.extra\.weight"):
        lavish.load(folder)
    edit_config(folder, intermediate_size=96)
    with pytest.raises((UnexpectedKeys, ShapeMismatch)):
        lavish.load(folder)


def test_another_number_of_layers_than_the_config_says(folder):
    edit_config(folder, num_hidden_layers=2)
    with pytest.raises(UnexpectedKeys, match=r"model\.layers\.2"):
        lavish.load(folder)
    edit_config(folder, num_hidden_layers=4)
    with pytest.raises(MissingKeys, match=r"model\.layers\.3"):
        lavish.load(folder)


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "flaot32"}, "Did you mean 'float32'"),
        ({"dtype": torch.int8}, "No dtype"),
        ({"device": "gpu"}, "No device 'gpu'"),
        ({"device": "cuda:99"}, "this machine has"),
        ({"quantization": "int4"}, "No quantization 'int4'.*int8, nf4"),
        ({"qformer": "x"}, "'qformer'.*without pieces"),
        ({"devise": "cpu"}, "Did you mean 'device'"),
        ({"base": "somewhere"}, "is no adapter"),
        ({"device": None}, "No device None"),
        ({"config": [("rope", "float32")]}, "config= must be a dict"),
        ({"config": {"vision_config": 3}}, "vision_config is 3 and must be an object"),
    ],
)
def test_wrong_options(v2, options, message):
    with pytest.raises(ConfigError, match=message):
        lavish.load(v2.folder, **options)


def test_nf4_without_bitsandbytes(v2, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("lavish.inference.quantization.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="bitsandbytes"):
        lavish.load(v2.folder, quantization="nf4")


def test_a_revision_only_of_a_hub_id(v2):
    with pytest.raises(ConfigError, match="revision"):
        lavish.load(v2.folder, revision="main")
