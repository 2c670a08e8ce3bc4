"""One sample in the common form, and where its pictures are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavish.common.errors import DataError, did_you_mean, shown

Sample = dict[str, Any]
"""`id` (a text) and `messages`; where a row has more that evaluation needs, also that, under its own name."""

ROLES = {
    **dict.fromkeys(("user", "human", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    "system": "system",
}
"""Names of speakers in the data that people have, in lower case."""
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
MAX_NAME_CHARS = 255
"""Of one part of a path, on the usual file systems."""


@dataclass(frozen=True)
class Options:
    """What the person may say about the data."""

    images: Path | None = None
    """Folder of the pictures; None: beside the file, or in a folder `images` there."""
    prompt: str | None = None
    """What the user says where the data have no question; `{question}` and `{expr}` stand for those that have one."""


@dataclass(frozen=True)
class Pictures:
    """Folders in which the pictures of a file may be."""

    roots: tuple[Path, ...]

    @classmethod
    def beside(cls, folder: Path, options: Options, *more: str) -> Pictures:
        """Give the folder that the person named, else the file's own and its usual subfolders."""
        if options.images is not None:
            return cls((options.images,))
        return cls((folder, *(folder / name for name in (*more, "images", "image", "videos"))))

    def find(self, source: Any) -> Any:
        """Give what `open_image` takes: a path that exists, encoded bytes or a data URL.

        Raises:
            DataError: no such file, or a URL.
        """
        if isinstance(source, Mapping):  # the Image feature of Hugging Face datasets, undecoded
            source = source.get("bytes") or source.get("path")
        if isinstance(source, bytes):
            return source
        if not isinstance(source, str) or not source:
            raise DataError(f"the picture is {shown(source)}; the name of a file is expected.")
        if source[:5].lower() == "data:":
            return source
        if found := _URL.match(source):
            is_web = found[0].lower() in ("https://", "http://")
            advice = (
                "is a web address; fetch it and name the file." if is_web else "is a URL; name the file by its path."
            )
            raise DataError(f"the picture {shown(source)} {advice}")
        for root in self.roots:
            if os.path.isfile(root / source):  # Path.is_file raises for a name that is too long
                return str(root / source)
        hint = " Base64 text needs 'data:image/png;base64,' before it." if len(source) > MAX_NAME_CHARS else ""
        looked = "" if os.path.isabs(source) else f"; looked in {' or '.join(map(str, self.roots))}"
        raise DataError(f"the picture or video {shown(source)} is missing{looked}.{hint}")


def listed(value: Any) -> list[Any]:
    """Give a value, a list of values or nothing as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def speaker(name: Any) -> str:
    """Give the role of a speaker's name.

    Raises:
        DataError: unknown; the nearest is suggested.
    """
    role = ROLES.get(str(name).lower())
    if role is None:
        hint = did_you_mean(str(name), ROLES)
        raise DataError(f"the speaker {shown(name)} is unknown.{hint} Known: {', '.join(ROLES)}.")
    return role


def parts(text: str, places: Mapping[str, str], media: Iterator[tuple[str, Any]], turn: int) -> list[dict[str, Any]]:
    """Cut a text at its places for pictures, and put the next of `media` (kind, source) at each.

    `places` maps what stands in a text to a kind, "image", "video", or "any". One line break beside a place goes.

    Raises:
        DataError: more places than pictures, or a place of the other kind.
    """
    pattern = "|".join(re.escape(place) for place in sorted(places, key=len, reverse=True))
    found: list[dict[str, Any]] = []
    for piece in re.split(f"({pattern})", text):
        if piece not in places:
            found.append({"type": "text", "text": piece})
            continue
        kind, source = next(media, (None, None))
        if kind is None:
            raise DataError(f"message {turn} has {piece} and no picture or video is left for it: their numbers differ.")
        if places[piece] not in ("any", kind):
            raise DataError(
                f"message {turn} has {piece} where the next file is {'an image' if kind == 'image' else 'a video'}."
            )
        found.append({"type": kind, kind: source})
    return [part for part in _trimmed(found) if part["type"] != "text" or part["text"]]


def _trimmed(found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Take one line break off a text before and after a picture."""
    for at, part in enumerate(found):
        if part["type"] != "text":
            yield part
            continue
        text = part["text"]
        if at > 0:
            text = text.removeprefix("\n")
        if at < len(found) - 1:
            text = text.removesuffix("\n")
        yield {"type": "text", "text": text}


def converse(
    spoken: Iterable[tuple[str, Any]],
    places: Mapping[str, str],
    media: Sequence[tuple[str, Any]],
    *,
    first_if_no_place: bool = False,
) -> list[dict[str, Any]]:
    """Give messages of (role, text or list of parts), with pictures where the texts of users have their places.

    `first_if_no_place`: without any place the pictures stand before the first user's text.

    Raises:
        DataError: another number of places than of pictures, or a text that is none.
    """
    turns = list(spoken)
    asked = [text for role, text in turns if role == "user" and isinstance(text, str)]
    num_places = sum(text.count(place) for text in asked for place in _disjoint(places))
    left = iter(media)
    opening: list[dict[str, Any]] = []
    if first_if_no_place and not num_places:
        opening = [{"type": kind, kind: source} for kind, source in left]
    elif num_places != len(media):
        what = " or ".join(places)
        raise DataError(f"{len(media)} pictures or videos, and {num_places} places for them ({what}): they pair up.")
    messages = []
    for turn, (role, text) in enumerate(turns):
        if not isinstance(text, str):
            content = text
        elif role == "user":
            content = [*opening, *parts(text, places, left, turn)]
            opening = []
            if all(part["type"] == "text" for part in content):
                content = "".join(part["text"] for part in content)
        else:
            content = text
        messages.append({"role": role, "content": content})
    if opening:
        raise DataError("the conversation has pictures and no message of a user to hold them.")
    return messages


def _disjoint(places: Mapping[str, str]) -> list[str]:
    """Give the places that hold no other one, so that `<Img><ImageHere></Img>` counts once."""
    return [place for place in places if not any(other in place for other in places if other != place)]
