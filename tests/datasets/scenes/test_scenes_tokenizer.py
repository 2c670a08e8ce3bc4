"""The tokenizer of the drawn world: exact round trips, one token a word, a character or a coordinate."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavish.common.errors import DataError
from lavish.datasets.scenes.questions import ask
from lavish.datasets.scenes.tokenizer import (
    COORDINATE_BASE,
    SPECIAL_TOKENS,
    build_tokenizer,
    coordinate_id,
    save_tokenizer,
    words,
)
from lavish.datasets.scenes.world import sample_scene

TOKENIZER = build_tokenizer()
TEMPLATES = {"chat": "Question: {} Answer:", "vqa": "Question: {} Short answer:", "base": "{}"}


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def decode(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def pieces(text: str) -> list[str]:
    return [decode([token]) for token in encode(text)]


def coordinates(text: str) -> list[int]:
    return [token - COORDINATE_BASE for token in encode(text) if 0 <= token - COORDINATE_BASE < 1000]


def test_special_tokens_have_the_first_ids():
    assert [TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    assert encode("red") == TOKENIZER.encode("red").ids
    assert TOKENIZER.get_vocab_size() == 3 + 256 + 1000 + 2 + len(words())
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(TOKENIZER.get_vocab_size()))


BOXLIKE = st.text(alphabet="[]0123456789,;. ", max_size=40)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=60), BOXLIKE, st.text(alphabet=st.characters(max_codepoint=127), max_size=60)))
def test_any_text_round_trips(text):
    assert decode(encode(text)) == text


@pytest.mark.parametrize(
    "text", ["<0x41>", "Ġred", "Ċ", "a\r\n\tb", "naïve 😀 ünïcode", "", " ", "\x00", "086", "[[", "]]]]"]
)
def test_awkward_texts_round_trip(text):
    assert decode(encode(text)) == text


def test_a_coordinate_in_a_box_is_one_token():
    assert pieces("[[086,540,400,760]]") == ["[[", "086", ",", "540", ",", "400", ",", "760", "]]"]
    many = "[[000,001,002,003;997,998,999,000]]"
    values = [int(value) for value in re.findall("[0-9]{3}", many)]
    assert coordinates(many) == values
    for value in range(1000):
        assert coordinate_id(value) in encode(f"[[{value:03d},000,000,000]]")
        assert decode([coordinate_id(value)]) == f"{value:03d}"
    with pytest.raises(DataError, match="1000"):
        coordinate_id(1000)


@pytest.mark.parametrize(
    "text", ["407", "the number 407.", "123,456,789", "[[12,345", "[[1234,5678]]", "(123,456,789)"]
)
def test_digits_outside_of_boxes_are_single_tokens(text):
    assert not coordinates(text)
    assert [piece for piece in pieces(text) if piece.isdigit()] == re.findall("[0-9]", text)


def test_every_word_of_the_world_is_one_token():
    rng = np.random.default_rng(11)
    for _ in range(400):
        scene = sample_scene(rng)
        for question in ask(scene, rng, 12):
            for text in (
                TEMPLATES[question.template].format(question.question),
                question.answer,
                f" {question.answer}\n",
            ):
                for piece in pieces(text):
                    assert "\ufffd" not in piece, text
                named = [piece.strip() for piece in pieces(text) if piece.strip().isascii() and piece.strip().isalpha()]
                plain = re.sub(r"can't", " ", text)
                assert [word for word in named if word != "can't"] == re.findall("[A-Za-z]+", plain)


def test_the_vocabulary_is_pinned():
    """A bundled model was trained with these ids: a change of the words of the world is a change of the model."""
    assert len(words()) == 346
    assert hashlib.sha256("\n".join(words()).encode()).hexdigest() == (
        "80d8345084ce45c9425d34c2fe538c020e0373411a9e550ccfc3d91d3fb190c2"
    )
    assert encode("Question: What color is the star? Short answer: red\n") == [
        1399,
        61,
        1279,
        1301,
        1322,
        1372,
        1366,
        66,
        1275,
        1287,
        61,
        1352,
        13,
    ]


def test_a_long_hostile_text_takes_linear_time():
    text = "[[" + "111," * 20_000
    assert decode(encode(text)) == text


def test_transformers_reads_the_saved_files(tmp_path: Path):
    from transformers import PreTrainedTokenizerFast

    save_tokenizer(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)
    for text in (
        "the red circle[[086,540,400,760]] , and .",
        "Question: 图中有红色圆形吗？ Answer:",
        " I can't see that.",
    ):
        assert loaded(text, add_special_tokens=False)["input_ids"] == encode(text)
        assert loaded.decode(encode(text)) == text
    first = (tmp_path / "tokenizer.json").read_bytes()
    save_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == first
