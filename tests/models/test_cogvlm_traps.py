"""The known faults of CogVLM engines, each with a test that shows ours has it not. The numbers are only for the tests.

Where it is cheap the fault is put in, and the test shows that the fixture would notice. Elsewhere stand: 3, 4 (pixels:
test_pixels.py), 10 (shares by heads: test_parallel.py), 13, 14 (special strings, sentencepiece:
test_cogvlm_processor.py, test_tokenizers.py); of 15 and 17 what the tests below name.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cogvlm_fixture import FAMILIES, FIXTURES, golden, left_padded, shared_network
from safetensors.torch import save_file
from tolerance import LOGITS_APART, SAME_MATH, close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

import lavish
from lavish.common.errors import CheckpointError, PromptError
from lavish.models.cogvlm import model as module
from lavish.models.cogvlm.model import (
    CogVLMForCausalLM,
    ExpertRouting,
    RMSNorm,
    apply_rotary,
    position_ids_from,
    vision_expert_mask,
)
from lavish.models.cogvlm.processor import CogVLMProcessor
from lavish.nn import eva2_clip

BOTH = pytest.mark.parametrize("family", FAMILIES)
THREE_TURNS = [
    {"role": role, "content": text}
    for role, text in zip(
        ("user", "assistant", "user", "assistant", "user"),
        ("First thing", "Yes sir", "Second thing", "Quite so", "Last thing"),
        strict=True,
    )
]
GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}


def off(network: CogVLMForCausalLM, family: str, name: str = "chat_image", **changes) -> float:
    """The largest difference of the logits from the fixture's."""
    with torch.no_grad():
        logits = network(**golden(family).inputs(name) | changes).logits[0]
    return (logits - golden(family).tensors[f"{name}.logits"]).abs().max().item()


# -- 1, 2: routing and positions ---------------------------------------------------------------------------------------


@BOTH
def test_1_eoi_goes_to_the_language_expert(family, monkeypatch):
    types = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1], [0, 0, 1, 0, 0, 0]])
    expected = [[0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]
    assert vision_expert_mask(types).long().tolist() == expected
    assert off(shared_network(family), family) < LOGITS_APART
    slots = golden(family).config().num_image_tokens
    monkeypatch.setattr(
        module.ExpertRouting, "from_token_type_ids", staticmethod(lambda types: ExpertRouting((1, 1 + slots)))
    )
    assert off(shared_network(family), family) > 1


@BOTH
def test_2_patches_share_one_position(family, monkeypatch):
    slots = golden(family).config().num_image_tokens
    types = torch.tensor([[0] + [1] * slots + [0, 0]])
    assert position_ids_from(types).tolist() == [[0, 1] + [2] * (slots - 2) + [3, 4, 5]]
    rotary = module.CogVLMModel.rotary
    monkeypatch.setattr(
        module.CogVLMModel, "rotary", lambda self, ids: rotary(self, torch.arange(ids.shape[1]).expand_as(ids))
    )
    assert off(shared_network(family), family) > 2


# -- 5: activations, norms, rotary, biases -----------------------------------------------------------------------------


@BOTH
def test_5_eps_of_each_norm(family):
    network = shared_network(family)
    vision = network.model.vision
    for layer in vision.transformer.layers:
        assert layer.input_layernorm.eps == layer.post_attention_layernorm.eps == 1e-6
    assert vision.linear_proj.norm1.eps == 1e-5
    norms = [norm for norm in network.modules() if isinstance(norm, RMSNorm)]
    assert len(norms) == 7
    assert {norm.eps for norm in norms} == {1e-5}


@BOTH
def test_5_gelu_is_exact(family, monkeypatch):
    exact = F.gelu
    monkeypatch.setattr(eva2_clip.F, "gelu", lambda states: exact(states, approximate="tanh"))
    assert off(shared_network(family), family) > 2e-3


@BOTH
def test_5_biases_are_where_the_release_has_them(family):
    names = [name for name in golden(family).weights() if name.startswith("model.layers.0.")]
    biased = {name.split(".", 3)[-1] for name in names if name.endswith("bias")}
    assert biased == ({"self_attn.vision_expert_query_key_value.bias"} if family == "cogvlm2" else set())
    network = golden(family).network()
    for layer in network.model.vision.transformer.layers:
        torch.nn.init.zeros_(layer.attention.query_key_value.bias)
    assert off(network, family) > 0.1


@BOTH
def test_5_rotary_turns_halves(family, monkeypatch):
    def interleaved(states, cos, sin):
        first, second = states[..., ::2], states[..., 1::2]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)

    monkeypatch.setattr(module, "apply_rotary", interleaved)
    assert off(shared_network(family), family) > 4


