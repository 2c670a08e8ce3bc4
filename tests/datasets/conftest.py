"""What the tests of datasets get: a cache folder of their own, and no network."""

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the cache folder; LAVISH_OFFLINE forbids the network."""
    monkeypatch.setenv("LAVISH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LAVISH_OFFLINE", "1")
    return tmp_path / "cache"
