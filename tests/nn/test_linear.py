"""The linear layer for few rows: the product of `nn.Linear`, and the plain way wherever it does not apply."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import ROUNDING, close
from torch import nn

from lavish.nn.linear import Linear


def layer(in_features: int, out_features: int, bias: bool, dtype: torch.dtype = torch.float32) -> Linear:
    made = Linear(in_features, out_features, bias=bias)
    nn.init.normal_(made.weight, std=in_features**-0.5)
    if bias:
        nn.init.normal_(made.bias, std=0.3)
    return made.to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96), (2, 96), (3, 1, 96), (4, 96), (2, 40, 96), (0, 96)])
@pytest.mark.parametrize("out_features", [64, 72, 7])
def test_the_product_is_that_of_the_ordinary_layer(bias, shape, out_features):
    made = layer(96, out_features, bias)
    states = torch.randn(shape)
    with torch.inference_mode():
        product = made(states)
    assert product.shape == (*shape[:-1], out_features)
    if product.numel():
        close(product, exact(made, states))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(32, 320), (1, 140, 320), (2, 33, 320)])
def test_many_rows_of_a_large_layer_too(bias, shape):
    made = layer(320, 256, bias)
    states = torch.randn(shape)
    with torch.inference_mode():
        assert made._is_many_rows(states)
        product = made(states)
    assert product.shape == (*shape[:-1], 256)
    close(product, exact(made, states))


@pytest.mark.parametrize("rows", [1, 40])
def test_autocast_gets_its_dtype(rows):
    made, states = layer(320, 256, bias=True), torch.randn(rows, 320)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        product = made(states)
    assert product.dtype == torch.bfloat16


def exact(made: Linear, states: torch.Tensor) -> torch.Tensor:
    bias = None if made.bias is None else made.bias.double()
    return F.linear(states.double(), made.weight.double(), bias).float().detach()


def test_rows_that_are_no_block_of_memory():
    made = layer(96, 64, bias=False)
    states = torch.randn(96, 2).t()
    with torch.inference_mode():
        close(made(states), exact(made, states))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_take_the_plain_way(dtype):
    made = layer(96, 64, bias=True, dtype=dtype)
    states = torch.randn(1, 96).to(dtype)
    with torch.inference_mode():
        assert torch.equal(made(states), F.linear(states, made.weight, made.bias))


def test_gradients_reach_weight_and_input():
    made = layer(96, 64, bias=True)
    states = torch.randn(1, 96, requires_grad=True)
    made(states).sum().backward()
    assert torch.allclose(states.grad, made.weight.sum(0)[None], **ROUNDING)
    assert made.weight.grad is not None


def test_a_wrong_size_is_refused_as_by_torch():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(96, 64, bias=False)(torch.randn(1, 48))
