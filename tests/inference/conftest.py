"""The tiny fixture checkpoints of both versions, loaded once, and their prompts as chat messages."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lavish

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@dataclass
class Release:
    """One family's fixture: its folder, prompts as (messages, template), and what the release answers."""

    name: str
    folder: Path
    prompts: dict[str, tuple[list[dict[str, Any]], str | None]]
    greedy_ids: dict[str, list[int]]
    batch_left: list[list[int]]
    expected: dict[str, Any]
    loaded: "lavish.VLM"

    def vlm(self, **settings: Any) -> "lavish.VLM":
        """A fresh VLM on the shared network: nothing cached."""
        return lavish.VLM(self.loaded.model, self.loaded.processor, name=self.name, **settings)

    def image(self, name: str) -> Path:
        return self.folder.parent / "inputs" / name


def to_messages(prompt: dict[str, Any], inputs: Path) -> list[dict[str, Any]]:
    """Turn a prompt of the fixture into chat messages; the image goes into the first one."""
    messages: list[dict[str, Any]] = []
    for question, answer in prompt["history"]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": prompt["query"]})
    if prompt["image"]:
        image = {"type": "image", "image": str(inputs / prompt["image"])}
        messages[0]["content"] = [image, {"type": "text", "text": messages[0]["content"]}]
    return messages


def read_release(name: str) -> Release:
    folder = FIXTURES / name / "open"
    prompts = json.loads((folder / "inputs" / "prompts.json").read_text(encoding="utf-8"))["prompts"]
    tensors = load_file(folder / "expected.safetensors")
    return Release(
        name=name,
        folder=folder / "checkpoint",
        prompts={p["id"]: (to_messages(p, folder / "inputs"), p["template_version"]) for p in prompts},
        greedy_ids={p["id"]: tensors[f"{p['id']}.greedy_ids"].tolist() for p in prompts},
        batch_left=tensors["batch_left.greedy_ids"].tolist(),
        expected=json.loads((folder / "expected.json").read_text(encoding="utf-8")),
        loaded=lavish.load(folder / "checkpoint", device="cpu"),
    )


@pytest.fixture(scope="session")
def releases() -> dict[str, Release]:
    return {name: read_release(name) for name in ("cogvlm", "cogvlm2")}


@pytest.fixture(params=["cogvlm", "cogvlm2"])
def release(request: pytest.FixtureRequest, releases: dict[str, Release]) -> Release:
    """Each family in turn."""
    return releases[request.param]


@pytest.fixture
def v2(releases: dict[str, Release]) -> Release:
    return releases["cogvlm2"]


@pytest.fixture
def count_tokens(monkeypatch: pytest.MonkeyPatch) -> Callable[["lavish.VLM"], list[int]]:
    """Note how many tokens (rows x columns) every pass through the decoder of a VLM computes from now on."""

    def watch(vlm: "lavish.VLM") -> list[int]:
        counts: list[int] = []
        decoder_forward = vlm.model.model.forward

        def forward(inputs_embeds: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            counts.append(inputs_embeds.shape[0] * inputs_embeds.shape[1])
            return decoder_forward(inputs_embeds, *args, **kwargs)

        monkeypatch.setattr(vlm.model.model, "forward", forward)
        return counts

    return watch
