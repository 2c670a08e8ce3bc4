"""Conversations that share rows: the loss and gradients of the padded batch, for every family, and fewer rows."""

from typing import Any

import pytest
import tiny_lavis
import torch
from PIL import Image
from test_chat_learner import TINY
from tolerance import BIGGER_BATCH, JOINED_ROWS

from lavish.common.errors import ConfigError
from lavish.common.registry import registry
from lavish.nn.joined_rows import IGNORED, JoinedRows, first_fit

pytest.importorskip("peft")


def learner(name: str, **settings: Any) -> Any:
    section = {**TINY[name], "train": ["projector", "decoder"], **settings}  # a Q-Former that learns drops out
    model = registry.get_model_class("chat").from_config(section).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # noise by place, which is another one
    return model


def conversations() -> list[Any]:
    """Of five lengths, with and without a picture, of one and two turns."""
    red, green = (Image.new("RGB", (20, 16), tiny_lavis.COLORS[name]) for name in ("red", "green"))

    def turn(text: str, answer: str, image: Any = None) -> list[dict[str, Any]]:
        content = [{"type": "text", "text": text}]
        asked = [{"type": "image", "image": image}, *content] if image is not None else content
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]

    return [
        turn("a", "b"),
        turn("Which colour?", "red it is", red),
        turn("what else is there", "nothing"),
        turn("b", "a", green) + turn("and now", "the same as before"),
        turn("c c", "d"),
    ]


@pytest.mark.parametrize("name", TINY)
def test_joined_rows_have_the_loss_and_gradients_of_the_batch(name: str) -> None:
    padded, joined = learner(name), learner(name, packing=True)
    batch = padded.collator({"messages": conversations()})
    rows = JoinedRows.of(batch["inputs"]["attention_mask"])
    assert len(rows.index) < 5, "shorter ones share a row"
    losses = []
    for model in (padded, joined):
        losses.append(model({**batch})["loss"])
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], **JOINED_ROWS)
    ours, theirs = (dict(model.named_parameters()) for model in (joined, padded))
    for key, weight in theirs.items():
        if weight.grad is not None:
            torch.testing.assert_close(ours[key].grad, weight.grad, msg=key, **BIGGER_BATCH)
    assert joined.eval()({**batch})["loss"].item() == padded.eval()({**batch})["loss"].item(), "for training only"


def test_a_conversation_does_not_see_its_neighbours() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    rows = JoinedRows.of(mask)
    assert rows.segments.tolist() == [[0, 0, 0, 0], [1, 1, 2, -1]]
    assert rows.index[1, :3].tolist() == [4, 5, 8]
    assert rows.mask[1, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    labels = torch.arange(12).view(3, 4)
    assert rows.labels(labels).tolist() == [[IGNORED, 1, 2, 3], [IGNORED, 5, IGNORED, IGNORED]]


def test_rows_are_filled_by_the_longest_first() -> None:
    assert first_fit([3, 9, 4, 2, 5, 4]) == [[1], [4, 2], [5, 0, 3]]
    assert first_fit([2, 2]) == [[0], [1]]


def test_a_decoder_of_transformers_is_refused() -> None:
    from lavish.nn.qwen import TransformersDecoder

    model = learner("clip_qwen", packing=True)
    decoder = TransformersDecoder.__new__(TransformersDecoder)
    torch.nn.Module.__init__(decoder)
    decoder.model = torch.nn.Linear(1, 1)
    model._base.language_model = decoder
    with pytest.raises(ConfigError, match=r"model\.packing: Linear of transformers makes its own masks"):
        model({"messages": conversations()[:1]})
