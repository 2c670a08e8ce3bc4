"""GLM-4V-9B: stages of the golden fixture, cache, batches, loading, sizes that no release has."""

import gzip
import json

import pytest
import torch
from glm4v_fixture import (
    BOI,
    CASES,
    CHECKPOINT,
    EOI,
    IMAGE_CASES,
    NUM_PATCHES,
    PAD,
    ROOT,
    config,
    config_dict,
    expand,
    expected,
    inputs,
    network,
    shared_network,
    weights,
)
from tolerance import GLM4V, GLM4V_GRADIENTS

from lavish.checkpoints.hf import read
from lavish.checkpoints.loading import load_into
from lavish.checkpoints.rules import plan
from lavish.common.errors import ConfigError, MissingKeys, PromptError
from lavish.models.glm4v_9b.config import ChatGLMConfig, Glm4v9bVisionConfig, read_config
from lavish.models.glm4v_9b.model import Glm4v9bForCausalLM
from lavish.models.glm4v_9b.weights import INV_FREQ, RULES, complete


def near(actual, wanted, bounds=GLM4V):
    torch.testing.assert_close(actual, wanted, **bounds)


@pytest.fixture(scope="module")
def net():
    return shared_network()


@torch.no_grad()
def test_tower_stage_by_stage(net):
    vision, pixels = net.transformer.vision, expected()["single_image.images"]
    states = vision.patch_embedding(pixels)
    near(states, expected()["single_image.vision.patch_embedding"])
    for index, layer in enumerate(vision.transformer.layers):
        states = layer(states)
        near(states, expected()[f"single_image.vision.layer{index}"])
    merged = vision.encode(pixels)
    near(merged.transpose(1, 2).unflatten(2, (3, 3)), expected()["single_image.vision.conv"])
    near(vision.linear_proj(merged), expected()["single_image.vision.linear_proj"])


@pytest.mark.parametrize("case", IMAGE_CASES)
@torch.no_grad()
def test_rows_of_an_image(net, case):
    near(net.get_image_features(expected()[f"{case}.images"]), expected()[f"{case}.vision.output"])


@pytest.mark.parametrize("case", CASES)
def test_positions(net, case):
    batch = inputs(case)
    assert torch.equal(net.position_ids_from(batch["input_ids"]), expected()[f"{case}.expanded_position_ids"])
    assert torch.equal(
        net.position_ids_from(batch["input_ids"], batch["attention_mask"]), expected()[f"{case}.expanded_position_ids"]
    )


@pytest.mark.parametrize("case", ["single_image", "text_only"])
@torch.no_grad()
def test_decoder_stage_by_stage(net, case):
    batch = inputs(case)
    features = net.get_image_features(batch["pixel_values"]) if "pixel_values" in batch else None
    embeds = net.embed(batch["input_ids"], features)
    near(embeds, expected()[f"{case}.expanded_inputs_embeds"])
    cos, sin = net.transformer.rotary_pos_emb(net.position_ids_from(batch["input_ids"]), torch.float32)
    near(torch.stack((cos, sin), dim=-1)[:, :, 0], expected()[f"{case}.rope_cos_sin"], {"rtol": 0, "atol": 1e-6})
    output = net(**batch, output_hidden_states=True)
    for index in range(2):
        near(output.hidden_states[index], expected()[f"{case}.hidden_states.{index}"])
        cache = output.past_key_values.layers[index]
        near(cache.keys, expected()[f"{case}.kv.{index}.key"])
        near(cache.values, expected()[f"{case}.kv.{index}.value"])
    near(output.hidden_states[2], net.transformer.encoder.final_layernorm(expected()[f"{case}.hidden_states.2"]))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits(case, implementation):
    net = shared_network() if implementation == "sdpa" else network()
    net.config._attn_implementation = implementation
    near(net(**inputs(case)).logits, expected()[f"{case}.logits"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate(net, case, with_mask, use_cache):
    batch = inputs(case)
    if not with_mask:
        del batch["attention_mask"]
    tokens = net.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=use_cache)
    assert torch.equal(tokens[:, batch["input_ids"].shape[1] :], expected()[f"{case}.greedy_tokens_no_eos_stop"])


@torch.no_grad()
def test_cached_steps(net):
    batch = inputs("single_image")
    output = net(**batch)
    last = expected()["single_image.logits"].shape[1]
    for step in range(8):
        wanted = expected()["single_image.greedy_step_logits"][:, step]
        near(output.logits[:, -1], wanted)
        if step < 7:
            output = net(wanted.argmax(-1, keepdim=True), past_key_values=output.past_key_values)
    near(output.past_key_values.layers[0].keys, expected()["single_image.kv_after_steps.0.key"])
    next_position = last + 7 - output.rope_deltas
    assert int(next_position) == int(expected()["single_image.greedy_step_position_ids_last"])


@torch.no_grad()
def test_left_padded_batch_is_the_release_s(net):
    batch = inputs("multi_turn", "single_image")
    real = batch["attention_mask"].bool()
    near(net(**batch).logits[real], expected()["batch_left_padded.logits"][real])
    assert torch.equal(
        net.position_ids_from(batch["input_ids"], batch["attention_mask"]),
        expected()["batch_left_padded.expanded_position_ids"],
    )
    tokens = net.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(
        tokens[:, batch["input_ids"].shape[1] :], expected()["batch_left_padded.greedy_tokens_no_eos_stop"]
    )


def test_mixed_batch_is_the_single_runs(net):
    """Faults 4 and 5: text-only rows in a padded batch, alone and beside pictures."""
    for cases in (CASES, ("text_only", "special_text")):
        batch = inputs(*cases)
        tokens = net.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)
        single = torch.cat([expected()[f"{case}.greedy_tokens_no_eos_stop"] for case in cases])
        assert torch.equal(tokens[:, batch["input_ids"].shape[1] :], single)


