"""Reader of the golden fixtures of CogVLM (v1) and CogVLM2 for the tests of this folder."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from lavish.models.cogvlm.config import CogVLMConfig, read_config
from lavish.models.cogvlm.model import CogVLMForCausalLM

FIXTURES = Path(__file__).parents[1] / "fixtures"
FAMILIES = ("cogvlm", "cogvlm2")


class Golden:
    """One fixture: its checkpoint, inputs and expected stages."""

    def __init__(self, family: str):
        self.folder = FIXTURES / family / "open"
        self.expected = json.loads((self.folder / "expected.json").read_text())
        self.tensors = load_file(self.folder / "expected.safetensors")
        prompts = json.loads((self.folder / "inputs/prompts.json").read_text())["prompts"]
        self.images = {prompt["id"]: prompt.get("image") for prompt in prompts}

    def config(self, **overrides) -> CogVLMConfig:
        path = self.folder / "checkpoint/config.json"
        return read_config(json.loads(path.read_text()), str(path), **overrides)

    def weights(self) -> dict[str, torch.Tensor]:
        shards = sorted((self.folder / "checkpoint").glob("*.safetensors"))
        return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}

    def network(self, **overrides) -> CogVLMForCausalLM:
        """A network of its own, with the fixture's weights; for tests that change it."""
        network = CogVLMForCausalLM(self.config(**overrides)).eval()
        network.load_state_dict(self.weights())
        return network

    def ids(self) -> list[str]:
        return list(self.images)

    def pixels(self, *prompt_ids: str) -> torch.Tensor | None:
        images = [self.tensors[f"pixels.{self.images[name]}"] for name in prompt_ids if self.images[name]]
        return torch.stack(images) if images else None

    def inputs(self, prompt_id: str, *, with_mask: bool = True) -> dict[str, torch.Tensor]:
        """One prompt as the network takes it, a batch of one."""
        keys = ["input_ids", "token_type_ids"] + ["attention_mask"] * with_mask
        inputs = {key: torch.tensor([self.expected[prompt_id][key]]) for key in keys}
        pixels = self.pixels(prompt_id)
        return inputs if pixels is None else inputs | {"pixel_values": pixels}

    def batch(self, name: str) -> dict[str, torch.Tensor]:
        """A batch of expected.json: `batch_left`, `batch_right` or `train`."""
        entry = self.expected[name]
        keys = [key for key in ("input_ids", "token_type_ids", "attention_mask", "labels") if key in entry]
        items = [item if isinstance(item, str) else item["id"] for item in entry["items"]]
        return {key: torch.tensor(entry[key]) for key in keys} | {"pixel_values": self.pixels(*items)}


@cache
def golden(family: str) -> Golden:
    return Golden(family)


@cache
def shared_network(family: str) -> CogVLMForCausalLM:
    """One network for all tests that only read it."""
    return golden(family).network()


def prompts() -> list[tuple[str, str]]:
    """Every (family, prompt id), for parametrize."""
    return [(family, name) for family in FAMILIES for name in golden(family).ids()]


def left_padded(golden: Golden, names: list[str]) -> dict[str, torch.Tensor]:
    """Make one batch, padded on the left with the pad id, of prompts with and without an image."""
    entries = [golden.expected[name] for name in names]
    width = max(len(entry["input_ids"]) for entry in entries)

    def pad(key: str, value: int) -> torch.Tensor:
        return torch.tensor([[value] * (width - len(entry[key])) + entry[key] for entry in entries])

    batch = {"input_ids": pad("input_ids", golden.config().pad_token_id or 0)}
    batch |= {key: pad(key, 0) for key in ("token_type_ids", "attention_mask")}
    return batch | {"pixel_values": golden.pixels(*names)}
