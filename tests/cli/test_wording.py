"""Both languages say the same things and fill in the same names."""

import re
from dataclasses import fields
from string import Formatter

import pytest

from lavish.cli.wording import WORDINGS, Wording, choose_language


def holes(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name}


@pytest.mark.parametrize("name", [entry.name for entry in fields(Wording)])
def test_both_languages_fill_in_the_same(name: str) -> None:
    english, chinese = (getattr(WORDINGS[language], name) for language in ("en", "zh"))
    assert holes(english) == holes(chinese)
    assert name == "answer" or re.search(r"[\u4e00-\u9fff]", chinese)
    assert english.isascii()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, "en"),
        ({"LC_MESSAGES": "zh_TW", "LANG": "en_US.UTF-8"}, "zh"),
    ],
)
def test_the_locale_chooses(environment: dict[str, str], expected: str) -> None:
    assert choose_language(None, environment) == expected
    assert choose_language("en", environment) == "en"
