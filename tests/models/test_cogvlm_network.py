"""Parity of the CogVLM and CogVLM2 networks with their golden fixtures, and what every family must do."""

import gzip
import json

import pytest
import torch
from cogvlm_fixture import FAMILIES, FIXTURES, golden, left_padded, prompts, shared_network
from safetensors.torch import load_file
from tolerance import GRADIENTS, SAME_MATH, close
from transformers import DynamicCache, StaticCache

from lavish.common.errors import CheckpointError, ConfigError, PromptError
from lavish.models.cogvlm.config import read_config
from lavish.models.cogvlm.manifest import read_sizes
from lavish.models.cogvlm.model import (
    CogVLMForCausalLM,
    ExpertRouting,
    position_ids_from,
    reference_inv_freq,
    rotary_table,
    vision_expert_mask,
)
from lavish.models.cogvlm.weights import RULES, complete

BOTH = pytest.mark.parametrize("family", FAMILIES)
EVERY_PROMPT = pytest.mark.parametrize(("family", "name"), prompts())
STAGED = [(family, name) for family, name in prompts() if f"{name}.vision.features" in golden(family).tensors]
GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}


def mixed(family: str) -> list[str]:
    """Prompts of one batch: two with an image, at different places after padding, and one without."""
    return ["chat_image", next(name for name in golden(family).ids() if name.startswith("text_only")), "zh_image"]


# -- parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), STAGED)
@torch.no_grad()
def test_tower_stages(family, name):
    data, vision = golden(family), shared_network(family).model.vision
    stages = ("patch_embedding", "transformer", "conv")
    expected = {stage: data.tensors.get(f"{name}.vision.{stage}") for stage in stages}
    embedded = vision.patch_embedding(data.pixels(name))
    close(embedded[0], expected["patch_embedding"])
    rows = vision.transformer(embedded)
    close(rows[0], expected["transformer"])
    patches = vision.encode(data.pixels(name))
    if expected["conv"] is not None:  # CogVLM2 merges 2 x 2
        close(patches[0].T.reshape(expected["conv"].shape), expected["conv"])
    close(vision.linear_proj(patches)[0], data.tensors[f"{name}.vision.linear_proj"])
    features = shared_network(family).get_image_features(data.pixels(name))
    close(features[0], data.tensors[f"{name}.vision.features"])


@EVERY_PROMPT
def test_positions_and_experts_are_exact(family, name):
    entry = golden(family).expected[name]
    types, mask = torch.tensor([entry["token_type_ids"]]), torch.tensor([entry["attention_mask"]])
    assert position_ids_from(types, mask).tolist() == [entry["position_ids"]]
    assert position_ids_from(types).tolist() == [entry["position_ids"]]
    assert vision_expert_mask(types).long().tolist() == [entry["vision_expert_mask"]]


@EVERY_PROMPT
@torch.no_grad()
def test_hidden_states_and_logits(family, name):
    tensors = golden(family).tensors
    output = shared_network(family)(**golden(family).inputs(name), output_hidden_states=True)
    if f"{name}.layer0_hidden" in tensors:
        close(output.hidden_states[1][0], tensors[f"{name}.layer0_hidden"])
    close(output.logits[0], tensors[f"{name}.logits"])
    assert output.logits.dtype == torch.float32


@EVERY_PROMPT
@torch.no_grad()
def test_greedy_steps_with_a_cache(family, name):
    data, network = golden(family), shared_network(family)
    seen = []  # the positions that the decoder was given
    hook = network.model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[1][0].tolist()))
    output, cache = network(**data.inputs(name, with_mask=False), logits_to_keep=1), None
    for step, (token, logits) in enumerate(
        zip(data.tensors[f"{name}.greedy_ids"], data.tensors[f"{name}.greedy_step_logits"], strict=True)
    ):
        if step:
            output = network(input_ids=data.tensors[f"{name}.greedy_ids"][None, step - 1, None], past_key_values=cache)
        cache = output.past_key_values
        close(output.logits[0, -1], logits)
        assert output.logits[0, -1].argmax() == token
    hook.remove()
    assert seen == data.expected[name]["position_ids"] + data.expected[name]["greedy_position_ids"]


