"""METEOR 1.5 by its authors' Java program, where Java and the program are on the machine.

The program and its paraphrase table are not part of lavish; pycocoevalcap brings both. The protocol is that of
salaniz/pycocoevalcap, meteor/meteor.py: one line a picture (`SCORE`), then one line with all their counts (`EVAL`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from lavish.common.errors import MissingDependency

JAR = "meteor-1.5.jar"
ENVIRONMENT = "LAVISH_METEOR_JAR"
Words = Sequence[str]


class Meteor(NamedTuple):
    """METEOR of a set of captions."""

    score: float
    """Of the whole set, from all counts together; not the mean of `scores`."""
    scores: list[float]


def find_jar() -> Path:
    """Give the program's path: of the environment variable LAVISH_METEOR_JAR, else of an installed pycocoevalcap.

    Raises:
        MissingDependency: no Java, or no program; says what to do.
    """
    if shutil.which("java") is None:
        raise MissingDependency(
            "METEOR is a Java program and there is no `java` here: install a Java runtime (8 or newer)."
        )
    named = os.environ.get(ENVIRONMENT)
    package = importlib.util.find_spec("pycocoevalcap")
    places = [Path(named)] if named else []
    if package is not None and package.submodule_search_locations:
        places += [Path(place) / "meteor" / JAR for place in package.submodule_search_locations]
    for place in places:
        if place.is_file():
            return place
    looked = f"; looked for {', '.join(map(str, places))}" if places else ""
    raise MissingDependency(
        f"METEOR needs {JAR} with its folder data/, which is not here{looked}. `pip install --no-deps pycocoevalcap` "
        f"brings it, or set {ENVIRONMENT} to its path."
    )


def meteor(predictions: Sequence[Words], references: Sequence[Sequence[Words]], jar: Path | None = None) -> Meteor:
    """Give METEOR of one caption a picture against its references.

    Raises:
        MissingDependency: as `find_jar`, or the program ends before it has answered.
    """
    path = find_jar() if jar is None else jar
    command = ["java", "-jar", "-Xmx2G", path.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    process = subprocess.Popen(
        command,
        cwd=path.resolve().parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    with process:
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018 - by PIPE
        try:
            talk = _Talk(process.stdin, process.stdout)
            counts = [talk.ask(_line(words, refs)) for words, refs in zip(predictions, references, strict=True)]
            first = talk.ask(" ||| ".join(["EVAL", *counts]))
            rest = [talk.read() for _ in counts]  # one score a picture, then that of the set
        finally:
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
    *scores, score = (float(value) for value in [first, *rest])
    return Meteor(score, scores)


class _Talk:
    """Asks the program line by line; its pipes are too small for everything at once."""

    def __init__(self, stdin: IO[str], stdout: IO[str]) -> None:
        self.stdin, self.stdout = stdin, stdout

    def ask(self, line: str) -> str:
        with contextlib.suppress(BrokenPipeError):  # read() says so
            self.stdin.write(f"{line}\n")
            self.stdin.flush()
        return self.read()

    def read(self) -> str:
        answer = self.stdout.readline().strip()
        if not answer:
            raise MissingDependency(f"The METEOR program ended without an answer; is its folder data/ beside {JAR}?")
        return answer


def _line(words: Words, refs: Sequence[Words]) -> str:
    texts = [" ".join(text).replace("|||", "") for text in (*refs, words)]
    return " ||| ".join(["SCORE", *texts])
