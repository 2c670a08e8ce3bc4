"""PEFT adapters through lavish.load."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

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
    with pytest.raises(ConfigError, match="merge the adapter"):
        lavish.load(v2.folder, adapter=folder, quantization="int8")
    with pytest.raises(ConfigError, match="base="):
        lavish.load(folder)
    path.write_text(json.dumps({**fields, "peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ConfigError, match="PREFIX_TUNING"):
        lavish.load(v2.folder, adapter=folder)
    path.write_text(json.dumps({**fields, "new_rank_rule": "x"}))
    with pytest.raises(ConfigError, match="new_rank_rule"):
        lavish.load(v2.folder, adapter=folder)
    path.write_text(json.dumps({**fields, "target_modules": ["no_such_layer"]}))
    with pytest.raises(ConfigError, match="does not fit this network"):
        lavish.load(v2.folder, adapter=folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        lavish.load(v2.folder, adapter=tmp_path / "empty")
