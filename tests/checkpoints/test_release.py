"""Pieces of composite releases: found where they are, and only once."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lavish.checkpoints import hf
from lavish.checkpoints.release import find_piece, merged
from lavish.common.errors import ConfigError


def test_of_equal_names_the_last_piece_counts(tmp_path: Path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_file({"weight": torch.full((2,), value), name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    first, second = (hf.read(tmp_path / f"{name}.safetensors") for name in "ab")
    both = merged(tmp_path, [("llm.", first), ("llm.", second)])
    assert set(both) == {"llm.weight", "llm.a", "llm.b"}
    assert both["llm.weight"].tolist() == [2.0, 2.0]


def test_a_piece_is_found_once(tmp_path: Path):
    here, elsewhere = tmp_path / "eva.pth", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(ConfigError, match=r"the piece 'eva' is absent; looked for .*eva\.pth\. Name it: eva=\.\.\."):
        find_piece("eva", tmp_path, {}, [here])
    assert find_piece("eva", tmp_path, {"eva": elsewhere}, [here]) == elsewhere
    here.touch()
    assert find_piece("eva", tmp_path, {}, [here]) == here
    with pytest.raises(ConfigError, match=r"eva='.*elsewhere' was given, and .* holds that piece too"):
        find_piece("eva", tmp_path, {"eva": elsewhere}, [here])
    with pytest.raises(ConfigError, match="holds the piece 'eva' twice"):
        find_piece("eva", tmp_path, {}, [here, elsewhere])
