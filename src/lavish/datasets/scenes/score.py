"""Scores of answers about drawn scenes: exact match, box hits, caption facts, and their means per task and language."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from lavish.datasets.scenes.phrases import THING, WORDS
from lavish.datasets.scenes.world import COLOURS, SHAPES, SIZES

IOU_THRESHOLD = 0.5
CAPTION_TASKS = ("caption", "grounded_caption")
BOX_TASKS = ("locate",)
VQA_TASKS = ("count", "colour", "shape", "size", "relation", "exists", "number", "comparison", "absent")

_BOXES = re.compile(r"\[\[([^\]]*)\]\]")
_COORDINATES = re.compile(r"[0-9]{1,4}(?:,[0-9]{1,4}){3}")
_ENGLISH_ITEM = re.compile(rf"\b({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join((*SHAPES, THING['en']))})\b")
_ENGLISH_NUMBER = re.compile(r"\bnumber ([0-9]+)")


def _chinese(words: Iterable[str]) -> dict[str, str]:
    return {WORDS["zh"][word]: word for word in words}


_ZH_SIZES, _ZH_COLOURS, _ZH_SHAPES = _chinese(SIZES), _chinese(COLOURS), _chinese(SHAPES)
_CHINESE_ITEM = re.compile(rf"({'|'.join(_ZH_SIZES)})的({'|'.join(_ZH_COLOURS)})({'|'.join(_ZH_SHAPES)})")
_CHINESE_NUMBER = re.compile(r"数字([0-9]+)")


def normalised(text: str) -> str:
    """Fold what exact match overlooks: case, runs of white space, and a full stop at the end."""
    return " ".join(text.split()).lower().rstrip(".。").rstrip()


def exact_match(prediction: str, answer: str) -> bool:
    """Say whether two answers are equal but for case, white space and a final full stop."""
    return normalised(prediction) == normalised(answer)


def first_box(text: str) -> tuple[int, int, int, int] | None:
    """Give the first box written in a text, in thousandths, or None if there is none or it has not four numbers."""
    found = _BOXES.search(text)
    if found is None:
        return None
    part = found.group(1).split(";")[0]
    if not _COORDINATES.fullmatch(part):
        return None
    x0, y0, x1, y1 = (int(number) for number in part.split(","))
    return x0, y0, x1, y1


def iou(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """Give the intersection over the union of two boxes x0, y0, x1, y1; 0 for a box turned inside out."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    if min(areas) <= 0:
        return 0.0
    return width * height / (sum(areas) - width * height)


def box_hit(prediction: str, answer: str) -> bool:
    """Say whether the first boxes of prediction and answer overlap with IoU >= .5; no readable box is a miss."""
    predicted, wanted = first_box(prediction), first_box(answer)
    return predicted is not None and wanted is not None and iou(predicted, wanted) >= IOU_THRESHOLD


def caption_facts(text: str) -> Counter[tuple[str, ...]]:
    """Read the (size, colour, shape) triples and the number from an English or Chinese caption, as a multiset."""
    plain = _BOXES.sub("", text)
    lowered = plain.lower()
    facts: Counter[tuple[str, ...]] = Counter(_ENGLISH_ITEM.findall(lowered))
    facts.update((number,) for number in _ENGLISH_NUMBER.findall(lowered))
    for size, colour, shape in _CHINESE_ITEM.findall(plain):
        facts[_ZH_SIZES[size], _ZH_COLOURS[colour], _ZH_SHAPES[shape]] += 1
    facts.update((number,) for number in _CHINESE_NUMBER.findall(plain))
    return facts


def caption_counts(prediction: str, answer: str) -> tuple[int, int, int]:
    """Give how many facts agree, how many the prediction states and how many the answer states."""
    predicted, wanted = caption_facts(prediction), caption_facts(answer)
    return (predicted & wanted).total(), predicted.total(), wanted.total()


def caption_f1(prediction: str, answer: str) -> float:
    """Give the F1 of the facts of one caption; 1.0 where neither states any."""
    agreed, predicted, wanted = caption_counts(prediction, answer)
    return 2 * agreed / (predicted + wanted) if predicted + wanted else 1.0


def score(task: str, prediction: str, answer: str) -> float:
    """Score one answer by the measure of its task: caption F1, box hit (for "locate") or exact match; 0..1."""
    if task in CAPTION_TASKS:
        return caption_f1(prediction, answer)
    if task in BOX_TASKS:
        return float(box_hit(prediction, answer))
    return float(exact_match(prediction, answer))


def summarise(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Give the mean scores of many answers.

    Args:
        results: mappings with `task`, `language`, `prediction` and `answer`.

    Returns:
        `tasks` (task -> score), `languages` (language -> task -> score), `counts` (task -> number of answers), and the
        three headlines over all answers of their kind: `vqa` (exact match), `box_hit`, `caption_f1`. A headline without
        answers is left out.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    by_language: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        value = score(result["task"], result["prediction"], result["answer"])
        scores[result["task"]].append(value)
        by_language[result["language"]][result["task"]].append(value)
    summary: dict[str, Any] = {
        "tasks": {task: _mean(values) for task, values in sorted(scores.items())},
        "languages": {
            language: {task: _mean(values) for task, values in sorted(tasks.items())}
            for language, tasks in sorted(by_language.items())
        },
        "counts": {task: len(values) for task, values in sorted(scores.items())},
    }
    for headline, tasks in (("vqa", VQA_TASKS), ("box_hit", BOX_TASKS), ("caption_f1", CAPTION_TASKS)):
        values = [value for task in tasks for value in scores.get(task, ())]
        if values:
            summary[headline] = _mean(values)
    return summary


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
