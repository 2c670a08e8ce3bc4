"""Rules from the names of a release to the names of our modules, one rule a line of `models/<family>/weights.py`.

A name that no rule matches stays as it is. `*` stands for one part of a dotted name (a layer's number, a module), and
is carried over in order. A plan is total: every source name is used once or dropped with a reason, every target name
is made once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lavish.common.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Rename:
    """Call `source` of the file `target` in the module; both hold the same number of `*`."""

    source: str
    target: str

    def __post_init__(self) -> None:
        if self.source.count("*") != self.target.count("*"):
            raise ConfigError(f"{self}: source and target need the same number of '*', or the rule cannot be reversed.")


@dataclass(frozen=True)
class Drop:
    """Leave `source` of the file unread."""

    source: str
    why: str


@dataclass(frozen=True)
class Optional:
    """`target` of the module may be absent from the file; the network computes it then."""

    target: str
    why: str


Rule = Rename | Drop | Optional


@dataclass(frozen=True)
class Plan:
    """What to load from where: `sources` maps target name to source name."""

    sources: dict[str, str]
    dropped: tuple[str, ...]


def plan(names: Iterable[str], rules: Sequence[Rule]) -> Plan:
    """Give each name of a file its place; the first rule that matches counts.

    Raises:
        CheckpointError: two names of the file would become the same.
    """
    steps = [(re.compile(_regex(rule.source)), rule) for rule in rules if not isinstance(rule, Optional)]
    sources: dict[str, str] = {}
    dropped: list[str] = []
    for name in names:
        target: str | None = name
        for regex, rule in steps:
            if found := regex.fullmatch(name):
                target = _fill(rule.target, found.groups()) if isinstance(rule, Rename) else None
                break
        if target is None:
            dropped.append(name)
        elif target in sources:
            raise CheckpointError(f"{sources[target]!r} and {name!r} of the file would both become {target!r}.")
        else:
            sources[target] = name
    return Plan(sources, tuple(dropped))


def reverse(rules: Sequence[Rule]) -> list[Rule]:
    """Give the rules from our names back to the release's, for the writer. What was dropped stays dropped."""
    return [Rename(rule.target, rule.source) for rule in rules if isinstance(rule, Rename)]


def matches(patterns: Iterable[str], name: str) -> bool:
    """Tell whether one of the patterns stands for the name."""
    return any(re.fullmatch(_regex(pattern), name) for pattern in patterns)


def _regex(pattern: str) -> str:
    return r"([^.]+)".join(re.escape(part) for part in pattern.split("*"))


def _fill(pattern: str, parts: Sequence[str]) -> str:
    first, *rest = pattern.split("*")
    return first + "".join(part + text for part, text in zip(parts, rest, strict=True))
