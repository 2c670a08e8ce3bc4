"""PEFT adapters through lavish.load."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerance import MERGED_ADAPTER

import lavish
from lavish.common.errors import CheckpointError, ConfigError, MissingKeys, UnexpectedKeys

peft = pytest.importorskip("peft")
# peft 0.21 asks transformers 5.23 under the attribute's old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def adapter(v2, tmp_path):
    """A LoRA adapter of the release's fine-tuning target, with weights that show."""
    network = lavish.load(v2.folder, device="cpu").model
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["vision_expert_query_key_value", "language_expert_dense"]
    )
    model = peft.get_peft_model(network, config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    inputs = v2.loaded.processor.apply_chat_template(v2.prompts["chat_image"][0])
    with torch.no_grad():
        return tmp_path / "adapter", model.eval()(**inputs).logits


def test_an_adapter_changes_the_network_as_peft_does(v2, adapter):
    folder, expected = adapter
    inputs = v2.loaded.processor.apply_chat_template(v2.prompts["chat_image"][0])
    for vlm in (
        lavish.load(v2.folder, adapter=folder, device="cpu"),
        lavish.load(folder, base=v2.folder, device="cpu"),
    ):
        with torch.no_grad():
            assert torch.equal(vlm.model(**inputs).logits, expected)
        messages, template = v2.prompts["chat_image"]
        reply = vlm.chat(messages, max_new_tokens=10, chat_template=template)
        assert reply.token_ids[0] == int(expected[0, -1].argmax())
        generated = vlm.model.generate(**inputs, max_new_tokens=10, do_sample=False)
        assert generated[0, inputs["input_ids"].shape[1] :].tolist() == reply.token_ids


def test_an_adapter_is_loaded_strictly(v2, adapter):
    folder, _ = adapter
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(MissingKeys, match="1 of"):
        lavish.load(v2.folder, adapter=folder)
    save_file({**tensors, "extra": torch.zeros(2)}, path)
    with pytest.raises(UnexpectedKeys, match="'extra'"):
        lavish.load(v2.folder, adapter=folder)
    save_file({**tensors, name: torch.zeros(3, 3)}, path)
    with pytest.raises(CheckpointError, match=r"\(3, 3\)"):
        lavish.load(v2.folder, adapter=folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="no adapter weights"):
        lavish.load(v2.folder, adapter=folder)


def test_adapters_that_are_refused(v2, adapter, tmp_path):
    folder, _ = adapter
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    with pytest.raises(ConfigError, match="base="):
        lavish.load(folder)
    path.write_text(json.dumps({**fields, "peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ConfigError, match="PREFIX_TUNING"):
        lavish.load(v2.folder, adapter=folder)
    path.write_text(json.dumps({**fields, "new_rank_rule": "x"}))
    with pytest.raises(ConfigError, match="new_rank_rule"):
        lavish.load(v2.folder, adapter=folder)
    path.write_text(json.dumps({**fields, "target_modules": ["no_such_layer"]}))
    with pytest.raises(ConfigError, match="does not fit this CogVLMForCausalLM, so it is of another family or size"):
        lavish.load(v2.folder, adapter=folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        lavish.load(v2.folder, adapter=tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"init_lora_weights": "pissa"}, "'pissa' changes the weights of the base"),
        ({"init_lora_weights": "loftq"}, "'loftq' changes the weights of the base"),
        ({"r": "8"}, "the rank 'r' is '8'"),
        ({"r": 10**9}, "a rank of 1000000000 and the largest that is stored is 4"),
        ({"target_modules": 5}, "target_modules is 5"),
        ({"target_modules": [5]}, r"target_modules is \[5\]"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern holds '\(', which is no pattern"),
        ({"rank_pattern": [3]}, r"rank_pattern is \[3\]"),
    ],
)
def test_fields_that_are_refused_before_the_network_changes(v2, adapter, change, words):
    folder, _ = adapter
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    vlm = lavish.load(v2.folder, device="cpu")
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    with pytest.raises((ConfigError, CheckpointError), match=words):
        vlm.load_adapter(folder, "x")
    assert vlm.adapters == ()
    assert all(torch.equal(value, before[name]) for name, value in vlm.model.state_dict().items())


def test_loading_an_adapter_warns_of_nothing(v2, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vlm = lavish.load(v2.folder, adapter=adapter[0], device="cpu")
        vlm.load_adapter(adapter[0], "two")


def test_weights_learn_again_once_the_adapters_are_off(v2, adapter):
    folder, _ = adapter
    vlm = lavish.load(v2.folder, device="cpu")
    frozen = next(name for name, _ in vlm.model.named_parameters())
    vlm.model.get_parameter(frozen).requires_grad_(False)

    def learning():
        return {name: weight.requires_grad for name, weight in vlm.model.named_parameters()}

    before = learning()
    assert sum(not learns for learns in before.values()) == 1
    vlm.load_adapter(folder, "one")
    vlm.load_adapter(folder, "two")
    vlm.unload_adapters()
    assert learning() == before
    vlm.load_adapter(folder, "one")
    vlm.merge_adapter()
    assert learning() == before
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    for change in ({"target_modules": ["no_such_layer"]}, {"target_modules": ["vision_expert_query_key_value"]}):
        path.write_text(json.dumps({**fields, **change}))
        with pytest.raises((ConfigError, CheckpointError)):
            vlm.load_adapter(folder, "x")
        assert learning() == before


def test_an_adapter_of_another_family(v2):
    other = Path(__file__).parents[1] / "fixtures/glm4v/open/adapter"
    with pytest.raises(MissingKeys, match=r"none of its \d+ tensors .* in this CogVLM.*of another family or size"):
        lavish.load(v2.folder, adapter=other, device="cpu")


def test_an_adapter_finds_its_base(v2, adapter, tmp_path):
    folder, expected = adapter
    inputs = v2.loaded.processor.apply_chat_template(v2.prompts["chat_image"][0])
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    (tmp_path / "base").symlink_to(v2.folder)
    for name in ("../base", str(tmp_path / "base")):
        path.write_text(json.dumps({**fields, "base_model_name_or_path": name}))
        with torch.no_grad():
            assert torch.equal(lavish.load(folder, device="cpu").model(**inputs).logits, expected)
    for name, words in (
        ("~/no/such/folder", "is not on this machine"),
        ("..", "is not on this machine|no layout|config.json"),
        ("", "names no base"),
        (str(folder), "is an adapter itself"),
    ):
        path.write_text(json.dumps({**fields, "base_model_name_or_path": name}))
        with pytest.raises((ConfigError, CheckpointError), match=words):
            lavish.load(folder, device="cpu")
        if name:
            assert lavish.load(folder, base=v2.folder, device="cpu").adapters == ("default",)


def test_adapters_are_switched_merged_and_taken_off(v2, adapter, tmp_path):
    folder, expected = adapter
    messages = v2.prompts["chat_image"][0]
    inputs = v2.loaded.processor.apply_chat_template(messages)

    def logits(vlm):
        with torch.no_grad():
            return vlm.model(**inputs).logits

    vlm = lavish.load(v2.folder, device="cpu")
    before = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    base = logits(vlm)
    assert (vlm.adapters, vlm.active_adapter) == ((), None)
    plain = vlm.chat(messages, max_new_tokens=6).token_ids
    vlm.load_adapter(folder, "one")
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: -value if "lora_B" in name else value for name, value in tensors.items()},
        other / "adapter_model.safetensors",
    )
    assert torch.equal(logits(vlm), expected)
    first = vlm.chat(messages, max_new_tokens=6)
    assert first.token_ids != plain
    assert first.usage.cached_tokens == 0  # keys of the base's weights are of no use
    vlm.load_adapter(other, "two")
    second = logits(vlm)
    assert vlm.active_adapter == "two"
    assert not torch.equal(second, expected)
    with pytest.raises(ConfigError, match="'one' is on the network already"):
        vlm.load_adapter(other, "one")
    with pytest.raises(ConfigError, match=r"No adapter 'tow'\. Did you mean 'two'"):
        vlm.set_adapter("tow")
    save_file({**tensors, "extra": torch.zeros(1)}, other / "adapter_model.safetensors")
    with pytest.raises(UnexpectedKeys):
        vlm.load_adapter(other, "three")
    assert vlm.adapters == ("one", "two")
    assert torch.equal(logits(vlm), second)
    vlm.set_adapter("one")
    assert torch.equal(logits(vlm), expected)
    vlm.set_adapter(None)
    assert torch.equal(logits(vlm), base)
    assert vlm.chat(messages, max_new_tokens=6).token_ids == plain
    with pytest.raises(ConfigError, match="No adapter is active"):
        vlm.merge_adapter()
    vlm.unload_adapters()
    after = vlm.model.state_dict()
    assert vlm.adapters == ()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    vlm.load_adapter(folder, "one")
    vlm.merge_adapter()
    assert vlm.adapters == ()
    assert torch.allclose(logits(vlm), expected, **MERGED_ADAPTER)
    assert type(vlm.model).__name__ == "CogVLMForCausalLM"
