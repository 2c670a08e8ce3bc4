"""The table of families and released models."""

import pytest

from lavish.common.errors import ConfigError, UnknownLayout
from lavish.inference.build import build
from lavish.models import FAMILIES, detect_family, family, model_zoo


def test_every_family_names_classes_that_exist():
    for row in FAMILIES:
        assert row.config_class.model_type == row.model_type
        assert row.model_class.__name__ in row.architectures
        assert row.processor_class.__name__ == row.processor
        if row.opener is None:
            assert isinstance(row.rules, tuple)


def test_families_are_found_by_architecture_first():
    assert detect_family({"architectures": ["CogVLMForCausalLM"]}, "x").name == "cogvlm"
    assert detect_family({"architectures": ["CogVLMVideoForCausalLM"]}, "x").name == "cogvlm"
    assert detect_family({"model_type": "cogvlm"}, "x").name == "cogvlm"
    for config in ({"architectures": ["CogVLM3ForCausalLM"], "model_type": "cogvlm"}, {"model_type": "llama"}, {}):
        with pytest.raises(UnknownLayout, match=r"^some/config\.json names"):
            detect_family(config, "some/config.json")
    assert detect_family({"architectures": "CogVLMForCausalLM"}, "x").name == "cogvlm"
    for odd in (5, [None], {"a": 1}):
        with pytest.raises(UnknownLayout, match=r"^some/config\.json names"):
            detect_family({"architectures": odd}, "some/config.json")


@pytest.mark.parametrize(
    ("architecture", "is_near"),
    [("CogVLM2ForCausalLM", True), ("CogVLMForCausalML", True), ("LlamaForCausalLM", False), ("x", False)],
)
def test_only_near_architectures_are_suggested(architecture, is_near):
    with pytest.raises(UnknownLayout) as error:
        detect_family({"architectures": [architecture]}, "config.json")
    assert ("Did you mean 'CogVLMForCausalLM'?" in str(error.value)) == is_near


def test_names_suggest():
    assert family("cogvlm").model_type == "cogvlm"
    with pytest.raises(ConfigError, match="Did you mean 'cogvlm'"):
        family("cog-vlm")


def test_the_zoo_is_a_mapping_by_name_and_hub_id():
    assert model_zoo["cogvlm2-llama3-chat-19B"] is model_zoo["THUDM/cogvlm2-llama3-chat-19B"]
    assert model_zoo["cogvlm2-llama3-chat-19B"] is model_zoo["zai-org/cogvlm2-llama3-chat-19B"]
    assert "someone/cogvlm2-llama3-chat-19B" not in model_zoo
    assert len(model_zoo) == len(list(model_zoo)) >= 7
    assert "no-such-model" not in model_zoo
    for entry in model_zoo.values():
        assert family(entry.family)
        assert entry.licence
        assert entry.good_at


def test_the_zoo_prints_as_a_table():
    lines = str(model_zoo).splitlines()
    assert lines[0].split() == ["name", "hub", "id", "size", "licence", "good", "at"]
    assert len(lines) == len(model_zoo) + 1
    assert "39.0 GB" in str(model_zoo)
    assert lines[1].split()[:4] == ["pocket", "bundled", "14.9", "MB"]


def test_the_bundled_model_is_as_the_table_says():
    network, entry = build("pocket"), model_zoo["pocket"]
    assert entry.hub_id is None
    assert sum(parameter.numel() for parameter in network.parameters()) == entry.num_parameters
    assert 2 * sum(tensor.numel() for tensor in network.state_dict().values()) == entry.num_bytes
    assert network.config.vision_config.image_size == entry.image_size
