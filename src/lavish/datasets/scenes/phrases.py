"""The words of the drawn world, English and Chinese: names, phrases, question forms and answer forms, as data.

A form is a format string. `{a}` and `{b}` are phrases of items ("red circle", no article), `{many}` a plural, `{n}` a
numeral, `{region}` written boxes, `{shape}`, `{colour}`, `{size}`, `{relation}` single words.
"""

from __future__ import annotations

from collections.abc import Sequence

from lavish.datasets.scenes.world import COLOURS, PATTERNS, SHAPES, SIZES, Box

LANGUAGES = ("en", "zh")
CANNOT_SEE = {"en": "I can't see that.", "zh": "我看不到。"}
NO_PICTURE = {"en": "I need a picture to answer that.", "zh": "我需要一张图片。"}

WORDS = {
    "en": {word: word for word in (*SHAPES, *COLOURS, *SIZES, *PATTERNS)},
    "zh": {
        **dict(zip(SHAPES, ("圆形", "方形", "三角形", "星形", "十字形", "心形"), strict=True)),
        **dict(zip(COLOURS, ("红色", "橙色", "黄色", "绿色", "蓝色", "紫色", "黑色"), strict=True)),
        **dict(zip(SIZES, ("小", "中等", "大"), strict=True)),
        **dict(zip(PATTERNS, ("纯色", "条纹", "格子", "噪点"), strict=True)),
    },
}
THING = {"en": "object", "zh": "物体"}
ANY_SHAPE = {"en": "shape", "zh": "图形"}
NUMBER = {"en": "number", "zh": "数字"}
DIRECTIONS = ("left", "right", "above", "below")
RELATION = {
    "en": {"left": "left of", "right": "right of", "above": "above", "below": "below"},
    "zh": {"left": "左边", "right": "右边", "above": "上面", "below": "下面"},
}
RELATION_WORD = {"en": {name: name for name in DIRECTIONS}, "zh": RELATION["zh"]}

CAPTION_QUESTIONS = {
    "en": ("Describe this image.", "What is in the image?", "What do you see?"),
    "zh": ("描述这张图片。", "图中有什么？", "你看到了什么？"),
}
GROUNDED_CAPTION_QUESTIONS = {
    "en": (
        "Can you provide a description of the image and include the coordinates [[x0,y0,x1,y1]] for each mentioned "
        "object?",
        "Describe this image with boxes.",
    ),
    "zh": ("描述这张图片，并给出每个物体的坐标[[x0,y0,x1,y1]]。", "描述这张图片，并给出坐标。"),
}

