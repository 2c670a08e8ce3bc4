"""Reader of the golden fixture of CLIP + Qwen for the tests of this folder."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import lavish
from lavish.models.clip_qwen.model import ClipQwenForConditionalGeneration
from lavish.models.clip_qwen.processor import ClipQwenProcessor

FIXTURE = Path(__file__).parents[1] / "fixtures/clip_qwen"
OPEN = FIXTURE / "open"
RELEASE = OPEN / "checkpoint"
IMAGES = OPEN / "inputs/images"
TRAINED, LLM, TOWER = (RELEASE / name for name in ("checkpoint-27000", "Qwen-7B-Chat", "clip-vit-large-patch14"))
EXPECTED = json.loads((OPEN / "expected.json").read_text())
PROMPTS = {prompt["name"]: prompt for prompt in json.loads((OPEN / "inputs/prompts.json").read_text())["prompts"]}
IMAGE, END_OF_TEXT, IM_START, IM_END = 559, 556, 557, 558
PLACE = "<|extra_0|>"


@cache
def tensors() -> dict[str, torch.Tensor]:
    return load_file(OPEN / "expected.safetensors")


def load(kind: str = "lora", **options: Any) -> Any:
    """The release as `base` (its projector, no LoRA), `lora` or `merged`; for tests that change it."""
    vlm = lavish.load(RELEASE, **options)
    if kind == "base":
        vlm.model.unload()
        return lavish.inference.vlm.VLM(vlm.model.get_base_model(), vlm.processor, eos_token_ids=[END_OF_TEXT])
    if kind == "merged":
        network = vlm.model.merge_and_unload()
        return lavish.inference.vlm.VLM(network, vlm.processor, eos_token_ids=[END_OF_TEXT])
    return vlm


@cache
def shared(kind: str = "lora") -> Any:
    """One for all tests that only read it."""
    return load(kind)


def network(kind: str = "base") -> ClipQwenForConditionalGeneration:
    return shared(kind).model


def processor() -> ClipQwenProcessor:
    return shared().processor


def content(text: str, image: Any) -> str | list[dict[str, Any]]:
    """A fixture's text, with the picture where its token stands."""
    if PLACE not in text:
        return text
    before, after = text.split(PLACE)
    parts: list[dict[str, Any]] = [{"type": "text", "text": before}] if before else []
    parts.append({"type": "image", "image": image})
    return [*parts, {"type": "text", "text": after}] if after else parts


def messages(name: str) -> list[dict[str, Any]]:
    prompt = PROMPTS[name]
    image = None if prompt["image"] is None else str(IMAGES / prompt["image"])
    made: list[dict[str, Any]] = [{"role": "system", "content": prompt["system"]}]
    for question, answer in [*prompt["history"], (prompt["query"], None)]:
        made.append({"role": "user", "content": content(question, image)})
        if answer is not None:
            made.append({"role": "assistant", "content": answer})
    return made


def training_messages() -> list[list[dict[str, Any]]]:
    """The four captions, as conversations."""
    captions = json.loads((OPEN / "inputs/captions.json").read_text())
    return [
        [
            {"role": "user", "content": content(entry["q"], str(IMAGES / f"img{name}.png"))},
            {"role": "assistant", "content": entry["a"][0]},
        ]
        for name, entry in captions.items()
    ]


def with_one_slot(ids: list[int]) -> list[int]:
    """Ids as the release holds them: one image token instead of all slots."""
    return [token for index, token in enumerate(ids) if token != IMAGE or ids[index - 1] != IMAGE]


def expanded(row: list[int], num_slots: int = 16) -> list[int]:
    return [token for token in row for _ in range(num_slots if token == IMAGE else 1)]
