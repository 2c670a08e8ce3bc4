"""Packed linear layers: the same values, the same products, and the layer's surroundings."""

import copy

import pytest
import torch
from torch import nn

from lavish.nn.packed import PackedLinear, can_pack

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(2, 2)), reason="this torch or CPU has no packed products")


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(96, 72, bias=bias)
    nn.init.normal_(layer.weight, std=96**-0.5)
    if bias:
        nn.init.normal_(layer.bias, std=0.3)
    return layer.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (1, 1, 96), (2, 40, 96), (0, 96)])
def test_the_product_is_that_of_the_linear_layer(dtype, bias, shape):
    layer = linear(dtype, bias)
    states = torch.randn(shape).to(dtype)
    exact = states.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0.0)
    product = PackedLinear.from_linear(layer)(states)
    assert product.dtype == dtype
    assert product.shape == exact.shape
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    assert not product.numel() or (product.double() - exact).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_comes_back_bit_for_bit(dtype):
    layer = linear(dtype)
    packed = PackedLinear.from_linear(layer)
    assert torch.equal(packed.weight, layer.weight)
    again = packed.to_linear()
    assert torch.equal(again.weight, layer.weight)
    assert torch.equal(again.bias, layer.bias)
    assert {key: value.shape for key, value in packed.state_dict().items()} == {
        key: value.shape for key, value in layer.state_dict().items()
    }
    assert torch.equal(packed.state_dict()["weight"], layer.weight)


def test_a_copy_stands_alone():
    packed = PackedLinear.from_linear(linear())
    other = copy.deepcopy(packed)
    states = torch.randn(3, 96)
    assert torch.equal(other(states), packed(states))
    assert other.bias is not packed.bias


def test_it_follows_a_cast():
    packed = PackedLinear.from_linear(linear()).to(torch.bfloat16)
    assert packed.weight.dtype == torch.bfloat16
    assert packed(torch.randn(1, 96).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("target", [torch.float16, "meta"])
def test_it_refuses_what_has_no_packed_product(target):
    with pytest.raises(RuntimeError, match="Undo the packing first"):
        PackedLinear.from_linear(linear()).to(target)


def test_gradients_flow_to_the_input():
    layer = linear()
    states = torch.randn(4, 96, requires_grad=True)
    PackedLinear.from_linear(layer)(states).sum().backward()
    torch.testing.assert_close(states.grad, layer.weight.sum(dim=0).expand(4, -1))
