"""The golden BLIP fixtures: LAVIS's own classes on transformers 4.26.1, tiny random weights (facts.json of each)."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from lavish.models import load_model

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
TYPES = {"blip_caption": "base_coco", "blip_vqa": "vqav2", "blip_feature_extractor": "base"}
CONFIG = {
    "vision_config": {
        "image_size": 64,
        "patch_size": 16,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
}
"""What no LAVIS file records; the text half is in med_config.json beside it."""
MAX_TXT_LEN = {"blip_caption": 12, "blip_vqa": 10, "blip_feature_extractor": 30}


def folder(name: str) -> Path:
    return FIXTURES / name / "open"


def checkpoint(name: str) -> Path:
    return next((folder(name) / "checkpoint").glob("*.pth"))


def tokenizer(name: str) -> Path:
    return folder(name) / "checkpoint" / "bert-base-uncased"


@cache
def expected(name: str) -> dict[str, torch.Tensor]:
    return load_file(folder(name) / "expected.safetensors")


@cache
def facts(name: str) -> dict[str, Any]:
    return json.loads((folder(name) / "expected.json").read_text(encoding="utf-8"))


@cache
def prompts(name: str) -> dict[str, Any]:
    return json.loads((folder(name) / "inputs" / "prompts.json").read_text(encoding="utf-8"))


def pictures(name: str) -> list[Image.Image]:
    return [Image.open(folder(name) / "inputs" / file).convert("RGB") for file in prompts(name)["images"]]


def load(name: str, **options: Any) -> Any:
    """Load the fixture's model anew, ready to be compared: no dropout."""
    config = {**CONFIG, "max_txt_len": MAX_TXT_LEN[name], **options.pop("config", {})}
    file = options.pop("checkpoint", checkpoint(name))
    return load_model(name, TYPES[name], is_eval=True, checkpoint=file, config=config, **options)


@cache
def model(name: str) -> Any:
    """The fixture's model, which tests must leave as it is."""
    return load(name)