@torch.no_grad()
def test_right_padding_changes_nothing_either(net):
    batch = inputs("single_image")
    padded = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5), value=PAD),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5)),
        "pixel_values": batch["pixel_values"],
    }
    near(net(**padded).logits[:, :-5], expected()["single_image.logits"])


@torch.no_grad()
def test_several_tokens_after_a_cache(net):
    """A prompt given in two parts: before the picture, and from it on."""
    batch = inputs("image_second_turn")
    cut = batch["input_ids"][0].tolist().index(BOI)
    first = net(batch["input_ids"][:, :cut], use_cache=True)
    rest = net(batch["input_ids"][:, cut:], pixel_values=batch["pixel_values"], past_key_values=first.past_key_values)
    near(rest.logits, expected()["image_second_turn.logits"][:, cut:])
    whole = inputs("multi_turn")
    cut = whole["input_ids"][0].tolist().index(EOI) + 1
    first = net(whole["input_ids"][:, :cut], pixel_values=whole["pixel_values"], use_cache=True)
    rest = net(whole["input_ids"][:, cut:], past_key_values=first.past_key_values)
    near(rest.logits, expected()["multi_turn.logits"][:, cut:])


@torch.no_grad()
def test_parts_that_inference_calls(net):
    batch = inputs("multi_turn", "single_image")
    features = net.get_image_features(batch["pixel_values"])
    hidden = net.decode_hidden(
        net.embed(batch["input_ids"], features),
        net.position_ids_from(batch["input_ids"], batch["attention_mask"]),
        batch["attention_mask"],
        None,
        net.request_state([27, 22]),
    )
    real = batch["attention_mask"].bool()
    near(net.lm_head(hidden)[real], expected()["batch_left_padded.logits"][real])
    assert net.lm_head is net.transformer.output_layer is net.get_output_embeddings()
    slots = net.image_slots(batch["input_ids"])
    assert slots.sum(dim=1).tolist() == [NUM_PATCHES + 2, NUM_PATCHES + 2]
    assert (batch["input_ids"][slots].view(2, -1)[:, [0, -1]] == torch.tensor([BOI, EOI])).all()
    assert net.config.num_hidden_layers == 2
    assert net.config.max_position_embeddings == 8192


def test_a_boi_that_the_network_made_up_is_a_token(net):
    ids = inputs("text_only")["input_ids"].clone()
    ids[0, 10] = BOI
    assert not net.image_slots(ids).any()
    assert torch.equal(net.position_ids_from(ids)[0], torch.arange(ids.shape[1]))
    assert not net.image_slots(ids[:, :4]).any()


