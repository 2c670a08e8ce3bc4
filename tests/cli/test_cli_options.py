"""Options that several commands take are the same everywhere: names, bounds, help."""

import inspect
from typing import Any, get_type_hints

import pytest

from lavish.cli import chat, evaluate, options, predict, train


def option_of(module: Any, name: str) -> Any:
    return get_type_hints(module.command, include_extras=True)[name].__metadata__[0]


@pytest.mark.parametrize("pair", [(chat, predict), (train, evaluate)], ids=["chat-predict", "train-evaluate"])
def test_they_are_written_once(pair: tuple[Any, Any]) -> None:
    first, second = ({*inspect.signature(module.command).parameters} for module in pair)
    own = {"image", "context"}  # chat asks for an image, predict does not; the context is typer's
    shared = (first & second) - own
    assert len(shared) >= 3
    for name in shared:
        assert option_of(pair[0], name) is option_of(pair[1], name), f"{name}: give it a home in {options.__name__}"
