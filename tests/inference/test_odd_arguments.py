"""What callers give by mistake: other types, None, NaN, huge numbers, impossible paths. Each is told what is wrong."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import lavish
from lavish.common.errors import ConfigError, LavishError, NumericsError, PromptError, shown
from lavish.inference.options import parse_options, read_sampling_defaults

HUGE = 10**5000
ODD = [
    None,
    3,
    -1,
    math.nan,
    HUGE,
    True,
    b"x",
    [],
    {},
    [None],
    object(),
    "x" * 5000,
    "a\0b",
    "",
    "\ud800",
    Path("a\0b"),
]
ODD_PATHS = [value for value in ODD if value is not None]
HELLO = [{"role": "user", "content": "Hello"}]


def name_of(value):
    return f"{type(value).__name__}-{shown(value, 12)}" if not isinstance(value, dict) else None


def odd(values):
    return pytest.mark.parametrize("value", values, ids=name_of)


def refused(error):
    """A message that a person reads: short, and not the builtin's own."""
    message = str(error.value)
    assert 20 < len(message) < 600, message
    assert "File name too long: '" not in message


@odd(ODD)
def test_build_by_no_name(value):
    with pytest.raises(LavishError) as error:
        lavish.build(value)
    refused(error)


@pytest.mark.parametrize("seed", ["x", None, 1.5, True, -1, 2**64, HUGE, math.nan], ids=name_of)
def test_build_with_no_seed(v2, seed):
    with pytest.raises(ConfigError, match=r"seed must be a whole number from 0 to 2\*\*64 - 1") as error:
        lavish.build(v2.folder, seed=seed)
    refused(error)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": HUGE}, "hidden_size is .*, over 2147483647"),
        ({"vision_config.image_size": 2**40}, "image_size is 1099511627776, over"),
        ({"hidden_size": "x" * 5000}, "hidden_size is 'xxx.*whole number"),
        ({"eos_token_id": b"x"}, "eos_token_id is b'x' and must be a token's number"),
        ({"pad_token_id": [Path("/")]}, "pad_token_id is .* and must be a token's number"),
    ],
    ids=["hidden_size", "image_size", "text", "eos_token_id", "pad_token_id"],
)
def test_build_with_impossible_fields(v2, overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        lavish.build(v2.folder, **overrides)
    refused(error)


@pytest.mark.parametrize("option", ["path_or_hub_id", "tokenizer", "adapter", "config"])
@odd(ODD_PATHS)
def test_load_by_no_path(v2, option, value):
    if option == "config" and value == {}:  # names no field to replace, so it is right
        assert lavish.load(v2.folder, config=value, device="cpu").model is not None
        return
    arguments = {"path_or_hub_id": v2.folder, option: value}
    with pytest.raises(LavishError) as error:
        lavish.load(**arguments)
    refused(error)


@pytest.mark.parametrize(
    ("option", "value"), [("device", HUGE), ("device", 10**30), ("dtype", "x" * 5000)], ids=name_of
)
def test_load_to_nowhere(v2, option, value):
    with pytest.raises(ConfigError, match=f"No {option} ") as error:
        lavish.load(v2.folder, **{option: value})
    refused(error)


def test_a_config_that_is_no_text(v2, tmp_path):
    path = tmp_path / "config.yaml"
    for content in (b"\xff\xfe\0", b"rope: ${nowhere}", b"a: ["):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"config\.yaml"):
            lavish.load(v2.folder, config=path)


@odd([value for value in ODD if not isinstance(value, dict | list)])
def test_no_conversations(v2, value):
    vlm = v2.vlm()
    for ask in (vlm.chat, vlm.stream):
        with pytest.raises(PromptError, match="messages must be a list") as error:
            ask(value)
        refused(error)
    with pytest.raises(PromptError, match="batch takes a list of conversations") as error:
        vlm.batch(value)
    refused(error)


