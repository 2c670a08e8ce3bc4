"""Tell what bytes are from the bytes alone: image formats by their signatures, and what their headers betray.

Sources: the PNG, JPEG (T.81), GIF89a, BMP, TIFF 6.0 and WebP container specifications. Nothing is decoded, and Pillow
is not needed.
"""

from __future__ import annotations

import re

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")

_EXTENSIONS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
_BMP_HEADER_SIZES = (12, 16, 40, 52, 56, 64, 108, 124)
_TIFF_SIGNATURES = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
# What people take for an image that lavish opens. Prefix -> name in a message.
_OTHERS = (
    (b"%PDF-", "a PDF document"),
    (b"\x00\x00\x01\x00", "an ICO icon"),
    (b"8BPS", "a Photoshop document"),
    (b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"SIMPLE  =", "a FITS file"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself (run 'git lfs pull')"),
    (b"data:", "the text of a data URL (give it as str, not as bytes)"),
)
# In scan data FF00 stands for a byte, FFD0-FFD7 are restarts; FFFF fills.
_NEXT_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
# A camera or editor writes about 10 scans and 30 segments; a 20 MB PNG in pieces of 8 KB has 2,500 chunks.
_MAX_JPEG_SCANS, _MAX_JPEG_SEGMENTS, _MAX_JPEG_FILL, _MAX_PNG_CHUNKS = 64, 4096, 65_536, 65_536


def sniff(data: bytes) -> str | None:
    """Give the format's name out of `FORMATS`, or None."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(_TIFF_SIGNATURES):
        return "TIFF"
    if (
        data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADER_SIZES
    ):  # two letters alone also begin a text
        return "BMP"
    return None


def is_same_format(extension: str, name: str) -> bool:
    """Whether a file's extension goes with format `name`; an unknown or absent one contradicts nothing."""
    known = {each for extensions in _EXTENSIONS.values() for each in extensions}
    return extension not in known or extension in _EXTENSIONS[name]


def describe(data: bytes) -> str:
    """Name in a few words what is not an allowed image, without quoting any of it."""
    if name := sniff(data):
        return f"a {name} image"
    for prefix, words in _OTHERS:
        if data.startswith(prefix):
            return words
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        if brand in (b"avif", b"avis"):
            return "an AVIF image"
        return "a HEIC image" if brand in (b"heic", b"heix", b"mif1", b"hevc", b"msf1") else "a video (MP4 family)"
    head = data[:512].lstrip().lower()
    if b"<svg" in head:
        return "an SVG drawing"
    if head.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, not an image"
    printable = sum(32 <= byte < 127 or byte in b"\t\r\n" for byte in data[:512])
    return "text, not an image" if printable == len(data[:512]) else "of no image format that lavish knows"


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Give (width, height) of a WebP file from its first chunk, or None.

    Source: WebP container specification; RFC 6386 section 9.1.
    """
    kind = data[12:16]
    if len(data) < 30:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def is_busywork(data: bytes) -> bool:
    """Whether a JPEG or PNG has so many parts that reading them is the point: seconds to hours for a small file.

    Each scan of a progressive JPEG costs a pass over all pixels (20 ms at 36 megapixels), and 20 MB hold 300,000.
    """
    name = sniff(data)
    return (name == "JPEG" and _has_many_scans(data)) or (name == "PNG" and _has_many_chunks(data))


def _has_many_scans(data: bytes) -> bool:
    """Walk the markers of the first picture in a JPEG file, up to its end or to where it is damaged."""
    scans, segments, position = 0, 0, 2
    while scans <= _MAX_JPEG_SCANS and segments <= _MAX_JPEG_SEGMENTS:
        marker = _NEXT_MARKER.search(data, position)
        start = len(data) if marker is None else marker.start()
        if scans == 0 and start - position > _MAX_JPEG_FILL:
            return True  # Pillow steps through these byte by byte
        if marker is None or marker[1][0] == _EOI:
            return False
        segments += 1
        position = marker.end()
        if marker[1][0] not in (_SOI, _TEM):  # these two have no length after them
            scans += marker[1][0] == _SOS
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
    return True


def _has_many_chunks(data: bytes) -> bool:
    position = 8
    for _ in range(_MAX_PNG_CHUNKS):
        if position + 12 > len(data):
            return False
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return True
