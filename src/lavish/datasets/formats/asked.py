"""Data of one's own to evaluate on: questions about pictures, with choices or without, and captions.

Rows are those of `opening.FORMATS`, and pictures are found as there. What is right stays in the records, where the
tasks look for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavish.common.errors import DataError, MediaError, PromptError, shown
from lavish.common.media import open_image
from lavish.datasets.datasets.annotations import Fault
from lavish.datasets.datasets.base_dataset import BaseDataset
from lavish.datasets.formats import choices
from lavish.datasets.formats.opening import Source, open_data
from lavish.datasets.formats.records import ANSWERS, CONVERSATIONS, as_row, kind_of, media_of
from lavish.datasets.formats.samples import Pictures


class AskedDataset(BaseDataset):
    """Base: the rows of files, each with one picture."""

    what = "rows"

    def __init__(
        self,
        vis_processor: Any = None,
        text_processor: Any = None,
        vis_root: str | Path | None = None,
        ann_paths: Sequence[str | Path] = (),
        format: str | None = None,
    ) -> None:
        super().__init__(vis_processor, text_processor, vis_root)
        self.pictures: list[Pictures] = []
        for path in ann_paths:
            source = open_data(path, format, images=vis_root)
            records = self.records(source)
            self.add_annotation(path, records)
            self.pictures += [source.convert.pictures] * len(records)
        self._add_instance_ids()

    def records(self, source: Source) -> list[dict[str, Any]]:
        """Give the records of a source.

        Raises:
            DataError: a stream, or a row that is none of these.
        """
        if source.is_stream:
            raise DataError(f"{source.path}: is a stream; evaluation needs rows with a number.")
        places, rows = [], []
        for where, row in source.rows:
            places.append(where)
            rows.append(_placed(where, self.plain, source, row))
        made = zip(places, choices.with_pictures(rows), strict=True)
        return [_placed(where, self.record, row) for where, row in made]

    def plain(self, source: Source, row: Any) -> dict[str, Any]:
        """Give a row as an object, as its form reads it.

        Raises:
            DataError: it is none.
        """
        if isinstance(row, Fault):
            raise DataError(row)
        made = as_row(row if source.convert.before is None else source.convert.before(row))
        if not isinstance(made, Mapping):
            raise DataError(f"{shown(made)} where an object is expected.")
        return dict(made)

    def record(self, row: dict[str, Any]) -> dict[str, Any]:
        """Give the record of a row; what is wrong with it raises."""
        raise NotImplementedError(f"{type(self).__name__} does not say what a row is; override record().")

    def picture_of(self, index: int) -> Any:
        """Open and process the picture of a record.

        Raises:
            DataError: it names none, or several.
            MediaError: it cannot be opened.
        """
        found = media_of(self.annotation[index], self.pictures[index])
        if len(found) != 1 or found[0][0] != "image":
            raise DataError(f"names {len(found)} pictures or videos; one picture is expected.")
        return self.vis_processor(open_image(found[0][1], exif_rotation=False))


class QuestionDataset(AskedDataset):
    """`image`, `text_input`, `question_id`, `instance_id`; with `choices`, `correct_choice_idx`, `category`.

    The records keep the answers, by which the tasks `vqa`, `gqa` and `ocr_vqa` score. Rows may be conversations, in any
    form that trains, with one turn about one picture each.
    """

    def plain(self, source: Source, row: Any) -> dict[str, Any]:
        """Give a question as it stands in the row, or that of a conversation."""
        made = super().plain(source, row)
        if "question" in made or choices.has_choices(made) or kind_of(made) not in CONVERSATIONS:
            return made
        sample = source.convert(row)
        return {**_only_turn(sample["messages"]), "question_id": sample.get("id")}

    def record(self, row: dict[str, Any]) -> dict[str, Any]:
        """Give a question, with or without choices."""
        if choices.has_choices(row):
            asked = choices.asked_of(row)
            row |= {"question": asked.question, "choices": asked.choices, "correct_choice_idx": asked.right}
            return row | {"category": asked.category}
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            raise DataError(f"question is {shown(row.get('question'))}; a text is expected.")
        answers = next((row[name] for name in ANSWERS if row.get(name) is not None), None)
        return {**row, "answer": answers}

    def sample(self, index: int) -> dict[str, Any]:
        """Give one question with its picture."""
        record = self.annotation[index]
        name = choices.name_of(record)
        return {
            "image": self.picture_of(index),
            "text_input": self.text_processor(record["question"]),
            "question_id": index if name is None else name,
            "instance_id": record["instance_id"],
            **{key: record.get(key) for key in ("choices", "correct_choice_idx", "category")},
        }


class CaptionedDataset(AskedDataset):
    """`image`, `image_id`, `instance_id`; all captions of a picture are in its record, the references."""

    def records(self, source: Source) -> list[dict[str, Any]]:
        """Give one record a picture, with the captions of all its rows."""
        by_picture: dict[Any, dict[str, Any]] = {}
        for at, row in enumerate(super().records(source)):
            picture = row.get("image")
            known = by_picture.setdefault(picture if isinstance(picture, str) else at, {**row, "caption": []})
            known["caption"] += row["caption"]
        return list(by_picture.values())

    def record(self, row: dict[str, Any]) -> dict[str, Any]:
        """Give a picture with its captions; none where the split hides them."""
        given = next((row[name] for name in ("caption", "captions", "text") if row.get(name) is not None), [])
        texts = [given] if isinstance(given, str) else list(given) if isinstance(given, list | tuple) else [None]
        if not all(isinstance(one, str) for one in texts):
            raise DataError(f"caption is {shown(given)}; a text or a list of texts is expected.")
        return {**row, "caption": texts}

    def sample(self, index: int) -> dict[str, Any]:
        """Give one picture."""
        record = self.annotation[index]
        image = record.get("image")
        return {
            "image": self.picture_of(index),
            "image_id": record.get("image_id", image if isinstance(image, str) else index),
            "instance_id": record["instance_id"],
        }


def _placed(where: str, make: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """Call `make`; what is wrong is told with its place."""
    try:
        return make(*given)
    except (DataError, MediaError, PromptError) as error:
        raise DataError(f"{where}: {error}") from error


def _only_turn(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Give the question, answer and picture of a conversation.

    Raises:
        DataError: it has several turns, or another number of pictures than one.
    """
    if len(messages) != 2:
        raise DataError(
            f"a conversation of {len(messages)} messages; a question and its answer are expected. The losses of longer "
            "ones are those of the task image_text_pretrain on the data set conversations."
        )
    asked, answered = (message["content"] for message in messages)
    parts = [{"type": "text", "text": asked}] if isinstance(asked, str) else asked
    media = [part for part in parts if part["type"] != "text"]
    if [part["type"] for part in media] != ["image"]:
        raise DataError(f"names {len(media)} pictures or videos; one picture is expected.")
    question = " ".join(part["text"].strip() for part in parts if part["type"] == "text" and part["text"].strip())
    spoken = [answered] if isinstance(answered, str) else [part["text"] for part in answered]
    return {"question": question, "answer": " ".join(spoken), "image": media[0]["image"]}
