"""`multiple_choice`: what is read out of replies, ranked choices, scores by category, and a whole evaluation."""

import json
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from lavish.common.config import Config
from lavish.common.errors import DataError
from lavish.inference.load import POCKET
from lavish.runners import evaluation
from lavish.tasks.metrics.text_match import read_choice
from lavish.tasks.multiple_choice import MultipleChoiceTask

CHOICES = [["cat", "dog"], ["red", "green", "blue", "black"], ["yes", "no"]]


class Talker(torch.nn.Module):
    """Says what it is told to."""

    def __init__(self, *replies: str) -> None:
        super().__init__()
        self.replies = replies

    def choose(self, samples: Any, choices: Any) -> list[tuple[int | None, str]]:
        return [(read_choice(reply, row), reply) for reply, row in zip(self.replies, choices, strict=True)]


class Ranker(torch.nn.Module):
    def predict_answers(self, samples: Any, answer_list: list[str], **options: Any) -> list[str]:
        assert options == {"num_ans_candidates": len(answer_list), "inference_method": "rank"}
        assert len(samples["image"]) == len(samples["text_input"]) == 1
        return [answer_list[-1]]


def samples(**changes: Any) -> dict[str, Any]:
    return {
        "image": [None] * 3,
        "text_input": ["Which?"] * 3,
        "question_id": ["a", "b", "c"],
        "choices": CHOICES,
        "correct_choice_idx": [1, 0, 0],
        "category": ["pets", "colours", "pets"],
        **changes,
    }


def test_a_model_that_chats() -> None:
    task = MultipleChoiceTask({})
    results = task.valid_step(Talker("It is a dog.", "(A) red", "maybe"), samples())
    assert results[0] == {
        "question_id": "a",
        "answer": "It is a dog.",
        "choice": "B",
        "right_choice": "B",
        "choices": ["cat", "dog"],
        "category": "pets",
    }
    scores = task.score(results, None, "val")
    assert scores is not None
    assert scores.metrics() == pytest.approx(
        {
            "accuracy": 200 / 3,
            "readable": 200 / 3,
            "pets": 50,
            "colours": 100,
            "chance": 100 * (1 / 2 + 1 / 4 + 1 / 2) / 3,
            "agg_metrics": 200 / 3,
        }
    )
    assert scores.references == ["B. dog", "A. red", "A. yes"]
    assert task.leaderboard(results)[1:] == [
        {"question_id": "b", "prediction": "A"},
        {"question_id": "c", "prediction": ""},
    ]


def test_a_model_that_ranks() -> None:
    results = MultipleChoiceTask({}).valid_step(Ranker(), samples(category=None))
    assert [one["choice"] for one in results] == ["B", "D", "B"]
    assert [one["answer"] for one in results] == ["dog", "black", "no"]
    assert "category" not in results[0]


def test_splits_that_hide_what_is_right() -> None:
    task = MultipleChoiceTask({})
    model = Talker("A", "A", "A")
    assert task.score(task.valid_step(model, samples(correct_choice_idx=[None] * 3)), None, "test") is None
    with pytest.raises(DataError, match="1 of 3 questions have no right choice, first 'b'"):
        task.score(task.valid_step(model, samples(correct_choice_idx=[0, None, 0])), None, "val")
    for absent in (None, [None, ["a", "b"], ["a", "b"]]):
        with pytest.raises(DataError, match=r"have no choices; .*`vqa`"):
            task.valid_step(model, samples(choices=absent))


def test_a_recipe_with_rows_of_ones_own(tmp_path: Path) -> None:
    """The bundled model, which knows no letters, is asked the question alone; its words name a choice."""
    rows = []
    for colour in ("red", "blue"):
        picture = Image.new("RGB", (96, 96), (235, 235, 235))
        ImageDraw.Draw(picture).ellipse((20, 20, 76, 76), fill=colour)
        picture.save(tmp_path / f"{colour}.png")
        right = ["red", "blue", "green"].index(colour)
        rows.append({"image": f"{colour}.png", "question": "What color is the circle?", "answer": right})
    (tmp_path / "rows.json").write_text(json.dumps([{**row, "choices": ["red", "blue", "green"]} for row in rows]))
    recipe = {
        "model": {"path": str(POCKET), "ask": {"choice": {"text": "{question}", "max_new_tokens": 4}}},
        "datasets": {"questions": {"build_info": {"annotations": {"val": {"storage": str(tmp_path / "rows.json")}}}}},
        "run": {
            "task": "multiple_choice",
            "test_splits": ["val"],
            "device": "cpu",
            "output_dir": str(tmp_path / "out"),
        },
    }
    (split,) = evaluation.evaluate(Config(recipe)).splits
    assert split.metrics is not None
    assert split.metrics["accuracy"] == 100
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "All 2 samples have the same accuracy, so the bootstrap's interval has no width; up to 100 %" in unescape(
        page
    )
    assert page.count("data:image/jpeg;base64,") == 2
    assert "What color is the circle?" in page
    assert "B. blue" in page


def test_losses_of_a_model_that_chats(tmp_path: Path) -> None:
    """Perplexity of conversations of one's own; a batch gives what single ones give, and the page shows them."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    said = ["red", "The color is red, I think."]
    rows = [
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nWhat color is it?"}, {"from": "gpt", "value": text}],
        }
        for text in said
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    storage = {"storage": str(tmp_path / "rows.json")}
    found = {}
    for size in (1, 2):
        recipe = {
            "model": {"path": str(POCKET)},
            "datasets": {"conversations": {"build_info": {"annotations": {"val": storage}}}},
            "run": {
                "task": "image_text_pretrain",
                "test_splits": ["val"],
                "batch_size_eval": size,
                "device": "cpu",
                "output_dir": str(tmp_path / str(size)),
            },
        }
        (split,) = evaluation.evaluate(Config(recipe)).splits
        found[size] = split
    assert found[1].metrics == pytest.approx(found[2].metrics)
    tokens = [row["result"]["num_tokens"] for row in found[1].rows]
    losses = [row["result"]["loss"] for row in found[1].rows]
    assert 1 < tokens[0] < tokens[1]
    assert found[1].metrics is not None
    mean = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    assert found[1].metrics["perplexity"] == pytest.approx(2.718281828459045**mean)
    assert found[1].rows[0]["question"] == "What color is it?"
    assert (tmp_path / "1" / "report.html").read_text().count("data:image/jpeg;base64,") == 2
