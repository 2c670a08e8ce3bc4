"""Small local files in the form of the zoo's: pictures of one colour, annotations of a few rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

COLORS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30))
NAMES = tuple(f"val2014/COCO_val2014_{number:012d}.jpg" for number in (42, 73, 133, 139))


def pictures(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    """Draw a picture for each name and give the folder."""
    for color, name in zip(COLORS, names, strict=False):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), color).save(path)
    return folder


def write(path: Path, value: Any) -> Path:
    """Write JSON and give the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def captions() -> list[dict[str, Any]]:
    """Two pictures, three captions."""
    texts = ((0, "A red square."), (0, "Something red!"), (1, "A green square"))
    return [{"caption": text, "image": NAMES[at], "image_id": f"coco_{at}"} for at, text in texts]


def coco_caption(cache: Path) -> None:
    """Fill a cache folder with the files of `coco_caption`."""
    folder = cache / "coco" / "annotations"
    write(folder / "coco_karpathy_train.json", captions())
    rows = [{"image": name, "caption": ["a", "b"]} for name in NAMES[2:]]
    write(folder / "coco_karpathy_val.json", rows)
    write(folder / "coco_karpathy_test.json", rows[:1])


def questions(first: int = 0) -> list[dict[str, Any]]:
    """Two questions with the answers of ten annotators."""
    return [
        {
            "image": NAMES[at],
            "question": f"What color is #{at}?",
            "question_id": first + at,
            "answer": ["red"] * 6 + ["dark red"] * 4 if at == 0 else ["green"] * 10,
        }
        for at in range(2)
    ]


def coco_vqa(cache: Path) -> None:
    """Fill a cache folder with the files of `coco_vqa`."""
    folder = cache / "coco" / "annotations"
    write(folder / "vqa_train.json", questions())
    write(folder / "vqa_val.json", questions(100))
    write(folder / "vqa_val_eval.json", questions(100))
    write(folder / "vqa_test.json", [{k: row[k] for k in ("image", "question", "question_id")} for row in questions()])
    write(folder / "answer_list.json", ["red", "green", "dark red"])
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": []})
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": []})