@EVERY_PROMPT
@pytest.mark.parametrize("option", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("with_mask", [True, False])
def test_generate_gives_the_released_tokens(family, name, option, with_mask):
    inputs = golden(family).inputs(name, with_mask=with_mask)
    tokens = shared_network(family).generate(**inputs, **option, **GREEDY)
    assert torch.equal(tokens[0, inputs["input_ids"].shape[1] :], golden(family).tensors[f"{name}.greedy_ids"].long())


@BOTH
@torch.no_grad()
def test_left_padded_batch(family):
    data, batch = golden(family), golden(family).batch("batch_left")
    logits = shared_network(family)(**batch).logits
    is_real = batch["attention_mask"].bool()
    close(logits[is_real], data.tensors["batch_left.logits"][is_real])
    for option in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        tokens = shared_network(family).generate(**batch, **option, **GREEDY)
        assert torch.equal(tokens[:, is_real.shape[1] :], data.tensors["batch_left.greedy_ids"].long())


@BOTH
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_loss_and_gradients(family, implementation):
    data, network = golden(family), golden(family).network().train()
    network.set_attn_implementation(implementation)
    loss = network(**data.batch("train")).loss
    close(loss.detach(), data.tensors["train.loss"])
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    for name, expected in data.tensors.items():
        if name.startswith("train.grad."):
            close(gradients[name.removeprefix("train.grad.")], expected, GRADIENTS)
    norm = torch.stack([gradient.pow(2).sum() for gradient in gradients.values()]).sum().sqrt()
    close(norm, data.tensors["train.grad_global_norm"], GRADIENTS)
    unused = [name for name, gradient in gradients.items() if not gradient.any()]
    assert unused == data.expected["train"]["params_without_grad"]


@BOTH
def test_every_gradient_is_that_of_the_gathered_routing(family, monkeypatch):
    """All parameters, not only the fixture's few: cut segments and gathered indices are the same function."""

    def gradients(network):
        network.train()(**golden(family).batch("train")).loss.backward()
        return [parameter.grad for parameter in network.parameters()]

    cut = gradients(golden(family).network())
    split = ExpertRouting.from_token_type_ids
    calls = []

    def gathered(token_type_ids, attention_mask=None):
        calls.append(token_type_ids)
        text_row = torch.zeros_like(token_type_ids[:1])
        routing = split(torch.cat((token_type_ids, text_row)))  # a row without an image forces indices
        num_language = len(routing.language_index) - text_row.numel()
        language, vision = routing.language_index[:num_language], routing.vision_index
        return ExpertRouting(None, language, vision, torch.cat((language, vision)).argsort())

    monkeypatch.setattr(ExpertRouting, "from_token_type_ids", staticmethod(gathered))
    for left, right in zip(cut, gradients(golden(family).network()), strict=True):
        close(left, right, SAME_MATH)
    assert len(calls) == 1


# -- rotary tables -----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rope_tables_are_exact(family, dtype):
    folder = FIXTURES / family / "rope_tables"
    facts, tensors = json.loads((folder / "facts.json").read_text()), load_file(folder / "expected.safetensors")
    prefix = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    inv_freq = tensors[f"{prefix}.inv_freq"]
    assert torch.equal(reference_inv_freq(facts["head_dim"], facts["base"], dtype), inv_freq)
    cos, sin = rotary_table(torch.tensor(facts["positions"]), inv_freq)
    assert torch.equal(cos, tensors[f"{prefix}.cos"])
    assert torch.equal(sin, tensors[f"{prefix}.sin"])


@BOTH
def test_rope_modes_differ_in_half_precision_only(family):
    data, positions = golden(family), torch.tensor([[3, 257, 1001]])
    reference, exact = data.network(), data.network(rope="float32")
    for left, right in zip(reference.model.rotary(positions), exact.model.rotary(positions), strict=True):
        assert torch.equal(left, right)
    reference, exact = reference.to(torch.bfloat16), exact.to(torch.bfloat16)
    cos, _ = reference.model.rotary(positions)
    assert cos.dtype == torch.bfloat16
    assert torch.equal(cos[:, 1], reference.model.rotary(positions - 1)[0][:, 1])  # 257 is 256 in bf16
    cos_exact, _ = exact.model.rotary(positions)
    assert cos_exact.dtype == torch.float32
    assert torch.equal(cos_exact, golden(family).network().model.rotary(positions)[0])
    with pytest.raises(ConfigError, match="rope='bf16' was asked"):
        data.config(rope="bf16")


# -- weights and config ------------------------------------------------------------------------------------------------

MANIFESTS = {
    "cogvlm": ["base-224", "base-490", "chat-v1.1", "grounding-generalist"],
    "cogvlm2": ["llama3-chat-19B", "llama3-chinese-chat-19B"],
}
RELEASED = {
    "cogvlm": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "cogvlm2": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_multi_query_heads": 8,
    },
}
RELEASED_VISION = {
    "patch_size": 14,
    "hidden_size": 1792,
    "num_heads": 16,
    "num_hidden_layers": 63,
    "intermediate_size": 15360,
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in MANIFESTS for name in MANIFESTS[family]])
def test_real_size_manifest_is_consumed_key_by_key(family, name):
    manifest = json.loads(gzip.decompress((FIXTURES / family / f"manifest_{family}-{name}.json.gz").read_bytes()))
    image_size = 1344 if family == "cogvlm2" else 224 if name == "base-224" else 490
    config = read_config(RELEASED[family] | {"vision_config": RELEASED_VISION | {"image_size": image_size}}, "here")
    with torch.device("meta"):
        network = CogVLMForCausalLM(config).to(torch.bfloat16)
    found = {
        key: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for key, tensor in network.state_dict().items()
    }
    assert found == manifest
    assert len(found) == {"cogvlm": 1187, "cogvlm2": 1221}[family]
    assert config.num_image_tokens == {224: 258, 490: 1227, 1344: 2306}[image_size]


