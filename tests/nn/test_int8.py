"""Weight-only int8: error bounds, both ways to multiply, and the layer's surroundings."""

import pytest
import torch
from tolerance import INT8_PRODUCT, ROUNDING
from torch import nn

from lavish.nn.int8 import Int8Linear, quantize_weight


@pytest.fixture
def linear() -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(96, 64)
        nn.init.normal_(linear.weight, std=96**-0.5)
        nn.init.normal_(linear.bias, std=0.3)
    return linear.requires_grad_(False)


def test_the_error_of_a_weight_is_at_most_half_a_step(linear):
    weight, scale = quantize_weight(linear.weight)
    assert weight.dtype == torch.int8
    assert weight.abs().amax() == 127
    assert ((weight * scale[:, None] - linear.weight).abs() <= 0.5001 * scale[:, None]).all()


def test_a_row_of_zeros_stays_zero():
    weight, scale = quantize_weight(torch.zeros(3, 8))
    assert torch.equal(weight * scale[:, None], torch.zeros(3, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_the_product_is_that_of_the_dequantised_weight(linear, dtype, rows):
    linear = linear.to(dtype)
    layer = Int8Linear.from_linear(linear)
    x = torch.randn(2, rows, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ (layer.weight.double() * layer.weight_scale.double()[:, None]).T + linear.bias.double()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    assert (layer(x).double() - exact).abs().max() < tolerance
    assert layer(x).dtype == dtype
    assert layer(x[:, :1]).shape == (2, 1, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_the_product_without_gradients(dtype, rows):
    """float32 goes block by block: 2,048 inputs are 128 rows of the weight in a block."""
    linear = nn.Linear(2048, 300).to(dtype).requires_grad_(False)
    layer = Int8Linear.from_linear(linear)
    x = torch.randn(rows, 2048, generator=torch.Generator().manual_seed(3)).to(dtype)
    with torch.inference_mode():
        product = layer(x)
    exact = x.double() @ (layer.weight.double() * layer.weight_scale.double()[:, None]).T + linear.bias.double()
    assert product.shape == (rows, 300)
    assert torch.allclose(product.double(), exact, rtol=0, atol=INT8_PRODUCT[dtype])


def test_the_product_is_close_to_the_original(linear):
    layer = Int8Linear.from_linear(linear)
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(2))
    expected = linear(x)
    assert ((layer(x) - expected).norm() / expected.norm()) < 0.01


def test_gradients_reach_the_input(linear):
    x = torch.randn(1, 96, requires_grad=True)
    layer = Int8Linear.from_linear(linear)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dequantized().sum(0)[None], **ROUNDING)


def test_state_dict_names_and_an_empty_input(linear):
    layer = Int8Linear.from_linear(linear)
    assert list(layer.state_dict()) == ["weight", "weight_scale", "bias"]
    assert layer(torch.empty(0, 96)).shape == (0, 64)
    assert sum(t.nbytes for t in layer.buffers()) < 0.4 * sum(p.nbytes for p in linear.parameters())