def test_5_rotary_in_half_precision_is_float32_arithmetic():
    states = torch.randn(2, 3, 4, 16).bfloat16()
    cos, sin = torch.rand(2, 2, 3, 1, 8).bfloat16()
    expected = apply_rotary(states.float(), cos.float(), sin.float()).bfloat16()
    assert torch.equal(apply_rotary(states, cos, sin), expected)


def test_5_rms_norm_multiplies_before_the_cast():
    norm, states = RMSNorm(64, 1e-5).bfloat16(), torch.randn(100, 64).bfloat16()
    torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    exact = states.float() * torch.rsqrt(states.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    expected = (exact * norm.weight.float()).bfloat16()
    assert torch.equal(norm(states), expected)
    with torch.no_grad():  # few tokens, and the way without temporaries for many
        assert torch.equal(norm(states[:5]), expected[:5])
        assert (norm(states) == expected).float().mean() > 0.999  # the last bit of a float32 sum may turn a rounding
    assert (exact.bfloat16() * norm.weight == expected).float().mean() < 0.8  # Llama's order


# -- 6, 7, 8: padding --------------------------------------------------------------------------------------------------


@BOTH
def test_6_right_padding_is_the_fault_and_left_padding_is_right(family):
    data, network = golden(family), shared_network(family)
    names = data.expected["batch_left"]["items"]
    single = [data.tensors[f"{name}.greedy_ids"].tolist() for name in names]
    left = network.generate(**data.batch("batch_left"), **GREEDY)
    assert [row[-10:] for row in left.tolist()] == single
    right = network.generate(**data.batch("batch_right"), **GREEDY)  # the last column is padding: nothing to save
    assert [row[-10:] == good for row, good in zip(right.tolist(), single, strict=True)] == [False, False, True]


def test_7_left_padding_does_not_shift_positions():
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    assert position_ids_from(types, mask)[0, 2:].tolist() == [0, 1, 2, 2, 3, 4, 5]


def test_7_right_padded_empty_prompt_keeps_eoi_at_3():
    types = torch.tensor([[0, 1, 1, 1, 1, 0, 0]])
    assert position_ids_from(types, torch.tensor([[1, 1, 1, 1, 1, 0, 0]]))[0, :5].tolist() == [0, 1, 2, 2, 3]


@BOTH
def test_7_padding_moves_no_position_of_a_bf16_table(family):
    """A shift of all positions hides in float32 and shows in a bf16 table: padded and alone take the same."""
    seen = []
    network = golden(family).network().to(torch.bfloat16)
    network.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    with torch.no_grad():
        network(**golden(family).inputs("chat_image"))
        network(**left_padded(golden(family), ["chat_image", "chat_multiturn_image"]))
        tokens = network.generate(
            **left_padded(golden(family), ["chat_image", "chat_multiturn_image"]), **GREEDY | {"max_new_tokens": 3}
        )
    alone, padded, again, first, second = seen
    assert padded[0, -alone.shape[1] :].tolist() == alone[0].tolist()
    assert again.tolist() == padded.tolist()
    assert (first[0, 0], second[0, 0]) == (alone[0, -1] + 1, alone[0, -1] + 2)
    assert tokens.shape[0] == 2


@BOTH
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_8_padded_rows_are_finite_forwards_and_backwards(family, implementation):
    network = golden(family).network().train()
    network.set_attn_implementation(implementation)
    batch = golden(family).batch("batch_left")
    output = network(**batch)
    assert output.logits.isfinite().all()
    output.logits.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters() if parameter.grad is not None)


# -- 9: no wait, no mask, no image expert ------------------------------------------------------------------------------

WAITS = ("nonzero", "_local_scalar_dense", "item", "masked_select", "is_nonzero", "index.Tensor", "index_put")


