"""DeepSpeed's shards of every family's network load as the network itself does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from zero_files import write_zero

import lavish
from lavish.common.errors import CheckpointError, ConfigError, MissingKeys
from lavish.inference.convert import convert

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MINIGPT4 = {"llm": FIXTURES / "qwen/llm", "config": {"vision_config": {"num_attention_heads": 4}}}
CHAT: dict[str, tuple[str, dict[str, Any]]] = {
    "cogvlm": ("cogvlm2", {}),
    "glm4v_9b": ("glm4v", {}),
    "minigpt4_qwen": ("minigpt4qwen", MINIGPT4),
    "clip_qwen": ("clip_qwen", {}),
}
BLIP = {
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
# peft 0.21 asks transformers 5.23 under the attribute's old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def tiny(family: str) -> Any:
    name, options = CHAT[family]
    loaded = lavish.load(FIXTURES / name / "open/checkpoint", device="cpu", **options)
    if loaded.adapters:
        loaded.merge_adapter()
    return loaded


def shards(folder: Path, network: torch.nn.Module, *, prefix: str = "", **options: Any) -> Path:
    """Write the network as DeepSpeed does: its own tensors in float32, tied ones once."""
    tensors = {prefix + name: value.detach() for name, value in network.state_dict().items()}
    firsts: dict[int, str] = {}
    for name, value in network.state_dict(keep_vars=True).items():
        firsts.setdefault(id(value), prefix + name)
    tied = {prefix + n: firsts[id(v)] for n, v in network.state_dict(keep_vars=True).items()}
    shared = {name: first for name, first in tied.items() if name != first}
    buffers = tuple(prefix + name for name, _ in network.named_buffers() if prefix + name in tensors)
    return write_zero(folder, tensors, shared=shared, buffers=buffers, dtype=torch.float32, **options)


def question() -> list[dict[str, Any]]:
    picture = Image.effect_noise((40, 40), 60).convert("RGB")
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]


@pytest.mark.parametrize(("family", "stage"), [(name, 2 + index % 2) for index, name in enumerate(CHAT)])
def test_a_chat_network(tmp_path: Path, family: str, stage: int) -> None:
    """As a trainer of transformers leaves it: config, tokenizer and processor beside `latest`."""
    loaded = tiny(family)
    loaded.model.config.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    shards(tmp_path, loaded.model, stage=stage, num_processes=3)
    for path in (tmp_path, tmp_path / "global_step2"):
        again = lavish.load(path, device="cpu")
        for name, value in loaded.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], value), name
    asked = question()
    expected = loaded.chat(asked, max_new_tokens=4, do_sample=False).token_ids
    assert again.chat(asked, max_new_tokens=4, do_sample=False).token_ids == expected


def test_without_a_config(tmp_path: Path) -> None:
    loaded = tiny("cogvlm")
    loaded.processor.save_pretrained(tmp_path / "tokenizer")
    folder = shards(tmp_path / "run", loaded.model, stage=3, prefix="module.")
    with pytest.raises(ConfigError, match=r"hold no config\. Put the network's config\.json beside 'latest'"):
        lavish.load(folder, tokenizer=tmp_path / "tokenizer")
    config = json.loads((FIXTURES / "cogvlm2/open/checkpoint/config.json").read_text())
    for given in (config, FIXTURES / "cogvlm2/open/checkpoint/config.json"):
        again = lavish.load(folder, config=given, tokenizer=tmp_path / "tokenizer", device="cpu")
        assert torch.equal(again.model.lm_head.weight, loaded.model.lm_head.weight)
    (folder / "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(MissingKeys, match="1 of the 2 processes' shards are absent"):
        lavish.load(folder, config=config, tokenizer=tmp_path / "tokenizer")


@pytest.mark.parametrize("with_config", [True, False])
def test_a_blip_network(tmp_path: Path, with_config: bool) -> None:
    folder = FIXTURES / "blip_caption/open/checkpoint"
    loaded = lavish.load(folder, config={"vision_config": BLIP, **_med(folder)}, device="cpu")
    if with_config:
        loaded.model.config.architectures = ["BlipForConditionalGeneration"]
        loaded.model.config.save_pretrained(tmp_path)
        loaded.processor.save_pretrained(tmp_path)
    run = shards(tmp_path, loaded.model, stage=2, prefix="network.")
    options: dict[str, Any] = {}
    if not with_config:
        options = {"config": {"vision_config": BLIP, **_med(folder)}, "tokenizer": folder / "bert-base-uncased"}
    for path in (run, run / "global_step2"):
        again = lavish.load(path, device="cpu", **options)
        for name, value in loaded.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], value), name


def _med(folder: Path) -> dict[str, Any]:
    med = json.loads((folder / "med_config.json").read_text())
    return {"text_config": {"num_attention_heads": med["num_attention_heads"]}}


def test_a_dialogue_network(tmp_path: Path) -> None:
    folder = FIXTURES / "gpt_dialogue/open/checkpoint"
    loaded = lavish.load(folder / "checkpoint_best.pth", device="cpu")
    loaded.samples.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/model.safetensors").unlink()
    run = shards(tmp_path / "saved", loaded.model, stage=3)
    for path in (run, run / "global_step2"):
        again = lavish.load(path, device="cpu")
        for name, value in loaded.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], value), name


@pytest.mark.parametrize(("family", "stage"), [("cogvlm", 3), ("minigpt4_qwen", 2), ("clip_qwen", 1)])
def test_they_convert(tmp_path: Path, family: str, stage: int) -> None:
    """To a Hugging Face folder, in the precision of the optimizer or another, config and tokenizer beside it."""
    loaded = tiny(family)
    run = tmp_path / "run"
    loaded.model.config.save_pretrained(run)
    loaded.processor.save_pretrained(run)
    shards(run, loaded.model, stage=stage)
    report = convert(run, tmp_path / "hf", verify=True)
    assert (report.layout, report.family) == ("deepspeed", family)
    again = lavish.load(tmp_path / "hf", device="cpu")
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    convert(run / "global_step2", tmp_path / "half", dtype="bf16")
    half = lavish.load(tmp_path / "half", device="cpu")
    assert torch.equal(half.model.lm_head.weight, loaded.model.lm_head.weight.bfloat16())
    if family == "minigpt4_qwen":  # what was trained with DeepSpeed goes to the release's own programs again
        convert(run, tmp_path / "pieces", "lavis", verify=True)


def test_they_convert_with_a_config_given(tmp_path: Path) -> None:
    loaded = tiny("cogvlm")
    run = shards(tmp_path / "run", loaded.model, stage=3, prefix="module.")
    with pytest.raises(ConfigError, match="hold no config"):
        convert(run, tmp_path / "hf")
    release = FIXTURES / "cogvlm2/open/checkpoint"
    convert(run, tmp_path / "hf", config=release / "config.json", tokenizer=release, verify=True)
    again = lavish.load(tmp_path / "hf", device="cpu")
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_blip_s_shards_convert(tmp_path: Path) -> None:
    folder = FIXTURES / "blip_caption/open/checkpoint"
    loaded = lavish.load(folder, config={"vision_config": BLIP, **_med(folder)}, device="cpu")
    run = shards(tmp_path / "run", loaded.model, stage=2, prefix="network.")
    options: dict[str, Any] = {"config": {"vision_config": BLIP, **_med(folder)}}
    shutil.copytree(folder / "bert-base-uncased", run / "bert-base-uncased")
    for to in ("hf", "lavis"):
        if to == "lavis":
            convert(tmp_path / "hf", tmp_path / to, to)
        else:
            convert(run, tmp_path / to, to, verify=True, **options)
        again = lavish.load(tmp_path / to, device="cpu")
        for name, value in loaded.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], value), name


def test_an_adapter_in_the_shards_is_not_lost(tmp_path: Path) -> None:
    tensors = {"base_model.model.lm_head.base_layer.weight": torch.ones(3, 2)}
    tensors["base_model.model.lm_head.lora_A.default.weight"] = torch.ones(1, 2)
    folder = write_zero(tmp_path / "run", tensors, stage=2)
    (folder / "config.json").write_bytes((FIXTURES / "cogvlm2/open/checkpoint/config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"with a LoRA on it .* adapter_config\.json, and base="):
        lavish.load(folder)
