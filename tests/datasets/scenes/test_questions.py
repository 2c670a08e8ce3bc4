"""The questions: one right answer each, checked by an oracle that reads the question and looks at the scene anew."""

import re
from collections import Counter

import numpy as np
import pytest
from tolerance import BOX_JITTER

from lavish.common.errors import DataError
from lavish.datasets.scenes import phrases, questions
from lavish.datasets.scenes.phrases import CANNOT_SEE, FORMS
from lavish.datasets.scenes.questions import TASK_WEIGHTS, Question, ask, caption
from lavish.datasets.scenes.world import COLOURS, SHAPES, SIZES, Item, Scene, sample_scene

CHINESE = {
    "圆形": "circle",
    "方形": "square",
    "三角形": "triangle",
    "星形": "star",
    "十字形": "cross",
    "心形": "heart",
    "红色": "red",
    "橙色": "orange",
    "黄色": "yellow",
    "绿色": "green",
    "蓝色": "blue",
    "紫色": "purple",
    "黑色": "black",
    "左边": "left",
    "右边": "right",
    "上面": "above",
    "下面": "below",
}
ENGLISH_PHRASE = (
    rf"(?:(?:{'|'.join(SIZES)}) )?(?:(?:{'|'.join(COLOURS)}) )?(?:(?:{'|'.join(SHAPES)}|object|shape|number)(?:e?s)?)"
)
CHINESE_PHRASE = "(?:中等的|大的|小的)?(?:[红橙黄绿蓝紫黑]色)?(?:圆形|方形|三角形|星形|十字形|心形|物体|图形|数字)"
GROUPS = {
    "relation": "left of|right of|above|below|左边|右边|上面|下面",
    "region": r"\[\[[0-9,;]+\]\]",
    "n": "[0-9]+",
    "one": "an?",
}


def drawn(num_scenes: int, seed: int = 0, **options):
    rng = np.random.default_rng(seed)
    for _ in range(num_scenes):
        scene = sample_scene(rng)
        for question in ask(scene, rng, 12, **options):
            yield scene, question


def attributes(text: str) -> dict[str, str]:
    """Read a phrase: which shape, colour and size it names."""
    for chinese, english in CHINESE.items():
        text = text.replace(chinese, f" {english} ")
    text = text.replace("中等的", "medium ").replace("大的", "large ").replace("小的", "small ")
    found = {}
    for word in re.findall("[a-z]+", text.lower()):
        for name, known in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
            singular = word[:-2] if word.endswith("sses") else word.removesuffix("s") if word != "cross" else word
            if singular in known:
                found[name] = singular
    return found


def fitting(scene: Scene, text: str) -> list[Item]:
    wanted = attributes(text)
    return [item for item in scene.items if all(getattr(item, name) == value for name, value in wanted.items())]


def only(scene: Scene, text: str) -> Item:
    found = fitting(scene, text)
    assert len(found) == 1, text
    return found[0]


def reading(form: str, text: str) -> dict[str, str] | None:
    """Match a text with a form; give its fields."""
    seen, parts = set(), []
    for part in re.split(r"(\{\w+\})", form):
        if not part.startswith("{"):
            parts.append(re.escape(part))
        elif part in seen:
            parts.append(f"(?P={part[1:-1]})")
        else:
            seen.add(part)
            parts.append(f"(?P<{part[1:-1]}>{GROUPS.get(part[1:-1], f'{ENGLISH_PHRASE}|{CHINESE_PHRASE}')})")
    found = re.fullmatch("".join(parts), text, re.IGNORECASE)
    return found.groupdict() if found else None


def readings(question: Question, tasks) -> list[tuple[str, str, dict[str, str]]]:
    """Give each (task, form, fields) that the question's text can be read as."""
    plain = question.question.rstrip("?.？。")
    return [
        (task, name, fields)
        for task in tasks
        for name, form in FORMS[task].items()
        for text in form[question.language][0]
        if (fields := reading(text.rstrip("?.？。"), plain)) is not None
    ]


def centre(item: Item) -> tuple[float, float]:
    x0, y0, x1, y1 = item.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def side(first: Item, second: Item) -> str:
    (x0, y0), (x1, y1) = centre(first), centre(second)
    if abs(x0 - x1) > abs(y0 - y1):
        return "left" if x0 < x1 else "right"
    return "above" if y0 < y1 else "below"


def english(text: str) -> str:
    return CHINESE.get(text, text).removesuffix(" of")


def written(items: list[Item]) -> str:
    def box(item: Item) -> str:
        return ",".join(f"{min(999, round(1000 * edge)):03d}" for edge in item.box)

    return "[[" + ";".join(box(item) for item in sorted(items, key=centre)) + "]]"


def check(scene: Scene, question: Question) -> None:
    """Assert that the answer is true of the scene."""
    read = readings(question, [question.task])
    assert read, f"{question} cannot be read"
    for task, form, fields in read:  # the forms of yes and no share their questions
        expected, unwanted = truth(scene, task, form, fields)
        assert expected in question.answer.lower(), question
        assert not any(word in question.answer.lower() for word in unwanted), question