@BOTH
def test_absent_inv_freq_is_rebuilt_and_unequal_ones_are_refused(family):
    data = golden(family)
    network, weights = data.network(), data.weights()
    absent = [name for name in weights if name.endswith("inv_freq")]
    assert [rule.target.replace("*", "0") for rule in RULES] == absent[:1]
    with torch.device("meta"):
        network.model.layers[1].self_attn.rotary_emb.to_empty(device="meta")
    complete(network, [absent[1]])
    for name in absent:
        torch.testing.assert_close(network.get_buffer(name), weights[name], rtol=0, atol=0)
    network.model.layers[2].self_attn.rotary_emb.inv_freq *= 2
    with pytest.raises(CheckpointError, match="inv_freq of layer 2 differs"):
        complete(network)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is in no file"):
        complete(network, ["lm_head.weight"])


@BOTH
def test_from_pretrained_rebuilds_an_absent_inv_freq(family, tmp_path):
    network = golden(family).network().to(torch.bfloat16)
    weights = {name: tensor for name, tensor in network.state_dict().items() if "inv_freq" not in name}
    network.save_pretrained(tmp_path, state_dict=dict(weights))
    assert load_file(tmp_path / "model.safetensors").keys() == weights.keys()
    again = CogVLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = reference_inv_freq(16, again.config.rotary_base, torch.bfloat16)
    for layer in again.model.layers:
        assert torch.equal(layer.self_attn.rotary_emb.inv_freq, expected)