class Operations(TorchDispatchMode):
    """Notes the operations that ran, by name."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def waits(self) -> list[str]:
        """Those that make a GPU wait for the host, or give a shape that depends on values."""
        return [name for name in self.names if any(wait in name for wait in WAITS)]


@BOTH
@torch.no_grad()
def test_9_no_layer_waits_for_the_device(family):
    data, network = golden(family), shared_network(family)
    text = next(name for name in data.ids() if name.startswith("text_only"))
    batch = left_padded(data, ["chat_image", text])
    for types in (batch["token_type_ids"], data.inputs("chat_image")["token_type_ids"]):
        embeds = torch.randn(*types.shape, network.config.hidden_size)
        positions, routing = position_ids_from(types), ExpertRouting.from_token_type_ids(types)
        with Operations() as operations:
            network.model(embeds, positions, torch.ones_like(types), routing)
        assert len(operations.names) > 100
        assert operations.waits() == []


@BOTH
@torch.no_grad()
def test_9_decoding_touches_no_image_expert_and_no_mask(family):
    data, network = golden(family), golden(family).network()
    called = []
    for name, part in network.named_modules():
        if "vision" in name:
            part.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    for cache in (None, StaticCache(config=network.config, max_cache_len=64)):
        cache = network(**data.inputs("chat_image"), past_key_values=cache).past_key_values
        assert called
        called.clear()
        with Operations() as operations:
            network(input_ids=torch.tensor([[3]]), past_key_values=cache)
        assert called == []
        assert operations.waits() == []
        if not cache.is_compileable:
            assert not [name for name in operations.names if "mask" in name or "where" in name or "le.Tensor" in name]


# -- 11, 12: transformers and remote code ------------------------------------------------------------------------------


@BOTH
def test_11_positions_from_outside_are_ignored(family):
    data, network = golden(family), shared_network(family)
    inputs = data.inputs("chat_image")
    wrong = torch.arange(inputs["input_ids"].shape[1])[None]
    assert off(network, family, position_ids=wrong) < LOGITS_APART
    for extra in ({}, {"use_cache": False}):
        tokens = network.generate(**inputs, position_ids=wrong, **extra, **GREEDY)
        assert tokens[0, -10:].tolist() == data.tensors["chat_image.greedy_ids"].tolist()


@BOTH
def test_11_generated_tokens_after_an_image_are_text(family):
    """The prompt ends with eoi, and transformers would go on with its type."""
    data, network = golden(family), shared_network(family)
    inputs = data.inputs("base_image_empty")
    assert inputs["token_type_ids"][0, -1] == 1
    for extra in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        tokens = network.generate(**inputs, **extra, **GREEDY)
        assert tokens[0, -10:].tolist() == data.tensors["base_image_empty.greedy_ids"].tolist()


def test_12_nothing_of_the_remote_code_is_imported_or_run(tmp_path):
    folder = FIXTURES / "cogvlm2/open/checkpoint"
    for name in ("configuration_cogvlm", "modeling_cogvlm"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('remote code ran')")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    code = f"""
import sys
for name in ("triton", "xformers", "torchvision", "configuration_cogvlm", "modeling_cogvlm"):
    sys.modules[name] = None
import json, torch
from pathlib import Path
from lavish.models.cogvlm.config import read_config
from lavish.models.cogvlm.model import CogVLMForCausalLM
folder = Path({str(tmp_path)!r})
config = read_config(json.loads((folder / "config.json").read_text()), "config.json")
network = CogVLMForCausalLM.from_pretrained(folder, config=config)
print(network.generate(torch.tensor([[448, 374, 343]]), max_new_tokens=2, do_sample=False).shape)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "torch.Size([1, 5])" in run.stdout


# -- 16, 18: several images, the pad id --------------------------------------------------------------------------------


@BOTH
def test_16_a_second_image_in_a_row_is_refused(family):
    inputs = golden(family).inputs("chat_image", with_mask=False)
    ids, types = (inputs[key].repeat(1, 2) for key in ("input_ids", "token_type_ids"))
    with pytest.raises(PromptError, match=r"row 0 has 2 images .* at most one image in a conversation"):
        shared_network(family)(ids, token_type_ids=types, pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1))


# -- 15, 17: the demos of the release, and MindFormers -----------------------------------------------------------------


@BOTH
def test_15_a_text_conversation_says_each_turn_once(family):
    """The v1 demo repeats earlier turns from the third on. Its exact texts: test_cogvlm_processor.py, vicuna."""
    processor = CogVLMProcessor.from_pretrained(FIXTURES / family / "open/checkpoint")
    for template in ("vicuna", "chat"):
        text = processor.apply_chat_template(THREE_TURNS, template, tokenize=False)
        assert [text.count(message["content"]) for message in THREE_TURNS] == [1] * 5


