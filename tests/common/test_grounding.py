"""The box reader and writer: the release's golden parses in compat mode, the wanted rules by default, and fuzzing."""

import json
import math
import random
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavish.common import grounding
from lavish.common.errors import PromptError
from lavish.common.grounding import Box, Grounding, parse, render, strip

FIXTURE = Path(__file__).parents[1] / "fixtures/cogvlm/grounding"
GOLDEN = json.loads((FIXTURE / "expected/grounding.json").read_text())
TEXTS = {name: case for name, case in GOLDEN["cases"].items() if "text" in case}


def read(text: str, **options) -> list[tuple[str, list[tuple[int, ...]], list[str]]]:
    return [(entry.phrase, [tuple(box) for box in entry.boxes], entry.issues) for entry in parse(text, **options)]


# --- the release's rules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_compat_mode_gives_the_releases_pairs(name: str) -> None:
    case = TEXTS[name]
    chunks = [tuple(chunk) for chunk in case["noun_chunks"]]
    entries = parse(case["text"], chunker=lambda text: chunks, compat="cogvlm")
    assert [[entry.phrase, [list(box) for box in entry.rel]] for entry in entries] == case["pairs"]


def test_all_golden_parses_are_there() -> None:
    assert len(TEXTS) == 12


@pytest.mark.parametrize("text", ["a [[1,,2,3]]", "a [[1,2,3,\u00b2]]"])
def test_compat_mode_raises_where_the_release_does_and_the_default_does_not(text: str) -> None:
    with pytest.raises(ValueError, match="int"):
        parse(text, compat="cogvlm")
    assert read(text) == [("a", [], ["not_a_number"])]


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="[]1,; a", max_size=40))
def test_compat_mode_finds_what_the_releases_expression_finds(text: str) -> None:
    spans: dict[str, tuple[int, int]] = {}
    for match in re.finditer(r"\[\[([^\]]+)\]\]", text):
        spans[text[: match.start()].strip()] = match.span()
    try:
        entries = parse(text, compat="cogvlm")
    except ValueError:
        return
    assert [entry.span for entry in entries] == list(spans.values())


def test_with_a_chunker_the_default_mode_takes_the_releases_phrase_in_its_own_case() -> None:
    case = TEXTS["phrase_box"]
    entries = parse(case["text"], chunker=lambda text: [tuple(chunk) for chunk in case["noun_chunks"]])
    assert [(entry.phrase, entry.phrase_key) for entry in entries] == [
        ("A red circle", "a red circle"),
        ("a blue square", "a blue square"),
    ]


# --- the default rules: every row of the sheet's table ----------------------------------------------------------------

