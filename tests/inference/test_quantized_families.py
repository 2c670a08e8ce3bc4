"""Quantised networks of every chat family: nf4, and adapters that stay in float on top of int8 and nf4."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import GENERATION, TINY, ask, conversations, load_tiny
from tolerance import ADAPTER_SHOWS, INT8

import lavish
from lavish.common.errors import ConfigError, MissingDependency
from lavish.inference.quantization import quantized_layers
from lavish.nn.int8 import Int8Linear

peft = pytest.importorskip("peft")
# peft 0.21 asks transformers 5.23 under the attribute's old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
HAS_NF4 = find_spec("bitsandbytes") is not None
NF4 = pytest.param("nf4", marks=pytest.mark.skipif(not HAS_NF4, reason="needs bitsandbytes"))


def plain(name: str, **options: Any) -> "lavish.VLM":
    """The release without the adapter that CLIP + Qwen's has: merged."""
    vlm = load_tiny(name, **options)
    if vlm.adapters:
        vlm.merge_adapter()
    return vlm


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each family's network as one folder, and a LoRA for two of its kinds of layers."""
    made: dict[str, tuple[Path, Path]] = {}

    def save(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            vlm = plain(name)
            vlm.model.save_pretrained(folder / "whole")
            vlm.processor.save_pretrained(folder / "whole")
            leaves = sorted({layer.rpartition(".")[2] for layer in quantized_layers(vlm.model)})[:2]
            model = peft.get_peft_model(vlm.model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=leaves))
            generator = torch.Generator().manual_seed(5)
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
            model.save_pretrained(folder / "adapter")
            made[name] = folder / "whole", folder / "adapter"
        return made[name]

    return save


def logits_of(vlm: "lavish.VLM", messages: list[dict[str, Any]]) -> torch.Tensor:
    with torch.no_grad():
        return vlm.model(**vlm.processor.apply_chat_template(messages)).logits


def as_float(layer: Any) -> torch.Tensor:
    if isinstance(layer, Int8Linear):
        return layer.dequantized()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def assert_near(found: torch.Tensor, expected: torch.Tensor, quantization: str) -> None:
    if quantization == "int8":
        torch.testing.assert_close(found, expected, **INT8)
    else:  # bitsandbytes multiplies with bfloat16 on a CPU
        assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("quantization", ["int8", NF4])
@pytest.mark.parametrize("name", TINY)
def test_an_adapter_lies_in_float_on_quantised_layers(saved: Any, name: str, quantization: str) -> None:
    whole, adapter = saved(name)
    found = lavish.load(whole, adapter=adapter, quantization=quantization, device="cpu")
    assert found.adapters == ("default",)
    assert {value.dtype for key, value in found.model.named_parameters() if "lora_" in key} == {torch.float32}
    expected = lavish.load(whole, device="cpu")
    quantised = lavish.load(whole, quantization=quantization, device="cpu")
    for key, layer in quantised.model.named_modules():
        if isinstance(layer, Int8Linear) or type(layer).__name__ == "Linear4bit":
            expected.model.get_submodule(key).weight.data = as_float(layer).float()
    bare = logits_of(expected, ask("Hello", 0))
    assert_near(logits_of(quantised, ask("Hello", 0)), bare, quantization)
    expected.load_adapter(adapter, "default")
    adapted = logits_of(expected, ask("Hello", 0))
    assert not torch.allclose(adapted, bare, **ADAPTER_SHOWS), "the adapter shows"
    assert_near(logits_of(found, ask("Hello", 0)), adapted, quantization)
    rows = conversations(name)[:3]
    replies, singles = found.batch(rows, **GENERATION), [found.chat(row, **GENERATION) for row in rows]
    if quantization == "int8":  # one row and several go through different bfloat16 products of bitsandbytes
        assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in singles]
    with pytest.raises(ConfigError, match="cannot be merged into quantised weights"):
        found.merge_adapter()
    found.set_adapter(None)
    assert torch.equal(logits_of(found, ask("Hello", 0)), logits_of(quantised, ask("Hello", 0)))
    found.unload_adapters()
    assert found.adapters == ()
    assert torch.equal(logits_of(found, ask("Hello", 0)), logits_of(quantised, ask("Hello", 0)))


def test_the_lora_of_a_release_in_pieces_lies_on_int8() -> None:
    release = load_tiny("clip_qwen")
    found = load_tiny("clip_qwen", quantization="int8")
    assert found.adapters == release.adapters == ("default",)
    assert any(isinstance(layer, Int8Linear) for layer in found.model.modules())
    near, exact = logits_of(found, ask("Hello", 0)), logits_of(release, ask("Hello", 0))
    assert torch.nn.functional.cosine_similarity(near.flatten(), exact.flatten(), dim=0) > 0.98
    assert found.chat(ask("Hello", 0), **GENERATION).token_ids


def test_two_adapters_on_int8(saved: Any) -> None:
    whole, adapter = saved("glm4v_9b")
    vlm = lavish.load(whole, adapter=adapter, quantization="int8", device="cpu")
    first = logits_of(vlm, ask("Hello"))
    vlm.load_adapter(adapter, "again")
    assert vlm.active_adapter == "again"
    assert torch.equal(logits_of(vlm, ask("Hello")), first)


@pytest.mark.parametrize(
    ("fields", "words"), [({"use_dora": True}, "use_dora"), ({"init_lora_weights": "pissa"}, "'pissa'")]
)
def test_an_adapter_that_reads_its_base(saved: Any, tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    whole, adapter = saved("glm4v_9b")
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    with pytest.raises(ConfigError, match=f"{words} (reads|changes) the weights of the base"):
        lavish.load(whole, adapter=tmp_path, quantization="int8", device="cpu")


@pytest.mark.skipif(HAS_NF4, reason="bitsandbytes is installed")
@pytest.mark.parametrize("name", TINY)
def test_nf4_without_bitsandbytes(name: str) -> None:
    with pytest.raises(MissingDependency, match="pip install bitsandbytes"):
        load_tiny(name, quantization="nf4")


@pytest.mark.skipif(not HAS_NF4, reason="needs bitsandbytes")
@pytest.mark.parametrize("name", TINY)
def test_nf4(saved: Any, name: str) -> None:
    whole, _ = saved(name)
    exact = lavish.load(whole, device="cpu")
    found = lavish.load(whole, quantization="nf4", device="cpu")
    kinds = {key for key, layer in found.model.named_modules() if type(layer).__name__ == "Linear4bit"}
    fit = {
        key
        for key in quantized_layers(exact.model)
        if all(size % 64 == 0 for size in exact.model.get_submodule(key).weight.shape)
    }
    assert kinds == fit
    near, right = logits_of(found, ask("Hello", 0)), logits_of(exact, ask("Hello", 0))
    assert torch.nn.functional.cosine_similarity(near.flatten(), right.flatten(), dim=0) > 0.9
    assert found.chat(ask("Hello", 0), **GENERATION).token_ids