def truth(scene: Scene, task: str, form: str, fields: dict[str, str]) -> tuple[str, list[str]]:
    """Give what the answer must contain, and what it must not."""
    chinese = {english: chinese for chinese, english in CHINESE.items()}
    is_chinese = any(letter >= "\u4e00" for text in fields.values() for letter in text)

    def say(word: str) -> str:
        sizes = {"small": "小", "medium": "中等", "large": "大"}
        return (chinese | sizes)[word] if is_chinese else word

    if task == "count":
        return str(len(fitting(scene, fields.get("many") or fields["a"]))), []
    if task in ("colour", "shape", "size"):
        return say(getattr(only(scene, fields["a"]), task)), []
    if task == "relation":
        towards = side(only(scene, fields["a"]), only(scene, fields["b"]))
        if form == "where":
            return say(towards), []
        return yes_or_no(towards == english(fields["relation"].lower()), "是", "不是", is_chinese)
    if task == "exists":
        return yes_or_no(bool(fitting(scene, fields["a"])), "有", "没有", is_chinese)
    if task == "comparison" and form in ("larger", "smaller"):
        items = {name: only(scene, fields[name]) for name in ("a", "b")}
        order = sorted(items, key=lambda name: items[name].box[2] - items[name].box[0], reverse=form == "larger")
        return fields[order[0]].lower(), []
    if task == "comparison":
        more, fewer = (fields["a"], fields["b"]) if is_chinese else (fields["many"], fields["fewer"])
        return yes_or_no(len(fitting(scene, more)) > len(fitting(scene, fewer)), "是", "不是", is_chinese)
    if task == "locate":
        text = fields.get("many") or fields["a"]
        if text in ("number", "数字"):
            number = scene.number
            assert number is not None
            return written([Item("", "", "", number.box, (0, 0, 0))]), []
        return written(fitting(scene, text)), []
    raise AssertionError(task)


def yes_or_no(is_true: bool, yes: str, no: str, is_chinese: bool) -> tuple[str, list[str]]:
    if is_chinese:
        return (yes, [no]) if is_true else (no, [])
    return ("yes", ["no"]) if is_true else ("no", ["yes"])


def test_one_seed_gives_the_same_questions():
    assert list(drawn(20, seed=7)) == list(drawn(20, seed=7))


def test_answers_are_true_of_the_scene():
    checked = Counter()
    for scene, question in drawn(500):
        if question.task in ("caption", "grounded_caption", "number", "absent", "describe"):
            continue
        check(scene, question)
        checked[question.task] += 1
    assert min(checked.values()) > 200, checked


def test_what_is_absent_is_not_in_the_scene():
    checked = Counter()
    tasks = ("colour", "shape", "size", "relation", "locate", "number")
    for scene, question in drawn(500, task_weights={"absent": 1.0, "count": 1.0}):
        if question.task != "absent":
            continue
        assert question.answer == CANNOT_SEE[question.language]
        options = readings(question, tasks)
        assert options, question
        for task, _, fields in options:
            if task == "number":
                assert scene.number is None
            else:
                things = [fields[name] for name in ("a", "b") if name in fields]
                assert any(not fitting(scene, thing) for thing in things), question
            checked[task] += 1
    assert set(checked) == set(tasks)


def test_numbers_are_read_right_and_their_presence_is_balanced():
    said = Counter()
    for scene, question in drawn(1500, seed=3, task_weights={"number": 1.0, "count": 1.0}):
        if question.task != "number":
            continue
        digits = "".join(re.findall("[0-9]+", question.answer))
        if digits:
            assert scene.number is not None
            assert digits == scene.number.text
        else:
            is_no = question.answer.lower().startswith(("no", "没有"))
            assert is_no == (scene.number is None)
            said[is_no] += 1
    assert said[True] > 100
    assert said[False] > 100


@pytest.mark.parametrize("language", ["en", "zh"])
def test_captions_say_all_and_nothing_else(language):
    rng = np.random.default_rng(2)
    for _ in range(300):
        scene = sample_scene(rng)
        text = caption(scene, language)
        marks = r"a (\w+ \w+ \w+)" if language == "en" else r"一个([^、和。]+)"
        stated = [attributes(found) for found in re.findall(marks, text, re.IGNORECASE) if "background" not in found]
        wanted = [
            {"shape": item.shape, "colour": item.colour, "size": item.size} for item in sorted(scene.items, key=centre)
        ]
        assert stated == wanted
        assert re.findall("[0-9]+", text) == ([scene.number.text] if scene.number else [])
        assert phrases.WORDS[language][scene.background.pattern] in text
        assert re.sub(r"\[\[.*?\]\]", "", caption(scene, language, boxes=True)) == text


