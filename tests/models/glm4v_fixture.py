"""Reader of the golden fixture of GLM-4V-9B for the tests of this folder."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from lavish.models.glm4v_9b.config import ChatGLMConfig, read_config
from lavish.models.glm4v_9b.model import Glm4v9bForCausalLM

ROOT = Path(__file__).parents[1] / "fixtures/glm4v"
FOLDER = ROOT / "open"
CHECKPOINT, INPUTS = FOLDER / "checkpoint", FOLDER / "inputs"
BOI, EOI, PAD, USER, ASSISTANT = 510, 511, 500, 507, 508
NUM_PATCHES = 9
CASES = (
    "single_image",
    "text_only",
    "multi_turn",
    "system_image",
    "image_second_turn",
    "empty_text_image",
    "special_text",
)
IMAGE_CASES = tuple(name for name in CASES if name not in ("text_only", "special_text"))


@cache
def expected() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "expected.safetensors")


@cache
def expected_json() -> dict:
    return json.loads((FOLDER / "expected.json").read_text())


def config_dict() -> dict:
    return json.loads((CHECKPOINT / "config.json").read_text())


def config(**overrides) -> ChatGLMConfig:
    return read_config(config_dict(), str(CHECKPOINT / "config.json"), **overrides)


@cache
def weights() -> dict[str, torch.Tensor]:
    shards = sorted(CHECKPOINT.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def network(**overrides) -> Glm4v9bForCausalLM:
    """A network of its own, with the fixture's weights; for tests that change it."""
    made = Glm4v9bForCausalLM(config(**overrides)).eval()
    made.load_state_dict(weights())
    return made


@cache
def shared_network() -> Glm4v9bForCausalLM:
    """One network for all tests that only read it."""
    return network()


def expand(row: list[int], filler: int = PAD) -> list[int]:
    """Write the three ids of an image as the release's tokenizer has them as one id for each slot."""
    if BOI not in row:
        return row
    at = row.index(BOI)
    return row[: at + 1] + [filler] * NUM_PATCHES + row[at + 2 :]


def inputs(*cases: str) -> dict[str, torch.Tensor]:
    """One case, or several padded on the left, as the network takes them."""
    rows = [expand(expected()[f"{case}.input_ids"][0].tolist()) for case in cases]
    width = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([[PAD] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
    images = [expected()[f"{case}.images"] for case in cases if f"{case}.images" in expected()]
    return batch | ({"pixel_values": torch.cat(images)} if images else {})


def conversations() -> dict[str, list[dict]]:
    """The messages of every case, with the paths of their pictures."""
    found = json.loads((INPUTS / "prompts.json").read_text())
    return {name: [_with_path(message) for message in messages] for name, messages in found.items()}


def finetune_samples() -> list[list[dict]]:
    found = json.loads((INPUTS / "finetune.json").read_text())
    return [[_with_path(message) for message in messages] for messages in found]


def _with_path(message: dict) -> dict:
    return {**message, "image": str(INPUTS / message["image"])} if "image" in message else message
