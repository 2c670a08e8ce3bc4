"""Write data of any form as the one form: JSON lines of `id` and `messages`, with the pictures as files."""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lavish.common.errors import ConfigError, DataError
from lavish.common.sniff import sniff
from lavish.datasets.formats.checking import problem_of
from lavish.datasets.formats.opening import Source
from lavish.datasets.formats.samples import Sample

SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}


def write_data(
    source: Source,
    path: Path,
    *,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[int, list[tuple[str, str]]]:
    """Write the rows of `source` to a JSONL file, whole or not at all; give their number, and what was left out.

    Pictures that are files stay where they are, named relative to the new file if they lie below its folder; those
    inside the data go to the folder `<name>_images` beside it. What was left out is (where, why).

    Raises:
        ConfigError: the file is there already.
        DataError: a row is wrong, and `skip_bad` is not set.
    """
    if path.exists() and not overwrite:
        raise ConfigError(f"{path}: is there already; give another name, or --overwrite.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    count, bad = 0, []
    try:
        with temporary.open("x", encoding="utf-8") as file:
            for where, sample in source.samples():
                try:
                    line = json.dumps(plain(checked(sample), path, count + 1), ensure_ascii=False)
                except DataError as error:
                    if not skip_bad:
                        raise DataError(
                            f"{where}: {error} Nothing was written; --skip-bad leaves such rows out."
                        ) from error
                    bad.append((where, str(error)))
                else:
                    count += 1
                    file.write(f"{line}\n")
                if progress is not None:
                    progress(count + len(bad))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count, bad


def checked(sample: Sample | DataError) -> Sample:
    """Give the sample.

    Raises:
        DataError: it is one, or the conversation is wrong.
    """
    if isinstance(sample, DataError):
        raise sample
    if (problem := problem_of(sample)) is not None:
        raise DataError(problem)
    return sample


def plain(sample: Sample, path: Path, number: int) -> dict[str, Any]:
    """Give a sample that JSON can hold: pictures as names of files."""
    messages, at = [], 0
    for message in sample["messages"]:
        content = message["content"]
        if isinstance(content, list):
            parts = []
            for part in content:
                kind = part["type"]
                if kind in ("image", "video"):
                    at += 1
                    part = {"type": kind, kind: file_of(part[kind], path, f"{number:06d}-{at}")}
                parts.append(part)
            content = parts
        messages.append({"role": message["role"], "content": content})
    more = {name: value for name, value in sample.items() if name not in ("id", "messages")}
    return {"id": sample["id"], "messages": messages, **more}


def file_of(picture: Any, path: Path, name: str) -> str:
    """Give the name of a picture's file, written if it is none yet.

    Raises:
        DataError: bytes of no format that lavish opens.
    """
    if isinstance(picture, str) and not picture.startswith("data:"):
        found = Path(picture).resolve()
        folder = path.parent.resolve()
        return str(found.relative_to(folder)) if found.is_relative_to(folder) else str(found)
    try:
        content = base64.b64decode(picture.partition(",")[2], validate=True) if isinstance(picture, str) else picture
    except ValueError as error:
        raise DataError(f"the data URL of a picture is no base64 ({error}).") from error
    folder = path.with_name(f"{path.stem}_images")
    if not isinstance(content, bytes):
        raise DataError(f"a picture is {type(picture).__name__}; a file, bytes or a data URL is expected.")
    kind = sniff(content)
    if kind not in SUFFIXES:
        raise DataError("a picture inside the data is of no format that lavish opens.")
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}{SUFFIXES[kind]}"
    file.write_bytes(content)
    return str(file.relative_to(path.parent))
