"""Scores of answers about drawn scenes."""

import numpy as np
import pytest

from lavish.datasets.scenes.questions import ask, caption
from lavish.datasets.scenes.score import box_hit, caption_f1, caption_facts, exact_match, first_box, iou, summarise
from lavish.datasets.scenes.world import sample_scene


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The star is red.", "the star  is red", True),
        (" Yes\n", "yes", True),
        ("我看不到", "我看不到。", True),
        ("The star is red!", "The star is red.", False),
        ("red", "The star is red.", False),
        ("", "red", False),
    ],
)
def test_exact_match_overlooks_case_space_and_the_full_stop_only(prediction, answer, expected):
    assert exact_match(prediction, answer) is expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("[[100,100,300,300]]", True),
        ("the red circle[[110,100,310,300]]", True),
        ("[[100,100,300,300;700,700,900,900]]", True),
        ("[[700,700,900,900;100,100,300,300]]", False),
        ("[[100,100,200,200]]", False),
        ("[[300,300,100,100]]", False),
        ("[[100,100,300]]", False),
        ("[[100,100,300,300", False),
        ("[[x0,y0,x1,y1]]", False),
        ("I can't see that.", False),
    ],
)
def test_box_hits(prediction, expected):
    assert box_hit(prediction, "[[100,100,300,300]]") is expected


def test_first_box_and_iou():
    assert first_box("a[[001,002,003,004]]b[[5,6,7,8]]") == (1, 2, 3, 4)
    assert first_box("nothing") is None
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert iou((0, 0, 2, 2), (2, 2, 3, 3)) == 0.0


def test_caption_facts_are_the_same_in_both_languages_and_with_boxes():
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = sample_scene(rng)
        facts = caption_facts(caption(scene, "en"))
        assert facts.total() == len(scene.items) + (scene.number is not None)
        assert facts == caption_facts(caption(scene, "zh"))
        assert (
            facts == caption_facts(caption(scene, "en", boxes=True)) == caption_facts(caption(scene, "zh", boxes=True))
        )


def test_caption_f1_counts_twins_and_needs_whole_triples():
    truth = "A small red circle, a small red circle and the number 407 on a plain background."
    assert caption_f1(truth, truth) == 1.0
    assert caption_f1("A small red circle and the number 407 on a plain background.", truth) == pytest.approx(0.8)
    assert caption_f1("A large red circle on a plain background.", truth) == 0.0
    assert caption_f1("", truth) == 0.0
    assert caption_f1("An empty plain background.", "An empty striped background.") == 1.0


def test_true_answers_score_one_everywhere():
    rng = np.random.default_rng(1)
    results = []
    for _ in range(60):
        scene = sample_scene(rng)
        for question in ask(scene, rng, 12):
            results.append(
                {
                    "task": question.task,
                    "language": question.language,
                    "prediction": question.answer,
                    "answer": question.answer,
                }
            )
    summary = summarise(results)
    assert set(summary["tasks"].values()) == {1.0}
    assert (summary["vqa"], summary["box_hit"], summary["caption_f1"]) == (1.0, 1.0, 1.0)
    assert set(summary["languages"]) == {"en", "zh"}
    assert sum(summary["counts"].values()) == len(results)


def test_summaries_average_per_task_and_language():
    results = [
        {"task": "count", "language": "en", "prediction": "3", "answer": "3"},
        {"task": "count", "language": "zh", "prediction": "2", "answer": "3"},
        {"task": "locate", "language": "en", "prediction": "nowhere", "answer": "[[1,1,9,9]]"},
    ]
    assert summarise(results) == {
        "tasks": {"count": 0.5, "locate": 0.0},
        "languages": {"en": {"count": 1.0, "locate": 0.0}, "zh": {"count": 0.0}},
        "counts": {"count": 2, "locate": 1},
        "vqa": 0.5,
        "box_hit": 0.0,
    }
    assert summarise([]) == {"tasks": {}, "languages": {}, "counts": {}}
