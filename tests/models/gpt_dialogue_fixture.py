"""Reader of the golden fixture of GPTDialogue for the tests of this folder."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from lavish.checkpoints import lavis
from lavish.checkpoints.loading import load_into
from lavish.models.gpt_dialogue.config import GPTDialogueConfig, read_config
from lavish.models.gpt_dialogue.model import GPTDialogueLMHeadModel
from lavish.models.gpt_dialogue.processor import GPTDialogueProcessor
from lavish.models.gpt_dialogue.weights import RULES

FIXTURE = Path(__file__).parents[1] / "fixtures" / "gpt_dialogue"
OPEN = FIXTURE / "open"
GPT2, FILE, FEATURES = OPEN / "checkpoint/gpt2", OPEN / "checkpoint/checkpoint_best.pth", OPEN / "inputs/features"
BATCHES = {"train": (0, 3, 5), "eval": (0, 1)}


@cache
def expected() -> dict[str, torch.Tensor]:
    return load_file(OPEN / "expected.safetensors")


@cache
def facts() -> dict:
    return json.loads((OPEN / "expected.json").read_text())


def config(**overrides) -> GPTDialogueConfig:
    file = GPT2 / "config.json"
    return read_config(json.loads(file.read_text()), str(file), **{"len_video_ft": 16, **overrides})


def load(file: Path = FILE, **overrides) -> GPTDialogueLMHeadModel:
    with torch.device("meta"):
        network = GPTDialogueLMHeadModel(config(**overrides))
    assert load_into(network, lavis.read(file), dtype=None, device="cpu", rules=RULES) == []
    return network.eval()


@cache
def network() -> GPTDialogueLMHeadModel:
    """One network for all tests that only read it."""
    return load()


@cache
def processor() -> GPTDialogueProcessor:
    return GPTDialogueProcessor.from_pretrained(GPT2, len_video_ft=16, max_positions=160)


def dialogues() -> list[dict]:
    return json.loads((OPEN / "inputs/annotations.json").read_text())["dialogs"]


def turns(dialogue: dict) -> list[dict]:
    """One sample a turn, with the earlier turns as its history, as the training set is made."""
    return [{**dialogue, "dialog": dialogue["dialog"][:i], **turn} for i, turn in enumerate(dialogue["dialog"])]


@cache
def samples(split: str) -> tuple[dict[str, torch.Tensor], ...]:
    every = [turns(dialogue) for dialogue in dialogues()]
    chosen = [turn for rows in every for turn in rows] if split == "train" else [rows[-1] for rows in every]
    return tuple(processor().sample(one, features=FEATURES) for one in chosen)


def batch(split: str, compat: str | None = None):
    return processor().collate([samples(split)[i] for i in BATCHES[split]], compat=compat)


def prompts(*indices: int, **options):
    """Batch the questions of evaluation dialogues, without their answers, for `generate`."""
    rows = [processor().prompt(samples("eval")[i]) for i in indices]
    made = processor().collate(rows, padding_side="left", **options)
    return {name: tensor for name, tensor in made.items() if name != "labels"}
