"""Generation options: what is accepted, what is refused, and with which words."""

import pytest

from lavish.common.errors import ConfigError, PromptError
from lavish.inference.options import parse_options


def test_the_default_is_greedy():
    assert parse_options({}).is_greedy


@pytest.mark.parametrize(
    ("given", "is_greedy"),
    [
        ({"do_sample": False, "temperature": 0.8}, True),
        ({"temperature": 0}, True),
        ({"temperature": 0.0, "top_p": 0.5}, True),
        ({"temperature": 0.7}, False),
        ({"top_p": 0.9}, False),
        ({"do_sample": True}, False),
        ({"do_sample": True, "top_k": 1}, True),  # the released CogVLM2 demo: greedy whatever the rest says
        ({"top_p": 0.4, "top_k": 1, "temperature": 0.8}, True),
        ({"top_k": 5}, True),
    ],
)
def test_when_an_answer_is_drawn(given, is_greedy):
    assert parse_options(given).is_greedy is is_greedy


def test_generation_config_fills_in_but_does_not_turn_sampling_on():
    defaults = {"temperature": 0.6, "top_p": 0.9}
    assert parse_options({}, defaults).is_greedy
    options = parse_options({"do_sample": True, "top_p": 0.5}, defaults)
    assert (options.temperature, options.top_p) == (0.6, 0.5)
    assert parse_options({"do_sample": True}).temperature == 1.0


def test_an_unknown_option_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"'max_new_token'.*Did you mean 'max_new_tokens'"):
        parse_options({"max_new_token": 5})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": "9"}, "whole number"),
        ({"max_new_tokens": True}, "whole number"),
        ({"temperature": -1}, "at least 0"),
        ({"temperature": float("nan")}, "a number"),
        ({"top_p": 0}, "above 0"),
        ({"top_p": 1.5}, "at most 1"),
        ({"top_k": -1}, "at least 0"),
        ({"repetition_penalty": 0}, "from 0.01 to 100"),
        ({"repetition_penalty": 1e30}, "from 0.01 to 100"),
        ({"repetition_penalty": float("inf")}, "finite, not inf"),
        ({"temperature": float("inf")}, "finite, not inf"),
        ({"temperature": 101}, "from 0 to 100, not 101"),
        ({"top_p": float("-inf")}, "finite, not -inf"),
        ({"template": "vqa"}, "in Python it is chat_template, .* Write chat_template='vqa'"),
        ({"do_sample": "yes"}, "True, False or None"),
        ({"stop": [""]}, "none of them empty"),
        ({"stop": 5}, "a text or a list"),
        ({"chat_template": 3}, "template's name"),
        ({"max_length": 10, "max_new_tokens": 10}, "not both"),
        ({"do_sample": True, "temperature": 0}, "no meaning"),
        ({"seed": 2**64}, r"below 2\*\*64"),
        ({"temperature": 10**400}, "temperature must be a number that is finite, not 1000"),
    ],
)
def test_wrong_values_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(given)


def test_number_of_new_tokens():
    assert parse_options({}).num_new_tokens(100, 8192) == 2048
    assert parse_options({}).num_new_tokens(1300, 2048) == 748
    assert parse_options({"max_new_tokens": 5}).num_new_tokens(2043, 2048) == 5
    assert parse_options({"max_length": 110}).num_new_tokens(100, 2048) == 10
    for given in ({"max_new_tokens": 6}, {"max_length": 2049}):
        with pytest.raises(PromptError, match="at most 5 new tokens"):
            parse_options(given).num_new_tokens(2043, 2048)
    with pytest.raises(PromptError, match="2048 tokens, image slots included"):
        parse_options({}).num_new_tokens(2048, 2048)
    with pytest.raises(PromptError, match="leaves none"):
        parse_options({"max_length": 100}).num_new_tokens(100, 2048)
