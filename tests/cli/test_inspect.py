"""`lavish inspect`: from headers alone, at full size, in under a second; what is missing is named."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from zero_files import write_zero

import lavish
from lavish.checkpoints import hf
from lavish.cli import main
from lavish.cli.inspection import look
from lavish.common.config import load_yaml
from lavish.models.cogvlm import manifest

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
NAME = "cogvlm2-llama3-chat-19B"


def layout(name: str) -> dict:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(load_yaml(str(files("lavish") / "configs" / "models" / f"{name}.yaml")))  # type: ignore[return-value]


def read_list(name: str) -> dict:
    return json.loads(gzip.decompress((FIXTURES / f"{name}.json.gz").read_bytes()))


def write_sparse(folder: Path, num_shards: int = 8) -> dict[str, tuple[tuple[int, ...], str]]:
    """Write the released layout of CogVLM2 at full size: true headers, and holes where the weights would be."""
    fields = {key: value for key, value in layout(NAME).items() if key != "family"}
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = read_list(f"cogvlm2/manifest_{NAME}")
    names, weight_map = list(tensors), {}
    for shard in range(num_shards):
        file, header, end = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors", {}, 0
        for name in names[shard::num_shards]:
            shape = tensors[name][0]
            size = 2
            for side in shape:
                size *= side
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end, weight_map[name] = end + size, file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize(
    ("fixture", "name"),
    [
        ("cogvlm2/manifest_cogvlm2-llama3-chat-19B", NAME),
        ("cogvlm2/manifest_cogvlm2-llama3-chinese-chat-19B", "cogvlm2-llama3-chinese-chat-19B"),
        ("cogvlm/manifest_cogvlm-chat-v1.1", "cogvlm-chat-v1.1"),
        ("cogvlm/manifest_cogvlm-base-224", "cogvlm-base-224"),
        ("cogvlm/manifest_cogvlm-base-490", "cogvlm-base-490"),
        ("cogvlm/manifest_cogvlm-grounding-generalist", "cogvlm-grounding-generalist-v1.1"),
    ],
)
def test_the_manifest_is_the_released_list(fixture: str, name: str) -> None:
    released = read_list(fixture)
    found = {tensor.name: list(tensor.shape) for tensor in manifest.tensors(manifest.read_sizes(layout(name), name))}
    assert found == {key: shape for key, (shape, _) in released.items()}


@pytest.mark.parametrize("version", ["cogvlm", "cogvlm2"])
def test_the_manifest_is_the_network(version: str) -> None:
    folder = FIXTURES / version / "open" / "checkpoint"
    sizes = manifest.read_sizes(json.loads((folder / "config.json").read_text()), "config.json")
    network = lavish.build(folder, device="meta")
    assert {tensor.name: tensor.shape for tensor in manifest.tensors(sizes)} == {
        name: tuple(value.shape) for name, value in network.state_dict().items()
    }
    linears = {name for name, module in network.named_modules() if type(module).__name__ == "Linear"} - {"lm_head"}
    assert {tensor.name for tensor in manifest.tensors(sizes) if tensor.is_linear} == {f"{n}.weight" for n in linears}
    assert sizes.num_image_tokens == network.config.num_image_tokens
    assert sizes.head_dim == network.config.head_dim


def test_39_gigabytes_in_under_a_second(tmp_path: Path) -> None:
    tensors = write_sparse(tmp_path)
    started_s = time.process_time()
    seen = look(str(tmp_path))
    assert time.process_time() - started_s < 1.0
    assert seen.num_bytes == 39_006_214_656
    assert seen.is_complete
    assert seen.files == 8
    assert seen.dtypes == {"bfloat16": 39_006_214_656}
    assert sum(part.num_tensors for part in seen.parts) == len(tensors)
    parts = {part.name: part.num_parameters for part in seen.parts}
    assert parts["language experts"] == 32 * (6144 * 4096 + 4096 * 4096 + 3 * 14336 * 4096)
    assert parts["image experts"] == parts["language experts"] + 32 * 6144
    assert parts["embeddings"] == parts["head"] == 128256 * 4096
    memory = {row.what: row.total for row in seen.memory}
    assert 39.0e9 < memory["inference, bfloat16"] < 42e9, "users report 42 GB"
    assert memory["inference, nf4"] < memory["inference, int8"] < memory["inference, bfloat16"]


def test_it_imports_no_torch(tmp_path: Path) -> None:
    write_sparse(tmp_path)
    code = (
        "import sys; from lavish.cli import main; status = main(['inspect', sys.argv[1]]); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules); sys.exit(status)"
    )
    answer = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert "complete: every tensor that the config asks for is there" in answer.stdout
    assert "39.0 GB" in answer.stdout


def test_a_missing_shard_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sparse(tmp_path)
    os.remove(tmp_path / "model-00005-of-00008.safetensors")
    assert main(["inspect", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "1 weight files are not here: model-00005-of-00008.safetensors" in printed
    assert "tensors missing:" in printed
    assert main(["inspect", str(tmp_path), "--json"]) == 1
    seen = json.loads(capsys.readouterr().out)
    assert not seen["is_complete"]
    assert seen["absent_files"] == ["model-00005-of-00008.safetensors"]
    assert len(seen["missing"]) > 100


def test_unexpected_and_misshaped_tensors_are_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"], config["vocab_size"] = 2, 481
    (folder / "config.json").write_text(json.dumps(config))
    seen = look(str(folder))
    assert len(seen.unexpected) == 14
    assert all(name.startswith("model.layers.2.") for name in seen.unexpected)
    assert seen.misshaped[0].startswith("lm_head.weight") or seen.misshaped[0].startswith("model.embed_tokens")
    assert seen.parts[-1].name == "unexpected"


def test_names_in_a_hostile_file_steer_no_terminal(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(checkpoint, folder)
    (folder / "evil\x1b[2J.py").touch()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    save_file({"evil\x1b]0;x\x07": torch.ones(1)}, folder / "more.safetensors")
    index["weight_map"] |= {"evil\x1b]0;x\x07": "more.safetensors", "gone": "gone\x1b[2J.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["inspect", str(folder)]) == 1
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    for shown in (r"evil\x1b]0;x\x07", r"gone\x1b[2J.safetensors", r"evil\x1b[2J.py"):
        assert shown in printed.out


def test_a_saved_int8_network_is_complete(checkpoint: Path, tmp_path: Path) -> None:
    lavish.load(checkpoint, quantization="int8").model.save_pretrained(tmp_path)
    seen = look(str(tmp_path))
    assert seen.is_complete, (seen.missing, seen.unexpected, seen.misshaped)
    assert "int8" in seen.dtypes


def test_a_folder_without_tokenizer_or_with_code_is_told(checkpoint: Path, tmp_path: Path) -> None:
    for name in ["config.json", *(file.name for file in hf.read(checkpoint).files), "model.safetensors.index.json"]:
        shutil.copy(checkpoint / name, tmp_path)
    (tmp_path / "modeling_cogvlm.py").write_text("raise SystemExit('never run')")
    notes = look(str(tmp_path)).notes
    assert "no tokenizer" in notes[0]
    assert "modeling_cogvlm.py" in notes[1]


def test_a_name_of_the_zoo_needs_no_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", NAME]) == 0
    printed = capsys.readouterr().out
    assert "cogvlm 2 · 19.50 B parameters · 39.0 GB · not on this machine" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_set_changes_the_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--set", "num_hidden_layers=2", "--set", "vision_config.num_hidden_layers=1", "--json"]
    assert main(["inspect", NAME, *changes]) == 0
    seen = json.loads(capsys.readouterr().out)
    network = lavish.build(NAME, device="meta", num_hidden_layers=2, vision_config={"num_hidden_layers": 1})
    assert seen["num_parameters"] == sum(value.numel() for value in network.state_dict().values())


@pytest.mark.parametrize("more", [[], ["--tree"]])
def test_an_unknown_field_suggests(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", NAME, "--set", "num_hiden_layers=2", *more]) == 2
    assert "Did you mean 'num_hidden_layers'?" in capsys.readouterr().err


def test_the_tree(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # a runner of tests may set it
    assert main(["inspect", NAME, "--tree", "--set", "num_hidden_layers=2"]) == 0
    printed = capsys.readouterr().out
    assert "0-1  DecoderLayer  x 2  872.44 M" in printed
    assert "language_expert_query_key_value  Linear  weight 6144 x 4096  25.17 M" in printed
    assert "0-62  TransformerLayer  x 63" in printed


def test_the_tree_as_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint), "--tree", "--json"]) == 0
    root = json.loads(capsys.readouterr().out)
    expected = sum(parameter.numel() for parameter in lavish.build(checkpoint, device="meta").parameters())
    assert root["num_parameters"] == expected == sum(child["num_parameters"] for child in root["children"])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no layout that lavish knows"), ("{", "not valid JSON"), ("[]", "not an object"), ("{}", "architectures")],
)
def test_folders_that_are_no_model(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["inspect", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_config_that_lacks_a_size(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    del config["vision_config"]["num_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path)]) == 2
    assert "vision_config.num_heads is absent" in capsys.readouterr().err


def test_a_config_alone(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copy(checkpoint / "config.json", tmp_path)
    seen = look(str(tmp_path))
    assert not seen.has_weights
    assert seen.notes == ["The folder has a config and no weights."]


def test_a_hub_id_is_not_downloaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "someone/something"]) == 2
    assert "hf download someone/something)" in capsys.readouterr().err
    assert main(["inspect", "someone/something@v1"]) == 2
    assert "hf download someone/something --revision v1)" in capsys.readouterr().err
    for path in ("/absent/model", "runs/a--b", "模型/a", "a/b/c", "~nobody/x"):
        assert main(["inspect", path]) == 2
        assert f"{path!r}: no such file or folder, and not a hub id" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("value", ["x", "0", "2000"])
def test_a_wrong_value_of_set_is_not_the_files_fault(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "pocket", "--set", f"num_hidden_layers={value}"]) == 2
    message = capsys.readouterr().err.replace("\n", " ")
    assert "Give num_hidden_layers another value" in message
    assert "config.json again" not in message


def test_a_config_read_as_the_other_version_is_noted(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["num_multi_query_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    assert any("is read as CogVLM v1" in note for note in look(str(folder)).notes)


@pytest.mark.parametrize("owner", ["THUDM", "zai-org"])
def test_both_names_of_the_owner_are_known(owner: str) -> None:
    seen = look(f"{owner}/cogvlm2-llama3-chat-19B")
    assert (seen.version, seen.sizes.vocab_size) == (2, 128256)


# -- the other layouts -------------------------------------------------------------------------------------------------

COGVLM = FIXTURES / "cogvlm2/open/checkpoint"


def shards(folder: Path, stage: int, **options: object) -> Path:
    """The tiny CogVLM2 as DeepSpeed's shards of three processes, its config and tokenizer beside them."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(COGVLM / name, folder)
    tensors = dict(hf.read(COGVLM))
    return write_zero(folder, tensors, stage=stage, num_processes=3, dtype=torch.float32, step=40, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_shards_of_deepspeed(tmp_path: Path, stage: int, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shards(tmp_path / "run", stage)
    seen = look(str(folder))
    assert (seen.family, seen.version, seen.layout) == ("cogvlm", 2, "deepspeed")
    assert seen.is_complete, (seen.missing, seen.unexpected, seen.misshaped)
    assert seen.facts == {"ZeRO": str(stage), "processes": "3", "step": "40", "DeepSpeed": "0.19.8"}
    assert seen.files == 3  # the shares; nothing here is frozen
    assert seen.commands == [f"lavish chat {folder}", f"lavish convert {folder} DST --to hf"]
    assert look(str(folder / "global_step40")).is_complete
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["step"] == "40"


def test_an_absent_share_of_deepspeed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shards(tmp_path / "run", 3)
    gone = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (folder / "global_step40" / gone).unlink()
    assert main(["inspect", str(folder)]) == 1
    assert f"1 weight files are not here: {gone}" in capsys.readouterr().out
    seen = look(str(folder))
    assert seen.num_parameters == sum(tensor.numel() for tensor in hf.read(COGVLM).values())
    assert seen.commands == []


def test_shards_without_a_config(tmp_path: Path) -> None:
    seen = look(str(FIXTURES / "deepspeed/zero3"))
    assert (seen.family, seen.layout, seen.is_part, seen.has_problems) == ("unknown", "deepspeed", True, False)
    assert seen.facts["ZeRO"] == "3"
    assert {part.name: part.num_parameters for part in seen.parts}["embed"] == 35
    assert "hold no config" in seen.notes[0]
    assert seen.commands[1].endswith("DST --to hf --config FILE")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_sat_checkpoint(ranks: int) -> None:
    name = "checkpoint" if ranks == 1 else f"checkpoint_mp{ranks}"
    folder = FIXTURES / "cogvlm_sat/open" / name
    seen = look(str(folder))
    assert (seen.family, seen.version, seen.layout) == ("cogvlm", 1, "sat")
    assert seen.is_complete, (seen.missing, seen.unexpected, seen.misshaped)
    assert seen.facts["parallel ranks"] == str(ranks)
    assert seen.facts["iteration"] == "1"
    assert seen.files == ranks
    assert seen.commands[1] == f"lavish convert {folder} DST --to hf"


def test_a_mindspore_checkpoint(tmp_path: Path) -> None:
    made = FIXTURES / "mindspore_ckpt/open/checkpoint"
    for file in sorted((made / "ms").glob("cogvlm2-image_bf16.ckpt")):
        shutil.copy(file, tmp_path)
    seen = look(str(tmp_path))
    assert (seen.layout, seen.is_part, seen.facts["parallel ranks"]) == ("mindspore", True, "1")
    shutil.copy(made / "hf/config.json", tmp_path)
    seen = look(str(tmp_path))
    assert (seen.family, seen.version, seen.is_complete) == ("cogvlm", 2, True)
    assert seen.commands[1].endswith("--to hf")


def test_clip_qwen_as_it_was_trained() -> None:
    folder = FIXTURES / "clip_qwen/open/checkpoint"
    seen = look(str(folder))
    assert (seen.family, seen.layout, seen.is_complete) == ("clip_qwen", "vlm_learning", True)
    assert seen.facts == {"step": "27000", "LoRA": "rank 4, alpha 32, on c_attn, w1, w2"}
    assert seen.commands[1] == f"lavish convert {folder} DST --to hf --merge-lora"


def test_pieces_of_minigpt4_qwen() -> None:
    folder = FIXTURES / "minigpt4qwen/open/checkpoint"
    heads = {"vision_config": {"num_attention_heads": 4}}
    whole = look(str(folder), heads, {"llm": str(FIXTURES / "qwen/llm")})
    assert (whole.family, whole.layout) == ("minigpt4_qwen", "lavis")
    assert whole.commands[0] == f"lavish chat {folder} --piece llm={FIXTURES / 'qwen/llm'}"
    trained = look(str(folder / "checkpoint_9.pth"))
    assert (trained.family, trained.is_part) == ("minigpt4_qwen", True)
    assert {part.name: part.num_tensors for part in trained.parts}["llm_proj"] == 2
    assert trained.facts == {"weights": "under 'model'", "epoch": "9", "beside them": "optimizer, config, scaler"}
    assert trained.commands[0].endswith("checkpoint_9.pth --piece eva=PATH --piece blip2=PATH --piece llm=PATH")


def test_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (tmp_path / "checkpoint-50").mkdir()
    folder = tmp_path / "checkpoint-50"
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": "org/base"}))
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(8, 3)}, folder / "adapter_model.safetensors")
    seen = look(str(folder))
    assert (seen.layout, seen.num_parameters, seen.is_part) == ("peft", 24, True)
    assert seen.facts == {"step": "50", "LoRA": "rank 8, alpha 16, on q_proj", "base": "org/base"}
    assert seen.commands[0] == f"lavish chat {folder} --base BASE"
    assert main(["inspect", str(folder)]) == 0
    assert "LoRA" in capsys.readouterr().out


def test_files_of_lavis() -> None:
    blip = look(str(FIXTURES / "blip_vqa/open/checkpoint"))
    assert (blip.family, blip.layout, blip.is_part) == ("blip", "lavis", True)
    assert "how many heads" in blip.notes[0]
    assert blip.commands[0].endswith("--image FILE --config FILE")
    dialogue = look(str(FIXTURES / "gpt_dialogue/open/checkpoint/checkpoint_best.pth"))
    assert (dialogue.family, dialogue.layout, dialogue.is_complete) == ("gpt_dialogue", "lavis", True)


def test_what_a_folder_can_be_converted_to() -> None:
    assert look(str(COGVLM)).commands[1].endswith("DST --to mindspore")
    assert look(str(FIXTURES / "cogvlm/open/checkpoint")).commands[1].endswith("DST --to sat")


def test_a_hostile_shard_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shards(tmp_path / "run", 2, change=lambda trees: next(iter(trees.values())).update(x=Path("x")))
    assert main(["inspect", str(folder)]) == 2
    assert "nothing of it was run" in " ".join(capsys.readouterr().err.split())
