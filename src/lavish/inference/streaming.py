"""Turning token ids into text piece by piece: never half a character, never a part of a stop text.

The pieces joined are the text of the whole answer, for every tokenizer whose decoded text only grows at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "�"
_MAX_PENDING = 3
"""A UTF-8 character has at most four bytes, so at most three replacement characters at the end can still become one."""


class TextStream:
    """Decode a growing list of token ids, giving only text that later tokens cannot change.

    `decode` is the tokenizer's, without special tokens. Only a window of ids is decoded each time: from the piece
    before the last one, because sentencepiece drops the space before the first piece that it sees.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._window = 0  # ids before this are decoded for good
        self._read = 0  # ids of the window before this gave `_seen`
        self._seen = ""  # what the window's ids up to `_read` decode to
        self._given = 0  # characters of the window's new text that were moved to `_held`
        self._held = ""  # decoded text that could still become a stop text
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Add a token and give the text that is now final, often none. After a stop text, `is_stopped` is True and
        nothing more comes.
        """
        if self.is_stopped:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids[self._window :])
        pending = len(text) - len(text.rstrip(_REPLACEMENT))
        final = text[: len(text) - min(pending, _MAX_PENDING)]
        new = final[len(self._seen) + self._given :]
        self._given += len(new)
        if not pending and len(text) > len(self._seen):
            self._window, self._read = self._read, len(self._ids)
            self._seen = self._decode(self._ids[self._window : self._read])
            self._given = 0
        return self._release(new)

    def finish(self) -> str:
        """Give the rest at the end of the answer: half a character as a replacement character, and held text that was
        no stop text.
        """
        if self.is_stopped:
            return ""
        new = self._decode(self._ids[self._window :])[len(self._seen) + self._given :]
        self._given += len(new)
        text = self._release(new)
        held, self._held = self._held, ""
        return text if self.is_stopped else text + held

    def _release(self, new: str) -> str:
        if not self._stop:
            return new
        text = self._held + new
        hits = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if hits:
            self.is_stopped, self._held = True, ""
            return text[: min(hits)]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Give the length of the longest end of `text` that is a beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
