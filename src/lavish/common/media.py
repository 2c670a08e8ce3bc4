"""Open an image that somebody else made, safely: limits first, then decoding, then plain RGB.

Here: `MediaLimits`, `open_image` and `image_digest` (the network is in `fetch.py`, formats in `sniff.py`).
The rules answer attacks known from other servers: decompression bombs (sgl-project/sglang#28587), paths and URLs in
requests. It does NOT resize or normalise (the processor does), does not touch Pillow's process-wide settings, and never
puts the content of an image into a message or a log. Pillow is imported on first use.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from .errors import ConfigError, MediaError
from .sniff import FORMATS, describe, is_busywork, is_same_format, sniff, webp_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image
    from PIL.ImageFile import ImageFile

    from .fetch import Fetcher

    ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image

# What Pillow raises on crafted files: wrong lengths, offsets and counts surface as any of these. `Warning` is here for
# programs that turn warnings into errors. DecompressionBombError is a bare Exception, added once Pillow is imported.
_PILLOW_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    MemoryError,
    RecursionError,
    struct.error,
    zlib.error,
    Warning,
)
_ORIENTATION_TAG = 0x0112
_TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 322, 323
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class MediaLimits:
    """Bounds within which an image is opened. The defaults fit photographs and scans, and stop bombs."""

    max_image_bytes: int = 20_000_000
    """Encoded size, bytes; also the most that is downloaded."""
    max_pixels: int = 40_000_000
    """Width times height, checked before decoding (40 megapixels are 160 MB decoded)."""
    max_side: int = 65_535
    """Longest side, pixels: a resize to S x S passes through S columns of this length. JPEG and GIF end here too."""
    timeout_s: float = 10.0
    """Seconds for one URL in all: resolving, connecting, redirects and body together."""
    formats: tuple[str, ...] = FORMATS
    """Allowed formats, judged by content."""

    def __post_init__(self) -> None:
        for name in ("max_image_bytes", "max_pixels", "max_side", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"MediaLimits: {name} must be above 0, found {getattr(self, name)!r}.")
        if unknown := [name for name in self.formats if name not in FORMATS]:
            raise ConfigError(
                f"MediaLimits: formats names {unknown[0]!r}, which lavish does not open; "
                f"choose from {', '.join(FORMATS)}."
            )


DEFAULT_LIMITS = MediaLimits()


def open_image(
    source: ImageSource,
    *,
    limits: MediaLimits = DEFAULT_LIMITS,
    allow_paths: bool = True,
    allow_urls: bool = False,
    exif_rotation: bool = True,
    fetcher: Fetcher | None = None,
) -> Image.Image:
    """Give the image as an independent RGB picture without metadata; the source is never changed.

    `source`: a path, the encoded bytes, a base64 data URL, an open binary file (read from where it stands), a Pillow
    image, or an https URL. Any mode becomes RGB as in the releases, by Pillow's `convert("RGB")`: alpha is dropped and
    not blended, 16-bit grey and float are clipped at 255. Of an animation the first frame is taken.

    Args:
        allow_paths: whether a string may name a file. A server sets it to False for what a request brings.
        allow_urls: whether an https URL may be fetched.
        exif_rotation: turn the picture as its EXIF orientation asks. CogVLM's and CogVLM2's released code does not, so
            False gives their numbers for a photograph with such a tag (a TIFF is turned by Pillow itself either way).
        fetcher: how to fetch, in place of a `Fetcher` made from `limits`.

    Raises:
        MediaError: the source cannot be read, is over a limit, is no allowed image, or is damaged.
    """
    image_class = _image_module().Image
    if isinstance(source, image_class):
        return _to_rgb(source, "the Pillow image", limits, exif_rotation)
    encoded, label = _read(source, limits, allow_paths=allow_paths, allow_urls=allow_urls, fetcher=fetcher)
    with io.BytesIO(encoded) as stream:
        image = _open_encoded(encoded, stream, label, limits)
        return _to_rgb(image, label, limits, exif_rotation)


def image_digest(image: Image.Image) -> str:
    """Hash the decoded pixels to 64 hex digits: equal pictures have equal digests, whatever file they came from.

    Mode, size and palette are hashed with them; metadata are not.
    """
    import hashlib  # it loads OpenSSL, which only this function needs

    digest = hashlib.sha256(f"{image.mode}:{image.width}x{image.height}:".encode())
    if image.mode in ("P", "PA"):
        digest.update(bytes(image.getpalette() or ()))
    digest.update(image.tobytes())
    return digest.hexdigest()


def _image_module():
    from PIL import Image

    return Image


# --- bytes ---


def _read(
    source: object, limits: MediaLimits, *, allow_paths: bool, allow_urls: bool, fetcher: Fetcher | None
) -> tuple[bytes, str]:
    """Give the encoded bytes, within the size limit, and how to call the source in a message."""
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            return _read_data_url(source, limits), "the image in the data URL"
        if _SCHEME.match(source):
            return _read_url(source, limits, allow_urls, fetcher)
    if isinstance(source, (str, os.PathLike)):
        if not allow_paths:
            raise MediaError(
                "This image is named by a path, and paths are not opened here; send it as a data URL (base64)."
            )
        path = os.fspath(source)
        return _read_path(path, limits), f"the image file {_short(path)!r}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        size = memoryview(source).nbytes
        _check_bytes(size, "The image given as bytes", limits)
        return bytes(source), "the image given as bytes"
    if callable(getattr(source, "read", None)):  # binary files have no common base class
        return _read_stream(source, "The open image file", limits), "the open image file"  # type: ignore[arg-type]
    raise MediaError(
        f"An image cannot be opened from {type(source).__name__}; give a path, bytes, a data URL, an open binary file "
        "or a Pillow image (an array becomes one with PIL.Image.fromarray)."
    )


def _read_url(url: str, limits: MediaLimits, allow_urls: bool, fetcher: Fetcher | None) -> tuple[bytes, str]:
    from .fetch import Fetcher, shown_url

    if url[:7].lower() == "file://":
        raise MediaError("A file:// URL is never opened as an image; give the path itself where paths are allowed.")
    if not allow_urls:
        raise MediaError(
            f"The image {shown_url(url)!r} is a URL, and URLs are not fetched here; open it first with "
            "lavish.common.media.open_image(url, allow_urls=True), or give the image as a file or data URL."
        )
    fetcher = fetcher or Fetcher(max_bytes=limits.max_image_bytes, timeout_s=limits.timeout_s)
    encoded = fetcher.fetch(url)
    label = f"the image at {shown_url(url)!r}"
    _check_bytes(len(encoded), _capital(label), limits)
    return encoded, label


def _read_data_url(url: str, limits: MediaLimits) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma or head.split(";")[-1].strip().lower() != "base64":
        raise MediaError(
            "The data URL is not of the form 'data:image/png;base64,....'; only base64 data URLs are read."
        )
    # Base64 makes 4 characters of 3 bytes. Refuse before decoding; line breaks, which some encoders add, are under 4 %.
    _check_bytes(int(len(payload) * 0.72), "The image in the data URL", limits)
    payload = "".join(payload.split()).rstrip("=")
    try:
        encoded = base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters outside ASCII
        raise MediaError(
            f"The data URL holds no valid base64 ({len(payload)} characters); "
            "encode the file's bytes with base64, without URL escapes."
        ) from error
    _check_bytes(len(encoded), "The image in the data URL", limits)
    return encoded


def _read_path(path: str, limits: MediaLimits) -> bytes:
    shown = _short(path)
    handle = _open_path(path, shown)
    try:
        # Ask only now what it is, so that nothing is swapped in between.
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            raise MediaError(f"The image path {shown!r} is a folder; name one image file in it.")
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(f"The image path {shown!r} is a device, pipe or socket; name a regular file.")
        _check_bytes(status.st_size, f"The image file {shown!r}", limits)
        with open(handle, "rb", closefd=False) as file:
            return _read_stream(file, f"The image file {shown!r}", limits)
    finally:
        os.close(handle)


def _open_path(path: str, shown: str) -> int:
    # Without O_NONBLOCK (which Windows lacks) a FIFO would block; O_BINARY is of Windows alone.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    hint = " Base64 text needs 'data:image/png;base64,' before it." if len(path) > 255 else ""
    try:
        return os.open(path, flags)
    except FileNotFoundError as error:
        raise MediaError(f"The image file {shown!r} does not exist (looked from {os.getcwd()!r}).{hint}") from error
    except PermissionError as error:  # Windows answers so for a folder
        kind = "is a folder; name one image file in it" if os.path.isdir(path) else "may not be read by this user"
        raise MediaError(f"The image path {shown!r} {kind}.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no valid file name"
        raise MediaError(f"The image path {shown!r} cannot be opened: {reason}.{hint}") from error


def _read_stream(file: BinaryIO, label: str, limits: MediaLimits) -> bytes:
    """Read to the end, at most one byte beyond the limit."""
    pieces, size = [], 0
    while size <= limits.max_image_bytes:
        try:
            piece = file.read(min(_READ_BYTES, limits.max_image_bytes + 1 - size))
        except (OSError, ValueError) as error:  # ValueError: closed, or a text file with another encoding
            raise MediaError(f"{label} cannot be read: {_reason(error)}.") from error
        if not isinstance(piece, (bytes, bytearray)):
            raise MediaError(f"{label} gives {type(piece).__name__} where bytes are needed; open it with mode 'rb'.")
        if not piece:
            break
        pieces.append(bytes(piece))
        size += len(piece)
    _check_bytes(size, label, limits)
    return b"".join(pieces)


def _check_bytes(size: int, label: str, limits: MediaLimits) -> None:
    if size > limits.max_image_bytes:
        raise MediaError(
            f"{label} has over {limits.max_image_bytes / 1e6:g} MB, the limit (MediaLimits.max_image_bytes); "
            "save it smaller or as JPEG."
        )


# --- pixels ---


def _open_encoded(encoded: bytes, stream: BinaryIO, label: str, limits: MediaLimits) -> ImageFile:
    """Read the header with the one Pillow plugin that the content asks for, and check sizes; no pixel is decoded."""
    if not encoded:
        raise MediaError(f"{_capital(label)} is empty (0 bytes).")
    name = sniff(encoded)
    if name is None or name not in limits.formats:
        raise MediaError(
            f"{_capital(label)} is {describe(encoded)}; allowed are {', '.join(limits.formats)} (judged by content)."
        )
    if name == "WEBP":  # Pillow allocates the whole canvas as soon as it opens one
        _check_size(webp_size(encoded), label, limits)
    if is_busywork(encoded):
        raise MediaError(
            f"{_capital(label)} is a {name} in so many parts that it would block the decoder; save it anew."
        )
    try:
        # Not PIL.Image.open: its bomb check follows a process-wide number and warns; ours follows `limits` and raises.
        image = _plugin(name)(stream)
        _check_size(image.size, label, limits)
        if name == "TIFF":  # a tile is decoded whole, however little of it the picture shows
            tags = image.tag_v2  # type: ignore[attr-defined]
            _check_size((tags.get(_TIFF_TILE_WIDTH, 1), tags.get(_TIFF_TILE_HEIGHT, 1)), label, limits)
    except MediaError:
        raise
    except (*_PILLOW_FAULTS, *_bomb_errors()) as error:
        raise MediaError(
            f"{_capital(label)} is a damaged {name}: {_reason(error)}.{_extension_hint(label, name)}"
        ) from error
    return image


def _to_rgb(image: Image.Image, label: str, limits: MediaLimits, exif_rotation: bool) -> Image.Image:
    """Decode, convert and turn; the result shares nothing with `image`."""
    _check_size(image.size, label, limits)
    try:
        image.load()
        orientation = _orientation(image) if exif_rotation else 1
        if "transparency" in image.info:  # it says nothing about RGB, and Pillow warns where it is a table
            image = image.copy()
            del image.info["transparency"]
        rgb = image.convert("RGB")
    except (*_PILLOW_FAULTS, *_bomb_errors()) as error:
        what = image.format or image.mode
        raise MediaError(
            f"{_capital(label)} cannot be decoded; the {what} is damaged or cut off: {_reason(error)}."
        ) from error
    rgb.info = {}  # above all the EXIF block: opened again, the picture would be turned again
    return _turn(rgb, orientation)


def _orientation(image: Image.Image) -> int:
    """Give the EXIF orientation 1-8, and 1 where the metadata are damaged: they say nothing about the pixels."""
    try:
        found = image.getexif().get(_ORIENTATION_TAG, 1)
    except _PILLOW_FAULTS:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    """Undo an EXIF orientation. Source: Exif 2.3, tag 0x0112; same table as PIL.ImageOps.exif_transpose."""
    transpose = _image_module().Transpose
    method = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_270,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_90,
    }.get(orientation)
    return image if method is None else image.transpose(method)


def _check_size(size: tuple[int, int] | None, label: str, limits: MediaLimits) -> None:
    if size is None:
        raise MediaError(f"{_capital(label)} is damaged: its header gives no size.")
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"{_capital(label)} has no pixels ({width} x {height}).")
    if width * height > limits.max_pixels:
        raise MediaError(
            f"{_capital(label)} has {width} x {height} = {width * height / 1e6:.1f} megapixels, over the limit of "
            f"{limits.max_pixels / 1e6:g} (MediaLimits.max_pixels); make it smaller first."
        )
    if max(width, height) > limits.max_side:
        raise MediaError(
            f"{_capital(label)} has {width} x {height} pixels, and a side over the limit of {limits.max_side} "
            "(MediaLimits.max_side); cut it into pieces."
        )


def _plugin(name: str) -> Callable[[BinaryIO], ImageFile]:
    from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

    plugins: dict[str, Callable[[BinaryIO], ImageFile]] = {
        "PNG": PngImagePlugin.PngImageFile,
        "JPEG": JpegImagePlugin.JpegImageFile,  # not jpeg_factory: of a multi-picture file the first picture is wanted
        "WEBP": WebPImagePlugin.WebPImageFile,
        "BMP": BmpImagePlugin.BmpImageFile,
        "GIF": GifImagePlugin.GifImageFile,
        "TIFF": TiffImagePlugin.TiffImageFile,
    }
    return plugins[name]


def _bomb_errors() -> tuple[type[Exception]]:
    return (_image_module().DecompressionBombError,)


# --- words ---


def _extension_hint(label: str, name: str) -> str:
    extension = os.path.splitext(label.rstrip("'"))[1].lower()
    return (
        "" if is_same_format(extension, name) else f" (Its name ends in {extension!r}, its content begins like {name}.)"
    )


def _short(text: str, max_chars: int = 120) -> str:
    """Cut a name for a message: what is given as a path may be a whole payload."""
    return text if len(text) <= max_chars else f"{text[:40]}... ({len(text)} characters)"


def _reason(error: BaseException) -> str:
    """Put a decoder's complaint on one short line."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 100 else f"{text[:100]}..."


def _capital(label: str) -> str:
    return label[0].upper() + label[1:]