# task -> form -> language -> (questions, chat answer, short answer)
Forms = dict[str, dict[str, tuple[tuple[str, ...], str, str]]]
FORMS: dict[str, Forms] = {
    "count": {
        "count": {
            "en": (
                ("How many {many} are there?", "How many {many} do you see?", "How many {many} are in the image?"),
                "There {are} {n} {noun}.",
                "{n}",
            ),
            "zh": (("有几个{a}？", "图中有几个{a}？", "你看到几个{a}？"), "有{n}个{a}。", "{n}"),
        },
    },
    "colour": {
        "colour": {
            "en": (
                ("What color is the {a}?", "What colour is the {a}?", "What is the color of the {a}?"),
                "The {a} is {colour}.",
                "{colour}",
            ),
            "zh": (("{a}是什么颜色？", "{a}是什么颜色的？", "图中的{a}是什么颜色？"), "{a}是{colour}的。", "{colour}"),
        },
    },
    "shape": {
        "shape": {
            "en": (
                ("What shape is the {a}?", "What is the shape of the {a}?", "Which shape is the {a}?"),
                "The {a} is a {shape}.",
                "{shape}",
            ),
            "zh": (("{a}是什么形状？", "{a}是什么形状的？", "图中的{a}是什么形状？"), "{a}是{shape}。", "{shape}"),
        },
    },
    "size": {
        "size": {
            "en": (
                ("What size is the {a}?", "How large is the {a}?", "What is the size of the {a}?"),
                "The {a} is {size}.",
                "{size}",
            ),
            "zh": (("{a}有多大？", "{a}是什么大小？", "图中的{a}有多大？"), "{a}是{size}的。", "{size}"),
        },
    },
    "relation": {
        "where": {
            "en": (
                ("Where is the {a} relative to the {b}?", "On which side of the {b} is the {a}?"),
                "The {a} is {relation} the {b}.",
                "{word}",
            ),
            "zh": (("{a}在{b}的哪边？", "{a}在{b}的什么位置？"), "{a}在{b}的{relation}。", "{relation}"),
        },
        "yes": {
            "en": (
                ("Is the {a} {relation} the {b}?",),
                "Yes, the {a} is {relation} the {b}.",
                "yes",
            ),
            "zh": (("{a}在{b}的{relation}吗？",), "是的，{a}在{b}的{relation}。", "是"),
        },
        "no": {
            "en": (
                ("Is the {a} {relation} the {b}?",),
                "No, the {a} is not {relation} the {b}.",
                "no",
            ),
            "zh": (("{a}在{b}的{relation}吗？",), "不是，{a}不在{b}的{relation}。", "不是"),
        },
    },
    "exists": {
        "yes": {
            "en": (
                ("Is there {one} {a}?", "Do you see {one} {a}?", "Is there {one} {a} in the image?"),
                "Yes, there is {one} {a}.",
                "yes",
            ),
            "zh": (("有{a}吗？", "图中有{a}吗？", "有没有{a}？"), "有，图中有{a}。", "有"),
        },
        "no": {
            "en": (
                ("Is there {one} {a}?", "Do you see {one} {a}?", "Is there {one} {a} in the image?"),
                "No, there is no {a}.",
                "no",
            ),
            "zh": (("有{a}吗？", "图中有{a}吗？", "有没有{a}？"), "没有，图中没有{a}。", "没有"),
        },
    },
    "number": {
        "read": {
            "en": (
                (
                    "What number is shown?",
                    "What number is in the image?",
                    "What is the number?",
                    "Which number do you see?",
                    "Read the number.",
                ),
                "The number is {n}.",
                "{n}",
            ),
            "zh": (("图中的数字是多少？", "数字是多少？", "你看到什么数字？", "读出数字。"), "数字是{n}。", "{n}"),
        },
        "yes": {
            "en": (("Is there a number?", "Do you see a number?"), "Yes, there is a number.", "yes"),
            "zh": (("有数字吗？", "图中有数字吗？"), "有，图中有数字。", "有"),
        },
        "no": {
            "en": (("Is there a number?", "Do you see a number?"), "No, there is no number.", "no"),
            "zh": (("有数字吗？", "图中有数字吗？"), "没有，图中没有数字。", "没有"),
        },
    },
    "comparison": {
        "larger": {
            "en": (
                ("Which is larger, the {a} or the {b}?", "Which one is larger, the {a} or the {b}?"),
                "The {winner} is larger.",
                "{winner}",
            ),
            "zh": (("{a}和{b}哪个大？", "哪个大，{a}还是{b}？"), "{winner}大。", "{winner}"),
        },
        "smaller": {
            "en": (
                ("Which is smaller, the {a} or the {b}?", "Which one is smaller, the {a} or the {b}?"),
                "The {winner} is smaller.",
                "{winner}",
            ),
            "zh": (("{a}和{b}哪个小？", "哪个小，{a}还是{b}？"), "{winner}小。", "{winner}"),
        },
        "yes": {
            "en": (("Are there more {many} than {fewer}?",), "Yes, there are more {many} than {fewer}.", "yes"),
            "zh": (("{a}比{b}多吗？",), "是的，{a}比{b}多。", "是"),
        },
        "no": {
            "en": (("Are there more {many} than {fewer}?",), "No, there are not more {many} than {fewer}.", "no"),
            "zh": (("{a}比{b}多吗？",), "不是，{a}不比{b}多。", "不是"),
        },
    },
    "locate": {
        "one": {
            "en": (
                (
                    "Where is the {a}?",
                    "Where is the {a}? answer in [[x0,y0,x1,y1]] format.",
                    "Can you point out the {a} in the image and provide the bounding boxes of its location?",
                ),
                "the {a}{region}",
                "{region}",
            ),
            "zh": (
                ("{a}在哪里？", "{a}在哪里？用[[x0,y0,x1,y1]]格式回答。", "请给出{a}的坐标。"),
                "{a}{region}",
                "{region}",
            ),
        },
        "many": {
            "en": (
                (
                    "Where are the {many}?",
                    "Where are the {many}? answer in [[x0,y0,x1,y1]] format.",
                    "Can you point out the {many} in the image and provide the bounding boxes of their location?",
                ),
                "the {many}{region}",
                "{region}",
            ),
            "zh": (
                ("所有{a}在哪里？", "所有{a}在哪里？用[[x0,y0,x1,y1]]格式回答。", "请给出所有{a}的坐标。"),
                "{a}{region}",
                "{region}",
            ),
        },
    },
    "describe": {
        "item": {
            "en": (
                (
                    "What is in {region}?",
                    "Can you give me a description of the region {region} in image?",
                    "Tell me what you see within the designated area {region} in the picture.",
                ),
                "A {a}.",
                "a {a}",
            ),
            "zh": (("{region}是什么？", "描述区域{region}。", "{region}里有什么？"), "一个{a}。", "一个{a}"),
        },
        "number": {
            "en": (
                (
                    "What is in {region}?",
                    "Can you give me a description of the region {region} in image?",
                    "Tell me what you see within the designated area {region} in the picture.",
                ),
                "The number {n}.",
                "the number {n}",
            ),
            "zh": (("{region}是什么？", "描述区域{region}。", "{region}里有什么？"), "数字{n}。", "数字{n}"),
        },
    },
}

