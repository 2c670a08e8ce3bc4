"""Every family that chats, behind the interface of samples: all kinds of questions, a batch equal to single ones."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lavish.common.config import Config
from lavish.inference.load import load
from lavish.runners.evaluation_recipe import chat_section
from lavish.tasks.chat_model import ASKS, ChatModel

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
TINY: dict[str, dict[str, Any]] = {
    "cogvlm2": {},
    "glm4v": {},
    "clip_qwen": {},
    "minigpt4qwen": {"llm": FIXTURES / "qwen/llm", "config": {"vision_config": {"num_attention_heads": 4}}},
}


@pytest.mark.parametrize("name", TINY)
def test_families(name: str) -> None:
    model = ChatModel(load(FIXTURES / name / "open" / "checkpoint", device="cpu", **TINY[name])).eval()
    images = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue")]
    questions = ["What colour is it?", "Is it big, or small?"]
    samples = {"image": images, "text_input": questions}
    for method in (model.predict_answers, model.generate, model.locate):
        alone = [
            method({"image": [image], "text_input": [question]})[0]
            for image, question in zip(images, questions, strict=True)
        ]
        assert method(samples) == alone
    assert len(model.choose(samples, [["red", "blue"], ["big", "small"]])) == 2
    assert set(model.asks) == set(ASKS)
    assert model.asks["vqa"].chat_template == ("vqa" if name == "cogvlm2" else None)
    assert len(model.predict_answers(samples, max_len=1)) == 2


def test_pieces_and_config_of_a_recipe() -> None:
    section = {"path": "a", "pieces": {"llm": "b"}, "config": {"x": 1}, "dtype": "float32", "quantization": "int8"}
    found = chat_section(Config({"model": section}))
    assert (found.path, found.pieces, found.config, found.dtype) == ("a", {"llm": "b"}, {"x": 1}, "float32")
