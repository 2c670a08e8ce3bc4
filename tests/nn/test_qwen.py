"""The Qwen v1 decoder against its golden tensors: below, above and across `seq_length`."""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tolerance
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import DynamicCache, StaticCache

from lavish.checkpoints import hf
from lavish.checkpoints.qwen import qwen_rules
from lavish.checkpoints.rules import plan, reverse
from lavish.common.errors import ConfigError, PromptError
from lavish.nn.losses import causal_loss
from lavish.nn.qwen import (
    QwenConfig,
    QwenDecoder,
    causal_output,
    fill_slots,
    logn_scale,
    ntk_alpha,
    positions_from_mask,
    read_qwen_config,
    request_alphas,
)

FIXTURE = Path(__file__).parents[1] / "fixtures/qwen"
SEQ_LENGTH = 96


class Chat(nn.Module):
    """The smallest network with the decoder: what a family adds a tower to."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.language_model = QwenDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: torch.Tensor, **kwargs: Any):
        embeds = self.language_model.embed_tokens(input_ids)
        return causal_output(self.language_model, self.lm_head, embeds, **kwargs)


def released(**changes: Any) -> dict[str, Any]:
    return {**json.loads((FIXTURE / "llm/config.json").read_text()), **changes}


def load(attn_implementation: str = "sdpa", **changes: Any) -> Chat:
    config = read_qwen_config(released(**changes), "config.json")
    config._attn_implementation = attn_implementation
    with torch.device("meta"):
        chat = Chat(config)
    assert hf.load_into(chat, hf.read(FIXTURE / "llm"), dtype=None, device="cpu", rules=qwen_rules()) == []
    return chat.eval()


@cache
def chat() -> Chat:
    return load()


@cache
def expected() -> dict[str, torch.Tensor]:
    return load_file(FIXTURE / "expected.safetensors")


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "alpha"), [("llm_short", 1.0), ("llm_long", 3.0), ("llm_very_long", 7.0)], ids=["48", "144", "201"]
)
def test_prefill_and_one_step(name: str, alpha: float, attn_implementation: str) -> None:
    network = load(attn_implementation)
    ids = expected()[f"{name}.input_ids"]
    assert request_alphas(network.language_model.config, [ids.shape[1] - 1]) == (alpha,)
    with torch.no_grad():
        prefill = network(ids[:, :-1], use_cache=True)
        tolerance.qwen_logits(prefill.logits[:, -32:], expected()[f"{name}.logits"])
        step = network(ids[:, -1:], past_key_values=prefill.past_key_values, use_cache=True)
    tolerance.qwen_logits(step.logits, expected()[f"{name}.next_logits"])


def cross(network: Chat, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Prefill 94 tokens, then feed the others one by one; `seq_length` is 96."""
    out = network(ids[:, :94], use_cache=True, **kwargs)
    steps = []
    for position in range(94, ids.shape[1]):
        out = network(ids[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    return torch.cat(steps, dim=1)


@torch.no_grad()
def test_decoding_across_seq_length_keeps_the_alpha_of_the_prefill() -> None:
    ids, wanted = expected()["llm_cross.input_ids"], expected()["llm_cross.step_logits"]
    tolerance.qwen_logits(cross(chat(), ids), wanted)
    again = chat()(ids).logits[:, 94:]  # alpha of 99 tokens: what recomputing while decoding would come to
    assert (again - wanted).abs().max() > 0.01


@torch.no_grad()
def test_two_requests_at_once_do_not_disturb_each_other() -> None:
    ids = expected()["llm_cross.input_ids"]
    long_ids = expected()["llm_very_long.input_ids"]
    long_out = chat()(long_ids[:, :-1], use_cache=True)
    tolerance.qwen_logits(cross(chat(), ids), expected()["llm_cross.step_logits"])
    step = chat()(long_ids[:, -1:], past_key_values=long_out.past_key_values, use_cache=True)
    tolerance.qwen_logits(step.logits, expected()["llm_very_long.next_logits"])


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_a_left_padded_batch_below_and_above_seq_length(attn_implementation: str) -> None:
    """Each row has its own positions, alpha and logn: rows are what they are alone."""
    network = load(attn_implementation)
    rows = [expected()[f"{name}.input_ids"][0, :-1] for name in ("llm_short", "llm_long", "llm_very_long")]
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_full((width - len(row),), 406), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    out = network(ids, attention_mask=mask, use_cache=True)
    for index, name in enumerate(("llm_short", "llm_long", "llm_very_long")):
        tolerance.qwen_logits(out.logits[index : index + 1, -32:], expected()[f"{name}.logits"])
    last = torch.stack([expected()[f"{name}.input_ids"][0, -1:] for name in ("llm_short", "llm_long", "llm_very_long")])
    mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    step = network(last, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
    for index, name in enumerate(("llm_short", "llm_long", "llm_very_long")):
        tolerance.qwen_logits(step.logits[index : index + 1], expected()[f"{name}.next_logits"])


@torch.no_grad()
def test_a_prompt_in_two_pieces_and_in_a_static_cache() -> None:
    ids = expected()["llm_long.input_ids"]
    alphas = request_alphas(chat().language_model.config, [144])
    for cached in (DynamicCache(), StaticCache(chat().language_model.config, max_cache_len=160)):
        first = chat()(ids[:, :60], past_key_values=cached, alphas=alphas)
        second = chat()(ids[:, 60:144], past_key_values=first.past_key_values, alphas=alphas)
        tolerance.qwen_logits(second.logits[:, -32:], expected()["llm_long.logits"])
        step = chat()(ids[:, 144:], past_key_values=second.past_key_values, alphas=alphas)
        tolerance.qwen_logits(step.logits, expected()["llm_long.next_logits"])


@torch.no_grad()
def test_each_part_of_the_long_rule_is_seen() -> None:
    ids, wanted = expected()["llm_long.input_ids"][:, :-1], expected()["llm_long.logits"]
    for change in ({"use_dynamic_ntk": False}, {"use_logn_attn": False}):
        without = load(**change)(ids).logits[:, -32:]
        assert (without - wanted).abs().max() > 0.01, change
    training = load().train()(ids).logits[:, -32:]
    neither = load(use_dynamic_ntk=False, use_logn_attn=False)(ids).logits[:, -32:]
    torch.testing.assert_close(training, neither)


def test_alpha_by_the_length_of_the_prompt() -> None:
    lengths = [1, 2048, 2049, 4096, 4097, 8192, 8193]
    assert [ntk_alpha(length, 2048) for length in lengths] == [1, 1, 3, 3, 7, 7, 15]
    config = chat().language_model.config
    assert request_alphas(config, [96, 97]) == (1.0, 3.0)
    assert request_alphas(read_qwen_config(released(use_dynamic_ntk=False), ""), [97]) is None


def test_logn_starts_behind_seq_length() -> None:
    scale = logn_scale(chat().language_model.config, torch.tensor([[0, 95, 96, 191]]))
    assert scale.shape == (1, 1, 4, 1)
    assert scale.flatten()[:2].tolist() == [1, 1]
    assert scale.flatten()[2].item() == pytest.approx(1.00228, abs=1e-5)  # ln 97 / ln 96
    assert scale.flatten()[3].item() == pytest.approx(1.15186, abs=1e-5)  # ln 192 / ln 96


def test_positions_are_counted_from_the_first_real_token() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert positions_from_mask(torch.zeros(2, 4), mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert positions_from_mask(torch.zeros(2, 1), mask, past=3).tolist() == [[1], [3]]
    assert positions_from_mask(torch.zeros(1, 2), None, past=5).tolist() == [[5, 6]]


@torch.no_grad()
def test_half_precision_rotates_in_float32() -> None:
    """bfloat16 positions would merge beyond 256: the tables and the rotation are float32 whatever the dtype."""
    network = load().to(torch.bfloat16)
    ids = expected()["llm_very_long.input_ids"][:, :-1]
    logits, wanted = network(ids).logits[:, -32:], expected()["llm_very_long.logits"]
    assert (logits - wanted).abs().mean() < 0.02 * wanted.std()


def test_gradient_checkpointing_changes_no_gradient() -> None:
    ids = expected()["llm_short.input_ids"]
    found = []
    for is_on in (False, True):
        network = load().train()
        for layer in network.language_model.layers:
            layer.gradient_checkpointing = is_on
            if is_on:
                layer._gradient_checkpointing_func = lambda function, *args: torch.utils.checkpoint.checkpoint(
                    function, *args, use_reentrant=False
                )
        network(ids, labels=ids).loss.backward()
        found.append(network.language_model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*found)


def test_the_loss_leaves_ignored_tokens_out() -> None:
    logits = torch.zeros(1, 3, 5)
    assert causal_loss(logits, torch.tensor([[1, -100, 2]])).item() == pytest.approx(1.6094, abs=1e-4)
    assert causal_loss(logits, torch.full((1, 3), -100)).item() == 0


def test_slots_and_features_must_agree() -> None:
    embeds, slots = torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.bool)
    slots[0, 1:3] = slots[1, 2:] = True
    filled = fill_slots(embeds, slots, torch.arange(12.0).view(2, 2, 3))
    assert filled[1, 3].tolist() == [9, 10, 11]
    assert filled[0, 0].tolist() == [0, 0, 0]
    for features in (None, torch.zeros(1, 2, 3), torch.zeros(2, 3, 3)):
        with pytest.raises(PromptError, match="4 image slots"):
            fill_slots(embeds, slots, features)


def test_a_mask_of_another_length() -> None:
    with pytest.raises(PromptError, match=r"attention_mask has the shape \(1, 3\); .* must be \(1, 2\)"):
        chat()(torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 3))


@pytest.mark.parametrize("manifest", ["Qwen-14B-Chat", "Qwen-1_8B-Chat"])
def test_the_real_sizes_are_consumed(manifest: str) -> None:
    with gzip.open(FIXTURE / f"manifest_{manifest}.json.gz", "rt") as file:
        stored = {name: tuple(shape) for name, (shape, _) in json.load(file).items()}
    vocab_size, hidden_size = stored["transformer.wte.weight"]
    fields = released(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // 128,
        kv_channels=128,
        num_hidden_layers=sum(name.endswith("ln_1.weight") for name in stored),
        intermediate_size=2 * stored["transformer.h.0.mlp.w1.weight"][0],
    )
    with torch.device("meta"):
        network = Chat(read_qwen_config(fields, manifest))
    places = plan(stored, qwen_rules())
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert places.sources.keys() == shapes.keys()
    assert not places.dropped
    for name, source in places.sources.items():
        shape = list(stored[source])
        if name in places.parts:
            start, stop = places.parts[name].span(shape) or (0, 0)
            shape[0] = stop - start
        assert tuple(shape) == shapes[name], name
    back = plan(places.sources, reverse(qwen_rules()))
    assert set(back.sources) == set(stored)


def test_buffers_of_older_files_are_left_out() -> None:
    names = ["transformer.h.0.attn.masked_bias", "transformer.h.3.attn.rotary_emb.inv_freq"]
    assert plan(names, qwen_rules()).dropped == tuple(names)


def test_odd_sizes_load_too() -> None:
    fields = released(hidden_size=60, num_attention_heads=3, kv_channels=20, intermediate_size=50, num_hidden_layers=3)
    network = Chat(read_qwen_config(fields, "config.json")).eval()
    assert network(torch.arange(120)[None]).logits.shape == (1, 120, 640)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rotary_pct": 0.25}, r"rotary_pct is 0\.25 and must be 1\.0"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"no_bias": False}, "no_bias is False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"attn_dropout_prob": 0.1}, "no dropout"),
        ({"kv_channels": 32}, "kv_channels 32 x 4 heads is not hidden_size 64"),
        ({"intermediate_size": 191}, "must be even"),
        ({"seq_length": None}, "seq_length is None and must be a whole number"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"use_dynamic_ntk": "yes"}, "use_dynamic_ntk is 'yes' and must be true or false"),
        ({"rotary_emb_base": "many"}, r"config\.json: .*many"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'; a Qwen of the first generation says 'qwen'"),
    ],
)
def test_configs_that_this_decoder_does_not_compute(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_qwen_config(released(**change), "config.json")


def test_a_config_without_seq_length() -> None:
    fields = released()
    del fields["seq_length"]
    with pytest.raises(ConfigError, match=r"config\.json: lacks seq_length"):
        read_qwen_config(fields, "config.json")
