"""Faults of other implementations of GLM-4V-9B that ours does not have, by the numbers of the facts sheet.

Elsewhere: 6, 7 in test_glm4v_processor.py; 8, 9 in test_glm4v_network.py; 10, 11, 13, 15 in test_glm4v_loading.py.
14, the demo server's, belongs to the server.
"""

import pytest
import torch
from glm4v_fixture import (
    BOI,
    CASES,
    CHECKPOINT,
    IMAGE_CASES,
    expected,
    finetune_samples,
    inputs,
    network,
    shared_network,
)
from tolerance import GLM4V

from lavish.models.glm4v_9b.processor import Glm4v9bProcessor


@pytest.fixture(scope="module")
def net():
    return shared_network()


@pytest.fixture(scope="module")
def processor():
    return Glm4v9bProcessor.from_pretrained(CHECKPOINT)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_1_and_2_a_padded_batch_keeps_its_pictures(processor, side):
    """The reference embeds the ids again when the mask is not all ones, and counts 1600 slots whatever the size."""
    trained = network().train()
    batch = processor.apply_chat_template(finetune_samples(), return_labels=True, compat="release", padding_side=side)
    assert not batch["attention_mask"].all()
    loss = float(trained(**batch).loss)
    singles = [float(expected()[f"finetune.{index}.loss"]) for index in range(2)]
    assert loss == pytest.approx((24 * singles[0] + 10 * singles[1]) / 34, abs=1e-4)
    assert loss == pytest.approx(9.02857, abs=1e-4)
    batch["pixel_values"] = batch["pixel_values"].flip(0)
    assert abs(float(trained(**batch).loss) - loss) > 1e-3


@torch.no_grad()
def test_3_padding_with_labels_and_text_with_labels(net, processor):
    both = processor.apply_chat_template(finetune_samples(), return_labels=True)
    assert len(both["pixel_values"]) == 1
    losses, counts = [], []
    for sample in finetune_samples():
        single = processor.apply_chat_template(sample, return_labels=True)
        losses.append(float(net(**single).loss))
        counts.append(int((single["labels"] != -100).sum()))
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert float(net(**both).loss) == pytest.approx(mean, abs=1e-5)
    text = processor.apply_chat_template(
        [finetune_samples()[1], finetune_samples()[1][:2]], return_labels=True, padding_side="left"
    )
    assert float(net(**text).loss) == pytest.approx(losses[1], abs=1e-5)


@torch.no_grad()
def test_4_and_5_text_only_and_mixed_rows(net):
    for cases in (("text_only", "special_text"), CASES):
        batch = inputs(*cases)
        logits = net(**batch).logits
        for row, case in enumerate(cases):
            wanted = expected()[f"{case}.logits"][0]
            torch.testing.assert_close(logits[row, -len(wanted) :], wanted, **GLM4V)


@pytest.mark.parametrize("case", IMAGE_CASES)
@torch.no_grad()
def test_12_training_and_inference_see_the_same(net, case):
    """Repeated positions are no packed sequences: with and without mask, with and without cache."""
    batch = inputs(case)
    without = {name: value for name, value in batch.items() if name != "attention_mask"}
    trained = network().train()
    for model, arguments in (
        (trained, {**without, "use_cache": False}),
        (trained, {**batch, "use_cache": True}),
        (net, {**without, "use_cache": False}),
        (net, {**without, "use_cache": True}),
    ):
        torch.testing.assert_close(model(**arguments).logits, expected()[f"{case}.logits"], **GLM4V)


@pytest.mark.parametrize("case", IMAGE_CASES)
@torch.no_grad()
def test_positions_of_vllm_are_not_the_release_s(net, case):
    """vLLM counts every slot (users.md: the first text after the image at 1606 instead of 7); the release does not.

    The same network, once with the positions of vLLM and once with ours: ours are the fixture's.
    """
    batch = inputs(case)
    embeds = net.embed(batch["input_ids"], net.get_image_features(batch["pixel_values"]))
    sequential = torch.arange(embeds.shape[1])[None]
    ours = net.position_ids_from(batch["input_ids"])
    at = batch["input_ids"][0].tolist().index(BOI)
    assert torch.equal(ours, expected()[f"{case}.expanded_position_ids"])
    assert ours[0, at : at + 12].tolist() == [at, *[at + 1] * 9, at + 2, at + 3]
    assert int(sequential[0, at + 11] - ours[0, at + 11]) == 8
    right, wrong = (net.lm_head(net.decode_hidden(embeds, positions)) for positions in (ours, sequential))
    torch.testing.assert_close(right, expected()[f"{case}.logits"], **GLM4V)
    assert float((wrong - right).abs().max()) > 1.0


@torch.no_grad()
def test_sizes_of_common_mistakes(net):
    """Each of these moves the largest logit (8.2) by more than 1: the tolerance (2e-4) sees all of them."""
    batch = inputs("single_image")
    features, ids = net.get_image_features(batch["pixel_values"]), batch["input_ids"]
    right = expected()["single_image.logits"]

    def apart(embeds, mask=None):
        hidden = net.decode_hidden(embeds, net.position_ids_from(ids), mask)
        return float((net.lm_head(hidden) - right).abs().max())

    assert apart(net.embed(ids, features)) < 2e-4
    assert apart(net.embed(ids, features * 8)) > 1  # not divided
    edges = net.embed(ids, features)
    at = ids[0].tolist().index(BOI)
    edges[0, at] = net.get_input_embeddings().weight[BOI]  # boi's word instead of the tower's row
    assert apart(edges) > 1
    slots = net.image_slots(ids)[0]
    seq = len(slots)
    both_ways = torch.ones(seq, seq, dtype=torch.bool).tril() | (slots[:, None] & slots[None])
    assert apart(net.embed(ids, features), both_ways[None, None]) > 1


@torch.no_grad()
def test_no_mask_comes_from_the_pad_id(net):
    """The pad id stands in every slot: deriving a mask from it would hide the picture."""
    ids = inputs("single_image")["input_ids"]
    other = ids.clone()
    other[net.image_slots(ids) & (ids == 500)] = 33
    pixels = expected()["single_image.images"]
    assert torch.equal(net(ids, pixel_values=pixels).logits, net(other, pixel_values=pixels).logits)
    arguments = {"pixel_values": pixels, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    one, two = net.generate(ids, **arguments), net.generate(other, **arguments)
    assert torch.equal(one[:, ids.shape[1] :], two[:, ids.shape[1] :])
