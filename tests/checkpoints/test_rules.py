"""Renaming rules: total, reversible, and loud where a table is wrong."""

import pytest

from lavish.checkpoints.rules import (
    Drop,
    Joined,
    Merge,
    Optional,
    Part,
    Rename,
    Rule,
    Split,
    Surplus,
    matches,
    plan,
    reasons,
    reverse,
    without_surplus,
)
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


FUSED: list[Rule] = [
    Split("h.*.qkv", ("layers.*.q", "layers.*.k", "layers.*.v")),
    Merge(("b.*.q_bias", None, "b.*.v_bias"), "blocks.*.bias"),
]


def test_a_split_gives_one_name_several_places() -> None:
    made = plan(["h.0.qkv", "h.1.qkv"], FUSED)
    assert list(made.sources.items())[:3] == [
        ("layers.0.q", "h.0.qkv"),
        ("layers.0.k", "h.0.qkv"),
        ("layers.0.v", "h.0.qkv"),
    ]
    assert made.parts["layers.1.v"] == Part(0, 2, 3, None)
    assert made.parts["layers.1.v"].span((12, 4)) == (8, 12)
    assert made.parts["layers.1.v"].span((13, 4)) is None
    assert made.parts["layers.1.v"].span(()) is None
    assert Part(1, 1, 2, (3, 5)).span((2, 8)) == (3, 8)
    assert Part(1, 1, 2, (3, 5)).span((2, 9)) is None


def test_a_merge_gathers_in_any_order() -> None:
    made = plan(["b.3.v_bias", "b.3.q_bias"], FUSED)
    assert made.sources == {"blocks.3.bias": "b.3.q_bias"}
    assert made.joined == {"blocks.3.bias": Joined(("b.3.q_bias", None, "b.3.v_bias"), 0, None)}


def test_splits_and_merges_reverse() -> None:
    back = plan(plan(["h.0.qkv", "b.0.q_bias", "b.0.v_bias"], FUSED).sources, reverse(FUSED))
    assert back.joined["h.0.qkv"].names == ("layers.0.q", "layers.0.k", "layers.0.v")
    assert set(back.sources) == {"h.0.qkv", "b.0.q_bias", "b.0.v_bias"}
    assert reverse(reverse(FUSED)) == FUSED


def test_a_merge_without_all_its_parts() -> None:
    with pytest.raises(CheckpointError, match=r"'b\.0\.v_bias' of the file has no 'b\.\*\.q_bias' beside it"):
        plan(["b.0.v_bias"], FUSED)


def test_a_split_onto_a_taken_place() -> None:
    with pytest.raises(CheckpointError, match=r"would both become 'layers\.0\.k'"):
        plan(["layers.0.k", "h.0.qkv"], FUSED)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Split("a", ("b",)),
        lambda: Split("a.*", ("b", "c")),
        lambda: Split("a", ("b", "c"), sizes=(1,)),
        lambda: Merge((None, None), "a"),
        lambda: Merge(("b", "c"), "a", sizes=(0, 1)),
    ],
)
def test_splits_and_merges_that_cannot_be(make) -> None:
    with pytest.raises(ConfigError, match=r"needs|need the same"):
        make()


def test_surplus_is_left_out_where_the_module_has_no_place() -> None:
    rules = [*FUSED, Surplus("layers.*.*", why="the file holds one layer more than is run")]
    places = plan(["h.0.qkv", "h.1.qkv", "stray"], rules)
    known = {f"layers.0.{name}" for name in "qkv"}
    left = without_surplus(places, known, rules)
    assert set(left.sources) == {*known, "stray"}  # what no rule names stays, and is refused later
    assert set(left.parts) == known
    assert set(left.dropped) == {"h.1.qkv"}
    assert without_surplus(places, set(places.sources), rules) is places


def test_what_a_plan_drops_has_a_reason() -> None:
    rules = [
        Drop("head.*", why="of its training"),
        Rename("block.*.weight", "layer.*.weight"),
        Surplus("layer.*.weight", why="beyond the depth"),
    ]
    names = ["head.bias", "block.0.weight", "block.1.weight"]
    places = without_surplus(plan(names, rules), {"layer.0.weight"}, rules)
    assert reasons(places, rules) == [("head.bias", "of its training"), ("block.1.weight", "beyond the depth")]
