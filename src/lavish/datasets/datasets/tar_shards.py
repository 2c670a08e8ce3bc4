"""Tar shards in webdataset's form: files that share a name up to the first dot of its last part are one sample.

Read as a stream with Python's own tarfile; nothing is ever unpacked to disk, links and devices are passed over, and a
member that is too large raises before it is read. torch is not imported.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from lavish.common.errors import ConfigError, DataError

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
TEXTS = ("json", "txt")
MAX_MEMBER_BYTES = 200_000_000
MAX_SHARDS = 1_000_000
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_FAULTS = (tarfile.TarError, OSError, EOFError, zlib.error)


def expand(location: str) -> list[str]:
    """Give the paths that `{00000..01743}` stands for, the number of digits kept; without braces the path itself.

    Raises:
        ConfigError: the range runs backwards, or names over a million shards.
    """
    found = _BRACES.search(location)
    if found is None:
        return [location]
    first, last = int(found[1]), int(found[2])
    if last < first or last - first >= MAX_SHARDS:
        raise ConfigError(f"{location}: the range {found[0]} runs backwards, or names over {MAX_SHARDS:,} shards.")
    names = (f"{number:0{len(found[1])}d}" for number in range(first, last + 1))
    return [one for name in names for one in expand(f"{location[: found.start()]}{name}{location[found.end() :]}")]


def read_shard(path: str | Path) -> Iterator[dict[str, bytes]]:
    """Give the samples of one shard: `{"__key__": name, suffix: content}`, suffixes in lower case and without the dot.

    Names need not be UTF-8: the key has the bytes that the shard has.

    Raises:
        DataError: no such file, no tar, cut off, a member over the limit, or a suffix twice in one sample.
    """
    key, sample = None, {}
    try:
        with tarfile.open(path, mode="r|*") as shard:
            for member in shard:
                folder, _, file = member.name.rpartition("/")
                stem, dot, suffix = file.partition(".")
                if not member.isfile() or not dot or not stem:
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    raise DataError(f"{path}: {member.name!r} has {member.size:,} bytes, over {MAX_MEMBER_BYTES:,}.")
                name = f"{folder}/{stem}" if folder else stem
                if name != key:
                    if key is not None:
                        yield {"__key__": _bytes(key), **sample}
                    key, sample = name, {}
                if suffix.lower() in sample:
                    raise DataError(f"{path}: the sample {name!r} has two files .{suffix}.")
                content = shard.extractfile(member)
                sample[suffix.lower()] = b"" if content is None else content.read()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such shard.") from error
    except _FAULTS as error:
        raise DataError(f"{path}: is no tar file, or is cut off ({error}).") from error
    if key is not None:
        yield {"__key__": _bytes(key), **sample}


def _bytes(name: str) -> bytes:
    """Give a member's name as it stands in the shard; tarfile reads what is no UTF-8 as surrogates."""
    return name.encode("utf-8", "surrogateescape")
