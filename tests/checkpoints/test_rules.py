"""Renaming rules: total, reversible, and loud where a table is wrong."""

import pytest

from lavish.checkpoints.rules import Drop, Optional, Rename, matches, plan, reverse
from lavish.common.errors import CheckpointError, ConfigError

RULES = [
    Drop("h.*.mask", why="a constant of the code"),
    Rename("h.*.attn.*", "layers.*.self_attn.*"),
    Rename("wte", "embed.weight"),
    Optional("inv_freq", why="v1 may lack it"),
]
NAMES = ["wte", "h.0.attn.q", "h.11.attn.q", "h.0.mask", "h.0.attn.q.bias", "norm.weight"]


def test_a_plan_uses_every_name_once() -> None:
    made = plan(NAMES, RULES)
    assert made.sources == {
        "embed.weight": "wte",
        "layers.0.self_attn.q": "h.0.attn.q",
        "layers.11.self_attn.q": "h.11.attn.q",
        "h.0.attn.q.bias": "h.0.attn.q.bias",  # `*` is one part of the name: no rule matches
        "norm.weight": "norm.weight",
    }
    assert made.dropped == ("h.0.mask",)
    assert sorted([*made.sources.values(), *made.dropped]) == sorted(NAMES)


def test_the_reverse_gives_the_names_back() -> None:
    made = plan(NAMES, RULES)
    assert {source: target for target, source in plan(made.sources, reverse(RULES)).sources.items()} == made.sources


def test_two_names_for_one_place() -> None:
    with pytest.raises(CheckpointError, match=r"'a' and 'b' of the file would both become 'c'"):
        plan(["a", "b"], [Rename("a", "c"), Rename("b", "c")])


def test_a_rule_that_could_not_be_reversed() -> None:
    with pytest.raises(ConfigError, match="same number"):
        Rename("h.*.a", "h.a")


def test_patterns_are_text_not_regular_expressions() -> None:
    assert matches(["a.*.b"], "a.10.b")
    assert not matches(["a.*.b"], "a.1.2.b")
    assert not matches(["a.b"], "axb")
    assert not matches([], "a")
