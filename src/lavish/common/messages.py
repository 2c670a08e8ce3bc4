"""Chat messages: checked once, then the same small dataclasses for every family.

The form is that of transformers and of the OpenAI API: `{"role", "content"}` with content a string or a list of parts
(`text`, `image`, `image_url`, and `video` for the families that see one). Here the shape and the order of the turns are
checked; nothing is opened, downloaded or tokenised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lavish.common.errors import PromptError, did_you_mean

ROLES = ("system", "user", "assistant")
MESSAGE_KEYS = ("role", "content")
PART_TYPES = ("text", "image", "image_url", "video")
IMAGE_KEYS = ("image", "url", "path")
VIDEO_KEYS = ("video", "path")


@dataclass(frozen=True)
class TextPart:
    """A piece of text, as the user typed it."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """An image that is not opened yet: what `lavish.common.media.open_image` takes (path, bytes, URL or PIL image)."""

    source: Any


@dataclass(frozen=True)
class VideoPart:
    """A video that is not opened yet: what `lavish.common.video` takes (path, bytes, open file or list of frames)."""

    source: Any


Part = TextPart | ImagePart | VideoPart


@dataclass(frozen=True)
class Message:
    """One checked message."""

    role: str
    parts: tuple[Part, ...]

    def text(self, separator: str = " ") -> str:
        """Give the text parts joined by `separator`.

        A space is what the OpenAI-style demo of the CogVLM release puts between text parts.
        """
        return separator.join(part.text for part in self.parts if isinstance(part, TextPart))

    def images(self) -> list[Any]:
        """Give the sources of the image parts, in order."""
        return [part.source for part in self.parts if isinstance(part, ImagePart)]

    def videos(self) -> list[Any]:
        """Give the sources of the video parts, in order."""
        return [part.source for part in self.parts if isinstance(part, VideoPart)]


@dataclass(frozen=True)
class Turn:
    """A question and, unless it is still to come, its answer."""

    user: Message
    answer: Message | None


def normalize(messages: Any, *, allow_videos: bool = False) -> list[Message]:
    """Check chat messages and give them as `Message` objects (already checked ones pass through).

    Raises:
        PromptError: names the index of the bad message and what is allowed there; a video without `allow_videos` is
            one, so that no family passes over it.
    """
    if isinstance(messages, (str, bytes, Mapping, Message)) or not isinstance(messages, Sequence):
        raise PromptError(
            f"messages must be a list of {{'role', 'content'}} dicts, got {type(messages).__name__}. "
            "For one question write [{'role': 'user', 'content': '...'}]."
        )
    if not messages:
        raise PromptError("messages is empty; give at least one message, such as {'role': 'user', 'content': '...'}.")
    checked = [_message(message, index) for index, message in enumerate(messages)]
    for index, message in enumerate(checked):
        if message.videos() and not allow_videos:
            raise PromptError(
                f"Message {index} holds a video, and this model sees no videos. Those that do: CogVLM2-Video, "
                "cogvlm2-llama3-caption and MiniGPT4-Qwen; or send single frames as images."
            )
    return checked


def is_batch(messages: Any) -> bool:
    """Tell a list of conversations from one conversation."""
    return (
        isinstance(messages, Sequence)
        and not isinstance(messages, (str, bytes))
        and len(messages) > 0
        and isinstance(messages[0], Sequence)
        and not isinstance(messages[0], (str, bytes))
    )


def images(messages: Sequence[Message]) -> Iterator[tuple[int, Any]]:
    """Give (message index, image source) for every image part, in order."""
    for index, message in enumerate(messages):
        for source in message.images():
            yield index, source


def turns(messages: Sequence[Message]) -> tuple[Message | None, list[Turn]]:
    """Split checked messages into the system message, if any, and the turns.

    Raises:
        PromptError: a system message that is not the first, a conversation that starts with the assistant, or two
        messages of one role
            in a row.
    """
    system = messages[0] if messages and messages[0].role == "system" else None
    first = 0 if system is None else 1
    if first == len(messages):
        raise PromptError("The conversation holds a system message and no question; add a message with role 'user'.")
    found: list[Turn] = []
    for index, message in enumerate(messages[first:], start=first):
        if message.role == "system":
            raise PromptError(f"Message {index} has role 'system'; only the first message may have it.")
        expected = "user" if (index - first) % 2 == 0 else "assistant"
        if message.role != expected:
            before = "starts the conversation" if index == first else f"follows a {messages[index - 1].role!r} message"
            raise PromptError(
                f"Message {index} has role {message.role!r} and {before}; expected {expected!r}. Questions and answers "
                "must alternate: "
                "join two messages of one role into one."
            )
        if message.role == "user":
            found.append(Turn(message, None))
        else:
            found[-1] = Turn(found[-1].user, message)
    return system, found


def _message(message: Any, index: int) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping):
        raise PromptError(f"Message {index} must be a dict with 'role' and 'content', got {type(message).__name__}.")
    missing = [key for key in MESSAGE_KEYS if key not in message]
    if missing:
        raise PromptError(f"Message {index} has no {missing[0]!r}; it has {sorted(map(str, message))}.")
    # An empty value says nothing: lists of messages that other programs wrote hold such keys.
    said = [key for key, value in message.items() if key not in MESSAGE_KEYS and not _is_empty(value)]
    if said:
        hint = f" Put it into the content: [{{'type': {said[0]!r}, ...}}]." if said[0] in PART_TYPES else ""
        raise PromptError(f"Message {index} has the key {said[0]!r}, which this model does not read.{hint}")
    role = message["role"]
    if role not in ROLES:
        hint = did_you_mean(str(role), ROLES)
        raise PromptError(f"Message {index} has role {role!r}; known roles are {', '.join(ROLES)}.{hint}")
    parts = _parts(message["content"], index)
    if role != "user" and any(isinstance(part, ImagePart) for part in parts):
        raise PromptError(f"Message {index} has role {role!r} and holds an image; images belong to user messages.")
    if role != "user" and any(isinstance(part, VideoPart) for part in parts):
        raise PromptError(f"Message {index} has role {role!r} and holds a video; videos belong to user messages.")
    return Message(role, parts)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def _parts(content: Any, index: int) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (TextPart(_text(content, f"Message {index}")),)
    if not isinstance(content, (list, tuple)):
        raise PromptError(
            f"Message {index} has content of type {type(content).__name__}; it must be a string or a list of parts."
        )
    return tuple(_part(part, f"Message {index}, part {position}") for position, part in enumerate(content))


def _part(part: Any, where: str) -> Part:
    if isinstance(part, (TextPart, ImagePart, VideoPart)):
        return part
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise PromptError(
            f"{where}: a part must be a dict with a 'type' of {', '.join(PART_TYPES)}, got {type(part).__name__}."
        )
    kind = part["type"]
    if kind == "text":
        media = [key for key in ("image", "image_url", "video") if part.get(key) is not None]
        if media:
            raise PromptError(f"{where}: a text part holds {media[0]!r}; give that a part of its own.")
        return TextPart(_text(part.get("text"), where))
    if kind == "image":
        return ImagePart(_source(part, IMAGE_KEYS, f"{where}: an image part"))
    if kind == "video":
        return VideoPart(_source(part, VIDEO_KEYS, f"{where}: a video part"))
    if kind == "image_url":
        value = part.get("image_url")
        url = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(url, str):
            raise PromptError(f"{where}: an image_url part needs {{'image_url': {{'url': '...'}}}}.")
        return ImagePart(url)
    raise PromptError(
        f"{where}: unknown type {kind!r}; known are {', '.join(PART_TYPES)}.{did_you_mean(kind, PART_TYPES)}"
    )


def _source(part: Mapping[str, Any], keys: tuple[str, ...], what: str) -> Any:
    sources = [part[key] for key in keys if part.get(key) is not None]
    if len(sources) != 1:
        raise PromptError(f"{what} needs exactly one of {', '.join(keys)}, found {len(sources)}.")
    return sources[0]


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise PromptError(f"{where}: text must be a string, got {type(text).__name__}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where}: the text holds a lone surrogate at character {error.start}, half of a character outside the "
            "basic plane; "
            "send the whole character."
        ) from error
    return text
