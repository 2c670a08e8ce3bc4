"""Dialogues about drawn videos: features tell the labels, texts do not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lavish.common.config import Config
from lavish.common.errors import ConfigError
from lavish.common.registry import registry
from lavish.datasets.scenes.dialogues import TURNS, DrawnDialogues, VideoStream

TINY = str(Path(__file__).parents[3] / "projects/gpt_dialogue/tiny")
SPLITS = {"train": {"num_samples": 8, "seed": 1}, "val": {"num_samples": 40, "seed": 2}, "test": None}
NAMES = ("i3d_flow", "i3d_rgb", "vggish")


def section(info: dict[str, Any], **processors: Any) -> Any:
    named = {
        kind: {split: {"tokenizer": TINY} for split in ("train", "eval")}
        for kind in ("vis_processor", "text_processor")
    }
    config = Config({"datasets": {"scenes_dialogue": {"build_info": info, **named, **processors}}})
    return registry.get_builder_class("scenes_dialogue")(config.datasets_cfg.scenes_dialogue)


def build(**info: Any) -> dict[str, DrawnDialogues]:
    return section({"annotations": SPLITS, **info}).build_datasets()


def test_samples_are_those_of_avsd() -> None:
    data, again = build(), build()
    assert {split: len(dataset) for split, dataset in data.items()} == {"train": 24, "val": 40}, "a turn; a dialogue"
    sample = data["train"][4]
    assert set(sample) == {
        *("input_ids", "token_type_ids", "labels", "video_fts", "video_token_type_ids"),
        *("image_id", "instance_id"),
    }
    assert sample["video_fts"].shape[1] == 56
    assert torch.equal(sample["video_fts"], again["train"][4]["video_fts"])
    assert data["train"].annotation == again["train"].annotation
    batch = data["val"].collater([data["val"][index] for index in range(6)])
    assert batch["attn_mask"].shape == batch["token_type_ids"].shape
    assert len({int(row[:8].sum()) for row in batch["attn_mask"]}) > 1, "videos of several lengths"
    processor: Any = data["train"].text_processor
    text = processor.tokenizer.decode(sample["labels"][sample["labels"] >= 0])
    assert text.strip() == f"{data['train'].annotation[4]['answer']}<eos>"


def test_the_features_tell_and_the_texts_do_not() -> None:
    """A nearest mean over half of the videos knows the other half's labels; on noise it guesses."""
    found = {}
    for blank in (False, True):
        stream = VideoStream(2, build()["val"].stream.settings, blank)
        means = np.array([stream.features(index, NAMES).mean(axis=0) for index in range(120)])
        labels = np.array([stream.labels(index)[0]["shape"] for index in range(120)])
        centres = {name: means[:80][labels[:80] == name].mean(axis=0) for name in set(labels)}
        guessed = [min(centres, key=lambda name: np.square(centres[name] - row).sum()) for row in means[80:]]
        found[blank] = np.mean(guessed == labels[80:])
    assert found[False] > 0.8
    assert found[True] < 0.4
    for record in build()["val"].annotation:
        asked = {turn["question"] for turn in record["dialog"]} | {record["question"]}
        assert len(asked) == 3, "a question twice would give its answer away"
        said = " ".join([record["caption"], record["summary"], *(turn["answer"] for turn in record["dialog"])]).split()
        assert record["answer"].split()[-1] not in said
    assert {record["question"] for record in build()["val"].annotation} == {question for question, _ in TURNS.values()}
    assert build()["val"].annotation == build(blank=True)["val"].annotation


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"video": {"widths": {"i3d": 4}}}, "widths.i3d: no such feature. Did you mean 'i3d_rgb'"),
        ({"video": {"widths": {"vggish": 0}}}, "widths.vggish is 0"),
        ({"video": {"min_frames": 9}}, "min_frames is 9"),
        ({"video": {"noise": -1}}, "noise is -1"),
        ({"video": {"colours": ["rde"]}}, "'rde' is not drawn. Did you mean 'red'"),
        ({"scene": {}}, "build_info.scene.*unknown key"),
    ],
)
def test_wrong_settings(info: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        section(info).check()


def test_processors_that_ask_for_what_is_not_drawn() -> None:
    wrong = {"eval": {"name": "gpt_video_ft", "visual_ft": ["clip"], "tokenizer": TINY}}
    with pytest.raises(ConfigError, match="'clip', which is not drawn"):
        section({}, vis_processor=wrong).check()
    with pytest.raises(ConfigError, match=r"vis_processor\.eval is BaseProcessor; it is gpt_video_ft"):
        section({}, vis_processor={"eval": None}).check()
