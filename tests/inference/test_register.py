"""transformers' Auto classes on folders that lavish saved."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import lavish


@pytest.fixture
def saved(release, tmp_path):
    release.loaded.model.save_pretrained(tmp_path)
    release.loaded.processor.save_pretrained(tmp_path)
    return tmp_path


def test_registering_twice_changes_nothing():
    lavish.register()
    lavish.register()


def test_a_saved_folder_names_its_model_type_and_no_code(release, saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "cogvlm"
    assert config["architectures"] == ["CogVLMForCausalLM"]
    assert "auto_map" not in config
    assert not list(saved.glob("*.py"))


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForImageTextToText])
@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_auto_classes_load_a_saved_folder_and_never_its_code(release, saved, auto_class, trust_remote_code):
    lavish.register()
    marker = saved / "ran"
    (saved / "modeling_cogvlm.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise SystemExit('hostile')\n")
    config = json.loads((saved / "config.json").read_text())
    remote = {
        "AutoConfig": "modeling_cogvlm.CogVLMConfig",
        "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
        "AutoModelForImageTextToText": "modeling_cogvlm.CogVLMForCausalLM",
    }
    (saved / "config.json").write_text(json.dumps({**config, "auto_map": remote}))
    options = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    network = auto_class.from_pretrained(saved, **options)
    assert type(network) is type(release.loaded.model)
    for name, value in release.loaded.model.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    assert not marker.exists()


def test_the_other_auto_classes(release, saved):
    lavish.register()
    assert type(AutoConfig.from_pretrained(saved)) is type(release.loaded.model.config)
    processor = AutoProcessor.from_pretrained(saved)
    assert type(processor) is type(release.loaded.processor)
    text = "What is 图片?"
    expected = release.loaded.processor.tokenizer.encode(text, add_special_tokens=False)
    assert AutoTokenizer.from_pretrained(saved).encode(text, add_special_tokens=False) == expected


def test_lavish_loads_what_it_saved(release, saved):
    messages, template = release.prompts["chat_image"]
    reply = lavish.load(saved, device="cpu").chat(messages, max_new_tokens=10, chat_template=template)
    assert reply.token_ids == release.greedy_ids["chat_image"]
