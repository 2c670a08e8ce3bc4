"""Rules from the names of a release to the names of our modules, one rule a line of `models/<family>/weights.py`.

A name that no rule matches stays as it is. `*` stands for one part of a dotted name (a layer's number, a module), and
is carried over in order. A plan is total: every source name is used once or dropped with a reason, every target name
is made once.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lavish.common.errors import CheckpointError, ConfigError

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Rename:
    """Call `source` of the file `target` in the module; both hold the same number of `*`."""

    source: str
    target: str

    def __post_init__(self) -> None:
        _check_stars(self, self.source, self.target)


@dataclass(frozen=True)
class Split:
    """Cut `source` of the file along `dim` into `targets`, in order: a fused projection of q, k and v.

    A target None is a part that is left out: what `Merge` filled with zeros.
    """

    source: str
    targets: tuple[str | None, ...]
    dim: int = 0
    sizes: tuple[int, ...] | None = None
    """Length of each part; None: equal parts."""

    def __post_init__(self) -> None:
        _check_parts(self, self.targets, self.sizes)
        _check_stars(self, self.source, *self.targets)


@dataclass(frozen=True)
class Merge:
    """Lay `sources` of the file behind each other along `dim` as `target`; the reverse of `Split`.

    A source None is a part of zeros, as long as its part in `sizes`, or, without them, as the others.
    """

    sources: tuple[str | None, ...]
    target: str
    dim: int = 0
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_parts(self, self.sources, self.sizes)
        _check_stars(self, self.target, *self.sources)


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


@dataclass(frozen=True)
class Surplus:
    """What would become `target` stays unread where the module has no such place: layers that a file holds beyond
    those that the release runs.
    """

    target: str
    why: str


Rule = Rename | Split | Merge | Drop | Optional | Surplus


@dataclass(frozen=True)
class Part:
    """Which part of a stored tensor a target is."""

    dim: int
    index: int
    num_parts: int
    sizes: tuple[int, ...] | None

    def span(self, shape: Sequence[int]) -> tuple[int, int] | None:
        """Give start and stop along `dim`; None where a tensor of this shape has no such parts."""
        if self.dim >= len(shape):
            return None
        length = shape[self.dim]
        if self.sizes is not None:
            start = sum(self.sizes[: self.index])
            return (start, start + self.sizes[self.index]) if sum(self.sizes) == length else None
        share, over = divmod(length, self.num_parts)
        return None if over else (self.index * share, (self.index + 1) * share)


@dataclass(frozen=True)
class Joined:
    """Which stored tensors make a target, in order; None stands for zeros."""

    names: tuple[str | None, ...]
    dim: int
    sizes: tuple[int, ...] | None


@dataclass(frozen=True)
class Plan:
    """What to load from where: `sources` maps target name to source name.

    A target in `parts` is a part of its source; of one in `joined`, `sources` has the first of several.
    """

    sources: dict[str, str]
    dropped: tuple[str, ...]
    parts: dict[str, Part] = field(default_factory=dict)
    joined: dict[str, Joined] = field(default_factory=dict)


def plan(names: Iterable[str], rules: Sequence[Rule]) -> Plan:
    """Give each name of a file its place; the first rule that matches counts.

    Raises:
        CheckpointError: two names of the file would become the same, or a name to merge with is absent.
    """
    steps = [
        (re.compile(_regex(source)), rule, index)
        for rule in rules
        if not isinstance(rule, Optional | Surplus)
        for index, source in enumerate(rule.sources if isinstance(rule, Merge) else (rule.source,))
        if source is not None
    ]
    made = Plan({}, ())
    dropped: list[str] = []
    gathered: dict[str, tuple[Merge, dict[int, str]]] = {}
    for name in names:
        rule, index, stars = _first_match(steps, name)
        if isinstance(rule, Drop):
            dropped.append(name)
        elif isinstance(rule, Merge):
            target = _fill(rule.target, stars)
            found = gathered.setdefault(target, (rule, {}))[1]
            _add(found, index, name, target)
        elif isinstance(rule, Split):
            for part, pattern in enumerate(rule.targets):
                if pattern is not None:
                    target = _fill(pattern, stars)
                    _add(made.sources, target, name, target)
                    made.parts[target] = Part(rule.dim, part, len(rule.targets), rule.sizes)
        else:
            target = name if rule is None else _fill(rule.target, stars)
            _add(made.sources, target, name, target)
    for target, (rule, found) in gathered.items():
        joined = tuple(found.get(index) for index in range(len(rule.sources)))
        wanted = [pattern for pattern, name in zip(rule.sources, joined, strict=True) if pattern and name is None]
        first = min(found.items())[1]
        if wanted:
            raise CheckpointError(f"{first!r} of the file has no {wanted[0]!r} beside it to make {target!r} of both.")
        _add(made.sources, target, first, target)
        made.joined[target] = Joined(joined, rule.dim, rule.sizes)
    return Plan(made.sources, tuple(dropped), made.parts, made.joined)


def without_surplus(places: Plan, targets: Container[str], rules: Sequence[Rule]) -> Plan:
    """Give the plan without what rules call `Surplus` and the module, which holds `targets`, has no place for."""
    patterns = [rule.target for rule in rules if isinstance(rule, Surplus)]
    gone = [name for name in places.sources if name not in targets and matches(patterns, name)] if patterns else []
    if not gone:
        return places
    dropped = places.dropped + tuple(places.sources[name] for name in gone)
    return Plan(_without(places.sources, gone), dropped, _without(places.parts, gone), _without(places.joined, gone))


def reasons(places: Plan, rules: Sequence[Rule]) -> list[tuple[str, str]]:
    """Say of each name that a plan drops why."""
    drops = [(re.compile(_regex(rule.source)), rule.why) for rule in rules if isinstance(rule, Drop)]
    surplus = next((rule.why for rule in rules if isinstance(rule, Surplus)), "")
    return [(name, next((why for regex, why in drops if regex.fullmatch(name)), surplus)) for name in places.dropped]


def reverse(rules: Sequence[Rule]) -> list[Rule]:
    """Give the rules from our names back to the release's, for the writer. What was dropped stays dropped."""
    back: list[Rule] = []
    for rule in rules:
        if isinstance(rule, Rename):
            back.append(Rename(rule.target, rule.source))
        elif isinstance(rule, Split):
            back.append(Merge(rule.targets, rule.source, rule.dim, rule.sizes))
        elif isinstance(rule, Merge):
            back.append(Split(rule.target, rule.sources, rule.dim, rule.sizes))
    return back