def test_the_example_captions_read_well():
    background = sample_scene(np.random.default_rng(0)).background
    scene = sample_scene(np.random.default_rng(0), max_items=0, number_probability=0)
    assert caption(scene, "en") == f"An empty {background.pattern} background."
    items = (
        Item("square", "blue", "large", (0.5, 0.1, 0.9, 0.5), (0, 0, 0)),
        Item("circle", "red", "small", (0.1, 0.1, 0.3, 0.3), (0, 0, 0)),
    )
    text = caption(Scene(items, None, background), "en", boxes=True)
    assert text == (
        "A small red circle[[100,100,300,300]] and a large blue square[[500,100,900,500]] "
        f"on a {background.pattern} background."
    )


def test_described_regions_belong_to_what_is_named():
    checked = Counter()
    for scene, question in drawn(300, seed=4, task_weights={"describe": 1.0, "count": 1.0}):
        if question.task != "describe":
            continue
        corners = re.search(r"\[\[([0-9,]+)\]\]", question.question)
        assert corners
        asked = [int(edge) / 1000 for edge in corners.group(1).split(",")]
        np.testing.assert_allclose(asked, question.boxes[0], **BOX_JITTER)
        if scene.number and question.boxes[0] == scene.number.box:
            assert re.findall("[0-9]+", question.answer) == [scene.number.text]
            checked["number"] += 1
        else:
            item = next(item for item in scene.items if item.box == question.boxes[0])
            assert attributes(question.answer) == {"shape": item.shape, "colour": item.colour, "size": item.size}
            checked["item"] += 1
    assert min(checked["number"], checked["item"]) > 100


@pytest.mark.parametrize("task", ["exists", "relation", "comparison"])
def test_yes_and_no_are_balanced(task):
    said = Counter()
    for _, question in drawn(1500, seed=9, task_weights={task: 1.0, "count": 1.0}):
        if question.task == task:
            answer = question.answer.lower().rstrip("。.")
            no = re.match("no|不是|没有", answer)
            yes = re.match("yes|是|有", answer)
            said.update(["no"] if no else ["yes"] if yes else [])
    assert said.total() > 500
    assert 0.42 < said["yes"] / said.total() < 0.58, said


def test_every_task_language_and_template_is_asked():
    asked = [question for _, question in drawn(400, seed=5)]
    assert {question.task for question in asked} == set(TASK_WEIGHTS)
    chinese = sum(question.language == "zh" for question in asked) / len(asked)
    assert 0.32 < chinese < 0.38
    combinations = {(question.template, question.task) for question in asked}
    assert {task for template, task in combinations if template == "base"} == {
        "grounded_caption",
        "locate",
        "describe",
        "absent",
    }
    both = set(TASK_WEIGHTS) - {"caption", "grounded_caption"}
    assert {(template, task) for template in ("chat", "vqa") for task in both} <= combinations


def test_short_answers_are_short_and_chat_answers_are_sentences():
    for _, question in drawn(300, seed=6):
        if question.task in ("absent", "locate", "describe", "grounded_caption", "caption"):
            continue
        if question.template == "vqa":
            assert len(question.answer.split()) <= 3
            assert not question.answer.endswith((".", "。"))
        else:
            assert question.answer.endswith((".", "。"))
            assert question.answer[0] == question.answer[0].upper()


def test_questions_about_one_scene_differ():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng)
        if len(scene.items) > 1:
            asked = [
                (question.template, question.question.rstrip("?.？。").lower()) for question in ask(scene, rng, 12)
            ]
            assert len(set(asked)) >= 11


def test_same_question_never_has_two_answers():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng)
        answers = {}
        for question in ask(scene, rng, 80):
            key = (question.template, question.question)
            assert answers.setdefault(key, question.answer) == question.answer


def test_wrong_requests_are_refused_by_name():
    rng = np.random.default_rng(0)
    scene = sample_scene(rng, max_items=0, number_probability=0)
    with pytest.raises(DataError, match=r"no task 'color'\. Did you mean 'colour'\?"):
        ask(scene, rng, 1, task_weights={"color": 1.0})
    with pytest.raises(DataError, match="a scene with 0 items gives no question of the tasks colour"):
        ask(scene, rng, 1, task_weights={"colour": 1.0})


def test_directions_need_a_clear_margin():
    def item(x: float, y: float) -> Item:
        return Item("circle", "red", "small", (x - 0.1, y - 0.1, x + 0.1, y + 0.1), (0, 0, 0))

    middle = item(0.5, 0.5)
    assert questions.direction(item(0.2, 0.55), middle) == "left"
    assert questions.direction(item(0.8, 0.5), middle) == "right"
    assert questions.direction(item(0.5, 0.2), middle) == "above"
    assert questions.direction(item(0.55, 0.8), middle) == "below"
    assert questions.direction(item(0.45, 0.5), middle) is None
    assert questions.direction(item(0.2, 0.25), middle) is None
