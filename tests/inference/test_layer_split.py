"""One network on several devices: no block is cut, the answers stay, and what cannot be is refused by name."""

import sys
from typing import Any

import pytest
import torch
from test_families import FIXTURES, GENERATION, TINY, ask, conversations, load_tiny
from tolerance import SAME_MATH, close
from torch._subclasses.fake_tensor import FakeTensorMode

import lavish
from lavish.common.errors import ConfigError, MissingDependency
from lavish.inference import layer_split
from lavish.inference.cache import SliceCache
from lavish.inference.steps import Prompt
from lavish.models import family_of
from lavish.models.cogvlm.routing import ExpertRouting

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def network_of(vlm: "lavish.VLM") -> Any:
    return vlm._steps.network


def half_on(device: str, vlm: "lavish.VLM") -> dict[str, str]:
    """A map that puts all from the second decoder layer on elsewhere, the last norm and the head too."""
    units = layer_split.blocks(network_of(vlm), family_of(network_of(vlm)))
    layers = [unit for unit in units if unit.startswith(family_of(network_of(vlm)).decoder_layers)]
    first = units.index(layers[1])
    assert len(layers) >= 2
    return {unit: device if place >= first else "cpu" for place, unit in enumerate(units)}


def prompts(vlm: "lavish.VLM", name: str) -> list[Prompt]:
    from lavish.inference.options import parse_options

    return [vlm._prompt(messages, parse_options({})) for messages in conversations(name)]


@pytest.mark.parametrize("name", TINY)
def test_blocks_are_whole(name) -> None:
    vlm = load_tiny(name)
    network = network_of(vlm)
    units = layer_split.blocks(network, family_of(network))
    names = list(network.state_dict())
    for parameter in names:
        assert sum(layer_split._is_under(parameter, unit) for unit in units) == 1, parameter
    for unit in units:
        inside = {type(module).__name__ for module in network.get_submodule(unit.rpartition(".")[0]).children()}
        assert inside
    whole = {*network._no_split_modules}
    for path, module in network.named_modules():
        if type(module).__name__ in whole:
            assert any(layer_split._is_under(path, unit) for unit in units), f"{path} is cut"


@pytest.mark.parametrize("name", TINY)
def test_answers_are_those_of_one_device(name) -> None:
    """Half of the blocks live on the disk and come for each pass: every weight is read behind a hook, or not at all."""
    alone = load_tiny(name)
    split = lavish.load(TINY[name].folder, device_map=half_on("disk", alone), **TINY[name].options)
    network = network_of(split)
    gone = [key for key, value in network.named_parameters() if value.is_meta]
    assert gone
    assert any(key.startswith("lm_head") or "output_layer" in key for key in gone)
    many = conversations(name)
    assert [reply.token_ids for reply in split.batch(many, **GENERATION)] == [
        reply.token_ids for reply in alone.batch(many, **GENERATION)
    ]
    for messages in many:
        assert split.chat(messages, **GENERATION) == alone.chat(messages, **GENERATION)
    for prompt in prompts(alone, name):
        inputs = {"input_ids": torch.tensor([prompt.token_ids]), "pixel_values": prompt.pixel_values}
        inputs["token_type_ids"] = torch.tensor([prompt.token_type_ids])
        with torch.no_grad():
            close(network(**inputs).logits, network_of(alone)(**inputs).logits, SAME_MATH)


TOWER, FIRST, SECOND = "cpu:3", "cpu:1", "cpu:2"