@torch.no_grad()
def test_static_cache_and_beams(net):
    batch = inputs("single_image")
    length = batch["input_ids"].shape[1]
    static = net.generate(
        **batch,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        cache_implementation="static",
        disable_compile=True,
    )
    assert torch.equal(static[:, length:], expected()["single_image.greedy_tokens_no_eos_stop"])
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "num_beams": 3}
    beams = net.generate(**batch, **arguments)
    assert torch.equal(beams, net.generate(**batch, **arguments, use_cache=False))


def test_loss_and_gradients(net):
    """The release's mask, train mode: one sample each, as the golden fixture has them."""
    trained = network().train()
    for index in range(2):
        row = expected()[f"finetune.{index}.input_ids"][0].tolist()
        labels = expected()[f"finetune.{index}.labels"][0].tolist()
        at = row.index(BOI)
        labels = labels[: at + 1] + [-100] * NUM_PATCHES + labels[at + 2 :]
        pixels = expected()["single_image.images"] if index == 0 else black_image()
        trained.zero_grad()
        loss = trained(torch.tensor([expand(row)]), pixel_values=pixels, labels=torch.tensor([labels])).loss
        near(loss[None], expected()[f"finetune.{index}.loss"], {"rtol": 0, "atol": 1e-4})
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in trained.parameters() if p.grad is not None]).norm()
        near(norm.view(-1), expected()[f"finetune.{index}.grad_norm"].view(-1), GLM4V_GRADIENTS)
        if index == 0:
            named = dict(trained.named_parameters())
            wanted = {k.removeprefix("finetune.0.grad."): v for k, v in expected().items() if ".grad." in k}
            assert len(wanted) >= 1
            for name, gradient in wanted.items():
                near(named[name].grad, gradient, GLM4V_GRADIENTS)


def black_image() -> torch.Tensor:
    """What a black picture of any size becomes."""
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(1, 3, 1, 1)
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(1, 3, 1, 1)
    return (-mean / std).expand(1, 3, 84, 84).contiguous()


def test_gradient_checkpointing(net):
    batch = inputs("single_image")
    labels = batch["input_ids"].masked_fill(net.image_slots(batch["input_ids"]), -100)
    plain, checkpointed = network().train(), network().train()
    checkpointed.activation_checkpointing_enable()
    for made in (plain, checkpointed):
        made(**batch, labels=labels).loss.backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


# Loading


def test_released_shards_stream_into_the_network():
    tensors = read(CHECKPOINT)
    with torch.device("meta"):
        made = Glm4v9bForCausalLM(config())
    assert load_into(made, tensors, dtype=torch.float32, device=torch.device("cpu"), rules=RULES) == []
    complete(made)
    assert set(made.state_dict()) == set(weights())
    for name, value in made.state_dict().items():
        assert torch.equal(value, weights()[name])


def test_inv_freq_may_be_absent_and_is_never_read(tmp_path):
    from safetensors.torch import save_file

    kept = {name: value for name, value in weights().items() if name != INV_FREQ}
    save_file(kept, tmp_path / "model.safetensors")
    with torch.device("meta"):
        made = Glm4v9bForCausalLM(config())
    left = load_into(made, read(tmp_path), dtype=torch.float32, device=torch.device("cpu"), rules=RULES)
    assert left == [INV_FREQ]
    complete(made, left)
    assert torch.equal(made.transformer.rotary_pos_emb.inv_freq, weights()[INV_FREQ])
    made.transformer.rotary_pos_emb.inv_freq.fill_(7.0)
    with torch.no_grad():
        near(made.eval()(**inputs("single_image")).logits, expected()["single_image.logits"])
    del kept["transformer.vision.eoi"]
    save_file(kept, tmp_path / "model.safetensors")
    with torch.device("meta"):
        made = Glm4v9bForCausalLM(config())
    with pytest.raises(MissingKeys, match=r"transformer\.vision\.eoi"):
        load_into(made, read(tmp_path), dtype=torch.float32, device=torch.device("cpu"), rules=RULES)


def test_real_size_manifest_is_consumed_key_by_key():
    released = json.loads(gzip.decompress((ROOT / "manifest_glm-4v-9b.json.gz").read_bytes()))
    path = ROOT / "config_glm-4v-9b.reconstructed.json"
    with torch.device("meta"):
        made = Glm4v9bForCausalLM(read_config(json.loads(path.read_text()), str(path)))
    own = {name: list(value.shape) for name, value in made.state_dict().items()}
    assert own == {name: shape for name, (shape, _) in released.items()}
    assert len(own) == 1054
    assert sum(p.numel() for p in made.parameters()) == 13_906_320_896
    assert set(plan(released, RULES).sources) == set(own)
    assert made.config.num_image_tokens == 1602


