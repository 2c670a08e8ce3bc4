"""lavish.build: networks without weights, by name or folder."""

import pytest
import torch

import lavish
from lavish.common.errors import ConfigError, UnknownLayout
from lavish.inference.build import read_layout
from lavish.models import model_zoo

CHAT_MODELS = [name for name, entry in model_zoo.items() if entry.template]


@pytest.mark.parametrize("name", [name for name in model_zoo if name not in CHAT_MODELS])
def test_released_layouts_of_lavis_have_the_released_sizes(name):
    network, entry = lavish.build(name), model_zoo[name]
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert sum(p.numel() for p in network.parameters()) == entry.num_parameters
    num_bytes = 4 * sum(t.numel() for t in network.state_dict().values())
    assert 0 <= entry.num_bytes - num_bytes <= 4 * 2 * 512, "files count the text positions too"
    assert network.config.vision_config.image_size == entry.image_size


@pytest.mark.parametrize("name", CHAT_MODELS)
def test_released_layouts_have_the_released_sizes(name):
    network = lavish.build(name)
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert network.dtype == torch.bfloat16
    assert sum(p.numel() for p in network.parameters()) == model_zoo[name].num_parameters
    num_bytes = 2 * sum(t.numel() for t in network.state_dict().values())
    assert num_bytes == model_zoo[name].num_bytes
    assert network.config.vision_config.image_size == model_zoo[name].image_size
    # A config without a version has one template, the table's default.
    assert getattr(network.config, "template_version", "chat") == model_zoo[name].template


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_hidden_layers": 2, "vision_config": {"num_hidden_layers": 3}},
        {"num_hidden_layers": 2, "vision_config.num_hidden_layers": 3},
    ],
)
def test_fields_are_overridden(overrides):
    network = lavish.build("cogvlm2-llama3-chat-19B", **overrides)
    assert len(network.model.layers) == 2
    assert len(network.model.vision.transformer.layers) == 3
    assert network.config.vision_config.hidden_size == 1792


def test_positions_follow_from_the_side_of_the_picture():
    tower = {"image_size": 56, "num_hidden_layers": 1}
    network = lavish.build("cogvlm2-llama3-chat-19B", num_hidden_layers=1, vision_config=tower)
    assert network.config.vision_config.num_positions == 17
    with pytest.raises(ConfigError, match="num_positions is 9217 and must be 17"):
        lavish.build("cogvlm2-llama3-chat-19B", vision_config={**tower, "num_positions": 9217})


def test_an_unknown_field_suggests_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'num_hidden_layers'"):
        lavish.build("cogvlm2-llama3-chat-19B", num_hiden_layers=2)
    with pytest.raises(ConfigError, match="num_hiden_layers"):
        lavish.build("cogvlm2-llama3-chat-19B", vision_config={"num_hiden_layers": 2})


def test_an_unknown_name_suggests_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'cogvlm2-llama3-chat-19B'"):
        lavish.build("cogvlm2-llama3-chat-19b2")
    with pytest.raises(UnknownLayout, match="found nothing"):
        lavish.build(tmp_path)


def test_a_hub_id_of_the_table_needs_no_download():
    assert read_layout("THUDM/cogvlm2-llama3-chat-19B")[0]["hidden_size"] == 4096


def test_random_weights_are_seeded_and_leave_the_global_stream_alone(v2):
    before = torch.get_rng_state()
    first, again, other = (lavish.build(v2.folder, device="cpu", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert not first.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_random_network_computes(release, dtype):
    network = lavish.build(release.folder, device="cpu", dtype=dtype)
    assert {t.dtype for t in network.state_dict().values()} == {getattr(torch, dtype)}
    inputs = release.loaded.processor.apply_chat_template(release.prompts["chat_image"][0])
    with torch.no_grad():
        logits = network(**inputs).logits
    assert logits.isfinite().all()


def test_keys_and_shapes_are_those_of_the_release(release):
    network = lavish.build(release.folder)
    expected = {name: t.shape for name, t in release.loaded.model.state_dict().items()}
    assert {name: t.shape for name, t in network.state_dict().items()} == expected
