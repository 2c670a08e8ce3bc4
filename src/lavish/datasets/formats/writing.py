"""Write data of any form as the one form: JSON lines of `id` and `messages`, with the pictures as files."""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from lavish.common.errors import ConfigError, DataError, LavishError, OutputError
from lavish.common.sniff import sniff
from lavish.datasets.formats.checking import problem_of
from lavish.datasets.formats.opening import Source
from lavish.datasets.formats.samples import Sample

SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Say in words what keeps the block from writing `path`.

    Raises:
        OutputError: the disk is full, the folder may not be written to or cannot be made.
    """
    try:
        yield
    except LavishError:
        raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"{path}: cannot be written ({reason}); make room there, or name another place.") from error


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
        ConfigError: the file is there already, or the folder of the pictures.
        DataError: a row is wrong, and `skip_bad` is not set; or none is left.
        OutputError: it cannot be written.
    """
    with told(path):
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder; name the file to write.")
        if path.exists() and not overwrite:
            raise ConfigError(f"{path}: is there already; give another name, or --overwrite.")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        pictures = PictureFolder(path, overwrite=overwrite)
        try:
            with temporary.open("x", encoding="utf-8", errors="backslashreplace") as file:  # JSON's own escapes
                count, bad = _write_rows(source, file, pictures, skip_bad, progress)
                file.flush()
                os.fsync(file.fileno())
            if not count:
                why = f"none of its {len(bad)} rows is good, first {': '.join(bad[0])}" if bad else "holds no rows."
                raise DataError(f"{source.path}: {why} Nothing was written.")
            pictures.publish()
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            pictures.discard()
    return count, bad


def _write_rows(
    source: Source, file: TextIO, pictures: PictureFolder, skip_bad: bool, progress: Callable[[int], None] | None
) -> tuple[int, list[tuple[str, str]]]:
    count, bad = 0, []
    for where, sample in source.samples():
        try:
            row, inside = plain(checked(sample), pictures, count + 1)
        except DataError as error:
            if not skip_bad:
                raise DataError(f"{where}: {error} Nothing was written; --skip-bad leaves such rows out.") from error
            bad.append((where, str(error)))
        else:
            count += 1
            pictures.add(inside)
            file.write(f"{json.dumps(row, ensure_ascii=False)}\n")
        if progress is not None:
            progress(count + len(bad))
    return count, bad


class PictureFolder:
    """`<name>_images` beside a new file: its pictures lie in a hidden folder until the file is whole."""

    def __init__(self, file: Path, *, overwrite: bool = False) -> None:
        self.beside, self.overwrite = file.parent, overwrite
        self.folder = file.with_name(f"{file.stem}_images")
        self.hidden = file.with_name(f".{self.folder.name}.{secrets.token_hex(4)}")

    def add(self, pictures: dict[str, bytes]) -> None:
        """Write pictures by their names.

        Raises:
            ConfigError: the folder is there already, with whatever it holds.
        """
        if not pictures:
            return
        if self.folder.exists() and not self.overwrite:
            raise ConfigError(f"{self.folder}: is there already; give the new file another name, or --overwrite.")
        self.hidden.mkdir(exist_ok=True)
        for name, content in pictures.items():
            (self.hidden / name).write_bytes(content)

    def publish(self) -> None:
        """Bring the pictures to their place; others that are there stay."""
        if self.hidden.exists():
            self.folder.mkdir(exist_ok=True)
            for file in self.hidden.iterdir():
                file.replace(self.folder / file.name)

    def discard(self) -> None:
        """Remove what was not published."""
        shutil.rmtree(self.hidden, ignore_errors=True)


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


def plain(sample: Sample, pictures: PictureFolder, number: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Give a sample that JSON can hold, pictures as names of files, and the files that are none yet.

    Raises:
        DataError: a picture of no format that lavish opens.
    """
    messages: list[dict[str, Any]] = []
    inside: dict[str, bytes] = {}
    at = 0
    for message in sample["messages"]:
        content = message["content"]
        if isinstance(content, list):
            parts = []
            for part in content:
                kind = part["type"]
                if kind in ("image", "video"):
                    at += 1
                    part = {"type": kind, kind: _file_of(part[kind], pictures, f"{number:06d}-{at}", inside)}
                parts.append(part)
            content = parts
        messages.append({"role": message["role"], "content": content})
    more = {name: value for name, value in sample.items() if name not in ("id", "messages")}
    return {"id": sample["id"], "messages": messages, **more}, inside


def _file_of(picture: Any, pictures: PictureFolder, name: str, inside: dict[str, bytes]) -> str:
    """Give the name of a picture's file; one that is inside the data is put into `inside`."""
    if isinstance(picture, str) and picture[:5].lower() != "data:":
        found, folder = Path(picture).resolve(), pictures.beside.resolve()
        return str(found.relative_to(folder)) if found.is_relative_to(folder) else str(found)
    content = _decoded(picture) if isinstance(picture, str) else picture
    if not isinstance(content, bytes):
        raise DataError(f"a picture is {type(picture).__name__}; a file, bytes or a data URL is expected.")
    kind = sniff(content)
    if kind not in SUFFIXES:
        raise DataError("a picture inside the data is of no format that lavish opens.")
    inside[f"{name}{SUFFIXES[kind]}"] = content
    return f"{pictures.folder.name}/{name}{SUFFIXES[kind]}"


def _decoded(url: str) -> bytes:
    """Give the bytes of a data URL; as where pictures are opened, line breaks and absent padding do not matter."""
    payload = "".join(url.partition(",")[2].split()).rstrip("=")
    try:
        return base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except ValueError as error:
        raise DataError(f"the data URL of a picture is no base64 ({error}).") from error