def test_save_and_load(tmp_path):
    net = network()
    net.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "chatglm"
    assert "auto_map" not in saved
    again = Glm4v9bForCausalLM.from_pretrained(tmp_path).eval()
    assert set(again.state_dict()) == set(weights())
    with torch.no_grad():
        assert torch.equal(again(**inputs("single_image")).logits, net(**inputs("single_image")).logits)
    assert read_config(saved, "saved").to_dict()["vision_config"] == net.config.to_dict()["vision_config"]


def test_one_dtype_everywhere(tmp_path):
    """Fault 9: text and tower in one dtype, also in half precision and without a dtype argument."""
    network().to(torch.bfloat16).save_pretrained(tmp_path)
    made = Glm4v9bForCausalLM.from_pretrained(tmp_path)
    assert {value.dtype for value in made.state_dict().values()} == {torch.bfloat16}
    with torch.no_grad():
        logits = made.eval()(**inputs("single_image")).logits
    assert logits.dtype == torch.float32
    assert (logits - expected()["single_image.logits"]).abs().mean() < 0.1  # of logits up to 8


@torch.no_grad()
def test_rope_of_half_precision_models():
    reference, exact = network().to(torch.bfloat16), network(rope="float32").to(torch.bfloat16)
    positions = torch.arange(2048)[None]
    table = reference.transformer.rotary_pos_emb(positions, torch.bfloat16)[0].float()
    assert 1e-3 < (table - exact.transformer.rotary_pos_emb(positions, torch.float32)[0]).abs().max() < 2.1e-3
    batch = inputs("multi_turn")
    assert not torch.equal(reference(**batch).logits, exact(**batch).logits)


# Sizes that no release has


def drawn(**fields) -> Glm4v9bForCausalLM:
    """A network with random weights that show mistakes."""
    made = Glm4v9bForCausalLM(config(**fields)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if value.ndim == 1:
                base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                value.copy_(base + 0.3 * torch.randn(value.shape, generator=generator))
            else:
                value.copy_(torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5)
    return made


UNUSUAL = {
    "odd head counts": {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 12},
    "one group": {"multi_query_group_num": 1},
    "as many groups as heads": {"num_key_value_heads": 4},
    "another picture": {"vision_config": {"image_size": 70}},
    "one token a picture": {"vision_config": {"image_size": 28}},
    "other depths and widths": {"num_layers": 3, "ffn_hidden_size": 37, "vision_config": {"num_hidden_layers": 1}},
    "another scale and base": {"rope_ratio": 50, "vision_config": {"scaling_factor": 3}},
}


@pytest.mark.parametrize("name", UNUSUAL)
@torch.no_grad()
def test_unusual_sizes(name, tmp_path):
    made = drawn(**UNUSUAL[name])
    count = made.config.num_image_tokens
    side = made.config.tower.image_size
    rows = [[502, 504, 507, BOI] + [PAD] * (count - 2) + [EOI, 33, 34, 508], [502, 504, 507, 35, 36, 508]]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    batch = made(ids, attention_mask=mask, pixel_values=pixels).logits
    near(batch[:1, -len(rows[0]) :], made(torch.tensor(rows[:1]), pixel_values=pixels).logits)
    near(batch[1:, -len(rows[1]) :], made(torch.tensor(rows[1:])).logits)
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pixel_values": pixels}
    cached = made.generate(ids, attention_mask=mask, **arguments)
    assert torch.equal(cached, made.generate(ids, attention_mask=mask, **arguments, use_cache=False))
    made.save_pretrained(tmp_path)
    again = Glm4v9bForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids, attention_mask=mask, pixel_values=pixels).logits, batch)


