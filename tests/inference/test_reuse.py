"""What is kept between requests: bounds, and how much of a prompt counts as the same."""

import pytest
import torch

from lavish.common.errors import PromptError
from lavish.inference.cache import SliceCache
from lavish.inference.reuse import Conversation, ConversationStore, FeatureCache, image_runs, pixel_digest

IMAGE = [0, 1, 1, 1, 1]  # token types: bos and four slots


def conversation(ids, types, digests=(), cache=None):
    return Conversation(list(ids), list(types), digests, len(ids), cache or SliceCache(1))


def test_features_go_when_they_no_longer_fit():
    cache = FeatureCache(max_bytes=3 * 40)
    for name in "abcd":
        cache.put(name, torch.zeros(10))
        cache.get("a")
    assert [cache.get(name) is not None for name in "abcd"] == [True, False, True, True]
    assert cache.num_bytes == 120
    cache.put("huge", torch.zeros(100))
    assert cache.get("huge") is None
    cache.clear()
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_digests_tell_pictures_shapes_and_dtypes_apart():
    picture = torch.rand(3, 4, 4)
    assert pixel_digest(picture) == pixel_digest(picture.clone())
    other = picture.clone()
    other[2, 3, 3] += 1e-3
    assert len({pixel_digest(t) for t in (picture, other, picture.double(), picture.reshape(3, 2, 8))}) == 4


def test_image_runs():
    assert image_runs([0, 1, 1, 0, 0, 1, 1], 2) == [(1, 3), (5, 7)]
    assert image_runs([1, 1, 1, 1, 0, 1, 1], 3) == [(0, 2), (2, 4), (5, 7)]  # two images without text between
    assert image_runs([0, 0], 0) == []
    for types, num_images in ([0, 1, 1, 1], 2), ([0, 1], 0), ([0, 0], 1):
        with pytest.raises(PromptError, match=rf"has {sum(types)} image slots .* and {num_images} images"):
            image_runs(types, num_images)
    with pytest.raises(PromptError, match="torn apart"):
        image_runs([1, 0, 1, 1, 1, 1, 1, 0], 3)


def test_common_tokens():
    kept = conversation([9, 0, 0, 0, 0, 5, 6, 7], [*IMAGE, 0, 0, 0], ("a",))
    new = [9, 0, 0, 0, 0, 5, 6, 8]
    assert kept.num_common_tokens(new, [*IMAGE, 0, 0, 0], ("a",)) == 7
    assert kept.num_common_tokens(new, [*IMAGE, 0, 0, 0], ("b",)) == 1
    assert kept.num_common_tokens([9, 0, 0], [0, 0, 0], ()) == 1  # text that has the placeholder's id
    assert kept.num_common_tokens([9, 0, 0, 0, 0], IMAGE, ("a",)) == 5


def test_images_side_by_side_are_compared_one_by_one():
    types = [0, *[1] * 4, 0, 0]
    kept = conversation([9, 0, 0, 0, 0, 5, 6], types, ("a", "b"))
    assert kept.num_common_tokens([9, 0, 0, 0, 0, 5, 7], types, ("a", "b")) == 6
    assert kept.num_common_tokens([9, 0, 0, 0, 0, 5, 7], types, ("a", "c")) == 3
    assert kept.num_common_tokens([9, 0, 0, 0, 0, 5, 7], types, ("c", "b")) == 1
    assert kept.num_common_tokens([9, 0, 0, 0, 0, 5, 7], types, ("d",)) == 1


def test_keys_of_another_state_are_not_reused():
    store = ConversationStore()
    store.put(Conversation([1, 2, 3, 4], [0] * 4, (), 4, SliceCache(1), (1.0,)))
    assert store.take([1, 2, 3, 4, 5], [0] * 5, (), (3.0,)) == (None, 0)
    assert store.take([1, 2, 3, 4, 5], [0] * 5, ()) == (None, 0)
    assert store.take([1, 2, 3, 4, 5], [0] * 5, (), (1.0,))[1] == 4


def test_the_last_token_is_always_left_to_compute():
    store = ConversationStore()
    store.put(conversation([1, 2, 3, 4], [0] * 4))
    assert store.take([1, 2, 3, 4], [0] * 4, ())[1] == 3
    store.put(conversation([9, 0, 0, 0, 0], IMAGE, ("a",)))
    assert store.take([9, 0, 0, 0, 0], IMAGE, ("a",))[1] == 0  # an empty prompt ends with the image


def test_a_conversation_is_lent_to_one_request_only():
    store = ConversationStore()
    store.put(conversation([1, 2, 3, 4], [0] * 4))
    assert store.take([1, 2, 3, 4, 5], [0] * 5, ())[1] == 4
    assert store.take([1, 2, 3, 4, 5], [0] * 5, ()) == (None, 0)


def test_a_short_common_start_does_not_destroy_a_conversation():
    store = ConversationStore()
    store.put(conversation([1, 2, 3, 4, 5, 6], [0] * 6))
    assert store.take([1, 2, 9, 9, 9], [0] * 5, ()) == (None, 0)
    assert len(store) == 1


def test_the_store_is_bounded_by_number_and_bytes():
    store = ConversationStore(max_conversations=2)
    for start in range(3):
        store.put(conversation([start, 1, 1], [0] * 3))
    assert len(store) == 2
    assert store.take([0, 1, 1, 1], [0] * 4, ()) == (None, 0)
    filled = SliceCache(1)
    filled.update(torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8), 0)
    small = ConversationStore(max_bytes=filled.num_bytes - 1)
    small.put(conversation([1], [0], cache=filled))
    assert len(small) == 0


def test_a_slice_cache_grows_cuts_and_selects():
    cache = SliceCache(2, capacity=10)
    states = torch.randn(3, 2, 700, 4)
    for layer in range(2):
        cache.update(states[:, :, :100], -states[:, :, :100], layer)
        cache.update(states[:, :, 100:300], -states[:, :, 100:300], layer)
        keys, values = cache.update(states[:, :, 300:], -states[:, :, 300:], layer)
        assert torch.equal(keys, states)
        assert torch.equal(values, -states)
    cache.truncate(50)
    assert cache.get_seq_length() == 50
    cache.select_rows(torch.tensor([2, 0]))
    keys, _ = cache.update(states[:2, :, :1], states[:2, :, :1], 1)
    assert torch.equal(keys[:, :, :50], states[[2, 0], :, :50])
    assert cache.layers[0].get_seq_length() == 50


def test_images_side_by_side_are_shared_only_up_to_the_same_end():
    """The position of a last slot depends on whether another image follows it without text between."""

    def prompt(num_images: int, text: list[int]) -> tuple[list[int], list[int], tuple[str, ...]]:
        slots = 2 * num_images
        digests = tuple(f"image {index}" for index in range(num_images))
        return [5, *[0] * slots, *text], [0, *[1] * slots, *[0] * len(text)], digests

    ids, types, digests = prompt(2, [7, 8])
    kept = Conversation(ids, types, digests, len(ids), SliceCache(1, 16))
    assert kept.num_common_tokens(*prompt(2, [7, 9])) == 6
    assert kept.num_common_tokens(*prompt(2, [9])) == 5  # other text, the same images before it
    assert kept.num_common_tokens(*prompt(3, [7, 8])) == 1
    assert kept.num_common_tokens(*prompt(1, [7, 8])) == 1