@BOTH
def test_save_and_reload(family, tmp_path):
    data, network = golden(family), golden(family).network()
    network.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "auto_map" not in saved
    assert saved["model_type"] == "cogvlm"
    assert saved["vision_config"]["num_heads"] == 4  # the released spelling
    assert load_file(tmp_path / "model.safetensors").keys() == data.weights().keys()
    again = CogVLMForCausalLM.from_pretrained(tmp_path)
    assert again.config.version == network.config.version
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_auto_map_is_stripped_from_any_config():
    config = golden("cogvlm").config()
    config.auto_map = {"AutoConfig": "configuration_cogvlm.CogVLMConfig"}
    assert "auto_map" not in config.to_dict()
    assert "auto_map" not in config.to_json_string()


@BOTH
def test_version_follows_the_config_alone(family):
    config = golden(family).config()
    assert config.version == (2 if family == "cogvlm2" else 1)
    assert config.rope_theta == (500000 if family == "cogvlm2" else 10000)
    assert config.num_key_value_heads == config.num_multi_query_heads
    assert config.vision_config.num_attention_heads == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"vision_config": None}, "lacks vision_config"),
        ({"vision_config": {"image_size": 56}}, "lacks vision_config.patch_size"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_attention_heads": 3}, "heads of equal width"),
        ({"num_multi_query_heads": 3}, "query heads in equal groups"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"vision_config": {}}, "lacks vision_config.image_size, vision_config.patch_size"),
        ({"vision_config": "none"}, "vision_config is 'none' and must be an object"),
        ({"quantization_config": "int8"}, "quantization_config is 'int8' and must be an object"),
        ({"torch_dtype": "float77"}, "torch_dtype is 'float77'; it is one of float32"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5' and must be a number above 0"),
        ({"rope_theta": 0}, "rope_theta is 0 and must be a number above 0"),
    ],
)
def test_wrong_config_names_the_field(change, message):
    fields = json.loads((golden("cogvlm").folder / "checkpoint/config.json").read_text())
    fields = {key: value for key, value in (fields | change).items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        read_config(fields, "config.json")


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL_SIZES = ("num_multi_query_heads", "max_position_embeddings")
TOWER_SIZES = ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_heads")


@pytest.mark.parametrize("value", ["64", 0, -1, 1.5, True, []])
@pytest.mark.parametrize("name", [*SIZES, *OPTIONAL_SIZES, *(f"vision_config.{name}" for name in TOWER_SIZES)])
def test_a_size_that_is_none_is_named(name, value):
    fields = json.loads((golden("cogvlm2").folder / "checkpoint/config.json").read_text())
    section = fields["vision_config"] if name.startswith("vision_config.") else fields
    section[name.removeprefix("vision_config.")] = value
    with pytest.raises(ConfigError, match=rf"{name} is .* and must be a whole number above 0"):
        read_config(fields, "config.json")


@pytest.mark.parametrize("section", ["", "vision_config."])
def test_absurdly_many_layers_are_refused_before_one_is_made(section):
    fields = json.loads((golden("cogvlm2").folder / "checkpoint/config.json").read_text())
    (fields["vision_config"] if section else fields)["num_hidden_layers"] = 10**9
    for read in (read_config, read_sizes):
        with pytest.raises(ConfigError, match=r"num_hidden_layers is 1000000000, over 1000"):
            read(fields, "config.json")


def test_wrong_config_of_the_tower_names_the_field():
    with pytest.raises(ConfigError, match=r"vision_config.dropout_prob is 0.1 and must be 0.0"):
        golden("cogvlm").config(vision_config={"dropout_prob": 0.1})
    with pytest.raises(ConfigError, match=r"vision_config.layer_norm_eps is None and must be a number above 0"):
        golden("cogvlm").config(vision_config={"layer_norm_eps": None})


def test_unknown_override_suggests_the_field():
    with pytest.raises(ConfigError, match=r"'num_hidden_layer' is no field .* Did you mean 'num_hidden_layers'\?"):
        golden("cogvlm").config(num_hidden_layer=2)
    assert golden("cogvlm2").config(num_key_value_heads=1).num_multi_query_heads == 1
    assert golden("cogvlm2").config(vision_config={"num_hidden_layers": 1}).vision_config.num_hidden_layers == 1


# -- caches, batches, ways through the code ----------------------------------------------------------------------------


@BOTH
@torch.no_grad()
def test_eager_attention_equals_sdpa(family):
    data, network = golden(family), golden(family).network()
    batch = left_padded(data, mixed(family))
    expected = network(**batch).logits
    network.set_attn_implementation("eager")
    is_real = batch["attention_mask"].bool()
    close(network(**batch).logits[is_real], expected[is_real], SAME_MATH)
    tokens = network.generate(**data.inputs("chat_image"), **GREEDY)
    assert tokens[0, -10:].tolist() == data.tensors["chat_image.greedy_ids"].tolist()


@BOTH
@torch.no_grad()
def test_mixed_batch_equals_the_single_runs(family):
    data, network, names = golden(family), shared_network(family), mixed(family)
    batch = left_padded(data, names)
    assert ExpertRouting.from_token_type_ids(batch["token_type_ids"]).inverse is not None
    logits = network(**batch).logits
    last = network(**batch, logits_to_keep=1).logits
    for row, name in enumerate(names):
        expected = data.tensors[f"{name}.logits"]
        close(logits[row, -len(expected) :], expected)
        close(last[row, 0], expected[-1])
    for option in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        tokens = network.generate(**batch, **option, **GREEDY)
        for row, name in enumerate(names):
            assert tokens[row, -10:].tolist() == data.tensors[f"{name}.greedy_ids"].tolist()


@BOTH
@torch.no_grad()
def test_last_column_alone_equals_the_last_of_all(family):
    data, network = golden(family), shared_network(family)
    for batch in (data.inputs("chat_image"), data.batch("batch_left"), left_padded(data, mixed(family))):
        close(network(**batch, logits_to_keep=1).logits, network(**batch).logits[:, -1:], SAME_MATH)
        close(network(**batch, logits_to_keep=3).logits, network(**batch).logits[:, -3:], SAME_MATH)


@BOTH
@pytest.mark.parametrize("prefix", [1, "image", "image + 3"])
@pytest.mark.parametrize("whole_types", [True, False])
@torch.no_grad()
def test_prompt_in_two_parts_equals_one(family, prefix, whole_types):
    """A follow-up turn extends a cached prefix: before the image, right after it, or in the text."""
    data, network = golden(family), shared_network(family)
    inputs, slots = data.inputs("chat_image", with_mask=False), data.config().num_image_tokens
    cut = {1: 1, "image": 1 + slots, "image + 3": 4 + slots}[prefix]
    first = {"pixel_values": inputs["pixel_values"]} if cut > 1 else {}
    ids, types = inputs["input_ids"], inputs["token_type_ids"]
    cache = network(ids[:, :cut], token_type_ids=types[:, :cut], **first).past_key_values
    rest = types if whole_types else types[:, cut:]
    pixels = inputs["pixel_values"] if whole_types or cut == 1 else None
    output = network(ids[:, cut:], token_type_ids=rest, pixel_values=pixels, past_key_values=cache)
    close(output.logits[0], data.tensors["chat_image.logits"][cut:])
    step = network(data.tensors["chat_image.greedy_ids"][None, :1], past_key_values=output.past_key_values)
    close(step.logits[0, 0], data.tensors["chat_image.greedy_step_logits"][1])


@BOTH
def test_generate_continues_a_cache(family):
    data, network = golden(family), shared_network(family)
    inputs = data.inputs("chat_multiturn_image")
    cut = data.config().num_image_tokens + 5
    part = {key: value[:, :cut] for key, value in inputs.items() if key != "pixel_values"}
    with torch.no_grad():
        cache = network(**part, pixel_values=inputs["pixel_values"]).past_key_values
    tokens = network.generate(**inputs, past_key_values=cache, **GREEDY)
    assert tokens[0, -10:].tolist() == data.tensors["chat_multiturn_image.greedy_ids"].tolist()


@BOTH
@torch.no_grad()
def test_interleaved_requests_do_not_disturb_each_other(family):
    data, network = golden(family), shared_network(family)
    names = mixed(family)
    outputs = {name: network(**data.inputs(name), past_key_values=DynamicCache()) for name in names}
    for step in range(1, 10):
        for name in names:
            token = data.tensors[f"{name}.greedy_ids"][None, step - 1, None]
            outputs[name] = network(token, past_key_values=outputs[name].past_key_values)
            close(outputs[name].logits[0, -1], data.tensors[f"{name}.greedy_step_logits"][step])


@BOTH
def test_beams_and_several_samples(family):
    """Beams are reordered and rows repeated; each row keeps the positions of its prompt. One beam a row is greedy."""
    data, network = golden(family), shared_network(family)
    batch = left_padded(data, mixed(family))
    together = network.generate(**batch, max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None)
    for row, name in enumerate(mixed(family)):
        inputs = data.inputs(name)
        inputs["pixel_values"] = inputs.get("pixel_values")
        alone = network.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None)
        uncached = network.generate(
            **inputs, max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None, use_cache=False
        )
        assert together[row, -6:].tolist() == alone[0, -6:].tolist() == uncached[0, -6:].tolist()


