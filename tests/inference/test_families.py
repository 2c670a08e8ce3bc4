"""What every chat family can do alike: batches, next turns, several pictures, int8, adapters, on the tiny releases."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lavish
from lavish.common.errors import ConfigError, MediaError, PromptError, UnknownLayout
from lavish.models import FAMILIES

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
GENERATION = {"max_new_tokens": 10, "do_sample": False}
# peft 0.21 asks transformers 5.23 under the attribute's old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@dataclass
class Tiny:
    """A tiny release of one family."""

    folder: Path
    max_images: int = 1
    """Most pictures of one conversation."""
    options: dict[str, Any] = field(default_factory=dict)
    """What its files do not say."""


MINIGPT4 = {"llm": FIXTURES / "qwen/llm", "config": {"vision_config": {"num_attention_heads": 4}}}
TINY = {
    "glm4v_9b": Tiny(FIXTURES / "glm4v/open/checkpoint"),
    "minigpt4_qwen": Tiny(FIXTURES / "minigpt4qwen/open/checkpoint", 9, MINIGPT4),
    "clip_qwen": Tiny(FIXTURES / "clip_qwen/open/checkpoint"),
    "cogvlm": Tiny(FIXTURES / "cogvlm2/open/checkpoint"),
}


def load_tiny(name: str, **options: Any) -> "lavish.VLM":
    return lavish.load(TINY[name].folder, device="cpu", **TINY[name].options, **options)


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def loaded() -> Callable[[str], "lavish.VLM"]:
    kept: dict[str, Any] = {}

    def load(name: str) -> "lavish.VLM":
        if name not in kept:
            kept[name] = load_tiny(name)
        one = kept[name]
        one.features.clear()
        one.conversations.clear()
        return one

    return load


def ask(text: str, *pictures: int) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": picture(seed)} for seed in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def conversations(name: str) -> list[list[dict[str, Any]]]:
    many = [ask("And these?", 0, 1, 0)] if TINY[name].max_images > 1 else []
    return [
        ask("What is in the picture?", 0),
        ask("Hello"),
        ask("A longer question: how many things are there, and where does each of them stand?", 1),
        [*ask("Name it.", 1), {"role": "assistant", "content": "a thing"}, *ask("Its colour?")],
        *many,
    ]


def test_every_chat_family_is_tested_here():
    assert set(TINY) == {row.name for row in FAMILIES if "chat" in row.capabilities}


@pytest.mark.parametrize("name", TINY)
def test_a_batch_is_its_single_runs(loaded, name):
    one = loaded(name)
    singles = [one.chat(messages, **GENERATION) for messages in conversations(name)]
    for size in (2, 8):
        one.features.clear()
        replies = one.batch(conversations(name), batch_size=size, **GENERATION)
        assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in singles]
        assert [reply.text for reply in replies] == [reply.text for reply in singles]


@pytest.mark.parametrize("name", TINY)
def test_answers_are_those_of_generate(loaded, name):
    one = loaded(name)
    for messages in conversations(name):
        inputs = one.processor.apply_chat_template(messages, padding_side="left")
        with torch.no_grad():
            ids = one.model.generate(**inputs, **GENERATION, eos_token_id=sorted(one._eos_token_ids))
        expected = ids[0, inputs["input_ids"].shape[1] :].tolist()
        assert one.chat(messages, **GENERATION).token_ids == expected


@pytest.mark.parametrize("name", TINY)
def test_the_next_turn_reuses_the_cache_and_answers_the_same(loaded, name):
    one = loaded(name)
    first = conversations(name)[0]
    one.chat(first, **GENERATION)
    longer = [*first, {"role": "assistant", "content": "a thing"}, *ask("Its colour?")]
    again = one.chat(longer, **GENERATION)
    one.conversations.clear()
    fresh = one.chat(longer, **GENERATION)
    assert again.token_ids == fresh.token_ids
    assert fresh.usage.cached_tokens == 0


@pytest.mark.parametrize("name", TINY)
def test_streams_captions_and_answers(loaded, name):
    one = loaded(name)
    messages = conversations(name)[0]
    image = messages[0]["content"][0]["image"]
    text = one.chat(messages, **GENERATION).text
    assert "".join(one.stream(messages, **GENERATION)) == text
    assert one.answer(image, "What is in the picture?", **GENERATION) == text
    assert isinstance(one.caption(image, **GENERATION), str)
    with pytest.raises(ConfigError, match="has no embeddings"):
        one.embed([image])


@pytest.mark.parametrize("name", TINY)
def test_too_many_pictures_are_refused_in_numbers(loaded, name):
    if TINY[name].max_images == 1:
        with pytest.raises(PromptError, match="2"):
            loaded(name).chat(ask("Both?", 0, 1))


@pytest.mark.parametrize("name", TINY)
def test_an_int8_network_answers_is_saved_and_loads_again(name, tmp_path):
    merge = {"clip_qwen": True}.get(name, False)  # its release is an adapter, which is merged first
    one = load_tiny(name)
    if merge:
        one.merge_adapter()
    one.model.save_pretrained(tmp_path / "whole")
    one.processor.save_pretrained(tmp_path / "whole")
    int8 = lavish.load(tmp_path / "whole", device="cpu", quantization="int8")
    messages = conversations(name)[0]
    reply = int8.chat(messages, **GENERATION)
    kinds = {type(layer).__name__ for layer in int8.model.modules()}
    assert "Int8Linear" in kinds
    int8.model.save_pretrained(tmp_path / "int8")
    int8.processor.save_pretrained(tmp_path / "int8")
    again = lavish.load(tmp_path / "int8", device="cpu")
    assert again.chat(messages, **GENERATION).token_ids == reply.token_ids
    inputs = one.processor.apply_chat_template(messages)
    with torch.no_grad():
        near, exact = int8.model(**inputs).logits, one.model(**inputs).logits
    assert torch.nn.functional.cosine_similarity(near.flatten(), exact.flatten(), dim=0) > 0.98


def test_a_text_only_chatglm_is_refused_by_name(tmp_path):
    fields = json.loads((TINY["glm4v_9b"].folder / "config.json").read_text())
    fields.pop("vision_config")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UnknownLayout, match="names 'chatglm' and has no 'vision_config': a text-only model"):
        lavish.load(tmp_path, device="cpu")


@pytest.mark.parametrize("name", TINY)
def test_bad_pictures(loaded, name, tmp_path):
    (tmp_path / "img.png").write_bytes(b"no picture")
    content = [{"type": "image", "image": str(tmp_path / "img.png")}, {"type": "text", "text": "?"}]
    with pytest.raises(MediaError):
        loaded(name).chat([{"role": "user", "content": content}])


def test_the_context_of_glm4v_is_counted_in_positions():
    """A picture takes three positions, however many slots it has; the last position may be used."""
    messages, free = ask("Hello", 0), load_tiny("glm4v_9b")
    inputs = free.processor.apply_chat_template(messages)
    slots = inputs["input_ids"].shape[1]
    prompt = int(free.model.position_ids_from(inputs["input_ids"], None)[0, -1]) + 1
    assert prompt == slots - free.processor.num_image_tokens + 3 < slots
    expected = free.chat(messages, max_new_tokens=4).token_ids
    tight = lavish.load(TINY["glm4v_9b"].folder, device="cpu", config={"seq_length": prompt + 4})
    assert tight.chat(messages, max_new_tokens=4).token_ids == expected
    assert tight.batch([messages], max_new_tokens=4)[0].token_ids == expected
    assert len(tight.chat(messages).token_ids) <= 4
    words = rf"takes {prompt} positions .*max_new_tokens=5 that is more than the {prompt + 4} .*at most 4 new tokens"
    with pytest.raises(PromptError, match=words):
        tight.chat(messages, max_new_tokens=5)
    full = lavish.load(TINY["glm4v_9b"].folder, device="cpu", config={"seq_length": prompt})
    with pytest.raises(PromptError, match=f"takes {prompt} positions"):
        full.chat(messages)
    longer = [*messages, {"role": "assistant", "content": "yes"}, *ask("x")]
    with pytest.raises(PromptError, match="positions"):
        full.batch([ask("Hello"), longer])


def test_the_context_of_the_others_is_counted_in_slots():
    messages = ask("Hello", 0)
    free = load_tiny("cogvlm")
    slots = len(free.processor.apply_chat_template(messages)["input_ids"][0])
    tight = lavish.load(TINY["cogvlm"].folder, device="cpu", config={"max_position_embeddings": slots + 4})
    assert tight.chat(messages, max_new_tokens=4).token_ids == free.chat(messages, max_new_tokens=4).token_ids
    with pytest.raises(PromptError, match=f"has {slots} tokens, image slots included"):
        tight.chat(messages, max_new_tokens=5)


# -- files that would choose what runs ---------------------------------------------------------------------------------

ORDERS = {
    "attn_implementation": "kernels-community/any",
    "_attn_implementation": "kernels-community/any",
    "experts_implementation": "kernels-community/any",
    "attribute_map": {"hidden_size": "other"},
    "num_labels": 1_000_000_000,
}


def give_orders(folder: Path) -> int:
    """Write them into each config of a release, and into its sections."""
    files = [*folder.rglob("config.json"), *folder.rglob("med_config.json")]
    for file in files:
        fields = json.loads(file.read_text())
        sections = {name: {**value, **ORDERS} for name, value in fields.items() if name.endswith("_config")}
        file.write_text(json.dumps({**fields, **sections, **ORDERS}))
    return len(files)


@pytest.mark.parametrize("name", [*TINY, "blip_caption", "gpt_dialogue"])
def test_no_config_chooses_what_runs(name: str, tmp_path: Path) -> None:
    is_chat = name in TINY
    options = dict(TINY[name].options) if is_chat else {}
    if name == "blip_caption":
        options["config"] = MINIGPT4["config"]
    if name == "minigpt4_qwen":
        options["llm"] = shutil.copytree(options["llm"], tmp_path / "llm")
    source = TINY[name].folder if is_chat else FIXTURES / name / "open/checkpoint"
    shutil.copytree(source, tmp_path / "release")
    assert give_orders(tmp_path)
    vlm = lavish.load(tmp_path / "release", device="cpu", **options)
    if vlm.adapters:
        vlm.merge_adapter()
    network = vlm.model
    network.save_pretrained(tmp_path / "saved")
    vlm.processor.save_pretrained(tmp_path / "saved")
    give_orders(tmp_path / "saved")
    again = lavish.load(tmp_path / "saved", device="cpu").model
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())
    assert {module.config._attn_implementation for module in again.modules() if hasattr(module, "config")} <= {
        *("sdpa", "eager", None)
    }
    assert "other" not in again.config.attribute_map.values()


@pytest.mark.parametrize("name", ["minigpt4_qwen", "clip_qwen"])
def test_a_rope_where_there_is_one_table(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"rope='float32' was given, and the family '{name}' has one .* option of cogvlm and"
    ):
        load_tiny(name, rope="float32")


@pytest.mark.parametrize("name", ["minigpt4_qwen", "clip_qwen"])
def test_heads_of_an_odd_width(loaded: Callable[[str], "lavish.VLM"], name: str) -> None:
    family = next(row for row in FAMILIES if row.name == name)
    fields = loaded(name).model.config.to_dict()
    with pytest.raises(ConfigError, match="the rotation pairs the halves of a head"):
        family.read_config(fields, "config.json", text_config={"hidden_size": 60, "num_attention_heads": 4})


def test_no_tokens_give_no_logits(loaded: Callable[[str], "lavish.VLM"]) -> None:
    for name in TINY:
        network = loaded(name).model
        logits = network(input_ids=torch.zeros(1, 0, dtype=torch.long)).logits
        assert logits.shape[:2] == (1, 0)
