"""Data that are folders: CogVLM's fine-tuning demos and VLM-learning's pair of files.

Sources: THUDM/CogVLM, dataset.md and utils/utils/dataset.py (pictures whose name is the answer); THUDM/CogVLM2,
finetune_demo/peft_lora.py; VLM-learning's image_map.json and captions.json, in which all pairs of a picture are kept
(its loader keeps the last one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lavish.common.errors import DataError, shown
from lavish.datasets.datasets.annotations import Fault, need, read_json
from lavish.datasets.formats.coco import Rows

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
LABELS = ("labels_en", "labels_zh", "labels")
PLACE = "<|extra_0|>"
CAPTCHA = "CAPTCHA:"
"""What CogVLM's demo asks about a picture whose name is the answer."""


def kind_of(folder: Path) -> str | None:
    """Name what a folder holds, or None."""
    if (folder / "captions.json").is_file() and (folder / "image_map.json").is_file():
        return "image_map"
    if (folder / "images").is_dir() and any((folder / name).is_dir() for name in LABELS):
        return "cogvlm_sft"
    if shards := shards_in(folder):  # before parquet: img2dataset writes a table without pictures beside each shard
        beside = [name for name in data_files(folder) if not name.startswith(tuple(shards))]
        return None if beside else "webdataset"
    if any(path.suffix == ".parquet" for path in folder.iterdir()) or (folder / "dataset_info.json").is_file():
        return "hf"
    if data_files(folder):
        return None
    return "named_images" if next(pictures_in(folder), None) is not None else None


def shards_in(folder: Path) -> list[str]:
    """Name the tar files of a folder, without their suffix."""
    return sorted(path.stem for path in folder.iterdir() if path.suffix == ".tar")


def data_files(folder: Path) -> list[str]:
    """Name the files of a folder that may be the data themselves."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".jsonl", ".csv", ".tsv"))


def cogvlm_rows(folder: Path) -> Rows:
    """`images/` and `labels_en/`, `labels_zh/` or `labels/`: a JSON file for each picture, of the same name.

    Raises:
        DataError: a label without its picture, or of another form.
    """
    files = [file for name in LABELS for file in sorted((folder / name).glob("*.json"))]
    if not files:
        raise DataError(f"{folder}: has no JSON file in {', '.join(LABELS)}.")
    found = {path.stem: path for path in pictures_in(folder / "images")}
    rows: Rows = []
    for file in files:
        picture = found.get(file.stem)
        # Whatever is wrong is told with the row, so it is not looked at here.
        row = {
            "id": f"{file.parent.name}/{file.stem}",
            "image": f"{file.stem}.jpg" if picture is None else str(picture.absolute()),
        }
        rows.append((str(file.relative_to(folder)), {**row, "label_file": str(file)}))
    return rows


def labelled(row: dict[str, Any]) -> dict[str, Any]:
    """Read the label of a row of `cogvlm_rows`: conversations, or captions.

    Raises:
        DataError: no JSON, or neither of the two.
    """
    label = read_json(row["label_file"])
    if isinstance(label, dict) and isinstance(label.get("conversations"), list):
        return {"id": row["id"], "image": row["image"], "conversations": label["conversations"]}
    if isinstance(label, dict) and isinstance(label.get("captions"), list):
        texts = [need(one, "content") if isinstance(one, dict) else one for one in label["captions"]]
        return {"id": row["id"], "image": row["image"], "caption": texts}
    raise DataError(f"holds {shown(label)}; an object with conversations or captions is expected.")


def image_map_rows(folder: Path) -> Rows:
    """`image_map.json` (name -> file, ID, path) and `captions.json` (ID -> q, a list of a): a row for each answer.

    Raises:
        DataError: another form.
    """
    names, captions = read_json(folder / "image_map.json"), read_json(folder / "captions.json")
    if not isinstance(names, dict) or not isinstance(captions, dict):
        raise DataError(f"{folder}: image_map.json and captions.json hold objects; at least one does not.")
    rows: Rows = []
    for name, one in names.items():
        where = f"image_map.json, {name!r}"
        if not isinstance(one, dict):
            raise DataError(f"{folder / 'image_map.json'}: {name!r} is {shown(one)}; an object is expected.")
        file = one.get("iamge_file", one.get("image_file", name))  # spelled so in the release
        key = str(one.get("ID"))
        said = captions.get(key)
        answers = said.get("a") if isinstance(said, dict) else None
        if not isinstance(said, dict) or not isinstance(answers, list) or not answers:
            rows.append((where, Fault(f"captions.json has no {{'q', 'a': [...]}} under the ID {key!r}.")))
            continue
        for at, answer in enumerate(answers):
            row = {"id": f"{key}-{at}", "image": f"{one.get('path', '')}{file}", "question": said.get("q")}
            rows.append((where, {**row, "answer": answer}))
    return rows


def named_rows(folder: Path) -> Rows:
    """Pictures whose name, up to the first dot, is the answer (CogVLM's captchas)."""
    return [
        (
            str(path.relative_to(folder)),
            {"id": path.stem, "image": str(path.absolute()), "caption": path.name.partition(".")[0]},
        )
        for path in pictures_in(folder)
    ]


def pictures_in(folder: Path) -> Iterator[Path]:
    """Give the pictures under a folder, sorted."""
    yield from sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


READERS: dict[str, tuple[str, Callable[[Path], Rows]]] = {
    "cogvlm_sft": ("`images/` and `labels_en/`, `labels_zh/` or `labels/` with a JSON file a picture", cogvlm_rows),
    "image_map": ("`image_map.json` and `captions.json`; `<|extra_0|>` in the question", image_map_rows),
    "named_images": ("pictures whose name is the answer (captchas)", named_rows),
}
"""By name: what the folder holds, and how its rows are read."""