@BOTH
def test_guessed_tokens_keep_their_positions(family):
    """Prompt lookup feeds several tokens behind a cache and takes the wrong ones back."""
    data, network = golden(family), shared_network(family)
    tokens = network.generate(**data.inputs("chat_multiturn_image"), prompt_lookup_num_tokens=3, **GREEDY)
    assert tokens[0, -10:].tolist() == data.tensors["chat_multiturn_image.greedy_ids"].tolist()


@BOTH
def test_reset_static_cache_serves_the_next_prompt(family):
    data, network = golden(family), shared_network(family)
    cache = StaticCache(config=network.config, max_cache_len=160)
    for name in mixed(family):
        cache.reset()
        tokens = network.generate(**data.inputs(name), past_key_values=cache, **GREEDY)
        assert tokens[0, -10:].tolist() == data.tensors[f"{name}.greedy_ids"].tolist()


@BOTH
@torch.no_grad()
def test_image_features_and_embeddings_in_place_of_pixels(family):
    data, network = golden(family), shared_network(family)
    inputs = data.inputs("chat_image")
    features = network.get_image_features(inputs.pop("pixel_values"))
    assert features.shape == (1, network.config.num_image_tokens, network.config.hidden_size)
    expected = data.tensors["chat_image.logits"]
    close(network(**inputs, image_features=features).logits[0], expected)
    tokens = network.generate(**inputs, image_features=features, **GREEDY)
    assert tokens[0, -10:].tolist() == data.tensors["chat_image.greedy_ids"].tolist()
    embeds = network.model.embed(inputs["input_ids"], inputs["token_type_ids"], features)
    merged = {"inputs_embeds": embeds, "token_type_ids": inputs["token_type_ids"], "image_features": features}
    close(network(**merged).logits[0], expected)


