"""The inputs and outputs of `lavish predict`: what is asked, and the JSONL file of answers that a killed run goes on.

No torch, no model: images are only named here.
"""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from lavish.cli.dialogue import IMAGE_SUFFIXES, is_url
from lavish.cli.run_record import RunRecord, difference
from lavish.common.errors import DataError, did_you_mean, shown

FIELDS = ("image", "images", "video", "question", "id")


@dataclass(frozen=True)
class Question:
    """One input: `id` is unique in a run, `image` is a path, a URL or None. `problem` says why it cannot be asked."""

    id: str | int
    image: str | None
    question: str
    problem: str | None = None
    images: tuple[str, ...] | None = None
    """Several pictures, in their order, in place of `image`."""
    video: str | None = None
    """Path of a video."""

    @property
    def pictures(self) -> tuple[str, ...]:
        """All pictures that it is about."""
        return self.images if self.images is not None else () if self.image is None else (self.image,)

    @property
    def fields(self) -> dict[str, Any]:
        """What a line of answers repeats of it."""
        row: dict[str, Any] = {"id": self.id, "image": self.image, "question": self.question}
        if self.images is not None:
            row["images"] = list(self.images)
        return row if self.video is None else {**row, "video": self.video}


def read_questions(source: str, question: str | None, *, may_caption: bool = False) -> list[Question]:
    """Read what stands behind --input: a folder of images (with its subfolders), a glob, a JSONL file, or one image.

    The id is the path in the folder or as the glob found it, in a JSONL file the field `id` or else the line's number.
    With `may_caption` a question may be left out, which asks for a caption.

    Raises:
        DataError: nothing there, no image or line found, two inputs of one id, or no question.
    """
    path = Path(os.path.expanduser(source))
    question = "" if question is None and may_caption else question
    if os.path.isdir(path):
        found = _from_paths(sorted(_images(path)), question, source, folder=path)
    elif os.path.isfile(path) and path.suffix.lower() not in IMAGE_SUFFIXES:
        found = _from_lines(path, question)
    elif os.path.isfile(path):
        found = _from_paths([path], question, source)
    elif glob.has_magic(source):
        names = sorted(glob.glob(str(path), recursive=True))
        found = _from_paths([Path(name) for name in names if os.path.isfile(name)], question, source)
    else:
        raise DataError(
            f"{shown(source)}: no such file or folder. Give a folder of images, a glob in quotes, or a JSONL file."
        )
    if not found:
        raise DataError(f"{source}: no image found ({', '.join(IMAGE_SUFFIXES)}).")
    counts = Counter(item.id for item in found)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise DataError(f"{source}: {counts[twice[0]]} inputs have the id {twice[0]!r}; ids must differ.")
    return found


def _images(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        inside = path.relative_to(folder).parts
        if (
            path.suffix.lower() in IMAGE_SUFFIXES
            and path.is_file()
            and not any(part.startswith(".") for part in inside)
        ):
            yield path


def _from_paths(paths: list[Path], question: str | None, source: str, folder: Path | None = None) -> list[Question]:
    if question is None:
        raise DataError(f"{source}: images and no question; give --question.")
    return [Question((path.relative_to(folder) if folder else path).as_posix(), str(path), question) for path in paths]


def _from_lines(path: Path, question: str | None) -> list[Question]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}). Inputs are images or JSONL.") from error
    objects = {number: _parse(line) for number, line in enumerate(lines, 1) if line.strip()}
    if not objects:
        raise DataError(f'{path}: no line in it. A line is {{"image": "a.png", "question": "...", "id": ...}}.')
    keys = {number: _key(fields) for number, fields in objects.items()}
    taken = set(keys.values())
    found = []
    for number, fields in objects.items():
        fallback = f"line {number}" if number in taken else number  # a torn line must not take another one's id
        key = keys[number]
        found.append(_from_line(path, number, fallback if key is None else key, fields, question))
    return found


