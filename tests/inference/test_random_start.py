"""A start without weights: `init: random` of any family, `init: random_projector` of a release in pieces."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lavish
from lavish.common.errors import CheckpointError, ConfigError, UnknownLayout
from lavish.common.registry import registry
from lavish.inference.random_start import random_model, with_random_projector

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
PROJECTS = Path(__file__).resolve().parents[2] / "projects"
TINY = PROJECTS / "glm4v_9b/tiny"
MINIGPT4 = FIXTURES / "minigpt4qwen/open/checkpoint"
MINIGPT4_PIECES = {
    "eva": MINIGPT4 / "eva/eva_vit_g.pth",
    "blip2": MINIGPT4 / "blip2/blip2_pretrained_flant5xxl.pth",
    "qformer": MINIGPT4 / "bert-base-uncased",
    "llm": FIXTURES / "qwen/llm",
}
HEADS = {"vision_config": {"num_attention_heads": 4}}
CLIP = FIXTURES / "clip_qwen/open/checkpoint"
CLIP_PIECES = {"llm": CLIP / "Qwen-7B-Chat", "vision_tower": CLIP / "clip-vit-large-patch14"}


def chat(**section: Any) -> Any:
    return registry.get_model_class("chat").from_config({"train": ["all"], **section})


def state(vlm: Any) -> dict[str, torch.Tensor]:
    return vlm.model.state_dict()


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(first[name], value) for name, value in second.items())


def test_the_seed_says_the_weights(tmp_path: Path) -> None:
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(state(random_model(TINY)))
        torch.manual_seed(seed)
        drawn = torch.rand(1)
        torch.manual_seed(seed)
        random_model(TINY)
        assert torch.equal(torch.rand(1), drawn), "the random state is left alone"
    assert same(made[0], made[1])
    assert not same(made[0], made[2])


@pytest.mark.parametrize("family", ["clip_qwen", "glm4v_9b", "minigpt4_qwen"])
def test_what_was_made_is_saved_and_opened(family: str, tmp_path: Path) -> None:
    model = chat(path=str(PROJECTS / family / "tiny"), init="random")
    for name, weight in model.network.named_parameters():
        assert weight.requires_grad
        assert weight.isfinite().all()
        assert weight.ndim < 2 or weight.std() > 5e-3, f"{name} says nothing"
    model.save_trained(tmp_path)
    again = lavish.load(tmp_path, device="cpu")
    assert same(state(again), model.network.state_dict())
    assert again._eos_token_ids
    assert again._eos_token_ids == model.vlm._eos_token_ids
    said = [{"role": "user", "content": "what color?"}]
    short = {"max_new_tokens": 3}
    assert again.chat(said, **short).token_ids == model.vlm.chat(said, **short).token_ids


def test_fields_and_dtype_are_replaced() -> None:
    fields = {"num_layers": 1, "vision_config": {"image_size": 48}}
    vlm = random_model(TINY, config=fields, dtype="bfloat16")
    assert (vlm.model.dtype, vlm.model.config.dtype) == (torch.bfloat16, torch.bfloat16)
    assert vlm.model.config.num_hidden_layers == 1
    assert vlm.processor.image_size == 48
    model = chat(path=str(TINY), init="random", config=fields)
    assert len(model.network.transformer.encoder.layers) == 1
    with pytest.raises(ConfigError, match=r"'num_layer' is no field.*Did you mean 'num_layers'"):
        random_model(TINY, config={"num_layer": 1})


def test_a_release_is_begun_anew() -> None:
    """Weights that lie in the folder are not read."""
    folder = FIXTURES / "glm4v/open/checkpoint"
    stored, made = (state(one) for one in (lavish.load(folder, device="cpu"), random_model(folder)))
    assert stored.keys() == made.keys()
    assert not any(
        torch.equal(stored[name], made[name])
        for name in stored
        if "norm" not in name and "bias" not in name and "inv_freq" not in name
    )


def test_folders_that_cannot_be_begun_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        random_model(tmp_path / "nothing")
    with pytest.raises(UnknownLayout, match="a folder of no layout"):
        random_model(tmp_path)
    shutil.copy(TINY / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer; looked for tokenizer\.model"):
        random_model(tmp_path)
    assert random_model(tmp_path, tokenizer=TINY).model.config.vocab_size == random_model(TINY).model.config.vocab_size
    fields = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "hidden_size": "wide"}))
    with pytest.raises(ConfigError, match="hidden_size is 'wide'"):
        random_model(tmp_path, tokenizer=TINY)
    blip = {"model_type": "blip", "architectures": ["BlipForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(blip))
    with pytest.raises(ConfigError, match="holds no conversation"):
        random_model(tmp_path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"init": "random"}, r"model\.path is null; name one"),
        ({"init": "random", "path": str(TINY), "pieces": {"llm": "x"}}, r"leave model\.pieces out"),
        ({"init": "random", "path": str(TINY), "base": "x"}, r"leave model\.base out"),
        ({"init": "noise", "path": str(TINY)}, "random_projector"),
        ({"init": "random_projector", "train": ["decoder"]}, "put projector into model.train"),
        ({"init": "random_projector", "freeze": ["projector"]}, "put projector into model.train"),
    ],
)
def test_sections_that_contradict_themselves(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chat(**section)


# -- a projector alone


def texts(pieces: dict[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in pieces.items()}


def test_the_projector_of_minigpt4_qwen_starts_random() -> None:
    trained = lavish.load(MINIGPT4, llm=MINIGPT4_PIECES["llm"], config=HEADS, device="cpu")
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        section = {"train": ["projector"], "pieces": texts(MINIGPT4_PIECES), "config": HEADS}
        made.append(chat(init="random_projector", **section).vlm)
    torch.manual_seed(1)
    # Of a folder that has what was trained, that is not read.
    made.append(with_random_projector(MINIGPT4, {"llm": MINIGPT4_PIECES["llm"]}, config=HEADS))
    states = [state(one) for one in made]
    differs = {name for name, value in state(trained).items() if not torch.equal(states[0][name], value)}
    assert differs == {"projector.weight", "projector.bias"}
    assert same(states[0], states[1])
    assert same(states[0], states[3])
    assert not torch.equal(states[0]["projector.weight"], states[2]["projector.weight"])
    assert states[0]["projector.weight"].std() > 0.01


def test_the_projector_of_clip_qwen_starts_as_in_the_release(tmp_path: Path) -> None:
    for name, path in CLIP_PIECES.items():
        (tmp_path / name).symlink_to(path)
    for made in (with_random_projector(None, CLIP_PIECES), with_random_projector(tmp_path, {})):
        found = state(made)
        assert not found["projector.0.bias"].any()
        assert found["projector.2.weight"].std() == pytest.approx(0.01, rel=0.1)
    stored = lavish.load(CLIP, device="cpu")
    assert torch.equal(found["lm_head.weight"], stored.model.get_base_model().state_dict()["lm_head.weight"])


@pytest.mark.parametrize(
    ("path", "pieces", "message"),
    [
        (None, {}, "names no release in pieces"),
        (TINY, {}, "names no release in pieces.*trained on from what it is"),
        (None, {"llms": "x"}, "'llms' is no piece"),
        (None, {"eva": MINIGPT4_PIECES["eva"], "vision_tower": CLIP_PIECES["llm"]}, "is no piece of"),
        (None, {"eva": MINIGPT4_PIECES["eva"]}, "the piece 'blip2' is absent"),
        (MINIGPT4 / "checkpoint_9.pth", MINIGPT4_PIECES, "a piece that was trained"),
        (None, {"llm": CLIP_PIECES["llm"], "vision_tower": CLIP_PIECES["llm"]}, "model_type 'qwen'"),
    ],
)
def test_what_has_no_projector_to_begin(path: Path | None, pieces: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        with_random_projector(path, pieces)
