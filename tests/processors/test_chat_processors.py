"""What the chat processors share; what each makes of it is tested with its family."""

import numpy as np
import pytest
import torch
from PIL import Image

from lavish.common.errors import MediaError, PromptError
from lavish.processors.chat import (
    check_end,
    check_one_image,
    checked_ids,
    collate,
    local_folder,
    naming_conversation,
    rows_of_ids,
)
from lavish.processors.pixels import clip_square, normalize, resize_two_pass

COLUMNS = {"input_ids": [[5, 6, 7], [8]], "token_type_ids": [[0, 1, 0], [0]], "labels": [[-100, 6, 7], [8]]}


def batch(**options):
    made = {"pad_token_id": 9, "padding_side": "left", "return_tensors": "pt", "is_single": False, **options}
    return collate(COLUMNS, made.pop("pixels", ()), **made)


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_column_is_padded_on_the_side_asked(side):
    found = batch(padding_side=side, return_tensors=None)
    for name, fill in (("input_ids", 9), ("token_type_ids", 0), ("labels", -100)):
        row, padding = COLUMNS[name][1], [fill, fill]
        assert found[name] == [COLUMNS[name][0], padding + row if side == "left" else row + padding]
    assert found["attention_mask"] == [[1, 1, 1], [0, 0, 1] if side == "left" else [1, 0, 0]]
    assert list(found) == ["input_ids", "attention_mask", "token_type_ids", "labels"]


def test_width_tensors_and_pictures():
    found = batch(width=5, pixels=[np.ones((3, 2, 2), np.float32)] * 2)
    assert {name: (tuple(value.shape), value.dtype) for name, value in found.items()} == {
        **dict.fromkeys(("input_ids", "attention_mask", "token_type_ids", "labels"), ((2, 5), torch.int64)),
        "pixel_values": ((2, 3, 2, 2), torch.float32),
    }
    assert isinstance(batch(return_tensors="np")["input_ids"], np.ndarray)
    assert "pixel_values" not in batch()


def test_lists_of_a_single_conversation_are_flat():
    alone = {name: rows[:1] for name, rows in COLUMNS.items()}
    found = collate(alone, (), pad_token_id=9, padding_side="left", return_tensors=None, is_single=True)
    assert (found["input_ids"], found["attention_mask"]) == ([5, 6, 7], [1, 1, 1])


@pytest.mark.parametrize(
    ("options", "words"), [({"padding_side": "up"}, "padding_side='up'"), ({"return_tensors": "tf"}, "'pt', 'np'")]
)
def test_unknown_options_are_refused(options, words):
    with pytest.raises(PromptError, match=words):
        batch(**options)


def test_an_error_names_its_conversation_where_there_are_several():
    for error in (PromptError, MediaError):
        with pytest.raises(error, match=r"^Conversation 1 of 3: no$"), naming_conversation(1, 3):
            raise error("no")
        with pytest.raises(error, match=r"^no$"), naming_conversation(0, 1):
            raise error("no")


def test_the_end_of_a_conversation():
    check_end(True, False, False)
    check_end(True, True, True)
    check_end(False, True, False)
    with pytest.raises(PromptError, match="nothing to generate"):
        check_end(True, True, False)
    with pytest.raises(PromptError, match="ends with an answer"):
        check_end(False, False, True)


def test_a_second_image_is_refused_with_its_places():
    check_one_image([4], "it takes one")
    with pytest.raises(PromptError, match=r"holds 2 images \(messages 0, 2\); it takes one\. Keep one"):
        check_one_image([0, 2], "it takes one")


def test_ids_of_every_kind():
    for ids in ([3, 4], (3, 4), torch.tensor([3, 4]), np.array([3, 4]), [torch.tensor(3), np.int64(4)]):
        assert checked_ids(ids) == [3, 4]
    assert checked_ids(3) == checked_ids(torch.tensor(3)) == [3]
    for wrong, words in (
        ([-100], "are no tokens"),
        ([[3]], "batch_decode"),
        ("3", "found '3'"),
        ([True], "found True"),
    ):
        with pytest.raises(PromptError, match=words):
            checked_ids(wrong)
    with pytest.raises(PromptError, match="takes rows"):
        rows_of_ids(torch.tensor(3))


def test_a_folder_is_itself(tmp_path):
    assert local_folder(str(tmp_path), None) == tmp_path


def test_clip_square_is_resize_then_normalise():
    noise = np.random.default_rng(0).integers(0, 256, (9, 14, 4), dtype=np.uint8)
    picture = Image.fromarray(noise)
    expected = normalize(resize_two_pass(picture.convert("RGB"), (6, 6)))
    assert np.array_equal(clip_square(picture, 6), expected)