@BOTH
def test_packed_questions_behind_one_image(family):
    """The decoder with a 4D mask: two questions share one image and do not see each other. Loss and gradients too."""
    data, network = golden(family), golden(family).network()
    one, two = data.expected["chat_image"], data.expected["chat_multiturn_image"]
    prefix = 1 + data.config().num_image_tokens
    tails = [entry["input_ids"][prefix:] for entry in (one, two)]
    ids = torch.tensor([one["input_ids"] + tails[1]])
    types = torch.tensor([one["token_type_ids"] + [0] * len(tails[1])])
    positions = torch.tensor([one["position_ids"] + two["position_ids"][prefix:]])
    end = prefix + len(tails[0])
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    mask[end:, prefix:end] = False
    features = network.get_image_features(data.pixels("chat_image"))
    routing = ExpertRouting.from_token_type_ids(types)
    embeds = network.model.embed(ids, types, features)
    logits = network.lm_head(network.model(embeds, positions, mask[None, None], routing))[0]
    close(logits[:end], data.tensors["chat_image.logits"])
    close(logits[end:], data.tensors["chat_multiturn_image.logits"][prefix:])
    logits.square().mean().backward()
    assert network.model.vision.boi.grad.any()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_row_without_any_key_gives_no_nan(implementation):
    network, data = golden("cogvlm2").network(), golden("cogvlm2")
    network.set_attn_implementation(implementation)
    inputs = left_padded(data, mixed("cogvlm2"))
    inputs["attention_mask"][1] = 0  # an empty row in the batch
    assert network(**inputs).logits.isfinite().all()
    embeds = network.model.embed(inputs["input_ids"])
    mask = torch.zeros(1, 1, embeds.shape[1], embeds.shape[1], dtype=torch.bool)
    assert network.model(embeds, torch.zeros_like(inputs["input_ids"]), mask).isfinite().all()


