"""Write MindSpore's files as a stream: a `.ckpt` with one message a slice, and the strategy of a run's ranks.

MindSpore 2.10.0 reads what is written by these rules bit by bit (tests/checkpoints/test_mindspore_itself.py). The
messages are those of `mindspore_file.py` and `mindspore.py`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lavish.checkpoints.mindspore_file import CRC_BYTES, CRC_MARK, TYPES
from lavish.checkpoints.protobuf import encode_bytes, encode_number, encode_start
from lavish.checkpoints.tensor_map import ITEM_BYTES
from lavish.common.errors import CheckpointError

if TYPE_CHECKING:
    from lavish.checkpoints.mindspore import Layout
    from lavish.checkpoints.output import Output

SLICE_BYTES = 512 << 20
"""MindSpore's own: a message may have 2 GB at most."""
TYPE_NAMES = {dtype: name for name, dtype in TYPES.items() if name != "Int4"}


class MindSporeFormat:
    """How one `.ckpt` is laid out; see `lavish.checkpoints.output.Format`.

    `has_crc`: end it with a CRC-32 of all bytes, which MindSpore's `load_checkpoint(crc_check=True)` compares.
    """

    def __init__(self, *, has_crc: bool = False, slice_bytes: int = SLICE_BYTES) -> None:
        self.has_crc, self.slice_bytes = has_crc, slice_bytes
        self._crc = 0

    def begin(self, outputs: Sequence[Output]) -> Iterator[bytes]:
        """Check that the tensors can be held; a file has nothing before them.

        Raises:
            CheckpointError: a dtype that MindSpore does not have, or a tensor without elements, which it leaves out.
        """
        for output in outputs:
            if output.dtype not in TYPE_NAMES:
                raise CheckpointError(
                    f"{output.name!r} is {output.dtype}, which MindSpore does not have; it has {', '.join(TYPE_NAMES)}."
                )
            if output.nbytes == 0:
                raise CheckpointError(f"{output.name!r} has no elements (shape {output.shape}); MindSpore has no such.")
        yield from ()

    def tensor(self, output: Output, data: memoryview, offset: int) -> Iterator[bytes | memoryview]:
        """Give a tensor in slices, each a message with the whole shape in it."""
        item = ITEM_BYTES[output.dtype]
        step = max(item, self.slice_bytes // item * item)
        name = encode_bytes(1, output.name.encode())
        about = b"".join(encode_number(1, size) for size in output.shape)
        about += encode_bytes(2, TYPE_NAMES[output.dtype].encode())
        for start in range(0, len(data), step):
            content = data[start : start + step]
            before = about + encode_start(3, len(content))
            value = name + encode_start(2, len(before) + len(content)) + before
            head = encode_start(1, len(value) + len(content)) + value
            if self.has_crc:
                self._crc = zlib.crc32(content, zlib.crc32(head, self._crc))
            yield head
            yield content

    def end(self, offset: int) -> Iterator[bytes]:
        """Give the CRC, if there is to be one."""
        if self.has_crc:
            yield CRC_MARK + self._crc.to_bytes(CRC_BYTES, "big")

    def state(self) -> dict[str, Any]:
        """Give the CRC of what is written."""
        return {"crc": self._crc}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where a `state` was taken."""
        self._crc = int(state["crc"])


def encode_strategy(layouts: Mapping[str, Layout]) -> bytes:
    """Encode the strategy file of a run of one pipeline stage; every rank's is the same."""
    items = [encode_number(1, 0)]
    for name, layout in layouts.items():
        matrix = b"".join(encode_number(1, size) for size in layout.dev_matrix)
        axes = b"".join(encode_number(1, axis) for axis in layout.tensor_map)
        parts = encode_bytes(1, matrix) + encode_bytes(2, axes) + encode_bytes(3, b"") + encode_bytes(4, b"")
        parts += b"".join(encode_number(number, 0) for number in (5, 6, 7))
        items.append(encode_bytes(3, encode_bytes(1, f"0-{name}".encode()) + encode_bytes(2, parts)))
    return b"".join(items)