def _parse(line: str) -> dict[str, Any] | str:
    """Give the object of a line, or what is wrong with it."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"no JSON ({error})"
    return fields if isinstance(fields, dict) else f"{type(fields).__name__}, not an object"


def _key(fields: dict[str, Any] | str) -> str | int | None:
    key = fields.get("id") if isinstance(fields, dict) else None
    return key if isinstance(key, str | int) and not isinstance(key, bool) else None


def _from_line(path: Path, number: int, key: str | int, fields: dict[str, Any] | str, question: str | None) -> Question:
    """Read one line; what is wrong with it becomes its `problem`, so that the others are still asked."""
    if isinstance(fields, str):
        return Question(key, None, "", f"{path.name}, line {number}: {fields}")
    image, asked = fields.get("image"), fields.get("question", question)
    images, video = fields.get("images"), fields.get("video")
    problem = None
    for name, value in {"image": image, "video": video}.items():
        if value is not None and not isinstance(value, str):
            problem = f"{name} is {type(value).__name__}; it must be a path"
    if images is not None and (not isinstance(images, list) or any(not isinstance(one, str) for one in images)):
        problem = f"images is {shown(images)}; it must be a list of paths"
    elif image is not None and images is not None:
        problem = "image and images were given; give one of them"
    if problem is not None:
        image = images = video = None
    mistyped = [name for name in fields if name not in FIELDS and did_you_mean(name, ["image"])]
    if not any(name in fields for name in ("image", "images", "video")) and mistyped:
        problem = f"field {mistyped[0]!r} is not read; call it 'image', or say \"image\": null where there is none"
    if not isinstance(asked, str):
        hint = "".join(did_you_mean(name, FIELDS) for name in fields if name not in FIELDS)
        has = f"has {', '.join(shown(name) for name in fields)}" if fields else "is empty"
        problem, asked = f"no question; the line {has}.{hint}", ""
    return Question(
        key,
        None if image is None else _place(image, path.parent),
        asked,
        problem and f"{path.name}, line {number}: {problem}",
        None if images is None else tuple(_place(one, path.parent) for one in images),
        None if video is None else _place(video, path.parent),
    )


def _place(image: str, folder: Path) -> str:
    """Give the path of an image or video of a JSONL file: beside the file, else in the working folder."""
    if is_url(image) or image.startswith("data:"):
        return image
    path = Path(os.path.expanduser(image))
    beside = folder / path
    # os.path, unlike Path, takes what no file name can be for absent: base64 text, a NUL.
    is_here = not os.path.exists(beside) and os.path.exists(path)
    return str(path if path.is_absolute() or is_here else beside)


# --- answers --------------------------------------------------------------------------------------------------------


class Answers:
    """The JSONL file of answers: one line an input, whole lines only, and never a line twice.

    A run that was killed left at most one torn line at the end; `open` removes it and knows which inputs are done.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.done: dict[str | int, dict[str, Any]] = {}
        self.repaired = False
        self.notes: list[str] = []
        """What the person should know before the run goes on."""
        self._file: FileIO | None = None
        self._record = None if path is None else RunRecord(path)
        self._replaces_with: dict[str, Any] | None = None
        """Settings of a run that overwrites: the old lines go when the first new one comes, not before."""

    def open(
        self, questions: Iterable[Question], settings: Mapping[str, Any], *, overwrite: bool, retry_failed: bool
    ) -> None:
        """Read what an earlier run wrote, and get ready to append. `settings` (model, options) must be that run's.

        Raises:
            DataError: the file is no file of answers, or holds those of another model, of other options or questions,
                or another process writes it.
        """
        if self.path is None or self._record is None:
            return
        if os.path.isdir(self.path):  # unlike Path's, it takes a name that is too long for absent
            raise DataError(f"{self.path}: a folder; --output is a file, such as {self.path / 'answers.jsonl'}.")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise DataError(f"{self.path}: cannot be written; a part of its folder's name is a file.") from error
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror or error}).") from error
        self._record.take()
        try:
            self._open(self._record, questions, settings, overwrite=overwrite, retry_failed=retry_failed)
        except BaseException:
            self.close()
            raise

    def _open(
        self,
        record: RunRecord,
        questions: Iterable[Question],
        settings: Mapping[str, Any],
        *,
        overwrite: bool,
        retry_failed: bool,
    ) -> None:
        path = record.output
        if not record.is_locked:
            self.notes.append(f"{path}: this file system has no locks; let no other process write it meanwhile.")
        recorded = None if overwrite and record.is_damaged() else record.read()
        has_answers = path.is_file() and path.stat().st_size > 0
        if has_answers and not overwrite:
            if recorded is None:
                self.notes.append(f"{path}: not recorded how it was made; its template and options are taken as asked.")
            elif differs := difference(recorded, settings):
                raise DataError(
                    f"{path}: {differs}. Go on with the same options, give another --output, or --overwrite."
                )
        if has_answers and overwrite:
            self._replaces_with = dict(settings)
        elif path.is_file():
            rows = self._read()
            self._check({item.id: item for item in questions}, settings["model"], rows)
            if retry_failed and any("error" in row for row in rows):
                rows = [row for row in rows if "error" not in row]
                self._write_anew(rows)
            self.done = {row["id"]: row for row in rows}
        try:
            self._file = path.open("ab", buffering=0)  # no buffer: what is written survives a kill
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror or error}).") from error
        record.write(settings if self._replaces_with is None else recorded)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, so that a kill loses none of them.

        Raises:
            DataError: the file cannot be written; what is in it stays.
        """
        text = "".join(map(_line, rows))
        try:
            if self._file is not None and self._record is not None and self._replaces_with is not None:
                self._file.truncate(0)
                self._record.write(self._replaces_with)
                self._replaces_with = None
            if self._file is None:
                print(text, end="", flush=True)
            else:
                left = memoryview(text.encode("utf-8"))
                while left:
                    left = left[self._file.write(left) :]
        except OSError as error:
            where, why = self.path or "stdout", error.strerror or error
            raise DataError(f"{where}: cannot be written ({why}). What is in it stays; run again to go on.") from error

    def close(self) -> None:
        """Close the file; where not one line is in it, nothing is left behind."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self.path is not None and self._record is not None:
            is_empty = not self.path.is_dir() and (not self.path.exists() or self.path.stat().st_size == 0)
            if is_empty:
                self.path.unlink(missing_ok=True)
            self._record.release(remove=is_empty)

    def _read(self) -> list[dict[str, Any]]:
        path = self.path
        if path is None:
            return []
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # a line that was torn by a kill; it is asked again
            self.repaired = True
            with path.open("r+b") as file:
                file.truncate(whole)
        rows = []
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("id"), str | int):
                raise DataError(
                    f"{path}, line {number}: no answer of `lavish predict`. Give another --output, or --overwrite."
                )
            rows.append(row)
        return rows

    def _check(self, questions: Mapping[str | int, Question], model: str, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            asked = questions.get(row["id"])
            if asked is None:
                why = f"holds the id {row['id']!r}, which is not among the inputs"
            elif any(row.get(name) != asked.fields.get(name) for name in FIELDS):
                why = f"has another image or question for the id {row['id']!r}"
            elif row.get("model") != model:
                why = f"holds answers of {row.get('model')!r}, and {model!r} was asked"
            else:
                continue
            raise DataError(f"{self.path}: {why}. Give another --output, or --overwrite to start anew.")

    def _write_anew(self, rows: list[dict[str, Any]]) -> None:
        """Replace the file in one step, so that a kill leaves the old or the new one."""
        if self.path is None:
            return
        text = "".join(map(_line, rows))
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise DataError(f"{self.path}: cannot be written ({error.strerror or error}).") from error


def _line(row: Mapping[str, Any]) -> str:
    """Give a row as a line of JSON; half a character that an input held is written as its escape."""
    text = json.dumps(row, ensure_ascii=False)
    return (text if _is_whole(text) else json.dumps(row)) + "\n"


def _is_whole(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
