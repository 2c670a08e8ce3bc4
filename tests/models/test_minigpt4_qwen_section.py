"""The section `model` of MiniGPT4-Qwen: the keys of MPP-LLaVA's own YAMLs, and a projector that starts random."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from minigpt4_qwen_fixture import HEADS, PIECES, TRAINED, expected, prompts, shared_network

from lavish.common.errors import ConfigError
from lavish.common.registry import registry
from lavish.models import load_model

RELEASED: dict[str, Any] = {
    "load_finetuned": False,
    "load_pretrained": True,
    "finetuned": "",
    "vit_model": "eva_clip_g",
    "image_size": 56,
    "drop_path_rate": 0,
    "use_grad_checkpoint": True,
    "vit_precision": "fp16",
    "freeze_vit": True,
    "unfreeze_pos_embed": False,
    "num_query_token": 4,
    "qformer_text_input": False,
    "freeze_qformer": True,
    "freeze_queries": True,
    "freeze_proj": False,
    "get_lora": False,
    "lora_alpha": 32,
    "lora_r": 8,
    "lora_dropout": 0.05,
    "max_txt_len": 96,
    "autocast_dtype": "bfloat16",
    "enable_autocast": False,
}
"""The section of lavis/projects/instruction_tuning/train.yaml and its like, with the sizes of the fixture."""


def section(**changes: Any) -> dict[str, Any]:
    """The release's section as a recipe has it: over the default YAML, whose pieces bear our names."""
    own = {name: str(PIECES[name]) for name in ("eva", "qformer")}
    theirs = {"pretrained": str(PIECES["blip2"]), "llm_model": str(PIECES["llm"])}
    defaults = {"blip2": "https://example.org/blip2.pth", "llm": "Qwen/Qwen-7B-Chat"}
    return {**defaults, **own, **HEADS, **RELEASED, **theirs, **changes}


def make(**changes: Any) -> Any:
    return registry.get_model_class("minigpt4qwen").from_config(section(**changes))


def test_a_section_of_the_release_is_read_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING):
        model = make()
    assert "The projector starts with random weights, as load_finetuned: false asks." in caplog.text
    found, trained = model.network.state_dict(), shared_network().state_dict()
    assert {name for name in found if not torch.equal(found[name], trained[name])} == {
        "projector.weight",
        "projector.bias",
    }
    learnt = [name for name, weight in model.network.named_parameters() if weight.requires_grad]
    assert learnt == ["projector.weight", "projector.bias"]
    assert model.max_txt_len == 96
    assert model.network.is_activation_checkpointing


def test_pieces_may_lie_below_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVISH_CACHE", str(tmp_path))
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/Qwen7B-chat").symlink_to(PIECES["llm"])
    assert make(llm_model="ckpt/Qwen7B-chat").network.config.text.hidden_size == 64
    with pytest.raises(ConfigError, match=r"ckpt/Qwen14B"):
        make(llm_model="./ckpt/Qwen14B-chat")


def test_it_learns_from_there() -> None:
    torch.manual_seed(3)
    model = make().train()
    order = [index for row in prompts()["conversation_images"] for index in row]
    samples = {"conversations": prompts()["conversations_train"], "image": expected()["pixel_values"][order]}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(samples)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


def test_a_random_projector_is_asked_for_by_name(caplog: pytest.LogCaptureFixture) -> None:
    silent = {"load_finetuned": True}
    with pytest.raises(ConfigError, match=r"on no hub.*init: random_projector"):
        make(**silent)
    with pytest.raises(ConfigError, match="on no hub"):
        make(**silent, finetuned=None)
    torch.manual_seed(3)
    first = make(**silent, init="random_projector").network
    torch.manual_seed(3)
    second = make().network
    assert torch.equal(first.projector.weight, second.projector.weight)
    assert "as init asks" in caplog.text
    trained = make(load_finetuned=True, finetuned=str(TRAINED)).network
    assert torch.equal(trained.projector.weight, shared_network().projector.weight)
    options = {name: str(path) for name, path in PIECES.items()}
    given = load_model("minigpt4qwen", "qwen7b_chat", config=HEADS, checkpoint=TRAINED, load_finetuned=False, **options)
    assert torch.equal(given.network.projector.weight, shared_network().projector.weight), "a checkpoint was given"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "random"}, r"all random is arch: chat with init: random"),
        ({"init": "random_projector", "finetuned": str(TRAINED)}, "leave one out"),
        ({"freeze_proj": True}, "freeze_proj is true"),
        ({"vit_model": "clip_L"}, "vit_model is 'clip_L', and only 'eva_clip_g' has a meaning here: no other tower"),
        ({"drop_path_rate": 0.1}, "drop_path_rate is 0.1"),
        ({"qformer_text_input": True}, "qformer_text_input is True"),
        ({"load_pretrained": False}, "load_pretrained is False"),
        ({"get_lora": True}, r"get_lora is True.*arch: chat, with model\.lora"),
        ({"vit_precision": "int8"}, "vit_precision is 'int8', and only 'fp16' or 'fp32'"),
        ({"autocast_dtype": "float16"}, "autocast_dtype is 'float16'.*run.amp"),
        ({"prompt": "Describe."}, "prompt is 'Describe.'"),
        ({"use_grad_checkpoint": "yes"}, "use_grad_checkpoint is 'yes'"),
        ({"num_query_tokn": 4}, "'num_query_tokn' is no key.*Did you mean 'num_query_token"),
    ],
)
def test_keys_that_have_no_meaning_here(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        make(**changes)


def test_what_learns_is_float32_beside_half_weights(tmp_path: Path) -> None:
    """Steps of 1e-4 would be lost on a bfloat16 projector."""
    import shutil

    from safetensors.torch import load_file, save_file

    llm = shutil.copytree(PIECES["llm"], tmp_path / "llm", copy_function=shutil.copyfile)
    for file in llm.glob("*.safetensors"):
        save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    model = make(llm_model=str(llm), load_finetuned=True, finetuned=str(TRAINED)).train()
    assert model.network.projector.weight.dtype == torch.float32
    assert model.network.lm_head.weight.dtype == torch.bfloat16
    order = [index for row in prompts()["conversation_images"] for index in row]
    images = expected()["pixel_values"][order]
    loss = model({"conversations": prompts()["conversations_train"], "image": images})["loss"]
    loss.backward()
    assert loss.dtype == model.network.projector.weight.grad.dtype == torch.float32
    text = "<Img><ImageHere></Img> What?"
    assert isinstance(model.eval().generate({"image": images[:1], "text": text}, max_new_tokens=2)[0], str)
