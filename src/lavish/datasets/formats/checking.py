"""What is wrong in which row, before anything is trained.

Without a model: pictures that are missing or damaged, places that do not pair up with them, speakers out of order,
nothing to learn. With a processor also what that model refuses: too many pictures, a prompt that is too long, labels
that are all masked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from lavish.common.errors import DataError, LavishError, PromptError, shown
from lavish.common.media import DEFAULT_LIMITS, MediaLimits, open_image
from lavish.common.messages import Message, normalize, turns
from lavish.common.video import read_frames
from lavish.datasets.formats.opening import Source
from lavish.datasets.formats.samples import Sample

IGNORE_INDEX = -100
"""As in lavish.processors.chat, which imports torch."""


@dataclass
class Report:
    """What a check found."""

    format: str
    num_rows: int = 0
    num_bad: int = 0
    """Rows with a problem."""
    num_images: int = 0
    num_videos: int = 0
    num_answers: int = 0
    num_characters: int = 0
    """Of the answers, which are what is learnt."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(where, what), up to `max_problems`."""
    notes: list[str] = field(default_factory=list)
    """What is no fault, and worth knowing."""
    num_tokens: int = 0
    num_labels: int = 0
    longest: tuple[int, str] = (0, "")
    """Most tokens of a sample, and where it is; with a processor only, as the two before."""

    @property
    def is_good(self) -> bool:
        """True if no row has a problem, and there is one."""
        return self.num_bad == 0 and self.num_rows > 0


def check_data(
    source: Source,
    *,
    processor: Any = None,
    max_length: int | None = None,
    quick: bool = False,
    max_rows: int | None = None,
    max_problems: int = 1000,
    limits: MediaLimits = DEFAULT_LIMITS,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Go through the rows and say what is wrong with which.

    Args:
        source: of `open_data`.
        processor: a chat processor: what it refuses is a problem too, and tokens are counted.
        max_length: most tokens of a sample, with a processor.
        quick: pictures and videos have to be there, and are not opened.
        max_rows: look at so many rows only.
        max_problems: keep so many in the report; all are counted.
        limits: within which pictures have to be.
        progress: called with the number of rows so far.
    """
    report = Report(source.format)
    seen: Counter[str] = Counter()
    opened: dict[str, str | None] = {}
    try:
        for where, sample in source.samples():
            report.num_rows += 1
            problem = str(sample) if isinstance(sample, DataError) else None
            if not isinstance(sample, DataError):
                seen[sample["id"]] += 1
                problem = problem_of(sample, None if quick else limits, opened)
                _count(report, sample)
                if problem is None and processor is not None:
                    problem = _label_problem(report, where, sample, processor, max_length)
            if problem is not None:
                report.num_bad += 1
                if len(report.problems) < max_problems:
                    report.problems.append((where, problem))
            if progress is not None:
                progress(report.num_rows)
            if max_rows is not None and report.num_rows >= max_rows:
                break
    except DataError as error:  # a shard or file that cannot be read on
        report.num_bad += 1
        report.problems.append((source.path, str(error).removeprefix(f"{source.path}: ")))
    if not report.num_rows and not report.problems:
        report.num_bad += 1
        report.problems.append((source.path, "holds no rows."))
    _note(report, seen)
    return report


def problem_of(
    sample: Mapping[str, Any], limits: MediaLimits | None = None, opened: dict[str, str | None] | None = None
) -> str | None:
    """Say what is wrong with a sample that would be trained on, or None.

    `limits`: None leaves pictures closed. `opened` keeps what was said of files that several rows share.
    """
    try:
        checked = normalize(sample["messages"], allow_videos=True)
        _, rounds = turns(checked)
        if rounds[-1].answer is None:
            return "the conversation ends with a question; its last message has to be an answer, which is learnt."
        empty = [at for at, message in enumerate(checked) if not _says(message)]
        if empty:
            role = checked[empty[0]].role
            why = "nothing is learnt of it" if role == "assistant" else "it has no text and no picture"
            return f"message {empty[0]} (of the {role}) is empty: {why}."
        if limits is not None:
            for kind, source in _media(checked):
                if (problem := _media_problem(kind, source, limits, opened)) is not None:
                    return problem
    except PromptError as error:
        return str(error)
    return None


def _says(message: Message) -> bool:
    return bool(message.text().strip() or message.images() or message.videos())


def _media(messages: list[Message]) -> list[tuple[str, Any]]:
    images = [("image", source) for message in messages for source in message.images()]
    return images + [("video", source) for message in messages for source in message.videos()]


def _media_problem(kind: str, source: Any, limits: MediaLimits, opened: dict[str, str | None] | None) -> str | None:
    """Say why a picture or video cannot be opened, or None; videos are left closed where PyAV is not installed."""
    key = f"{kind} {source}" if isinstance(source, str) and len(source) < 4096 else None
    if opened is not None and key in opened:
        return opened[key]
    problem = None
    try:
        if kind == "image":
            open_image(source, limits=limits)
        elif find_spec("av") is not None:
            read_frames(source, 1)
    except LavishError as error:
        problem = str(error)
    if opened is not None and key is not None:
        opened[key] = problem
    return problem


def _count(report: Report, sample: Sample) -> None:
    for message in sample["messages"]:
        content = message.get("content") if isinstance(message, Mapping) else None
        kinds = [part.get("type") for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
        report.num_images += kinds.count("image")
        report.num_videos += kinds.count("video")
        if isinstance(message, Mapping) and message.get("role") == "assistant":
            report.num_answers += 1
            report.num_characters += len(content) if isinstance(content, str) else 0


def _label_problem(report: Report, where: str, sample: Sample, processor: Any, max_length: int | None) -> str | None:
    """Say what a processor has against a sample, and count its tokens."""
    try:
        inputs = processor.apply_chat_template(sample["messages"], return_labels=True, return_tensors=None)
    except LavishError as error:
        return str(error)
    length, learnt = len(inputs["input_ids"]), sum(label != IGNORE_INDEX for label in inputs["labels"])
    report.num_tokens += length
    report.num_labels += learnt
    report.longest = max(report.longest, (length, where))
    if not learnt:
        return "its labels are all masked: no token of it is learnt."
    if max_length is not None and length > max_length:
        return f"it has {length} tokens, pictures included, and {max_length} are the most."
    return None


def _note(report: Report, seen: Counter[str]) -> None:
    twice = [(name, count) for name, count in seen.items() if count > 1]
    if twice:
        name, count = twice[0]
        report.notes.append(f"{len(twice)} ids stand more than once, first {shown(name)} ({count} times).")
    if report.num_videos and find_spec("av") is None:
        report.notes.append("videos were not opened: that needs PyAV, pip install 'lavish[video]'.")
    if report.num_rows and not report.num_images and not report.num_videos:
        report.notes.append("no row has a picture or video.")