A, B = (100, 200, 300, 400), (500, 600, 700, 800)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[120,340,560,780]]", [("", [(120, 340, 560, 780)], [])]),
        (
            "Two people [[010,020,300,900;350,040,620,910]] stand ..",
            [("Two people", [(10, 20, 300, 900), (350, 40, 620, 910)], [])],
        ),
        ("the dog[[100,200,300,400]] and the dog[[500,600,700,800]]", [("the dog", [A], []), ("the dog", [B], [])]),
        ("Where is the dog? [[100,200,300,400]]", [("Where is the dog?", [A], [])]),
        (
            "somewhere here [[100,200,300,400]] and there [[500,600,700,800]]",
            [("somewhere here", [A], []), ("there", [B], [])],
        ),
        ("There is nothing to point at.", []),
        ("a cat [[abc,1,2,3]]", [("a cat", [], ["not_a_number"])]),
        ("a cat [[100, 200, 300, 400]]", [("a cat", [A], [])]),
        ("a cat [[-10,20,30,40]]", [("a cat", [], ["out_of_range"])]),
        ("a cat [[1.5,2,3,4]]", [("a cat", [], ["not_a_number"])]),
        ("a cat [[100,200,\n300,400]]", [("a cat", [A], [])]),
        ("a cat [[10,20,30]]", [("a cat", [], ["not_four_numbers"])]),
        ("a cat [[1,2,3,4,5]]", [("a cat", [], ["not_four_numbers"])]),
        ("a cat [[100,200,300,400],[500,600,700,800]]", [("a cat", [A, B], [])]),
        ("a cat [[100,200,300,400] ; [500,600,700,800]]", [("a cat", [A, B], [])]),
        ("a cat [[100,200,300,400] ]", [("a cat", [A], [])]),
        ("a cat [[[100,200,300,400]]]", [("a cat", [A], [])]),
        ("a cat [[1,2,3,4", [("a cat", [], ["unclosed"])]),
        ("a cat [[1,2,3,4] on it", [("a cat", [], ["unclosed"])]),
        ("a cat [[1,2 [[100,200,300,400]]", [("a cat", [], ["unclosed"]), ("", [A], [])]),
        ("a cat [[1,,2,3]]", [("a cat", [], ["not_a_number"])]),
        ("a cat [[１２,2,3,4]]", [("a cat", [], ["not_a_number"])]),
        ("a cat [[900,900,100,100]]", [("a cat", [(100, 100, 900, 900)], ["swapped"])]),
        ("a cat [[5,6,5,9]]", [("a cat", [(5, 6, 5, 9)], ["empty"])]),
        ("a cat [[0,0,1000,1000]]", [("a cat", [(0, 0, 1000, 1000)], [])]),
        ("a cat [[0,0,1001,1000]]", [("a cat", [], ["out_of_range"])]),
        ("a cat [[0,0,1" + "0" * 5000 + ",1000]]", [("a cat", [], ["out_of_range"])]),
        ("a cat [[1,2,3;100,200,300,400;x,1,1,1]]", [("a cat", [A], ["not_four_numbers", "not_a_number"])]),
        ("a cat [[]] [[;]]", [("a cat", [], ["not_four_numbers"]), ("", [], ["not_four_numbers"])]),
    ],
)
def test_a_reply_is_read(text: str, expected: list) -> None:
    assert read(text) == expected


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("A red circle[[1,2,3,4]] next to a blue square[[1,2,3,4]].", ["A red circle", "a blue square"]),
        ("I see two things. A cat ([[1,2,3,4]]), and a dog ([[1,2,3,4]])", ["A cat", "a dog"]),
        ("1. a cat: [[1,2,3,4]]\n2. a dog: [[1,2,3,4]]", ["a cat", "a dog"]),
        ("- a cat [[1,2,3,4]]\n- a dog [[1,2,3,4]]", ["a cat", "a dog"]),
        ("Hello there. And where is the dog? [[1,2,3,4]]", ["And where is the dog?"]),
        (
            "图中有两个物体。红色的圆形[[1,2,3,4]]和蓝色的正方形[[1,2,3,4]]，以及绿色的三角形 [[1,2,3,4]]。",
            ["红色的圆形", "蓝色的正方形", "绿色的三角形"],
        ),
        ("和平鸽在哪里？[[1,2,3,4]]", ["和平鸽在哪里？"]),
        ("和平鸽（[[1,2,3,4]]）、老鹰（[[1,2,3,4]]）", ["和平鸽", "老鹰"]),
        ("THE BIG TREE[[1,2,3,4]]", ["THE BIG TREE"]),
        ("an orange[[1,2,3,4]] and Andy[[1,2,3,4]]", ["an orange", "Andy"]),
    ],
)
def test_a_phrase_is_the_clause_before_its_box(text: str, phrases: list[str]) -> None:
    assert [entry.phrase for entry in parse(text)] == phrases


def test_span_covers_the_brackets() -> None:
    text = "a cat [[1,2,3,4],[5,6,7,8]] and [[9"
    assert [text[slice(*entry.span)] for entry in parse(text)] == ["[[1,2,3,4],[5,6,7,8]]", "[[9"]


@pytest.mark.parametrize("image_size", [(1, 1), (1, 1000), (4000, 3000)])
def test_pixels_lie_inside_the_image(image_size: tuple[int, int]) -> None:
    width, height = image_size
    entry = parse("all [[000,000,1000,1000;0,0,999,999]]", image_size)[0]
    assert entry.boxes_px[0] == (0, 0, width - 1, height - 1)
    assert entry.boxes_px[1] == (0, 0, int(0.999 * width), int(0.999 * height))
    assert entry.rel == [(0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.999, 0.999)]


