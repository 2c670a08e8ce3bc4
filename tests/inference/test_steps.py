"""The passes of every network with the chat interface, on one that is no family's."""

import pytest
import torch
from torch import nn
from toy_chat_network import SLOT_ID, SLOTS, ToyProcessor, make_network

import lavish
from lavish.inference.cache import SliceCache
from lavish.inference.options import GenerationOptions
from lavish.inference.steps import DecoderSteps, Prompt, steps_for

GENERATION = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def network():
    return make_network()


def picture(seed: int) -> torch.Tensor:
    return torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(seed))


def ask(*content):
    return [{"role": "user", "content": list(content)}]


CONVERSATIONS = [
    ask("12"),
    ask(picture(1), "345"),
    ask("6", picture(1), picture(2), "78"),
    ask(picture(3), "9", picture(1), "0", picture(2)),
    ask("123456789" * 6),  # past the length from which on the request has another state
    ask("5", picture(2)),
]


def vlm(network, **settings):
    return lavish.VLM(network, ToyProcessor(), **settings)


def recomputed(network, messages, num_tokens):
    """Answer without cache, padding or passes: the whole row again for every token."""
    inputs = ToyProcessor().apply_chat_template(messages)
    ids, prompt_ids = inputs["input_ids"], inputs["input_ids"]
    pixels = inputs.get("pixel_values")
    state = network.request_state([ids.shape[1]])
    features = None if pixels is None else network.get_image_features(pixels)
    embeds = network.embed(prompt_ids, features)
    positions = network.position_ids_from(prompt_ids, None)
    tokens: list[int] = []
    with torch.no_grad():
        for _ in range(num_tokens):
            hidden = network.decode_hidden(embeds, positions, None, None, state)
            tokens.append(int(network.lm_head(hidden[:, -1]).argmax()))
            if tokens[-1] == network.config.eos_token_id:
                break
            embeds = torch.cat([embeds, network.model.embed_tokens(torch.tensor([tokens[-1:]]))], dim=1)
            positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
    return tokens


def test_answers_are_those_of_the_whole_row_computed_again(network):
    fresh = vlm(network)
    for messages in CONVERSATIONS:
        assert fresh.chat(messages, **GENERATION).token_ids == recomputed(network, messages, 12)


def test_a_batch_of_mixed_rows_is_its_single_runs(network):
    singles = [vlm(network).chat(messages, **GENERATION).token_ids for messages in CONVERSATIONS]
    assert len({tuple(tokens) for tokens in singles}) == len(singles)
    for size in (2, 4, 8):
        replies = vlm(network).batch(CONVERSATIONS, batch_size=size, **GENERATION)
        assert [reply.token_ids for reply in replies] == singles


def test_rows_that_end_early_take_their_state_along(network):
    lengths = [2, 5, 9]
    singles = [
        vlm(network).chat(messages, max_new_tokens=number).token_ids
        for messages, number in zip(CONVERSATIONS[2:5], lengths)
    ]
    steps = DecoderSteps(network)
    prompts = [vlm(network)._prompt(messages, GenerationOptions()) for messages in CONVERSATIONS[2:5]]
    cache = SliceCache(steps.num_layers)
    logits, state = steps.prefill(prompts, vlm(network)._features(prompts), cache)
    found, active = [[], [], []], [0, 1, 2]
    while True:
        tokens = logits.argmax(-1).tolist()
        for row, token in zip(active, tokens):
            found[row].append(token)
        going = [place for place, row in enumerate(active) if len(found[row]) < lengths[row]]
        if not going:
            break
        steps.select_rows(going, state, cache)
        active, tokens = [active[place] for place in going], [tokens[place] for place in going]
        assert len(state.fixed) == len(active)
        logits = steps.decode(tokens, state, cache)
    assert found == singles


def test_the_next_turn_computes_only_what_is_new(network):
    one = vlm(network)
    first = ask("6", picture(1), picture(2), "78")
    reply = one.chat(first, **GENERATION)
    answer = "".join(ch for ch in reply.text if ch.isdigit())
    longer = [*first, {"role": "assistant", "content": answer}, *ask("4", picture(5))]
    again = one.chat(longer, **GENERATION)
    assert again.usage.cached_tokens >= 2 + 2 * SLOTS
    assert again.token_ids == vlm(network).chat(longer, **GENERATION).token_ids
    other = ask("6", picture(1), picture(9), "78")  # the second picture is another one
    found = one.chat(other, **GENERATION)
    assert found.usage.cached_tokens in (0, 2 + SLOTS)
    assert found.token_ids == vlm(network).chat(other, **GENERATION).token_ids


def test_a_conversation_that_outgrows_its_state_is_computed_again(network):
    one = vlm(network)
    first = ask("12345" * 7)
    one.chat(first, max_new_tokens=1)
    longer = [*first, {"role": "assistant", "content": "1"}, *ask("2345678")]
    reply = one.chat(longer, **GENERATION)
    assert reply.usage.prompt_tokens > 40
    assert reply.usage.cached_tokens == 0
    assert reply.token_ids == vlm(network).chat(longer, **GENERATION).token_ids


def test_each_picture_is_computed_once(network, monkeypatch):
    seen: list[int] = []
    real = network.get_image_features
    monkeypatch.setattr(network, "get_image_features", lambda pixels: seen.append(len(pixels)) or real(pixels))
    one = vlm(network)
    one.batch(CONVERSATIONS, **GENERATION)
    assert seen == [3]
    one.chat(CONVERSATIONS[3], **GENERATION)
    assert seen == [3]


def test_a_generated_slot_id_is_a_word(network):
    steps, cache = DecoderSteps(network), SliceCache(2)
    _, state = steps.prefill([Prompt([4, 11], [0, 0])], None, cache)
    assert steps.decode([SLOT_ID], state, cache).isfinite().all()


def test_a_network_without_the_interface_is_refused():
    with pytest.raises(TypeError, match=r"Linear is no network .* lacks get_image_features, image_slots"):
        steps_for(nn.Linear(1, 1))
