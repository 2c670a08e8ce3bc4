"""A packed network answers as the ordinary one and is saved as if it were not packed."""

import pytest
import torch
from small_network import answer, make_network
from tolerance import SAME_MATH, close
from torch import nn

import lavish
from lavish.common.errors import ConfigError
from lavish.inference import packing
from lavish.inference.packing import pack, should_pack, unpack, weight_bytes
from lavish.models.cogvlm.model import CogVLMForCausalLM
from lavish.nn.packed import PackedLinear, can_pack

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(2, 2)), reason="this torch or CPU has no packed products")


@pytest.fixture
def network() -> CogVLMForCausalLM:
    return make_network()


def test_logits_are_those_of_the_ordinary_network(network):
    _, expected = answer(network, 4)
    num_linears = sum(isinstance(module, nn.Linear) for module in network.modules())
    assert pack(network, min_bytes=0) == num_linears
    assert isinstance(network.lm_head, PackedLinear)
    close(answer(network, 4)[1], expected, SAME_MATH)
    assert pack(network, min_bytes=0) == 0


def test_unpacking_gives_the_same_weights(network):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    pack(network, min_bytes=0)
    packed = network.state_dict()
    unpack(network)
    for state in (packed, network.state_dict()):
        assert set(state) == set(before)
        assert all(torch.equal(state[name], before[name]) for name in before)
    assert not any(isinstance(module, PackedLinear) for module in network.modules())


def test_a_packed_network_is_saved_as_an_ordinary_one(network, tmp_path):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    pack(network, min_bytes=0)
    network.save_pretrained(tmp_path)
    again = CogVLMForCausalLM.from_pretrained(tmp_path).state_dict()
    assert set(again) == set(before)
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_shared_weights_and_other_dtypes_stay():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    assert pack(nn.Sequential(first, second), min_bytes=0) == 0
    assert pack(nn.Sequential(nn.Linear(8, 8).half()), min_bytes=0) == 0
    assert pack(nn.Sequential(nn.Linear(8, 8, device="meta")), min_bytes=0) == 0


def test_small_layers_stay():
    layers = nn.Sequential(nn.Linear(1024, 513, bias=False), nn.Linear(1024, 512, bias=False))
    assert pack(layers) == 1
    assert isinstance(layers[0], PackedLinear)
    assert type(layers[1]) is nn.Linear


def test_a_packed_network_has_the_same_bytes(network):
    before = weight_bytes(network)
    pack(network, min_bytes=0)
    assert weight_bytes(network) == before


HERE = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "is_quantized": False, "has_adapter": False}


def test_packing_is_asked_for_or_automatic(monkeypatch):
    monkeypatch.setattr(packing, "can_pack", lambda weight: weight.dtype in (torch.bfloat16, torch.float32))
    assert [should_pack(asked, **HERE) for asked in (True, "auto", False)] == [True, True, False]
    # decoding float32 is faster without
    assert [should_pack(asked, **HERE | {"dtype": torch.float32}) for asked in (True, "auto")] == [True, False]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"device": torch.device("meta")}, "the device is 'meta'"),
        ({"is_quantized": True}, "these are quantised"),
        ({"has_adapter": True}, "does not take an adapter"),
        ({"dtype": torch.float16}, "asked: torch.float16"),
    ],
)
def test_what_cannot_be_packed_is_said(other, said):
    assert not should_pack("auto", **HERE | other)
    with pytest.raises(ConfigError, match=said):
        should_pack(True, **HERE | other)


def test_another_word_is_refused():
    with pytest.raises(ConfigError, match="pack must be True, False or \"auto\", not 'yes'"):
        should_pack("yes", **HERE)


def test_load_packs_answers_and_saves_the_same_files(release, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "__kwdefaults__", {"min_bytes": 0})
    vlm = lavish.load(release.folder, device="cpu", dtype="float32", pack=True)
    assert isinstance(vlm.model.lm_head, PackedLinear)
    messages, template = release.prompts["chat_image"]
    reply = vlm.chat(messages, max_new_tokens=10, chat_template=template)
    assert reply.token_ids == release.greedy_ids["chat_image"]
    for network, folder in ((vlm.model, tmp_path / "packed"), (release.loaded.model, tmp_path / "ordinary")):
        network.save_pretrained(folder)
    names = sorted(path.name for path in (tmp_path / "ordinary").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "packed").iterdir())
    for name in names:
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "ordinary" / name).read_bytes(), name


def test_load_refuses_to_pack_int8(v2):
    with pytest.raises(ConfigError, match="pack=True takes float weights"):
        lavish.load(v2.folder, device="cpu", quantization="int8", pack=True)
