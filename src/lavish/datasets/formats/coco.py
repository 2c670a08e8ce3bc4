"""The JSON files of COCO's kind, which hold a whole set in one object: captions, VQA, RefCOCO as MDETR writes it.

Each becomes rows that `records` reads. Sources: cocodataset.org (format), visualqa.org (format of the questions),
ashkamath/mdetr (finetune_refcoco_*.json). The pickles of RefCOCO's authors (`refs(unc).p`) are not read: reading one
would run what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lavish.common.errors import DataError, shown
from lavish.datasets.datasets.annotations import Fault, read_json

Rows = list[tuple[str, Any]]
"""(where a row is, the row or its `Fault`)."""


def kind_of(loaded: Mapping[str, Any]) -> str | None:
    """Name what an object holds, or None."""
    if isinstance(loaded.get("questions"), list):
        return "coco_vqa"
    annotations = loaded.get("annotations")
    if not isinstance(annotations, list):
        return None
    first = annotations[0] if annotations and isinstance(annotations[0], Mapping) else {}
    if "question_id" in first:
        return "coco_vqa"
    if not isinstance(loaded.get("images"), list):
        return "minigpt4" if "caption" in first else None
    pictured = loaded["images"][0] if loaded["images"] else {}
    if isinstance(pictured, Mapping) and "caption" in pictured and "bbox" in first:
        return "coco_refcoco"
    return "coco_captions" if "caption" in first else None


def caption_rows(loaded: Mapping[str, Any], path: Path) -> Rows:
    """`images` and `annotations` with a `caption` each: one row a caption."""
    names = _by_id(loaded, path)
    rows: Rows = []
    for at, one in _records(loaded["annotations"], path, "annotation"):
        picture = names.get(_key(one, "image_id"))
        row = {"id": one.get("id"), "image": (picture or {}).get("file_name"), "caption": one.get("caption")}
        rows.append((at, row if picture is not None else _no_picture(one)))
    return rows


def refcoco_rows(loaded: Mapping[str, Any], path: Path) -> Rows:
    """MDETR's file: an image a phrase (`caption`), an annotation its `bbox`."""
    pictures = _by_id(loaded, path)
    rows: Rows = []
    for at, one in _records(loaded["annotations"], path, "annotation"):
        picture = pictures.get(_key(one, "image_id"))
        if picture is None:
            rows.append((at, _no_picture(one)))
            continue
        row = {name: picture.get(name) for name in ("width", "height")}
        row |= {"image": picture.get("file_name"), "expression": picture.get("caption"), "bbox": one.get("bbox")}
        rows.append((at, {"id": picture.get("id"), **row}))
    return rows


def minigpt4_rows(loaded: Mapping[str, Any], path: Path) -> Rows:
    """MiniGPT-4's `filter_cap.json`: `annotations` of `image_id` and `caption`; the file is `<image_id>.jpg`."""
    rows: Rows = []
    for at, one in _records(loaded["annotations"], path, "annotation"):
        name = _key(one, "image_id")
        row = {"id": name, "image": f"{name}.jpg", "caption": one.get("caption")}
        rows.append((at, Fault("it has no image_id.") if name is None else row))
    return rows


def question_rows(loaded: Mapping[str, Any], path: Path) -> Rows:
    """VQA's pair of files, whichever of the two was named: questions, and the annotations with the answers.

    Raises:
        DataError: the other file is missing, or a question has no answer.
    """
    is_questions = isinstance(loaded.get("questions"), list)
    other = partner(path, is_questions)
    paired = read_json(other)
    questions, annotations = (loaded, paired) if is_questions else (paired, loaded)
    if not isinstance(questions, Mapping) or not isinstance(annotations, Mapping):
        raise DataError(f"{other}: holds {shown(paired)}; an object is expected.")
    given = _records(annotations.get("annotations"), other if is_questions else path, "annotation")
    answers = {_key(one, "question_id"): one for _, one in given}
    subtype = questions.get("data_subtype") or annotations.get("data_subtype")
    asked = _records(questions.get("questions"), path if is_questions else other, "question")
    return [(at, _question(one, answers.get(_key(one, "question_id"), {}), subtype)) for at, one in asked]


def _question(asked: Mapping[str, Any], answer: Mapping[str, Any], subtype: Any) -> dict[str, Any] | Fault:
    name, number = _key(asked, "question_id"), asked.get("image_id")
    if name is None:
        return Fault("it has no question_id.")
    image = asked.get("image")
    if image is None:
        if not isinstance(number, int):
            return Fault(f"image_id is {shown(number)}; the number of a COCO picture is expected.")
        image = f"COCO_{subtype}_{number:012d}.jpg"
    answers = answer.get("answers") or answer.get("multiple_choice_answer")
    return {"id": name, "image": image, "question": asked.get("question"), "answer": answers}


def partner(path: Path, is_questions: bool) -> Path:
    """Give the path of the file that belongs to one of VQA's two.

    Raises:
        DataError: it is not beside it.
    """
    if is_questions:
        names = [path.name.replace("OpenEnded_", "").replace("questions", "annotations")]
    else:
        swapped = path.name.replace("annotations", "questions")
        names = [swapped.replace("mscoco", "OpenEnded_mscoco"), f"OpenEnded_{swapped}", swapped]
    for name in names:
        if name != path.name and path.with_name(name).is_file():
            return path.with_name(name)
    what = "answers" if is_questions else "questions"
    raise DataError(f"{path}: the file of the {what} is not beside it; it is called {names[0]}.")


READERS: dict[str, tuple[str, Callable[[Mapping[str, Any], Path], Rows], str]] = {
    "coco_captions": (
        "`images` and `annotations` with `caption` (`captions_train2017.json`)",
        caption_rows,
        "captions",
    ),
    "coco_vqa": ("`questions` and, beside it, the file of `annotations` (VQAv2, OK-VQA)", question_rows, "vqa"),
    "coco_refcoco": ("`images` with `caption`, `annotations` with `bbox` (MDETR's RefCOCO)", refcoco_rows, "refcoco"),
    "minigpt4": (
        "`annotations` of `image_id`, `caption` (MiniGPT-4's `filter_cap.json`)",
        minigpt4_rows,
        "captions",
    ),
}
"""By name: what it holds, how its rows are read, and the kind of those rows."""


def _records(values: Any, path: Path, what: str) -> Rows:
    if not isinstance(values, list):
        raise DataError(f"{path}: the {what}s are {shown(values)}; a list is expected.")
    for at, one in enumerate(values, start=1):
        if not isinstance(one, dict):
            raise DataError(f"{path}, {what} {at}: {shown(one)} where an object is expected.")
    return [(f"{path.name}, {what} {at}", one) for at, one in enumerate(values, start=1)]


def _by_id(loaded: Mapping[str, Any], path: Path) -> dict[Any, dict[str, Any]]:
    return {_key(one, "id"): one for _, one in _records(loaded["images"], path, "image")}


def _key(one: Mapping[str, Any], name: str) -> str | int | None:
    """Give an id, or None where there is none."""
    value = one.get(name)
    return value if isinstance(value, str | int) else None


def _no_picture(one: Mapping[str, Any]) -> Fault:
    return Fault(f"its image_id {shown(one.get('image_id'))} is none of the images.")
