"""The wire format of Protocol Buffers, as far as checkpoints need it: fields by offset, and their encoding.

Nothing is copied and no message is built: a 39 GB file is walked through a memory map, a few bytes a field. Source:
the encoding's public description (protobuf.dev, "Encoding"). Groups, which proto2 has given up, are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_VARINT_BYTES = 10
MAX_FIELDS = 200_000
"""Fields of one file: 20 times those of a CogVLM2, whose optimizer may be in it too, and a third of a second's walk."""


class WireError(Exception):
    """Bytes that are no field; the caller says of which file."""


class Field(NamedTuple):
    """One field: its number, and its value or where its bytes lie."""

    number: int
    wire: int
    """VARINT, FIXED64, BYTES or FIXED32."""
    value: int
    """Of a VARINT."""
    start: int
    stop: int
    """First byte of the content, and the one behind its last."""


class Walk:
    """The fields of a buffer, found one after the other; `MAX_FIELDS` bounds all walks through it together."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.left = MAX_FIELDS

    def fields(self, start: int, stop: int, *, may_pass_the_end: bool = False) -> Iterator[Field]:
        """Give the fields from `start` to `stop`, in order.

        With `may_pass_the_end` a last field of bytes whose length passes the end is given too, so that the caller can
        look what it was to be.

        Raises:
            WireError: damaged, cut off, or too many.
        """
        position = start
        while position < stop:
            self.left -= 1
            if self.left < 0:
                raise WireError(f"more than {MAX_FIELDS} fields, byte {position}")
            key, begin = self.varint(position, stop)
            number, wire = key >> 3, key & 7
            value, end = 0, begin
            if number == 0:
                raise WireError(f"a field of number 0 at byte {position}")
            if wire == VARINT:
                value, end = self.varint(begin, stop)
            elif wire == BYTES:
                length, begin = self.varint(begin, stop)
                end = begin + length
            elif wire in (FIXED64, FIXED32):
                end = begin + (8 if wire == FIXED64 else 4)
            else:
                raise WireError(f"a field of the unknown kind {wire} at byte {position}")
            if end > stop and not (may_pass_the_end and wire == BYTES):
                raise WireError(f"a field at byte {position} that ends {end - stop} bytes after what holds it")
            yield Field(number, wire, value, begin, end)
            position = end

    def varint(self, position: int, stop: int) -> tuple[int, int]:
        """Give a whole number of up to 64 bits, and the position behind it.

        Raises:
            WireError: cut off, or longer than ten bytes.
        """
        value, begin = 0, position
        for shift in range(0, 7 * MAX_VARINT_BYTES, 7):
            if position >= stop:
                raise WireError(f"a number at byte {begin} that is cut off")
            byte = self.data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, position
        raise WireError(f"a number of more than {MAX_VARINT_BYTES} bytes at byte {begin}")

    def numbers(self, field: Field) -> list[int]:
        """Give the numbers of one field of whole numbers with a sign, packed or not.

        Raises:
            WireError: another kind of field, or too many.
        """
        if field.wire == VARINT:
            return [signed(field.value)]
        if field.wire != BYTES:
            raise WireError(f"a field of kind {field.wire} at byte {field.start} where whole numbers belong")
        found: list[int] = []
        position = field.start
        while position < field.stop:
            self.left -= 1
            if self.left < 0:
                raise WireError(f"more than {MAX_FIELDS} numbers, byte {position}")
            value, position = self.varint(position, field.stop)
            found.append(signed(value))
        return found

    def text(self, field: Field, most: int) -> str:
        """Give the text of a field.

        Raises:
            WireError: no text, or longer than `most` bytes.
        """
        if field.wire != BYTES or field.stop - field.start > most:
            raise WireError(f"a field at byte {field.start} that is no text of at most {most} bytes")
        try:
            return bytes(self.data[field.start : field.stop]).decode()
        except UnicodeDecodeError as error:
            raise WireError(f"a text at byte {field.start} that is no UTF-8") from error


def signed(value: int) -> int:
    """Read a number of 64 bits as one with a sign: int32 and int64 fields hold negative ones so."""
    return value - (1 << 64) if value >= 1 << 63 else value


def encode_varint(value: int) -> bytes:
    """Encode a whole number of up to 64 bits; a negative one takes ten bytes."""
    value &= 0xFFFFFFFFFFFFFFFF
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def encode_number(number: int, value: int) -> bytes:
    """Encode a field that holds a whole number."""
    return encode_varint(number << 3 | VARINT) + encode_varint(value)


def encode_start(number: int, length: int) -> bytes:
    """Encode what stands before the `length` bytes of a field of bytes, a text or a message."""
    return encode_varint(number << 3 | BYTES) + encode_varint(length)


def encode_bytes(number: int, content: bytes) -> bytes:
    """Encode a field of bytes, a text or a message."""
    return encode_start(number, len(content)) + content