def test_pixels_are_truncated_as_in_the_release_or_rounded() -> None:
    box = Box(290, 290, 296, 296)
    assert box.pixels((100, 100)) == (28, 28, 29, 29)  # int(0.29 * 100) is 28 in floating point
    assert box.pixels((100, 100), rounding="round") == (29, 29, 30, 30)
    assert parse("[[296,0,999,999]]", (100, 10), rounding="round")[0].boxes_px == [(30, 0, 99, 9)]


def test_a_box_of_pixels_is_clamped_and_sorted() -> None:
    assert Box.from_pixels((480, 640, -5, 20), (480, 640)) == Box(0, 31, 999, 999)
    assert str(Box(0, 31, 999, 1000)) == "000,031,999,999"


# --- streaming --------------------------------------------------------------------------------------------------------


def test_a_reply_that_streams_never_shows_a_half_box() -> None:
    text = "A cat [[100,200,300,400],[500,600,700,800]] and a dog [[1,2,3,4]]!"
    shown = [strip(text[:end], final=False) for end in range(len(text) + 1)]
    assert shown[-1] == "A cat and a dog!"
    assert not any("[" in piece or "0" in piece for piece in shown)
    issues = [entry.issues for end in range(len(text)) for entry in parse(text[:end], final=False)]
    assert not any(issues)


# --- display, writing, prompts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red circle[[1,2,3,4]] next to a blue square [[1,2,3,4]].", "A red circle next to a blue square."),
        ("[[1,2,3,4]]", ""),
        ("a cat [[abc,1,2,3]] on a mat", "a cat on a mat"),
        ("a cat ([[1,2,3,4]]) sits", "a cat sits"),
        ("a cat [[1,2,3,4]]sits", "a cat sits"),
        ("红色的圆形[[1,2,3,4]]在左边。", "红色的圆形在左边。"),
        ("nothing [1] here", "nothing [1] here"),
        ("cut [[1,2", "cut"),
    ],
)
def test_strip_leaves_the_text_for_display(text: str, expected: str) -> None:
    assert strip(text) == expected


def test_render_writes_three_digits() -> None:
    text = render([("a cat", [(86, 5, 400, 1000), (1, 2, 3, 4)]), ("nothing", []), ("a dog", [Box(0, 0, 9, 9)])])
    assert text == "a cat[[086,005,400,999;001,002,003,004]], a dog[[000,000,009,009]]"


def test_merge_by_phrase_joins_equal_phrases_only() -> None:
    merged = grounding.merge_by_phrase(
        parse("The dog[[1,2,3,4]], a cat[[5,6,7,8]] and the dog[[9,9,12,12]] [[1,1,2,2]]", (10, 10))
    )
    assert [(entry.phrase, len(entry.boxes), len(entry.boxes_px)) for entry in merged] == [
        ("The dog", 2, 2),
        ("a cat", 1, 1),
        ("", 1, 1),
    ]