@torch.no_grad()
def test_the_stock_decoder_computes_the_text_half():
    """transformers' `GlmForCausalLM`, another implementation, on our weights: sizes that the fixture does not have."""
    from transformers import GlmConfig, GlmForCausalLM

    made = drawn(num_attention_heads=6, multi_query_group_num=3, kv_channels=8, rope_ratio=7, num_layers=3)
    c = made.config
    stock = GlmForCausalLM(
        GlmConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            rms_norm_eps=c.rms_norm_eps,
            attention_bias=True,
            pad_token_id=PAD,
            rope_parameters={"rope_type": "default", "rope_theta": c.rotary_base, "partial_rotary_factor": 0.5},
        )
    ).eval()
    heads, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    state = {"model.embed_tokens.weight": made.transformer.embedding.word_embeddings.weight}
    state |= {
        "lm_head.weight": made.lm_head.weight,
        "model.norm.weight": made.transformer.encoder.final_layernorm.weight,
    }
    for index, layer in enumerate(made.transformer.encoder.layers):
        prefix = f"model.layers.{index}."
        for kind in ("weight", "bias"):
            fused = getattr(layer.self_attention.query_key_value, kind)
            parts = fused.split((heads, groups, groups))
            state |= {f"{prefix}self_attn.{x}_proj.{kind}": part for x, part in zip("qkv", parts, strict=True)}
        state |= {
            f"{prefix}self_attn.o_proj.weight": layer.self_attention.dense.weight,
            f"{prefix}mlp.gate_up_proj.weight": layer.mlp.dense_h_to_4h.weight,
            f"{prefix}mlp.down_proj.weight": layer.mlp.dense_4h_to_h.weight,
            f"{prefix}input_layernorm.weight": layer.input_layernorm.weight,
            f"{prefix}post_attention_layernorm.weight": layer.post_attention_layernorm.weight,
        }
    stock.load_state_dict(state)
    ids = torch.randint(0, 500, (2, 17), generator=torch.Generator().manual_seed(3))
    near(made(ids).logits, stock(ids).logits)


# Config


def test_class_defaults_are_the_released_class_s():
    made = ChatGLMConfig()
    assert {name: getattr(made, name) for name in RELEASED_DEFAULTS} == RELEASED_DEFAULTS
    assert made.vision_config is None


RELEASED_DEFAULTS = {
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "seq_length": 2048,
    "hidden_dropout": 0.0,
    "classifier_dropout": None,
    "attention_dropout": 0.0,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "apply_residual_connection_post_layernorm": False,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "bias_dropout_fusion": True,
    "multi_query_attention": False,
    "multi_query_group_num": 1,
    "rope_ratio": 1,
    "apply_query_key_layer_scaling": True,
    "attention_softmax_in_fp32": True,
    "fp32_residual_connection": False,
    "pre_seq_len": None,
    "prefix_projection": False,
    "boi_token_id": None,
    "eoi_token_id": None,
}


def test_standard_names():
    made = config()
    standard = (
        made.num_hidden_layers,
        made.vocab_size,
        made.intermediate_size,
        made.head_dim,
        made.num_key_value_heads,
        made.rms_norm_eps,
        made.max_position_embeddings,
    )
    assert standard == (2, 640, 96, 16, 2, 1.5625e-07, 8192)
    assert config(rope_ratio=8).rotary_base == 80000.0
    assert config(num_hidden_layers=1).num_layers == 1  # the file holds both names, with the old value
    assert config(vocab_size=641).padded_vocab_size == 641
    assert made.tower.num_attention_heads == 3


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"multi_query_attention": False}, "multi_query_attention is False and must be True"),
        ({"original_rope": False}, "original_rope is False and must be True"),
        ({"rmsnorm": False}, "rmsnorm is False"),
        ({"post_layer_norm": False}, "post_layer_norm is False"),
        ({"add_qkv_bias": False}, "add_qkv_bias is False"),
        ({"add_bias_linear": True}, "add_bias_linear is True and must be False"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
        ({"fp32_residual_connection": True}, "fp32_residual_connection is True"),
        ({"pre_seq_len": 128}, "pre_seq_len is 128 and must be None"),
        ({"hidden_dropout": 0.1}, "hidden_dropout is 0.1"),
        ({"boi_token_id": None}, "boi_token_id is absent, and the slots"),
        ({"eoi_token_id": 510}, "boi_token_id and eoi_token_id are both 510"),
        ({"eos_token_id": [500, "a"]}, "eos_token_id is .* must be a token's number"),
        ({"pad_token_id": 640}, "pad_token_id is 640, and the vocabulary has 640 tokens"),
        ({"num_layers": 0}, "num_layers is 0 and must be a whole number above 0"),
        ({"num_layers": 3000, "num_hidden_layers": 3000}, "num_hidden_layers is 3000, over 1000"),
        ({"num_hidden_layers": 5}, "num_hidden_layers is 5 and must be 2 \\(num_layers says so\\)"),
        ({"multi_query_group_num": 3}, "num_attention_heads % multi_query_group_num is 1"),
        ({"kv_channels": 18}, "kv_channels % 4 is 2"),
        ({"rope_ratio": 0}, "rope_ratio is 0 and must be a number above 0"),
        ({"rope": "half"}, "rope='half' was asked"),
        ({"vision_config": None}, "without a vision_config is a text-only ChatGLM"),
        ({"vision_config": {"image_size": 84}}, "needs 6 sizes and lacks vision_config.patch_size"),
        ({"vision_config": [1]}, "vision_config is .* must be an object"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
    ],
)
def test_configs_that_are_refused(fields, says):
    with pytest.raises(ConfigError, match=says):
        read_config({**config_dict(), **fields}, "config.json")


