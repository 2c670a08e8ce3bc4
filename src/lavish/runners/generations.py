"""What a model says during its training: answers to the first held-out samples, for whoever watches the run.

`run.sample_generations: 4` answers four samples of the validation split before the first step and at every validation.
A line of `samples.jsonl`: {"step", "epoch", "split", "index", "question", "reference", "answer", "picture"}, where
`picture` is a small copy in the folder `samples` of the run; what a sample does not have is null.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from lavish.common.errors import ConfigError, LavishError
from lavish.common.media import open_image
from lavish.common.messages import images, normalize
from lavish.datasets.datasets.base_dataset import BaseDataset
from lavish.runners.order import own_randomness
from lavish.runners.run_folder import RunFolder
from lavish.runners.schema import RunConfig
from lavish.tasks.base_task import BaseTask, to_device

PICTURES = "samples"
"""Folder of the pictures, below that of the run."""
MAX_SIDE = 224
"""Pixels of a kept picture."""
QUESTIONS = ("text_input", "question", "expression", "phrase")
REFERENCES = ("answer", "answers", "direct_answers", "caption", "text_output", "label")
"""Fields of a record, or of a sample, that hold what is asked and what is right; the first one there counts."""

Row = dict[str, Any]


def check(run: RunConfig, *, validates: bool) -> None:
    """Check that there is something to answer.

    Raises:
        ConfigError: no held-out samples.
    """
    if run.sample_generations and not (validates and run.valid_splits and not run.evaluate):
        raise ConfigError(
            f"run.sample_generations is {run.sample_generations}, and nothing is validated during the training. Name "
            "run.valid_splits in a LAVIS recipe, or leave it out."
        )


def answer(task: BaseTask, model: nn.Module, dataset: Any, run: RunConfig, device: torch.device) -> list[Row]:
    """Let the model answer the first samples of a split, whatever random numbers the training goes on with.

    Raises:
        ConfigError: the task or the model gives no answers.
    """
    indices = range(min(run.sample_generations, len(dataset)))
    was_training = model.training
    model.eval()
    with own_randomness(run.seed, device), torch.no_grad():
        task.before_evaluation(model=model, dataset=dataset)
        samples = [dataset[index] for index in indices]
        answers: list[Any] = []
        for start in range(0, len(samples), run.batch_size_eval):
            part = samples[start : start + run.batch_size_eval]
            answers += task.answer_step(model, to_device(dataset.collater(part), device))
    model.train(was_training)
    if len(answers) != len(samples):
        raise ConfigError(
            f"run.sample_generations: {type(task).__name__} gave {len(answers)} answers to {len(samples)} samples; "
            "leave the key out."
        )
    return [
        {"index": index, **_said(dataset, index, sample), "answer": str(answer)}
        for index, sample, answer in zip(indices, samples, answers, strict=True)
    ]


def write(folder: RunFolder, dataset: Any, rows: Sequence[Row], where: Mapping[str, Any]) -> None:
    """Put answers into `samples.jsonl`, in place of those of the same moment, and keep the pictures."""
    before = [row for row in folder.read_samples() if any(row[name] != value for name, value in where.items())]
    named = [{**where, **row, "picture": _keep_picture(folder, dataset, row["index"], where["split"])} for row in rows]
    folder.write_samples([*before, *named])


def as_markdown(rows: Sequence[Row]) -> str:
    """Give answers as TensorBoard shows text."""
    lines = ["| sample | question | reference | answer |", "|---|---|---|---|"]
    for row in rows:
        cells = (row["index"], row["question"] or "", row["reference"] or "", row["answer"])
        lines.append("| " + " | ".join(html.escape(str(cell)).replace("|", "\\|").replace("\n", " ") for cell in cells))
    return "\n".join(lines)


# -- what was asked, and what would have been right


def _said(dataset: Any, index: int, sample: Any) -> Row:
    record: Mapping[str, Any] = sample if isinstance(sample, Mapping) else {}
    messages = record.get("messages")
    if messages is not None:
        checked = normalize(messages, allow_videos=True)
        answers = [message.text() for message in checked if message.role == "assistant"]
        users = [message.text() for message in checked if message.role == "user"]
        return {"question": users[-1] if users else None, "reference": answers[-1] if answers else None}
    if record.get("conversations") is not None:  # of MPP-LLaVA: question, answer, question, answer ...
        question, right = (str(turn["value"]) for turn in record["conversations"][-2:])
        return {"question": question, "reference": right}
    records = getattr(dataset, "annotation", None)  # data sets of one's own may keep none
    if isinstance(records, list) and index < len(records) and isinstance(records[index], Mapping):
        record = {**record, **records[index]}
    question = next((record[name] for name in QUESTIONS if isinstance(record.get(name), str)), None)
    return {"question": question, "reference": _reference(record)}


def _reference(record: Mapping[str, Any]) -> Any:
    found = next((record[name] for name in REFERENCES if record.get(name) is not None), None)
    if isinstance(found, Sequence) and not isinstance(found, str):
        texts = [one.get("answer") if isinstance(one, Mapping) else one for one in found]
        return " | ".join(dict.fromkeys(map(str, texts)))
    return found if found is None or not isinstance(found, torch.Tensor) else str(found.tolist())


def _keep_picture(folder: RunFolder, dataset: Any, index: int, split: str) -> str | None:
    """Keep a small copy of a sample's picture once, and give its name in the folder; None where there is none."""
    name = f"{PICTURES}/{split}_{index}.jpg"
    path = folder.path / name
    if path.is_file():
        return name
    try:
        image = _picture(dataset, index)
    except LavishError:  # a picture that cannot be shown; the model has told if it cannot be read
        return None
    if image is None:
        return None
    small = image.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    path.parent.mkdir(exist_ok=True)
    partial = Path(f"{path}.partial")
    small.save(partial, "JPEG", quality=85)
    partial.replace(path)
    return name


def _picture(dataset: Any, index: int) -> Image.Image | None:
    records = getattr(dataset, "annotation", None)  # as above
    if isinstance(dataset, BaseDataset) and isinstance(records, list) and index < len(records):
        name = records[index].get("image")
        if isinstance(name, str) and dataset.path(name).is_file():
            return open_image(dataset.path(name), exif_rotation=False)
    sample = dataset[index]
    if not isinstance(sample, Mapping):
        return None
    if "messages" in sample:
        checked = normalize(sample["messages"], allow_videos=True)
        sources = [source for _, source in images(checked)]
        return open_image(sources[0]) if sources else None
    value = sample.get("image")
    if isinstance(value, torch.Tensor) and value.ndim == 3 and len(value) == 3:
        return _of_pixels(value)
    return value if isinstance(value, Image.Image) else None


def _of_pixels(pixels: torch.Tensor) -> Image.Image:
    """Give a picture of processed pixels, (3, height, width), stretched from darkest to brightest."""
    low, high = pixels.amin(), pixels.amax()
    scaled = (pixels - low) / (high - low).clamp(min=1e-6) * 255
    return Image.fromarray(scaled.byte().permute(1, 2, 0).cpu().numpy())
