"""What one request leaves for the next: image features by content, and the key/value cache of a conversation.

Both are bounded and locked. A conversation's cache is taken out of the store while a request works on it, so that two
requests never share one that grows.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from lavish.common.errors import ConfigError, PromptError, shown
from lavish.inference.cache import SliceCache


def pixel_digest(pixel_values: torch.Tensor) -> str:
    """Give a hash of what the tower will see of one picture. Shapes: (3, height, width)."""
    pixels = pixel_values.detach().cpu().contiguous()
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{tuple(pixels.shape)} {pixels.dtype}".encode())
    digest.update(memoryview(pixels.view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()


class FeatureCache:
    """Image features by pixel digest, least recently used out first. `max_bytes=0` keeps none."""

    def __init__(self, max_bytes: int = 512 * 2**20):
        self.max_bytes = _bound("max_feature_bytes", max_bytes)
        self.num_bytes = 0
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._features)

    def get(self, digest: str) -> torch.Tensor | None:
        """Give the features of a picture, (tokens, hidden), or None."""
        with self._lock:
            if digest in self._features:
                self._features.move_to_end(digest)
            return self._features.get(digest)

    def put(self, digest: str, features: torch.Tensor) -> None:
        """Keep the features of a picture; older ones go until all fit."""
        with self._lock:
            if digest in self._features or features.nbytes > self.max_bytes:
                return
            self._features[digest] = features
            self.num_bytes += features.nbytes
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._features.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget all features, as after a change of the tower's weights."""
        with self._lock:
            self._features.clear()
            self.num_bytes = 0


@dataclass
class Conversation:
    """What a finished request computed: the ids and token types in its cache, the digests of its images, the cache
    itself, and the state that its keys were computed under.
    """

    token_ids: list[int]
    token_type_ids: list[int]
    digests: tuple[str, ...]
    num_prompt_tokens: int
    cache: SliceCache
    request_state: Any = None

    def extend(self, token_ids: list[int], token_type_ids: list[int]) -> None:
        """Note tokens that a pass has put into the cache."""
        self.token_ids += token_ids
        self.token_type_ids += token_type_ids

    def num_common_tokens(self, token_ids: list[int], token_type_ids: list[int], digests: tuple[str, ...]) -> int:
        """Give how many tokens at the start are the same here and there.

        An image is the same only as a whole and with the same pixels; a common part never ends inside one.
        """
        length = min(len(self.token_ids), len(token_ids))
        if self.token_ids[:length] == token_ids[:length] and self.token_type_ids[:length] == token_type_ids[:length]:
            common = length
        else:
            pairs = zip(self.token_ids, token_ids, self.token_type_ids, token_type_ids)
            common = next(i for i, (a, b, s, t) in enumerate(pairs) if a != b or s != t)
        runs = image_runs(token_type_ids, len(digests))
        if _kind(self.token_type_ids, common) != _kind(token_type_ids, common):
            # The place of an image's last slot depends on whether another one follows it without text between.
            while common and token_type_ids[common - 1] == 1:
                common -= 1
        for index, (start, end) in enumerate(runs):
            same = self.digests[index : index + 1] == digests[index : index + 1]
            if start < common and (end > common or not same):
                return start
        return common


def _kind(token_type_ids: list[int], place: int) -> int:
    return token_type_ids[place] if place < len(token_type_ids) else 0


def image_runs(token_type_ids: list[int], num_images: int) -> list[tuple[int, int]]:
    """Give start and end of the slots (type 1) of each image; images may follow one another without text between.

    Raises:
        PromptError: the slots cannot be shared out evenly among the images.
    """
    slots = slots_per_image(token_type_ids, num_images)
    runs, index = [], 0
    while index < len(token_type_ids):
        if token_type_ids[index] == 1:
            runs.append((index, index + slots))
            index += slots
        else:
            index += 1
    if any(kind != 1 for start, end in runs for kind in token_type_ids[start:end]):
        raise PromptError(f"The slots of an image are torn apart: its {slots} do not follow one another.")
    return runs


def slots_per_image(token_type_ids: list[int], num_images: int) -> int:
    """Give how many slots each image takes; 0 without images.

    Raises:
        PromptError: slots without an image, or numbers that do not divide.
    """
    found = sum(token_type_ids)
    if num_images == 0 and found == 0:
        return 0
    if num_images == 0 or found % num_images or found == 0:
        raise PromptError(f"The prompt has {found} image slots (token_type_ids 1) and {num_images} images.")
    return found // num_images


class ConversationStore:
    """The caches of the last conversations. `max_conversations=0` keeps none."""

    def __init__(self, max_conversations: int = 2, max_bytes: int = 2 * 2**30):
        self.max_conversations = _bound("max_conversations", max_conversations)
        self.max_bytes = _bound("max_conversation_bytes", max_bytes)
        self._kept: list[Conversation] = []  # the most recently used one last
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def take(
        self, token_ids: list[int], token_type_ids: list[int], digests: tuple[str, ...], request_state: Any = None
    ) -> tuple[Conversation | None, int]:
        """Take out the conversation that shares the most tokens with a prompt, and say how many; (None, 0) if none is
        worth it. Keys that were computed under another state are of no use.

        At least the last prompt token is left to compute: its logits choose the first new token. A conversation of
        which less than half of the prompt is shared stays where it is, so that a new one does not destroy it.
        """
        with self._lock:
            best, most = None, 0
            most_reusable = _reusable(token_type_ids, len(digests))
            for kept in reversed(self._kept):
                if kept.request_state != request_state:
                    continue
                common = min(kept.num_common_tokens(token_ids, token_type_ids, digests), most_reusable)
                if common > most and 2 * common >= kept.num_prompt_tokens:
                    best, most = kept, common
            if best is not None:
                self._kept = [kept for kept in self._kept if kept is not best]
            return best, most

    def put(self, conversation: Conversation) -> None:
        """Keep a conversation as the most recently used; older ones go until all fit."""
        with self._lock:
            self._kept.append(conversation)
            while self._kept and (
                len(self._kept) > self.max_conversations or sum(k.cache.num_bytes for k in self._kept) > self.max_bytes
            ):
                self._kept.pop(0)

    def clear(self) -> None:
        """Forget all conversations, as after a change of the weights."""
        with self._lock:
            self._kept.clear()


def _bound(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} must be a whole number, at least 0 (none is kept), not {shown(value)}.")
    return value


def _reusable(token_type_ids: list[int], num_images: int) -> int:
    """Give how many tokens of a prompt may come from a cache: all but the last, and no image in parts."""
    last = len(token_type_ids) - 1
    for start, end in image_runs(token_type_ids, num_images):
        if start < last < end:
            return start
    return last