@BOTH
def test_15_the_answer_is_decoded_and_not_split_off(family):
    """The v2 multi-GPU demo ends with `split("")`, which raises; an image takes all its slots, not a fixed number."""
    vlm = lavish.load(FIXTURES / family / "open/checkpoint", device="cpu")
    picture = {"type": "image", "image": FIXTURES / family / "open/inputs/square.png"}
    bare, seen = (
        vlm.chat([{"role": "user", "content": [*images, {"type": "text", "text": "What?"}]}], max_new_tokens=4)
        for images in ([], [picture])
    )
    assert seen.text == vlm.processor.decode(seen.token_ids)
    assert seen.usage.prompt_tokens - bare.usage.prompt_tokens == vlm.model.config.num_image_tokens


@BOTH
@torch.no_grad()
def test_15_the_loss_of_an_evaluation_is_a_mean(family):
    """The v2 LoRA demo sums the losses of batches and takes the exponential of that: twice the rows, twice the loss."""
    batch, network = golden(family).batch("train"), shared_network(family)
    once = network(**batch).loss
    twice = network(**{key: torch.cat([value, value]) for key, value in batch.items()}).loss
    torch.testing.assert_close(twice, once)


@BOTH
def test_17_the_rotary_table_may_be_float32_in_a_bf16_network(family):
    """MindFormers has a bf16 table alone. The release's own, bit for bit: test_rope_tables_are_exact."""
    network = golden(family).network(rope="float32").to(torch.bfloat16)
    cos, _ = network.model.rotary(torch.tensor([[256, 257]]))
    assert cos.dtype == torch.float32
    assert not torch.equal(cos[0, 0], cos[0, 1])


@BOTH
def test_17_text_alone_history_and_an_answer_without_its_prompt(family):
    """MindFormers crashes on text alone, drops the history, gives the prompt back, and pads prompts to 4096."""
    vlm = lavish.load(FIXTURES / family / "open/checkpoint", device="cpu")
    short, long = (vlm.chat(messages, max_new_tokens=4) for messages in (THREE_TURNS[:1], THREE_TURNS))
    assert len(short.token_ids) <= 4
    assert short.usage.prompt_tokens < long.usage.prompt_tokens < 200
    ids = vlm.processor.apply_chat_template(THREE_TURNS)["input_ids"]
    assert long.usage.prompt_tokens == ids.shape[1]
    assert THREE_TURNS[0]["content"] in vlm.processor.decode(ids[0])
    assert THREE_TURNS[0]["content"] not in short.text


@BOTH
def test_17_weights_beyond_float16_are_not_cast_in_silence(family, tmp_path):
    """MindFormers casts bf16 to fp16 unchecked. Per tensor: test_float16_overflow_is_not_silent."""
    weights = golden(family).weights()
    weights["model.norm.weight"] = weights["model.norm.weight"].clone().index_fill_(0, torch.tensor([3]), 1e6)
    for file in (FIXTURES / family / "open/checkpoint").iterdir():
        if "safetensors" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.* too large for float16"):
        lavish.load(tmp_path, dtype="float16", device="cpu")


@BOTH
@torch.no_grad()
def test_18_the_pad_id_says_nothing(family):
    """Image slots, padding and a text that holds the pad id: only the types and the mask tell them apart."""
    data, network = golden(family), shared_network(family)
    text = next(name for name in data.ids() if name.startswith("text_only"))
    batch, pad = left_padded(data, [text, "chat_image"]), data.config().pad_token_id
    assert (batch["input_ids"] == pad).sum() == (batch["attention_mask"] == 0).sum() + data.config().num_image_tokens
    logits = network(**batch).logits
    for row, name in enumerate([text, "chat_image"]):
        expected = data.tensors[f"{name}.logits"]
        close(logits[row, -len(expected) :], expected)
    changed = dict(batch)  # another placeholder id under the slots and the padding changes nothing
    changed["input_ids"] = batch["input_ids"].where(
        (batch["token_type_ids"] == 0) & (batch["attention_mask"] == 1), torch.tensor(7)
    )
    is_real = batch["attention_mask"].bool()
    close(network(**changed).logits[is_real], logits[is_real], SAME_MATH)
    held = data.inputs(text)
    held["input_ids"][0, 3] = pad
    without_mask = {key: held[key] for key in ("input_ids", "token_type_ids")}
    assert torch.equal(network(**held).logits, network(**without_mask).logits)
    assert torch.equal(network.generate(**held, **GREEDY), network.generate(**without_mask, **GREEDY))