CAPTION_WORDS = {
    "en": ("A", "a", "and", "the number", "on a", "An empty", "background"),
    "zh": ("一个", "和", "数字", "背景上有", "背景上什么也没有", "、"),
}
PROMPT_WORDS = ("Question: Answer: Short answer:", "\n")


def phrase(language: str, shape: str | None = None, colour: str | None = None, size: str | None = None) -> str:
    """Name an item without article by the attributes given: "large red circle", "red object", "大的红色圆形"."""
    words = WORDS[language]
    noun = words[shape] if shape else THING[language]
    if language == "zh":
        return (f"{words[size]}的" if size else "") + (words[colour] if colour else "") + noun
    return " ".join([words[word] for word in (size, colour) if word] + [noun])


def plural(english: str) -> str:
    """Make an English phrase plural: "red cross" -> "red crosses"."""
    return english + ("es" if english.endswith("ss") else "s")


def article(english: str) -> str:
    """Give "a" or "an" for an English phrase."""
    return "an" if english[0] in "aeiou" else "a"


def casual(question: str) -> str:
    """Write a question as people type it: small first letter, no mark at the end."""
    return question[0].lower() + question[1:].rstrip("?.？。")


def coordinate(value: float) -> int:
    """Give a relative coordinate in thousandths, 0..999."""
    return min(999, max(0, round(1000 * value)))


def boxes_text(boxes: Sequence[Box]) -> str:
    """Write boxes as CogVLM does: `[[086,540,400,760]]`, several separated by `;`."""
    return "[[" + ";".join(",".join(f"{coordinate(edge):03d}" for edge in box) for box in boxes) + "]]"


def all_texts(language: str) -> list[str]:
    """Give every constant text of a language, so that a vocabulary can be made from it."""
    texts = [
        CANNOT_SEE[language],
        NO_PICTURE[language],
        THING[language],
        *WORDS[language].values(),
        *RELATION[language].values(),
        *RELATION_WORD[language].values(),
    ]
    for question in (*CAPTION_QUESTIONS[language], *GROUNDED_CAPTION_QUESTIONS[language]):
        texts += [question, casual(question)]
    texts += CAPTION_WORDS[language]
    for forms in FORMS.values():
        for form in forms.values():
            questions, chat, short = form[language]
            texts += [*questions, *(casual(question) for question in questions), chat, short]
    if language == "en":
        texts += [plural(word) for word in (*SHAPES, THING["en"], ANY_SHAPE["en"])] + ["is", "are", "an", *PROMPT_WORDS]
    return texts