def test_prompts_hold_the_phrase_or_the_boxes() -> None:
    assert grounding.prompt("locate", expr=" the dog ") == "Where is the dog? answer in [[x0,y0,x1,y1]] format."
    assert grounding.prompt("locate", expr="the dog", variant=1) == "Where is the dog?"
    boxes = [(86, 540, 400, 760), (1, 2, 3, 4)]
    assert "[[086,540,400,760;001,002,003,004]]" in grounding.prompt("describe", boxes=boxes)
    assert "[[500,500,999,999]]" in grounding.prompt("describe", boxes=[(50, 20, 100, 40)], image_size=(100, 40))
    assert "[[x0,y0,x1,y1]]" in grounding.prompt("caption")
    for kind, forms in grounding.PROMPTS.items():
        for variant in range(len(forms)):
            assert "<" not in grounding.prompt(kind, expr="x", boxes=[A], variant=variant)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "locat"}, "Did you mean 'locate'"),
        ({"kind": "locate"}, "needs the phrase"),
        ({"kind": "describe"}, "needs boxes"),
    ],
)
def test_a_prompt_that_lacks_something_says_so(arguments: dict, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        grounding.prompt(**arguments)


# --- scoring ----------------------------------------------------------------------------------------------------------


def test_iou() -> None:
    assert grounding.iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert grounding.iou((0, 0, 10, 10), (20, 20, 30, 30)) == 0
    assert grounding.iou((5, 5, 5, 5), (5, 5, 5, 5)) == 0


def test_unparsable_replies_count_as_wrong() -> None:
    replies = ["here [[100,100,500,500]]", "[[x]] or [[100,100,340,500]]", "I see none", "[[600,600,900,900]]"]
    result = grounding.score(replies, [(0.1, 0.1, 0.5, 0.5)] * 4)
    assert (result.num_correct, result.num_replies, result.num_unparsable) == (2, 4, 1)
    assert result.accuracy == 0.5
    assert result.mean_iou == pytest.approx((1 + 0.6) / 4)
    assert math.isnan(grounding.score([], []).accuracy)
    with pytest.raises(ValueError, match="shorter"):
        grounding.score(replies, [])


# --- fuzzing ----------------------------------------------------------------------------------------------------------


def check_invariants(text: str) -> None:
    entries = parse(text, (64, 48))
    end = 0
    for entry in entries:
        assert end <= entry.span[0] < entry.span[1] <= len(text)
        end = entry.span[1]
        assert "[[" not in entry.phrase
        assert entry.boxes or entry.issues
        assert all(0 <= box.x0 <= box.x1 <= 1000 and 0 <= box.y0 <= box.y1 <= 1000 for box in entry.boxes)
        assert all(0 <= x < 64 for box in entry.boxes_px for x in box[::2])
    strip(text)
    strip(text, final=False)
    parse(text, final=False)
    with_boxes = [entry for entry in entries if entry.boxes]
    written = render(with_boxes)
    again = parse(written)
    assert [entry.phrase for entry in again] == [entry.phrase for entry in with_boxes]
    assert [str(box) for entry in again for box in entry.boxes] == [
        str(box) for entry in with_boxes for box in entry.boxes
    ]
    assert render(again) == written


def test_ten_thousand_random_and_mutated_replies_do_no_harm() -> None:
    rng = random.Random(7)
    seeds = [case["text"] for case in TEXTS.values()] + ["红色[[1,2,3,4]]和？蓝色（[[5,6,7,8],[1,2,3,4]]）。 ok"]
    for index in range(10_000):
        if index % 2:
            text = rng.randbytes(rng.randrange(60)).decode("utf-8", errors="replace")
        else:
            letters = list(rng.choice(seeds))
            for _ in range(rng.randrange(1, 8)):
                place = rng.randrange(len(letters) + 1)
                letters[place : place + rng.randrange(3)] = rng.choice(
                    ["[", "]", "[[", "]]", ",", ";", "?", ". ", " and ", "9", "-", "\n", "和", "("]
                )
            text = "".join(letters)
        check_invariants(text)


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="[]1,; a.?\n和（-", max_size=40))
def test_no_combination_of_brackets_does_harm(text: str) -> None:
    check_invariants(text)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 1_000_000,
        "]" * 1_000_000,
        "[[1]" + " " * 1_000_000 + "x",
        "[[" + " " * 1_000_000,
        "[[" + "1" * 1_000_000 + "]]",
        "[[1]" + ",[1]" * 250_000 + "]",
        "," * 1_000_000 + "[[1,2,3,4]]",
        "and " * 250_000 + "[[1,2,3,4]]",
        ". " * 500_000 + "[[1,2,3,4]]",
        "[[1,2,3,4]" * 20_000,
        "([[1,2,3,4]])" * 20_000,
        "[[ " * 60_000,
    ],
    ids=lambda text: text[:8],
)
def test_long_replies_take_linear_time(text: str) -> None:
    start = time.process_time()
    parse(text)
    strip(text)
    strip(text, final=False)
    assert time.process_time() - start < 5  # quadratic ones would take hours


def test_compat_mode_reads_a_megabyte_of_brackets_in_linear_time() -> None:
    assert parse("[" * 1_000_000 + "]" * 10, compat="cogvlm")[0].boxes == []


def test_an_entry_can_be_made_by_hand() -> None:
    assert Grounding("a cat", [Box(1, 2, 3, 4)], (0, 0)).issues == []