def test_batch_takes_any_row_of_conversations_and_none(v2):
    vlm = v2.vlm()
    expected = vlm.batch([HELLO, HELLO], max_new_tokens=2)
    assert vlm.batch((messages for messages in (HELLO, HELLO)), max_new_tokens=2) == expected
    assert vlm.batch([]) == []
    with pytest.raises(PromptError, match=r"Conversation 0 of 1: messages must be a list.*got dict"):
        vlm.batch(HELLO)
    with pytest.raises(PromptError, match="batch takes a list"):
        vlm.batch({"a": HELLO})


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", 100), ("temperature", 1e-300), ("repetition_penalty", 100), ("repetition_penalty", 0.01)],
)
def test_numbers_at_the_edge_are_numbers(v2, option, value):
    assert v2.vlm().chat(HELLO, do_sample=True, seed=1, max_new_tokens=2, **{option: value}).token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalty": None}, "repetition_penalty must be a number, not None"),
        ({"max_new_tokens": -HUGE}, "max_new_tokens must be at least 1"),
        ({"stop": [3]}, "stop must be a text"),
        ({"top_k": "x" * 5000}, "top_k must be a whole number, not 'xxx"),
    ],
    ids=["none", "huge", "stop", "text"],
)
def test_options_are_refused_in_short(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse_options(options)
    refused(error)


def test_more_tokens_than_python_prints(v2):
    for option in ("max_new_tokens", "max_length"):
        with pytest.raises(PromptError, match="too long to print") as error:
            v2.vlm().chat(HELLO, **{option: HUGE})
        refused(error)


@pytest.mark.parametrize(
    "token_ids",
    [
        -1,
        [-100],
        2**31,
        [2**40],
        HUGE,
        None,
        1.5,
        [1.5],
        "text",
        ["a"],
        [[3], [-1]],
        torch.tensor([0.5]),
        np.array([-1]),
    ],
    ids=name_of,
)
def test_decode_of_what_is_no_id(release, token_ids):
    processor = release.loaded.processor
    with pytest.raises(PromptError, match="decode takes token ids, whole numbers from 0, and found") as error:
        processor.decode(token_ids)
    refused(error)


def test_decode_and_batch_decode(release):
    processor = release.loaded.processor
    ids = release.greedy_ids["chat_image"]
    text = processor.decode(ids)
    assert processor.decode(torch.tensor(ids)) == processor.decode(np.array(ids)) == text
    assert processor.decode(10**6) == ""  # a row of the embedding that no piece belongs to
    assert processor.decode([torch.tensor(ids[0])]) == processor.decode(ids[0])
    assert processor.batch_decode([ids, ids[:2]]) == [text, processor.decode(ids[:2])]
    assert processor.batch_decode(torch.tensor([ids])) == [text]
    for wrong in (None, 3, "text", torch.tensor(3)):
        with pytest.raises(PromptError, match="batch_decode takes rows"):
            processor.batch_decode(wrong)
    with pytest.raises(PromptError, match=r"-100 are no tokens"):
        processor.batch_decode([[-100]])


@odd([3, b"x", [], [3], [None], "\ud800", object()])
def test_processor_without_text(v2, value):
    with pytest.raises(PromptError) as error:
        v2.loaded.processor(text=value)
    refused(error)


@odd(["x" * 5000, [3], 3])
def test_processor_with_no_template(v2, value):
    with pytest.raises(PromptError, match="Unknown template") as error:
        v2.loaded.processor.apply_chat_template(HELLO, chat_template=value)
    refused(error)


@pytest.mark.parametrize("name", ["max_feature_bytes", "max_conversations", "max_conversation_bytes"])
@odd([None, -1, 1.5, True, "x"])
def test_bounds_of_what_is_kept(v2, name, value):
    with pytest.raises(ConfigError, match=f"{name} must be a whole number, at least 0"):
        v2.vlm(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token_ids": 2.5}, "numbers of tokens"),
        ({"eos_token_ids": "</s>"}, "numbers of tokens"),
        ({"sampling_defaults": [("top_p", 1)]}, "sampling_defaults must be a dict"),
        ({"sampling_defaults": {"top_p": 7}}, "sampling_defaults: top_p must be above 0 and at most 1, not 7"),
    ],
)
def test_settings_of_a_vlm(v2, settings, message):
    with pytest.raises(ConfigError, match=message):
        v2.vlm(**settings)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", -1, "at least 0"),
        ("temperature", "abc", "number"),
        ("temperature", True, "number"),
        ("temperature", math.nan, "number"),
        ("top_p", 7, "at most 1"),
        ("top_k", 0.5, "whole number"),
        ("top_k", -3, "at least 0"),
    ],
)
def test_generation_config_is_checked_before_the_weights(v2, tmp_path, name, value, message):
    folder = Path(shutil.copytree(v2.folder, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({name: value}))
    for weights in folder.glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-8])  # would be an error of its own
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {name} must be .*{message}.*take it out"):
        lavish.load(folder)


def test_a_temperature_of_zero_is_no_default_of_a_draw():
    assert read_sampling_defaults({"temperature": 0.0, "top_p": 0.5, "top_k": None, "other": "x"}, "file") == {
        "top_p": 0.5
    }


@pytest.mark.parametrize("generation", [{}, {"temperature": 0.8, "seed": 1}], ids=["greedy", "drawn"])
def test_damaged_weights_are_told(v2, tmp_path, generation):
    vlm = lavish.load(v2.folder)
    with torch.no_grad():
        vlm.model.model.layers[1].mlp.language_mlp.down_proj.weight[0, 0] = torch.nan
    for ask in (vlm.chat, lambda messages, **options: list(vlm.stream(messages, **options))):
        with pytest.raises(NumericsError, match=r"^VLM\(.*float32.*NaN or infinity"):
            ask(HELLO, max_new_tokens=3, **generation)
    with pytest.raises(NumericsError, match="weights are damaged"):
        vlm.batch([HELLO, HELLO], max_new_tokens=3, **generation)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": "x"}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_multi_query_heads"),
        ({"vision_config.num_heads": 0}, "vision_config.num_heads"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"eos_token_id": "x"}, "eos_token_id"),
    ],
    ids=name_of,
)
def test_the_fault_of_an_override_is_not_the_files(v2, overrides, name):
    with pytest.raises(ConfigError, match=f"Give {name} another value") as error:
        lavish.build(v2.folder, **overrides)
    assert "Correct the config.json" not in str(error.value)


def test_the_fault_of_a_file_is_the_files(v2, tmp_path):
    fields = json.loads((v2.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 0}))
    with pytest.raises(ConfigError, match=r"num_hidden_layers is 0 .* Correct the config\.json"):
        lavish.build(tmp_path, vocab_size=500)