def matches(patterns: Iterable[str], name: str) -> bool:
    """Tell whether one of the patterns stands for the name."""
    return any(re.fullmatch(_regex(pattern), name) for pattern in patterns)


def _first_match(
    steps: Sequence[tuple[re.Pattern[str], Rename | Split | Merge | Drop, int]], name: str
) -> tuple[Rename | Split | Merge | Drop | None, int, tuple[str, ...]]:
    for regex, rule, index in steps:
        if found := regex.fullmatch(name):
            return rule, index, found.groups()
    return None, 0, ()


def _without(table: dict[str, _Value], gone: Container[str]) -> dict[str, _Value]:
    return {name: value for name, value in table.items() if name not in gone}


def _add(places: dict[Any, str], place: object, name: str, target: str) -> None:
    if place in places:
        raise CheckpointError(f"{places[place]!r} and {name!r} of the file would both become {target!r}.")
    places[place] = name


def _check_stars(rule: Rule, first: str, *others: str | None) -> None:
    if any(other is not None and other.count("*") != first.count("*") for other in others):
        raise ConfigError(f"{rule}: source and target need the same number of '*', or the rule cannot be reversed.")


def _check_parts(rule: Rule, parts: tuple[str | None, ...], sizes: tuple[int, ...] | None) -> None:
    if len(parts) < 2 or not any(parts):
        raise ConfigError(f"{rule}: needs two parts or more, one of them with a name.")
    if sizes is not None and (len(sizes) != len(parts) or min(sizes) < 1):
        raise ConfigError(f"{rule}: needs one size above 0 for each of the {len(parts)} parts.")


def _regex(pattern: str) -> str:
    return r"([^.]+)".join(re.escape(part) for part in pattern.split("*"))


def _fill(pattern: str, parts: Sequence[str]) -> str:
    first, *rest = pattern.split("*")
    return first + "".join(part + text for part, text in zip(parts, rest, strict=True))
