"""What a model sees of a row, as a page: tokens of every family, pictures inside, nothing of the data as markup."""

import html.parser
import re
from pathlib import Path
from typing import Any

import pytest
from test_formats import ROWS, jpeg, picture, said, write

from lavish.common.errors import ConfigError, DataError
from lavish.datasets.formats.opening import open_data
from lavish.datasets.formats.page import Piece, Shown, look_at, page, pieces_of, token, write_page
from lavish.inference.processor_alone import load_processor

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
TINY: dict[str, tuple[Path | None, dict[str, Any]]] = {
    "pocket": (None, {}),
    "cogvlm": (FIXTURES / "cogvlm2/open/checkpoint", {}),
    "glm4v_9b": (FIXTURES / "glm4v/open/checkpoint", {}),
    "clip_qwen": (FIXTURES / "clip_qwen/open/checkpoint", {}),
    "minigpt4_qwen": (
        FIXTURES / "minigpt4qwen/open/checkpoint",
        {"pieces": {"llm": FIXTURES / "qwen/llm"}, "config": {"vision_config": {"num_attention_heads": 4}}},
    ),
}
SPOKEN = "Red, 红色, or\n🙂."


class Checker(html.parser.HTMLParser):
    """Collects tags and checks that they close in order."""

    VOID = {"meta", "img", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


def sample(folder: Path, answer: str = SPOKEN) -> dict[str, Any]:
    picture(folder)
    row = {"image": "a.png", "messages": said("<image>What colour?", answer)}
    ((_, made),) = open_data(write(folder / "rows.json", [row])).samples()
    assert not isinstance(made, DataError)
    return made


@pytest.mark.parametrize("name", TINY)
def test_tokens_of_every_family(name: str, tmp_path: Path) -> None:
    path, options = TINY[name]
    processor = load_processor(path, **options)
    conversation = sample(tmp_path)["messages"]
    inputs = processor.apply_chat_template(conversation, return_labels=True, return_tensors=None)
    pieces = pieces_of(inputs, processor.tokenizer)
    assert [token_id for piece in pieces for token_id in piece.ids] == list(inputs["input_ids"])
    positions = [piece.first + at for piece in pieces for at in range(len(piece.ids))]
    assert positions == list(range(len(inputs["input_ids"])))
    for piece in pieces:
        labels = [inputs["labels"][piece.first + at] for at in range(len(piece.ids))]
        assert {label != -100 for label in labels} == {piece.kind == "learnt"}
    slots = [piece for piece in pieces if piece.kind == "slots"]
    assert len(slots) == 1
    learnt = "".join(piece.text for piece in pieces if piece.kind == "learnt")
    assert SPOKEN in learnt, "words in two scripts and a picture character, whole"
    assert "�" not in "".join(piece.text for piece in pieces)
    assert "What colour?" in "".join(piece.text for piece in pieces if piece.kind == "given")
    assert any(piece.is_special for piece in pieces)
    shown = look_at("rows.json, row 1", sample(tmp_path), processor)
    assert (shown.num_tokens, shown.problem) == (len(inputs["input_ids"]), None)


def test_a_page(tmp_path: Path) -> None:
    picture(tmp_path, "a.png", "b.png")
    evil = "<script>alert('x')</script> & <b>"
    rows = [
        {"id": evil, "image": "a.png", "messages": said(f"<image>{evil}", evil)},
        {"image": "nowhere.png", "messages": said("<image>?")},
        {"messages": said("Hello", "Hi")},
    ]
    processor = load_processor(None)
    source = open_data(write(tmp_path / "rows.json", rows))
    shown = [look_at(where, made, processor) for where, made in source.samples()]
    path = tmp_path / "out" / "page.html"
    write_page(path, shown, title=f"Data {evil}", facts=[("format", "messages"), ("rows", "3")])
    text = path.read_text(encoding="utf-8")
    found = checked(text)
    assert "script" not in found.seen
    assert found.sources, "pictures are there"
    assert all(source.startswith("data:image/jpeg;base64,") for source in found.sources), "and inside the page"
    assert not re.search(r"https?://|url\(", text), "nothing is loaded from elsewhere"
    assert "nowhere.png" in text
    assert "slots of pictures" in text
    assert text.count("<article") == 3
    assert text.count("class=bad") == 1


def test_the_bar_has_one_part_for_neighbours_of_a_kind() -> None:
    kinds = ("given", "given", "slots", "learnt", "learnt", "given")
    pieces = [Piece("x", tuple(range(at + 1)), at, kind) for at, kind in enumerate(kinds)]
    text = page([Shown("row", pieces=pieces)], title="x", facts=[])
    assert re.findall(r"<i class='(\w+)' style='flex:(\d+)'>", text) == [
        ("given", "3"),
        ("slots", "3"),
        ("learnt", "9"),
        ("given", "6"),
    ]


def test_spaces_stay(tmp_path: Path) -> None:
    """An answer that is code is looked at as it is: HTML alone would join the spaces."""
    code = "def f(x):\n    return x"
    text = page([look_at("row", sample(tmp_path, code))], title="x", facts=[])
    assert "<p>def f(x):<br>    return x</p>" in text
    assert re.search(r"\.message p\{[^}]*white-space:pre-wrap", text)


def test_a_target_is_drawn(tmp_path: Path) -> None:
    picture(tmp_path)
    ((_, made),) = open_data(write(tmp_path / "rows.json", [ROWS["RefCOCO"][1]])).samples()
    text = page([look_at("row", made)], title="x", facts=[])
    assert "left:10.00%;top:25.00%;width:50.00%;height:50.00%" in text
    checked(text)


def test_what_cannot_be_shown(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(jpeg()[:30])
    row = {"image": "a.png", "messages": said("<image>What?")}
    ((_, made),) = open_data(write(tmp_path / "rows.json", [row])).samples()
    shown = look_at("row 1", made)
    text = page([shown, look_at("row 2", DataError("is wrong"))], title="x", facts=[])
    assert "is wrong" in text
    assert text.count("class='problem'") == 2, "the picture and the row"
    shown = look_at("row 1", made, load_processor(None))
    text = page([shown], title="x", facts=[])
    assert text.count("damaged PNG") == 1, "the row says it, and the picture's place has its name"
    assert "✕ a.png" in text
    checked(text)
    video = {"id": "v", "messages": said([{"type": "video", "video": "clips/v.mp4"}, {"type": "text", "text": "?"}])}
    text = page([look_at("row 3", video)], title="x", facts=[])
    assert "▶ v.mp4" in text
    checked(text)


def test_what_a_model_refuses(tmp_path: Path) -> None:
    picture(tmp_path)
    row = {"images": ["a.png", "a.png"], "messages": said("<image><image>Same?")}
    ((_, made),) = open_data(write(tmp_path / "rows.json", [row])).samples()
    shown = look_at("row 1", made, load_processor(None))
    assert "holds 2 images" in str(shown.problem)
    assert shown.pieces == []
    assert shown.messages


def test_pieces_as_markup() -> None:
    assert "position 3, id 7, learnt" in token(Piece("a<b", (7,), 3, "learnt"))
    assert "a&lt;b" in token(Piece("a<b", (7,), 3, "learnt"))
    assert "<b>↵</b><br>" in token(Piece("\n", (7,), 3, "given"))
    assert "∅" in token(Piece("", (7,), 3, "given"))
    assert "picture · 1,225 slots" in token(Piece("", tuple(range(1225)), 1, "slots"))
    assert Shown("x").num_tokens == 0


def test_a_processor_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no conversation"):
        load_processor(FIXTURES / "blip_vqa/open/checkpoint")
    with pytest.raises(ConfigError, match="no such file or folder"):
        load_processor(tmp_path / "nothing")
