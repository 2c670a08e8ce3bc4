"""Rows that are objects: conversations, instructions, captions, questions, phrases with boxes.

`kind_of` tells by a row's fields which of `KINDS` it is. Sources of the forms: haotian-liu/LLaVA, docs/Finetune_Custom_
Data.md; Coobiw/MPP-LLaVA, README; THUDM/CogVLM2 and THUDM/GLM-4, finetune_demo; salesforce/LAVIS's annotation files;
HuggingFaceM4/the_cauldron on Hugging Face (`texts`); modelscope/ms-swift, Custom-dataset.md (`query`). RefCOCO is rows
of picture, expression and box.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from lavish.common import grounding
from lavish.common.boxes import Box
from lavish.common.errors import DataError, shown
from lavish.datasets.datasets.annotations import need
from lavish.datasets.formats import choices
from lavish.datasets.formats.samples import Options, Pictures, Sample, converse, listed, speaker

Convert = Callable[[Mapping[str, Any], Pictures, Options], Sample]
"""(row, where its pictures are, what the person said) -> sample without its id."""

PLACES = {"<image>": "image", "<video>": "video"}
IMAGE_HERE = {"<Img><ImageHere></Img>": "any", "<ImageHere>": "any"}
DESCRIBE = "Describe this image."
EXPRESSIONS = ("expression", "sentence", "sent", "ref", "phrase", "text", "caption")
BOXES = ("bbox", "box")
IMAGES = ("image", "images", "image_path", "img", "image_file", "file_name")
MAX_PIXELS = 1_000_000_000
"""No side of a picture is longer."""
CONVERSATIONS = ("llava", "sharegpt", "messages", "swift", "cauldron", "minigpt4_qwen")
"""Those of `KINDS` that are questions with their answers as they were said."""
ANSWERS = ("answer", "answers", "direct_answers", "multiple_choice_answer")


@dataclass(frozen=True)
class Kind:
    """One form of a row."""

    fields: str
    """What a row has, for people."""
    is_it: Callable[[Mapping[str, Any]], bool]
    convert: Convert


def as_row(value: Any) -> Any:
    """Give a row as an object: a list of messages is one too."""
    if isinstance(value, list) and value and all(isinstance(turn, Mapping) for turn in value):
        return {"messages" if "role" in value[0] else "conversations": value}
    return value


def kind_of(row: Mapping[str, Any]) -> str | None:
    """Name the form of a row, or None."""
    return next((name for name, kind in KINDS.items() if kind.is_it(row)), None)


def media_of(row: Mapping[str, Any], pictures: Pictures) -> list[tuple[str, Any]]:
    """Give (kind, source) of the pictures and videos that a row names.

    Raises:
        DataError: one of them is missing.
    """
    images = [source for name in IMAGES for source in listed(row.get(name))]
    videos = [source for name in ("video", "videos") for source in listed(row.get(name))]
    return [("image", pictures.find(one)) for one in images] + [("video", pictures.find(one)) for one in videos]


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name} is {shown(value)}; a text is expected.")
    return value


# -- conversations


def messages_sample(row: Mapping[str, Any], pictures: Pictures, options: Options) -> Sample:
    """`messages` (or `conversations`) of role and content; pictures in the parts, or named beside them."""
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"the messages are {shown(turns)}; a list of objects with role and content is expected.")
    spoken = []
    for turn in turns:
        content, own = need(turn, "content"), media_of(turn, pictures)
        if isinstance(content, list):
            content = [_part(part, pictures) for part in content]
        elif own:  # GLM-4's: a message names its picture
            text = [{"type": "text", "text": content}] if content else []
            content = [*({"type": kind, kind: source} for kind, source in own), *text]
        spoken.append((speaker(need(turn, "role")), content))
    named = media_of(row, pictures)
    if any(isinstance(content, list) for _, content in spoken):
        if not named:
            return {"messages": [{"role": role, "content": content} for role, content in spoken]}
        spoken = [(role, _joined(content, named)) for role, content in spoken]
    return {"messages": converse(spoken, PLACES, named, first_if_no_place=True)}


def _part(part: Any, pictures: Pictures) -> Any:
    """Find the file of a part; what is no picture stays as it is, for the check of messages."""
    if not isinstance(part, Mapping) or part.get("type") not in ("image", "video", "image_url"):
        return part
    kind = "video" if part["type"] == "video" else "image"
    if part["type"] == "image_url":
        value = part.get("image_url")
        source = value.get("url") if isinstance(value, Mapping) else value
    else:
        source = _first(part, (kind, "url", "path"))
    return part if source is None else {"type": kind, kind: pictures.find(source)}


def _joined(content: Any, named: list[tuple[str, Any]]) -> Any:
    """Write parts without a source (`{"type": "image"}`) as places for the pictures that the row names."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, Mapping):
            raise DataError(f"a part of the content is {shown(part)}; an object with a type is expected.")
        kind = str(part.get("type"))
        if kind in part and kind != "text":
            raise DataError(f"pictures stand in the parts and beside the messages ({len(named)}): keep one of the two.")
        texts.append(f"<{kind}>" if kind in ("image", "video") else str(part.get("text", "")))
    return "".join(texts)


