"""The shared tower: what its families set by arguments. Its values are proven with each family's fixture."""

import pytest
import torch
import torch.nn.functional as F

from lavish.common.errors import ConfigError
from lavish.nn.eva2_clip import EVA2CLIPModel

SIZES = {
    "image_size": 12,
    "patch_size": 3,
    "num_channels": 3,
    "num_positions": 17,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "layer_norm_eps": 1e-6,
    "out_size": 20,
    "projector_intermediate_size": 32,
}


def tower(**arguments) -> EVA2CLIPModel:
    """A tower whose weights show mistakes: no zero bias, no unit norm."""
    model = EVA2CLIPModel(**SIZES | arguments)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize(("merge_size", "tokens"), [(None, 16), (16, 4), (20, 4)])
@torch.no_grad()
def test_rows_are_boi_patches_eoi(merge_size, tokens):
    model, pixels = tower(merge_size=merge_size), torch.randn(2, 3, 12, 12)
    assert model.encode(pixels).shape == (2, tokens, merge_size or 16)
    rows = model(pixels)
    assert rows.shape == (2, tokens + 2, 20)
    for row, name in ((0, "boi"), (-1, "eoi")):
        assert torch.equal(rows[:, row], model.get_parameter(name)[0].expand(2, -1))


@torch.no_grad()
def test_merge_takes_squares_of_the_grid_row_by_row():
    model, pixels = tower(merge_size=16), torch.randn(1, 3, 12, 12)
    rows = model.transformer(model.patch_embedding(pixels))[0, 1:]
    square = torch.stack([rows[2], rows[3], rows[6], rows[7]])  # the grid is 4 x 4; the second square of the first row
    expected = torch.einsum("oipq,pqi->o", model.conv.weight, square.view(2, 2, 16)) + model.conv.bias
    torch.testing.assert_close(model.encode(pixels)[0, 1], expected)


@torch.no_grad()
def test_scaling_factor_divides_every_row():
    model, pixels = tower(merge_size=20), torch.randn(1, 3, 12, 12)
    rows = model(pixels)
    model.scaling_factor = 8.0
    assert torch.equal(model(pixels), rows / 8)


@torch.no_grad()
def test_norms_stand_after_their_sublayers():
    layer, states = tower().transformer.layers[0], torch.randn(1, 5, 16)
    halfway = states + F.layer_norm(
        layer.attention(states), (16,), layer.input_layernorm.weight, layer.input_layernorm.bias, 1e-6
    )
    norm = layer.post_attention_layernorm
    expected = halfway + F.layer_norm(layer.mlp(halfway), (16,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(layer(states), expected)
    torch.testing.assert_close(layer(states, "eager"), expected)


def test_other_image_sizes_are_refused():
    with pytest.raises(ConfigError, match=r"\(1, 3, 12, 15\); this tower takes \(images, 3, 12, 12\)"):
        tower()(torch.zeros(1, 3, 12, 15))
