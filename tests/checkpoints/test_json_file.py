"""The JSON files of a checkpoint's folder: one set of errors, whatever is wrong with them."""

import json
from pathlib import Path

import pytest

from lavish.checkpoints import json_file
from lavish.common.errors import CheckpointError


def test_an_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"name": "画"}', encoding="utf-8")
    (tmp_path / "marked.json").write_text('{"name": "画"}', encoding="utf-8-sig")
    assert json_file.read_object(tmp_path / "a.json") == json_file.read_object(tmp_path / "marked.json")
    assert json_file.read_optional_object(tmp_path / "absent.json") == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not valid JSON"),
        (b'{"a": 1', "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON"),
        (b"null", "holds NoneType and not an object"),
        (b"[]", "holds list and not an object"),
        (b'"x"', "holds str and not an object"),
    ],
)
def test_what_is_none(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for read in (json_file.read_object, json_file.read_optional_object):
        with pytest.raises(CheckpointError, match=rf"config\.json {says}"):
            read(path)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        json_file.read_object(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    monkeypatch.setattr(json_file, "MAX_BYTES", 1)
    with pytest.raises(CheckpointError, match="2 bytes, and a file of this kind has at most 1"):
        json_file.read_object(tmp_path / "a.json")


def test_a_config_gives_no_orders_and_a_vocabulary_keeps_its_words(tmp_path: Path) -> None:
    orders = {"attn_implementation": "org/kernel", "_attn_implementation": "org/kernel", "num_labels": 10**9}
    content = {"a": 1, **orders, "sub": [{"b": {"attribute_map": {"a": "b"}, "experts_implementation": 1, "c": 2}}]}
    for name in ("config.json", "med_config.json"):
        (tmp_path / name).write_text(json.dumps(content))
        assert json_file.read_object(tmp_path / name) == {"a": 1, "sub": [{"b": {"c": 2}}]}
    (tmp_path / "vocab.json").write_text(json.dumps(content))
    assert json_file.read_object(tmp_path / "vocab.json") == content