def test_text_only_chatglm_is_refused_by_name():
    fields = {key: value for key, value in config_dict().items() if key != "vision_config"}
    for make in (
        lambda: read_config(fields, "folder/config.json"),
        lambda: ChatGLMConfig.from_dict(fields),
        lambda: Glm4v9bForCausalLM(ChatGLMConfig(**{k: v for k, v in fields.items() if k != "auto_map"})),
    ):
        with pytest.raises(ConfigError, match=r"text-only ChatGLM \(GLM-4-9B, ChatGLM3\)"):
            make()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_heads": 5}, "hidden_size % num_heads is 3"),
        ({"num_positions": 38}, "num_positions is 38 and must be 37"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        ({"scaling_factor": 0}, "scaling_factor is 0 and must be a number above 0"),
        ({"image_size": 14, "num_positions": 2}, "the 2x2 merge needs two"),
        ({"dropout_prob": 0.1}, "dropout_prob"),
    ],
)
def test_towers_that_are_refused(fields, says):
    with pytest.raises(ConfigError, match=says):
        Glm4v9bVisionConfig(**{**config_dict()["vision_config"], **fields})


def test_unknown_overrides():
    with pytest.raises(ConfigError, match=r"'num_layer' is no field of ChatGLMConfig\. Did you mean 'num_layers'"):
        config(num_layer=3)


# Bad input


def test_images_and_slots_that_do_not_fit(net):
    batch = inputs("single_image")
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    with pytest.raises(PromptError, match=r"0 image\(s\) were given and input_ids have slots for 1"):
        net(ids)
    with pytest.raises(PromptError, match=r"2 image\(s\) were given and input_ids have slots for 1"):
        net(ids, pixel_values=torch.cat((pixels, pixels)))
    with pytest.raises(PromptError, match=r"1 image\(s\) were given and input_ids have slots for 0"):
        net(inputs("text_only")["input_ids"], pixel_values=pixels)
    with pytest.raises(PromptError, match=r"1 image\(s\) as three ids \(boi, one id, eoi\).*expanded to 11"):
        net(expected()["single_image.input_ids"], pixel_values=pixels)
    with pytest.raises(PromptError, match=r"image_features has the shape \(1, 10, 64\); .*\(1, 11, 64\)"):
        net(ids, image_features=torch.zeros(1, 10, 64))
    with pytest.raises(ConfigError, match="this tower takes"):
        net(ids, pixel_values=torch.zeros(1, 3, 70, 84))
    with pytest.raises(PromptError, match="both or none"):
        net(ids, inputs_embeds=torch.zeros(1, 4, 64))
    with pytest.raises(ConfigError, match="output_attentions"):
        net(ids, pixel_values=pixels, output_attentions=True)
    with pytest.raises(PromptError, match=r"attention_mask has the shape \(1, 3\)"):
        net(ids, attention_mask=torch.ones(1, 3), pixel_values=pixels)


def test_past_the_last_position():
    """Fault 8. Positions are limited, not slots: 22 slots are 14 positions."""
    batch = inputs("single_image")
    assert (batch["input_ids"].shape[1], len(expected()["single_image.input_ids"][0])) == (22, 14)
    network(seq_length=14)(**batch)
    with pytest.raises(PromptError, match=r"reaches position 13 and this model has 13 \(seq_length; an image"):
        network(seq_length=13)(**batch)
    with pytest.raises(PromptError, match="reaches position 14"):
        network(seq_length=14).generate(**batch, max_new_tokens=2, do_sample=False, eos_token_id=None)