# -- training ----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("method", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_activation_checkpointing_changes_nothing(family, method):
    data, plain, saving = golden(family), golden(family).network().train(), golden(family).network().train()
    getattr(saving, method)()
    assert sum(getattr(module, "gradient_checkpointing", False) for module in saving.modules()) == 5  # 3 + 2 layers
    losses = [network(**data.batch("train"), use_cache=True).loss for network in (plain, saving)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, left), right in zip(plain.named_parameters(), saving.parameters(), strict=True):
        close(right.grad, left.grad, SAME_MATH)
        assert left.grad is not None, name


def test_loss_is_the_mean_over_label_tokens_and_zero_without_any():
    data, network = golden("cogvlm2"), shared_network("cogvlm2")
    batch = data.batch("train")
    with torch.no_grad():
        logits = network(**batch).logits[:, :-1].log_softmax(-1)
        targets = batch["labels"][:, 1:]
        picked = -logits.gather(2, targets.clamp(min=0)[..., None])[..., 0][targets != -100]
        close(network(**batch).loss, picked.mean())
        batch["labels"] = torch.full_like(batch["labels"], -100)
        assert network(**batch).loss == 0


LORA_TARGETS = (
    [f"{expert}_expert_{part}" for expert in ("language", "vision") for part in ("query_key_value", "dense")]
    + ["gate_proj", "up_proj", "down_proj", "query_key_value", "dense", "fc1", "fc2"]
    + ["linear_proj.linear_proj", "dense_h_to_4h", "dense_4h_to_h"]
)


