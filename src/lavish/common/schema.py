"""Dataclasses as schemas: turn plain values into an instance and tell everything that is wrong with them; help texts.

It converts nothing but whole numbers to float, text to Path and names to Enum members. No dependency beyond Python.
"""

import ast
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union

from lavish.common.errors import ConfigError, did_you_mean

Schema = TypeVar("Schema")
Source = Callable[[str], str]


class FieldHelp(NamedTuple):
    """What `--help` says of one field."""

    key: str
    type: str
    default: str | None
    """None: the field must be given."""
    help: str


def instantiate(values: Any, schema: type[Schema], section: str = "", source: Source = lambda key: "") -> Schema:
    """Give the instance of the dataclass `schema` that the values describe.

    `source` gives the name of the layer that set a dotted key, relative to the section, or an empty string.

    Raises: ConfigError that lists every problem, one a line.
    """
    reader = _Reader(section, source)
    instance = reader.read(values, schema, "")
    if reader.problems:
        raise ConfigError("\n".join(reader.problems))
    return instance


class _Reader:
    """One pass over the values; the problems are collected."""

    def __init__(self, section: str, source: Source) -> None:
        self.section = section
        self.source = source
        self.problems: list[str] = []

    def problem(self, key: str, text: str, end: str = "") -> None:
        layer = self.source(key) if key else ""
        name = ".".join(part for part in (self.section, key) if part) or "The config"
        self.problems.append(f"{name}{f' (from {layer})' if layer else ''}: {text}.{end}")

    def read(self, value: Any, hint: Any, key: str) -> Any:
        """Give the value as the type hint wants it, or note a problem."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any:
            return value
        if origin in (Union, types.UnionType):
            return self._read_union(value, arguments, key)
        if origin is typing.Annotated:
            return self.read(value, arguments[0], key)
        if origin is Literal:
            if not any(value == choice and type(value) is type(choice) for choice in arguments):
                known = [str(choice) for choice in arguments]
                self.problem(key, f"{value!r} is not one of {', '.join(known)}", did_you_mean(str(value), known))
            return value
        if is_dataclass(hint):
            return self._read_dataclass(value, hint, key)
        if (origin or hint) in (list, tuple, dict):
            return self._read_container(value, origin or hint, arguments, key)
        return self._read_scalar(value, hint, key)

    def _read_dataclass(self, value: Any, schema: Any, key: str) -> Any:
        if not isinstance(value, dict):
            self.problem(key, f"{_show(value)} where a section of {schema.__name__} is expected")
            return None
        hints = typing.get_type_hints(schema, include_extras=True)
        known = {field.name: field for field in fields(schema) if field.init}
        problems_before = len(self.problems)
        for name in value:
            if name not in known:
                end = did_you_mean(str(name), known) or f" Known keys: {', '.join(known) or 'none'}."
                self.problem(_join(key, str(name)), "unknown key", end)
        given = {name: self.read(value[name], hints[name], _join(key, name)) for name in known if name in value}
        for name, field in known.items():
            if name not in value and field.default is MISSING and field.default_factory is MISSING:
                self.problem(_join(key, name), f"this key is needed ({_type_name(hints[name])})")
        if len(self.problems) > problems_before:
            return None
        try:
            return schema(**given)
        except (ValueError, TypeError) as error:  # raised by the schema's own __post_init__
            self.problem(key, str(error).rstrip("."))
            return None

    def _read_union(self, value: Any, choices: tuple[Any, ...], key: str) -> Any:
        attempts: list[list[str]] = []
        choices = tuple(sorted(choices, key=lambda choice: not _is_exactly(value, choice)))
        for choice in choices:
            attempt = _Reader(self.section, self.source)
            result = attempt.read(value, choice, key)
            if not attempt.problems:
                return result
            attempts.append(attempt.problems)
        if isinstance(value, dict) and any(is_dataclass(choice) for choice in choices):
            self.problems += next(
                problems for choice, problems in zip(choices, attempts, strict=True) if is_dataclass(choice)
            )
        else:
            self.problem(key, f"{_show(value)} where {' or '.join(map(_type_name, choices))} is expected")
        return None

    def _read_container(self, value: Any, kind: type, arguments: tuple[Any, ...], key: str) -> Any:
        if kind is dict and isinstance(value, dict):
            hint = arguments[1] if arguments else Any
            return {name: self.read(item, hint, _join(key, str(name))) for name, item in value.items()}
        if kind is dict or not isinstance(value, (list, tuple)):
            self.problem(key, f"{_show(value)} where a {_type_name(kind)} is expected")
            return None
        if kind is tuple and arguments and arguments[-1] is not Ellipsis:
            if len(value) != len(arguments):
                self.problem(key, f"{len(value)} items where {len(arguments)} are expected")
                return None
            hints: list[Any] = list(arguments)
        else:
            hints = [arguments[0] if arguments else Any] * len(value)
        items = [
            self.read(item, hint, _join(key, str(index)))
            for index, (item, hint) in enumerate(zip(value, hints, strict=True))
        ]
        return tuple(items) if kind is tuple else items

    def _read_scalar(self, value: Any, hint: Any, key: str) -> Any:
        if _is_exactly(value, hint):
            return value
        if hint is float and _is_exactly(value, int):
            return float(value)
        if hint is Path and isinstance(value, str):
            return Path(value)
        if isinstance(hint, type) and issubclass(hint, Enum):
            by_name = {**{str(member.value): member for member in hint}, **hint.__members__}
            if str(value) in by_name:
                return by_name[str(value)]
            known = list(hint.__members__)
            self.problem(key, f"{value!r} is not one of {', '.join(known)}", did_you_mean(str(value), known))
            return None
        self.problem(key, f"{_show(value)} where {_type_name(hint)} is expected")
        return None


def _is_exactly(value: Any, hint: Any) -> bool:
    """Say whether the value has this plain type; True is no int."""
    if hint is None or hint is type(None):
        return value is None
    return isinstance(hint, type) and isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _show(value: Any) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({type(value).__name__})"


def _type_name(hint: Any) -> str:
    """Give a type hint as a reader of YAML would say it."""
    if hint is None or hint is type(None):
        return "null"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_type_name, arguments))
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin in (list, tuple) and arguments:
        return f"list of {_type_name(arguments[0])}"
    return {list: "list", tuple: "list", dict: "section"}.get(origin or hint, getattr(hint, "__name__", str(hint)))


# --- help -----------------------------------------------------------------------------------------------------------


def field_help(schema: type, section: str = "") -> list[FieldHelp]:
    """Give key, type, default and help of every field, fields of nested dataclasses after their section's name.

    The help is the field's `metadata["help"]`, else the docstring under it.
    """
    hints, docs = typing.get_type_hints(schema), _field_docs(schema)
    found: list[FieldHelp] = []
    for field in fields(schema):
        key = _join(section, field.name)
        if isinstance(hints[field.name], type) and is_dataclass(hints[field.name]):
            found += field_help(hints[field.name], key)
            continue
        text = field.metadata.get("help", docs.get(field.name, ""))
        found.append(FieldHelp(key, _type_name(hints[field.name]), _default(field), text))
    return found


def help_text(schema: type, section: str = "") -> str:
    """Give the fields of a schema as indented lines for `--help`."""
    lines: list[str] = []
    for entry in field_help(schema, section):
        lines.append(f"{entry.key}  {entry.type}{', needed' if entry.default is None else f' = {entry.default}'}")
        if entry.help:
            lines.append(textwrap.indent(textwrap.fill(" ".join(entry.help.split()), 100), "    "))
    return "\n".join(lines)


def _default(field: Field[Any]) -> str | None:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if value is MISSING:
        return None
    if value is None:
        return "null"
    if isinstance(value, Enum):
        return value.name
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"


def _field_docs(schema: type) -> dict[str, str]:
    """Give the docstrings that stand under the fields in the source, those of base classes included."""
    docs: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # made at run time, or typed at a prompt: there is no source to read
            continue
        body = typing.cast(ast.ClassDef, tree.body[0]).body
        for statement, following in itertools.pairwise(body):
            is_field = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            text = following.value if isinstance(following, ast.Expr) else None
            if is_field and isinstance(text, ast.Constant) and isinstance(text.value, str):
                docs[typing.cast(ast.Name, typing.cast(ast.AnnAssign, statement).target).id] = text.value.strip()
    return docs
