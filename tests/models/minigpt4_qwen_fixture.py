"""Reader of the golden fixture of MiniGPT4-Qwen. Its LLM is the one that the tests of `nn/qwen.py` use."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import lavish
from lavish.models.minigpt4_qwen.config import MiniGPT4QwenConfig, read_config
from lavish.models.minigpt4_qwen.model import MiniGPT4QwenForConditionalGeneration
from lavish.models.minigpt4_qwen.processor import MiniGPT4QwenProcessor
from lavish.models.minigpt4_qwen.weights import open_release

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER = FIXTURES / "minigpt4qwen/open"
CHECKPOINT = FOLDER / "checkpoint"
TRAINED = CHECKPOINT / "checkpoint_9.pth"
HEADS = {"vision_config": {"num_attention_heads": 4}}
"""What no file of the fixture says: the released tower has 16 heads at 1408 wide."""
PIECES = {
    "eva": CHECKPOINT / "eva/eva_vit_g.pth",
    "blip2": CHECKPOINT / "blip2/blip2_pretrained_flant5xxl.pth",
    "qformer": CHECKPOINT / "bert-base-uncased",
    "llm": FIXTURES / "qwen/llm",
}
SEQ_LENGTH = 96


@cache
def expected() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "expected.safetensors")


@cache
def facts() -> dict[str, Any]:
    return json.loads((FOLDER / "expected.json").read_text())


@cache
def prompts() -> dict[str, Any]:
    return json.loads((FOLDER / "inputs/prompts.json").read_text())


def picture(index: int) -> Path:
    return FOLDER / "inputs" / prompts()["images"][index]


@cache
def vlm() -> Any:
    """One model for all tests that only read it."""
    return lavish.load(TRAINED, config=HEADS, **PIECES)


def shared_network() -> MiniGPT4QwenForConditionalGeneration:
    return vlm().model


def processor() -> MiniGPT4QwenProcessor:
    return vlm().processor


def own_network() -> MiniGPT4QwenForConditionalGeneration:
    """A network with the fixture's weights, for tests that change it."""
    network = MiniGPT4QwenForConditionalGeneration(config())
    network.load_state_dict(shared_network().state_dict())
    return network.eval()


def config(**overrides: Any) -> MiniGPT4QwenConfig:
    vision = {**HEADS["vision_config"], **overrides.pop("vision_config", {})}
    return read_config(open_release(TRAINED, PIECES).fields, "here", vision_config=vision, **overrides)


def side_by_side(folder: Path) -> Path:
    """A folder that holds all pieces, as the fixture was made."""
    shutil.copytree(CHECKPOINT, folder, dirs_exist_ok=True)
    shutil.copytree(PIECES["llm"], folder / "llm")
    return folder


def messages(history: list[tuple[str, str]], query: str, images: list[Any]) -> list[dict[str, Any]]:
    """A chat of the fixture: its questions say with `<ImageHere>` where the images stand."""
    left, spoken = list(images), []
    for question, answer in [*history, (query, None)]:
        here = [left.pop(0) for _ in range(question.count("<ImageHere>"))]
        parts = [{"type": "image", "image": image} for image in here]
        spoken.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        if answer is not None:
            spoken.append({"role": "assistant", "content": answer})
    return spoken


def chats() -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """The six turns: the messages of each, and what the release gave. The history holds the release's answers."""
    found = []
    for chat in facts()["chat"]:
        images = [picture(index) for index in chat["images"]]
        history: list[tuple[str, str]] = []
        for turn in chat["turns"]:
            found.append((messages(history, turn["query"], images), turn))
            history.append((turn["query"], turn["response"]))
    return found


def training_batch() -> dict[str, torch.Tensor]:
    batch = processor().preprocess(prompts()["conversations_train"], prompts()["max_txt_len"])
    order = [index for row in prompts()["conversation_images"] for index in row]
    inputs = {name: batch[name] for name in ("input_ids", "labels", "attention_mask")}
    return {**inputs, "pixel_values": expected()["pixel_values"][order]}