@BOTH
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_lora_attaches_to_every_offered_target(family):
    peft = pytest.importorskip("peft")
    data, network = golden(family), golden(family).network()
    with torch.no_grad():
        expected = network(**data.inputs("chat_image")).logits
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=LORA_TARGETS)
    adapted = peft.get_peft_model(network, config)
    reached = {name.split(".lora_")[0].split(".")[-1] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert reached == {target.split(".")[-1] for target in LORA_TARGETS}
    with torch.no_grad():  # B starts at zero
        close(adapted.eval()(**data.inputs("chat_image")).logits, expected, SAME_MATH)
    adapted.train()(**data.batch("train")).loss.backward()
    trained = [parameter for name, parameter in adapted.named_parameters() if "lora_B" in name]
    assert sum(parameter.grad.any().item() for parameter in trained) >= len(trained) - 4  # the last image expert rests
    tokens = adapted.eval().generate(**data.inputs("chat_image"), **GREEDY)
    assert tokens[0, -10:].tolist() == data.tensors["chat_image.greedy_ids"].tolist()


@BOTH
@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_weights_that_accelerate_offloads_give_the_same_tokens(family, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    data, network = golden(family), golden(family).network()
    if where == "cpu":
        network = accelerate.cpu_offload(network, execution_device=torch.device("cpu"))
    else:
        names = ["embed_tokens", "vision", "norm", *(f"layers.{index}" for index in range(3))]
        places = {f"model.{name}": "disk" for name in names} | {"model.layers.0": "cpu", "lm_head": "disk"}
        network = accelerate.dispatch_model(network, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert network.model.vision.boi.is_meta
    tokens = network.generate(**data.inputs("chat_image"), max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert tokens[0, -10:].tolist() == data.tensors["chat_image.greedy_ids"].tolist()


# -- compilation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@BOTH
@torch.no_grad()
def test_decode_step_compiles_without_a_break(family, fresh_dynamo):
    """Whole-graph, with a static cache, and one graph for all steps."""
    data, network = golden(family), golden(family).network()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(network.forward, fullgraph=True, backend=backend)
    cache = StaticCache(config=network.config, max_cache_len=64)
    network(**data.inputs("chat_image"), past_key_values=cache)
    for index in range(1, 10):
        token = data.tensors["chat_image.greedy_ids"][None, index - 1, None]
        logits = step(input_ids=token, past_key_values=cache).logits
        close(logits[0, -1], data.tensors["chat_image.greedy_step_logits"][index])
    assert len(graphs) == 1


@torch.no_grad()
def test_decode_step_compiles_with_a_growing_cache(fresh_dynamo):
    data, network = golden("cogvlm2"), golden("cogvlm2").network()
    step = torch.compile(network.forward, fullgraph=True, backend="aot_eager", dynamic=True)
    cache = network(**data.inputs("chat_image")).past_key_values
    for index in range(1, 4):
        token = data.tensors["chat_image.greedy_ids"][None, index - 1, None]
        output = step(input_ids=token, past_key_values=cache)
        close(output.logits[0, -1], data.tensors["chat_image.greedy_step_logits"][index])
        cache = output.past_key_values


# -- wrong inputs ------------------------------------------------------------------------------------------------------


def wrong(change) -> dict[str, torch.Tensor]:
    inputs = golden("cogvlm").inputs("chat_image")
    change(inputs)
    return inputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs: inputs.pop("pixel_values"), r"0 image\(s\) were given and 1 row"),
        (lambda inputs: inputs.pop("token_type_ids"), r"1 image\(s\) were given and 0 row"),
        (lambda inputs: inputs.update(pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1)), r"2 image\(s\) were"),
        (lambda inputs: inputs["token_type_ids"][:, 3:5].zero_(), "row 0 has 2 images"),
        (lambda inputs: inputs["token_type_ids"][:, 1].zero_(), "row 0 has 17 image slots .* takes 18"),
        (lambda inputs: inputs.update(attention_mask=inputs["attention_mask"][:, 1:]), "attention_mask has the shape"),
        (lambda inputs: inputs.update(token_type_ids=inputs["token_type_ids"][:, 1:]), "token_type_ids has the shape"),
        (lambda inputs: inputs.update(image_features=torch.zeros(1, 5, 64)), r"these rows take \(1, 18, 64\)"),
        (lambda inputs: inputs.update(inputs_embeds=torch.zeros(1, 2, 64)), "both or none"),
    ],
)
def test_inputs_that_do_not_fit_together_raise(change, message):
    with pytest.raises(PromptError, match=message):
        shared_network("cogvlm")(**wrong(change))


def test_wrong_pixels_and_attentions_raise():
    inputs = golden("cogvlm").inputs("chat_image")
    with pytest.raises(ConfigError, match=r"this tower takes \(images, 3, 56, 56\)"):
        shared_network("cogvlm").get_image_features(inputs["pixel_values"][..., :42])
    with pytest.raises(ConfigError, match="output_attentions"):
        shared_network("cogvlm")(**inputs, output_attentions=True)


def test_cache_that_ends_inside_an_image_raises():
    network, inputs = shared_network("cogvlm"), golden("cogvlm").inputs("chat_image", with_mask=False)
    cache = network(**inputs).past_key_values
    cache.crop(5 - cache.get_seq_length())
    with pytest.raises(PromptError, match="the cache ends inside an image, after 5 tokens"):
        network(**inputs | {"input_ids": inputs["input_ids"][:, 5:]}, past_key_values=cache)
    with pytest.raises(PromptError, match="2 rows were given and the cache holds the positions of 1"):
        network(torch.tensor([[3], [4]]), past_key_values=cache)
