"""What `lavish predict` asks a loaded model: messages for one that talks, pictures one by one for one that captions or
answers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavish.common.errors import ConfigError, LavishError, PromptError

if TYPE_CHECKING:
    from lavish.inference.vlm import VLM


ABOUT_FEATURES = (
    "answers about features of a video, which are no pictures and which no command reads; in Python: "
    "lavish.load(...).answer(features, question, dialog=[...])."
)


@dataclass(frozen=True)
class Seen:
    """What a question is about, opened: pictures in their order, or the path of a video; both may be absent."""

    pictures: list[Any] = field(default_factory=list)
    video: str | None = None


def ask_alone(vlm: VLM, seen: Seen, question: str, generation: dict[str, Any]) -> str:
    """Ask one question; a model that holds no conversation answers it, or captions where there is no question.

    Raises:
        ConfigError: a model that does neither, or an option of conversations for one that holds none.
        PromptError: more pictures, or fewer, than it takes.
    """
    if "chat" in vlm.capabilities:
        try:
            return vlm.chat(messages_of(seen, question), **generation).text
        except PromptError as error:
            if len(seen.pictures) < 2:
                raise
            advice = "To ask the same about each: --input with a folder or a glob in quotes."
            raise PromptError(f"{error} {advice}") from error
    check_options(vlm, generation)
    return sample_of(vlm, seen, question)


def messages_of(seen: Seen, question: str) -> list[dict[str, Any]]:
    """Make the conversation of one question: the video, the pictures, the text."""
    content: list[dict[str, Any]] = [] if seen.video is None else [{"type": "video", "video": seen.video}]
    content += [{"type": "image", "image": picture} for picture in seen.pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def check_talks(vlm: VLM, name: str | None) -> None:
    """Refuse a model that holds no conversation, and say what it is asked with.

    Raises:
        ConfigError: it holds none.
    """
    if "chat" in vlm.capabilities:
        return
    if _reads_features(vlm):
        raise ConfigError(f"{name} holds no conversation of its own: it {ABOUT_FEATURES}")
    ways = {
        "answer": f"lavish predict {name} --image FILE --question TEXT",
        "caption": f"lavish predict {name} --image FILE, which captions without a question",
        "embed": "in Python: lavish.load(...).embed(images, texts)",
    }
    asked = " or ".join(way for capability, way in ways.items() if capability in vlm.capabilities)
    raise ConfigError(f"{name} holds no conversation: it can {' and '.join(vlm.capabilities)}. Ask it with {asked}.")


def _reads_features(vlm: VLM) -> bool:
    return type(vlm.processor).__name__ == "GPTDialogueProcessor"


def check_options(vlm: VLM, generation: dict[str, Any]) -> None:
    """Refuse options of conversations for a model that holds none, and a model that sees no pictures.

    Raises:
        ConfigError: one was given, or the model answers about features.
    """
    if "chat" in vlm.capabilities:
        return
    if given := [name for name, value in generation.items() if value is not None]:
        raise ConfigError(f"{vlm.name} holds no conversation and takes no {given[0]}.")
    if _reads_features(vlm):
        raise ConfigError(f"{vlm.name} {ABOUT_FEATURES}")


def sample_of(vlm: VLM, seen: Seen, question: str) -> str:
    """Answer about one picture, or caption it where there is no question.

    Raises:
        ConfigError: the model does not do what was asked.
        PromptError: a video, or no picture, or more than one.
    """
    if seen.video is not None:
        raise PromptError(f"{vlm.name} holds no conversation and sees no videos.")
    if len(seen.pictures) != 1:
        raise PromptError(f"{vlm.name} answers about one picture; {len(seen.pictures)} were given.")
    return vlm.answer(seen.pictures[0], question) if question else vlm.caption(seen.pictures[0])


def samples_of(vlm: VLM, seen: Sequence[Seen], questions: Sequence[str]) -> list[str]:
    """Answer about several pictures together, or caption them where no question is asked.

    Raises: as `sample_of`; one that cannot be answered costs all, so they are then asked alone.
    """
    if len({bool(question) for question in questions}) > 1 or any(one.video or len(one.pictures) != 1 for one in seen):
        return [sample_of(vlm, one, question) for one, question in zip(seen, questions, strict=True)]
    pictures = [one.pictures[0] for one in seen]
    known: Any = vlm
    return known.answer_all(pictures, list(questions)) if questions[0] else known.caption_all(pictures)


def may_caption(model: str | None) -> bool:
    """Tell, before anything is loaded, whether a model may be one that captions, so that a question can be left out."""
    import lavish.models as table
    from lavish.cli.inspection import is_without_config
    from lavish.cli.loading import resolve_model

    try:
        name, entry = resolve_model(model)
    except LavishError:  # said where it is loaded
        return False
    if entry is not None:
        return table.family(entry.family).opener is not None
    if name is None or not os.path.exists(name):
        return False
    path = Path(name)
    if is_without_config(path, ()):
        return table.detect_composite(path, ()) is None
    config = path / "config.json"
    try:
        fields = json.loads(config.read_bytes()) if config.is_file() else None
    except ValueError:  # said where it is loaded
        return False
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    return any(row.opener is not None and row.model_type == kind for row in table.FAMILIES)
