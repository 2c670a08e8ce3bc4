"""A packed network answers as the ordinary one and is saved as if it were not packed."""

import pytest
import torch
from torch import nn

from lavish.inference.cache import SliceCache
from lavish.inference.packing import pack, unpack
from lavish.inference.steps import CogVLMSteps, Prompt
from lavish.models.cogvlm.config import CogVLMConfig
from lavish.models.cogvlm.model import CogVLMForCausalLM
from lavish.nn.packed import PackedLinear, can_pack

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(2, 2)), reason="this torch or CPU has no packed products")


@pytest.fixture
def network() -> CogVLMForCausalLM:
    config = CogVLMConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_multi_query_heads=2,
        vision_config={
            "image_size": 56,
            "patch_size": 14,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_heads": 2,
        },
    )
    network = CogVLMForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return network


def answer(network: CogVLMForCausalLM) -> torch.Tensor:
    """Give the logits of a prompt with a picture and of three more tokens."""
    steps = CogVLMSteps(network)
    pixel_values = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    prompt = Prompt([1, *[0] * 6, 5, 6, 7], [0, *[1] * 6, 0, 0, 0], pixel_values, None)
    cache = SliceCache(steps.num_layers)
    logits, state = steps.prefill([prompt], steps.image_features(pixel_values), cache)
    return torch.cat([logits, *(steps.decode([token_id], state, cache) for token_id in (8, 9, 10))])


def test_logits_are_those_of_the_ordinary_network(network):
    expected = answer(network)
    num_linears = sum(isinstance(module, nn.Linear) for module in network.modules())
    assert pack(network, min_bytes=0) == num_linears
    assert isinstance(network.lm_head, PackedLinear)
    torch.testing.assert_close(answer(network), expected, rtol=1e-5, atol=2e-5)
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