def pretend(made: Any, device_map: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a network without values on devices that are not there; torch refuses to mix them."""
    monkeypatch.setattr("accelerate.hooks.set_module_tensor_to_device", lambda *args, **kwargs: None)
    place = layer_split.placement(device_map)
    for name, parameter in list(made.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        empty = torch.empty(parameter.shape, device=place(name))
        made.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(empty, requires_grad=False)
    for name, buffer in list(made.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        empty = torch.empty(buffer.shape, dtype=buffer.dtype, device=place(name))
        made.get_submodule(owner)._buffers[leaf] = empty
    layer_split.dispatch(made, device_map)


@pytest.mark.parametrize("name", TINY)
def test_what_goes_from_block_to_block_is_moved(name, monkeypatch) -> None:
    """Tower, first and other layers on three devices, of which torch knows the names and the rules alone."""
    vlm = load_tiny(name)
    towers = family_of(network_of(vlm)).towers
    device_map = {unit: FIRST if device == "cpu" else SECOND for unit, device in half_on("", vlm).items()}
    device_map |= {unit: TOWER for unit in device_map if f"{unit}.".startswith(towers) or unit == "query_tokens"}
    pixels = prompts(vlm, name)[0].pixel_values.shape
    with torch.device("meta"):
        network = type(network_of(vlm))(network_of(vlm).config).eval()
    with FakeTensorMode(), torch.no_grad():
        pretend(network, device_map, monkeypatch)
        with pytest.raises(RuntimeError, match="at least two devices"):
            torch.zeros(2, device=FIRST) + torch.zeros(2, device=SECOND)
        ids = torch.zeros(2, 24, dtype=torch.long, device=FIRST)
        mask = torch.ones_like(ids)
        inputs_embeds = network.get_input_embeddings()(ids)
        assert str(inputs_embeds.device) == FIRST
        assert str(network.get_image_features(torch.empty(pixels)).device) == TOWER
        cache = SliceCache(vlm._steps.num_layers)
        if name == "cogvlm":
            features = torch.empty(1, 48, inputs_embeds.shape[-1], device=TOWER)
            inputs_embeds = network.model.place(inputs_embeds, mask.bool(), features)
            index = [torch.zeros(length, dtype=torch.long, device=FIRST) for length in (32, 16, 48)]
            for is_last_only in (True, False):
                cache = SliceCache(vlm._steps.num_layers)
                routing = ExpertRouting(None, *index)
                hidden = network.model(inputs_embeds, ids, mask, routing, cache, [], is_last_only=is_last_only)
        else:
            hidden = network.decode_hidden(inputs_embeds, ids, mask, cache, network.request_state([24, 24]))
        assert str(network.lm_head(hidden).device) == SECOND
        assert {str(layer.keys.device) for layer in cache.layers} == {FIRST, SECOND}
        cache.select_rows(torch.zeros(1, dtype=torch.long, device=FIRST))
        assert {str(layer.keys.device) for layer in cache.layers} == {FIRST, SECOND}


def test_one_device_is_as_before() -> None:
    vlm = load_tiny("cogvlm")
    assert not hasattr(network_of(vlm), "_hf_hook")
    assert (
        layer_split.plan_for(
            family_of(network_of(vlm)),
            network_of(vlm).config,
            torch.float32,
            device="auto",
            device_map=None,
            is_quantized=False,
            pack="auto",
        )
        is None
    )


def test_the_plan_fills_devices_in_the_order_of_a_pass(monkeypatch) -> None:
    pytest.importorskip("accelerate")
    vlm = load_tiny("glm4v_9b")
    network, family = network_of(vlm), family_of(network_of(vlm))
    total = sum(parameter.nbytes for parameter in network.parameters())
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {0: total, 1: total, "cpu": total})
    found = layer_split.plan(network, family, torch.float32, "auto")
    assert {str(device) for device in found.values()} == {"cuda:0", "cuda:1"}
    order = [found[unit].index for unit in found]
    assert order == sorted(order)
    assert found["transformer.embedding.word_embeddings"].index == 0
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {0: total * 3 // 4, 1: total // 3, "cpu": total})
    found = layer_split.plan(network, family, torch.float32, "auto")
    assert {str(device) for device in found.values()} == {"cuda:0", "cuda:1", "cpu"}
    assert found["transformer.embedding.word_embeddings"].index == 0
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {0: total * 3 // 4, 1: total // 3, "cpu": 10})
    with pytest.raises(ConfigError, match="Quantise them, or give a device_map with 'disk'"):
        layer_split.plan(network, family, torch.float32, "auto")


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": "cpu", "model.layers.0.mlp": "cpu"}, r"'model.layers.0.mlp' cuts the block 'model.layers.0'"),
        ({"": "cpu", "model.layer": "cpu"}, "'model.layer' is no part of it.* Did you mean"),
        ({"model": "cpu"}, "says nothing of 'lm_head'"),
        ({"": "disk"}, "puts 'model.embed_tokens' on 'disk'"),
        ({"": "cuda:77"}, "this machine has"),
        ("balanced", "must be 'auto' or a dict"),
    ],
)
def test_a_wrong_map_is_refused(device_map, message) -> None:
    with pytest.raises(ConfigError, match=message):
        lavish.load(FIXTURES / "cogvlm2/open/checkpoint", device_map=device_map)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "device='cpu' contradict"),
        ({"pack": True}, "pack=True contradict"),
        ({"quantization": "int8"}, "a quantised network contradict"),
    ],
)
def test_what_does_not_go_with_a_map_is_refused(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        lavish.load(FIXTURES / "cogvlm2/open/checkpoint", device_map="auto", **options)


def test_without_accelerate_it_says_so(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingDependency, match=r"needs accelerate, .*pip install 'lavish\[train\]'"):
        lavish.load(FIXTURES / "cogvlm2/open/checkpoint", device_map="auto")


# -- two GPUs ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("rest", ["cuda:1", "cpu"])
@pytest.mark.parametrize("name", TINY)
def test_two_gpus_answer_as_one(name, rest) -> None:
    alone = lavish.load(TINY[name].folder, device="cuda:0", dtype="float32", **TINY[name].options)
    device_map = {unit: "cuda:0" if device == "cpu" else rest for unit, device in half_on("cuda:1", alone).items()}
    split = lavish.load(TINY[name].folder, dtype="float32", device_map=device_map, **TINY[name].options)
    many = conversations(name)
    for messages in many:
        assert split.chat(messages, **GENERATION).token_ids == alone.chat(messages, **GENERATION).token_ids
    replies = split.batch(many, **GENERATION)
    assert [reply.token_ids for reply in replies] == [one.token_ids for one in alone.batch(many, **GENERATION)]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_auto_splits_what_one_gpu_does_not_hold(monkeypatch) -> None:
    vlm = lavish.load(FIXTURES / "cogvlm2/open/checkpoint", device="auto")
    assert not hasattr(network_of(vlm), "_hf_hook")
    monkeypatch.setattr(layer_split, "_is_too_large", lambda network, dtype: True)
    split = lavish.load(FIXTURES / "cogvlm2/open/checkpoint", device="auto")
    assert {parameter.device.index for parameter in network_of(split).parameters()} == {0, 1}
    assert split.chat(ask("Hello"), **GENERATION).token_ids == vlm.chat(ask("Hello"), **GENERATION).token_ids
