"""Streaming text: whole characters, exact stop texts, pieces that join to the whole."""

import random

import pytest

from lavish.inference.streaming import TextStream


def decode(ids):
    """A byte tokenizer: 0..255 is a byte, 256 is a special token that is skipped."""
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def decode_dropping_first_space(ids):
    """As sentencepiece does."""
    return decode(ids).removeprefix(" ")


def pieces_of(ids, stop=(), decode=decode):
    stream = TextStream(decode, stop)
    pieces = []
    for token_id in ids:
        pieces.append(stream.push(token_id))
        if stream.is_stopped:
            break
    return [*pieces, stream.finish()], stream


@pytest.mark.parametrize(
    "text", ["", "plain", "图片里有一个红色的圆形。", "a😀b 👩‍👩‍👧 ü", " lead", "\n\n", "� real replacement �"]
)
def test_pieces_join_and_never_split_a_character(text):
    pieces, _ = pieces_of(text.encode())
    assert "".join(pieces) == text
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@pytest.mark.parametrize("seed", range(30))
def test_random_bytes_join_to_the_whole_decoding(seed):
    ids = [random.Random(seed * 1000 + i).choice([*range(0, 256, 7), 0xE4, 0xBD, 0xA0, 32, 256]) for i in range(60)]
    assert "".join(pieces_of(ids)[0]) == decode(ids)
    assert "".join(pieces_of(ids, decode=decode_dropping_first_space)[0]) == decode_dropping_first_space(ids)


def test_text_comes_as_soon_as_it_is_final():
    stream = TextStream(decode)
    assert stream.push(ord("a")) == "a"
    assert [stream.push(byte) for byte in "你".encode()] == ["", "", "你"]
    assert stream.push(0xE4) == ""
    assert stream.finish() == "�"


def test_a_long_run_of_broken_bytes_is_not_held_back():
    pieces, _ = pieces_of([0xFF] * 50)
    assert "".join(pieces[:-1]) == "�" * 47
    assert "".join(pieces) == "�" * 50


@pytest.mark.parametrize("stop", [["\nQuestion:"], ["never", "\nQ"], ["\nQuestion: and more", "\nQuest"]])
def test_stop_texts_cut_exactly_and_are_never_shown(stop):
    pieces, stream = pieces_of(b"Two dogs.\nQuestion: what?", stop)
    assert "".join(pieces) == "Two dogs."
    assert stream.is_stopped


def test_a_started_stop_text_that_does_not_come_is_given():
    pieces, stream = pieces_of(b"a\nQuest for fire\nQue", ["\nQuestion:"])
    assert "".join(pieces) == "a\nQuest for fire\nQue"
    assert not stream.is_stopped


def test_overlapping_starts_of_a_stop_text():
    assert "".join(pieces_of(b"aaab", ["aab"])[0]) == "a"
    assert "".join(pieces_of("红红色停".encode(), ["红色"])[0]) == "红"


def test_a_stop_text_inside_one_token():
    words = ["Yes", " it is.END more", "!"]
    pieces, stream = pieces_of([0, 1, 2], ["END"], lambda ids: "".join(words[i] for i in ids))
    assert "".join(pieces) == "Yes it is."
    assert stream.is_stopped


def test_a_stop_text_completed_only_at_the_end():
    stream = TextStream(decode, ["�!"])
    assert [stream.push(0xE4), stream.push(ord("!")), stream.finish()] == ["", "", ""]
    assert stream.is_stopped