def spoken_sample(row: Mapping[str, Any], pictures: Pictures, options: Options) -> Sample:
    """LLaVA and ShareGPT: `conversations` of from and value, `<image>` where a picture stands."""
    turns = need(row, "conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"conversations is {shown(turns)}; a list of objects with from and value is expected.")
    spoken = [(speaker(need(turn, "from")), _value(turn)) for turn in turns]
    if isinstance(row.get("system"), str) and row["system"]:
        spoken.insert(0, ("system", row["system"]))
    return {"messages": converse(spoken, PLACES, media_of(row, pictures))}


def _value(turn: Mapping[str, Any]) -> str:
    value = need(turn, "value")
    if not isinstance(value, str):
        raise DataError(f"value is {shown(value)}; a text is expected.")
    return value


def query_sample(row: Mapping[str, Any], pictures: Pictures, options: Options) -> Sample:
    """ms-swift: `query` and `response`, before them pairs in `history`; `<image>` where a picture stands."""
    pairs = [*listed(row.get("history")), [row.get("query"), need(row, "response")]]
    spoken: list[tuple[str, Any]] = []
    for one in pairs:
        if not isinstance(one, list | tuple) or len(one) != 2:
            raise DataError(f"history holds {shown(one)}; pairs of a question and its answer are expected.")
        spoken += [("user", _text(one[0], "query")), ("assistant", _text(one[1], "response"))]
    if isinstance(row.get("system"), str) and row["system"]:
        spoken.insert(0, ("system", row["system"]))
    return {"messages": converse(spoken, PLACES, media_of(row, pictures), first_if_no_place=True)}


def texts_sample(row: Mapping[str, Any], pictures: Pictures, options: Options) -> Sample:
    """The Cauldron: `images` and `texts`, pairs of user and assistant about all of them."""
    spoken = []
    for pair in listed(need(row, "texts")):
        if not isinstance(pair, Mapping):
            raise DataError(f"texts holds {shown(pair)}; objects with user and assistant are expected.")
        spoken += [("user", need(pair, "user")), ("assistant", need(pair, "assistant"))]
    return {"messages": converse(spoken, PLACES, media_of(row, pictures), first_if_no_place=True)}


def instruction_sample(row: Mapping[str, Any], pictures: Pictures, options: Options) -> Sample:
    """MiniGPT4-Qwen: `instruction` and `output`, lists of them are turns; `<ImageHere>` where a picture stands."""
    asked, answered = listed(need(row, "instruction")), listed(need(row, "output"))
    if len(asked) != len(answered) or not asked:
        raise DataError(f"{len(asked)} instructions and {len(answered)} outputs; they pair up.")
    if isinstance(row.get("input"), str) and row["input"].strip():  # Alpaca's third field
        asked[0] = f"{asked[0]}\n{row['input']}"
    spoken = [
        turn
        for question, answer in zip(asked, answered, strict=True)
        for turn in (("user", _text(question, "instruction")), ("assistant", _text(answer, "output")))
    ]
    return {"messages": converse(spoken, IMAGE_HERE, media_of(row, pictures))}


# -- one question, one answer


def pair(question: str, answer: str, media: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    """Give the messages of one question about pictures and its answer."""
    content: list[dict[str, Any]] = [{"type": kind, kind: source} for kind, source in media]
    if question:
        content.append({"type": "text", "text": question})
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def caption_sample(row: Mapping[str, Any], pictures: Pictures, options: Options) -> Sample:
    """A picture with a caption; of several captions the first."""
    caption = listed(_first(row, ("caption", "captions", "text", "txt")))
    text = _text(caption[0] if caption else None, "caption")
    prompt = DESCRIBE if options.prompt is None else options.prompt
    return {"messages": pair(prompt, text.strip(), _some(row, pictures))}


def question_sample(row: Mapping[str, Any], pictures: Pictures, options: Options) -> Sample:
    """A question about a picture; of the annotators' answers the most frequent one is learnt."""
    question = filled(options.prompt, "question", _text(need(row, "question"), "question"))
    return {"messages": pair(question, most_frequent(_first(row, ANSWERS)), _some(row, pictures))}


def choice_sample(row: Mapping[str, Any], pictures: Pictures, options: Options) -> Sample:
    """A question with choices; the letter of the right one is learnt."""
    (row,) = choices.with_pictures([row])
    asked = choices.asked_of(row)
    if asked.right is None:
        raise DataError("the right choice is hidden; there is nothing to learn.")
    question = filled(options.prompt, "question", asked.question)
    text = choices.put(choices.PROMPT, question, choices.listed(asked.choices))
    return {"messages": pair(text, ascii_uppercase[asked.right], _some(row, pictures))}


def most_frequent(given: Any) -> str:
    """Give the answer that most annotators gave; texts, or objects with `answer`.

    Raises:
        DataError: there is none.
    """
    answers = [one.get("answer") if isinstance(one, Mapping) else one for one in listed(given)]
    answers = [one for one in answers if isinstance(one, str) and one.strip()]
    if not answers:
        raise DataError(f"the answer is {shown(given)}; a text, or a list of them, is expected.")
    return Counter(answers).most_common(1)[0][0]


def referring_sample(row: Mapping[str, Any], pictures: Pictures, options: Options) -> Sample:
    """A phrase and where it is: `bbox` (x, y, width, height, as COCO) or `box` (corners), pixels; width and height."""
    expression = expression_of(row)
    question = (
        filled(options.prompt, "expr", expression) if options.prompt else grounding.prompt("locate", expr=expression)
    )
    box = box_of(row)
    return {"messages": pair(question, grounding.render([("", [box])]), _some(row, pictures)), "box": box.rel}


def expression_of(row: Mapping[str, Any]) -> str:
    """Give a row's phrase.

    Raises:
        DataError: there is none.
    """
    return _text(_first(row, EXPRESSIONS), "the expression")


def box_of(row: Mapping[str, Any]) -> Box:
    """Give a row's box in thousandths of its picture.

    Raises:
        DataError: no four numbers of pixels, an empty box, one beside the picture, or no size of that.
    """
    name = "box" if row.get("box") is not None else "bbox"
    given = row.get(name)
    values = listed(given)
    if len(values) != 4 or not all(_is_pixels(one) for one in values):
        raise DataError(f"{name} is {shown(given)}; four numbers of pixels are expected.")
    x0, y0, x1, y1 = (float(one) for one in values)
    if name == "bbox":
        x1, y1 = x0 + x1, y0 + y1
    if not (x0 < x1 and y0 < y1):
        form = "x, y, width, height" if name == "bbox" else "corners"
        raise DataError(f"{name} is {shown(given)}, which is empty as {form}.")
    width, height = size_of(row)
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        raise DataError(f"{name} is {shown(given)}, which lies beside the picture of {width} x {height} pixels.")
    return Box.from_pixels((x0, y0, x1, y1), (width, height))


def _is_pixels(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_PIXELS  # NaN is not


def size_of(row: Mapping[str, Any]) -> tuple[int, int]:
    """Give the width and height of a row's picture.

    Raises:
        DataError: absent or no whole numbers above 0.
    """
    width, height = row.get("width"), row.get("height")
    if not all(isinstance(side, int) and _is_pixels(side) and side > 0 for side in (width, height)):
        raise DataError(
            f"width and height are {shown(width)} and {shown(height)}; the picture's size in pixels is needed."
        )
    return int(width), int(height)  # type: ignore[arg-type]


def filled(prompt: str | None, name: str, value: str) -> str:
    """Put a question into the person's prompt.

    Raises:
        DataError: the prompt has no place for it.
    """
    if prompt is None:
        return value
    if f"{{{name}}}" not in prompt:
        raise DataError(f"--prompt {shown(prompt)} has no {{{name}}}, where the rows' own goes.")
    return prompt.replace(f"{{{name}}}", value)


def _some(row: Mapping[str, Any], pictures: Pictures) -> list[tuple[str, Any]]:
    found = media_of(row, pictures)
    if not found:
        raise DataError(f"names no picture ({', '.join(IMAGES)}) and no video; it has {', '.join(map(str, row))}.")
    return found


# -- the table


def _turns(row: Mapping[str, Any]) -> list[Any]:
    turns = row.get("conversations")
    return turns if isinstance(turns, list) else []


def _is_spoken(row: Mapping[str, Any]) -> bool:
    return bool(_turns(row)) and isinstance(_turns(row)[0], Mapping) and "from" in _turns(row)[0]


def _has_media(row: Mapping[str, Any]) -> bool:
    return any(row.get(name) for name in (*IMAGES, "video", "videos"))


def _has_box(row: Mapping[str, Any]) -> bool:
    return _first(row, BOXES) is not None and _first(row, EXPRESSIONS) is not None


KINDS: dict[str, Kind] = {
    "llava": Kind(
        "`conversations` of `from` and `value`, `image`; `<image>` in the text",
        lambda row: _is_spoken(row) and _has_media(row),
        spoken_sample,
    ),
    "sharegpt": Kind("`conversations` of `from` and `value`, without pictures", _is_spoken, spoken_sample),
    "messages": Kind(
        "`messages` of `role` and `content` (or a row is such a list); pictures as parts, as `image` of a message, or "
        "in `images` with `<image>` in the text",
        lambda row: "messages" in row or bool(_turns(row)),
        messages_sample,
    ),
    "swift": Kind(
        "`query` and `response`, maybe `history` of pairs, `images`; `<image>` in the text",
        lambda row: "query" in row and "response" in row,
        query_sample,
    ),
    "cauldron": Kind(
        "`images` and `texts` of `user` and `assistant`",
        lambda row: isinstance(row.get("texts"), list | tuple),
        texts_sample,
    ),
    "minigpt4_qwen": Kind(
        "`instruction` and `output` (lists are turns), `image` or `video`; `<ImageHere>` in the text",
        lambda row: "instruction" in row and "output" in row,
        instruction_sample,
    ),
    "refcoco": Kind(
        "`image`, `expression`, `bbox` (x, y, width, height) or `box` (corners), `width`, `height`",
        _has_box,
        referring_sample,
    ),
    "multiple_choice": Kind(
        "`image`, `question`, `choices` (or columns A, B, C ...), the right one as `answer` or `correct_choice_idx`: "
        "its place from 0, its letter or its words; `hint`, `category`",
        lambda row: choices.has_choices(row) and row.get("direct_answers") is None,
        choice_sample,
    ),
    "vqa": Kind(
        "`image`, `question`, `answer` (or a list of the annotators')",
        lambda row: "question" in row and _first(row, ANSWERS) is not None,
        question_sample,
    ),
    "captions": Kind(
        "`image`, `caption`",
        lambda row: _has_media(row) and _first(row, ("caption", "captions", "text", "txt")) is not None,
        caption_sample,
    ),
}
"""By name, in the order in which a row is tried."""
