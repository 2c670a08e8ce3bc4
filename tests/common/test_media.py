"""Opening images: every kind of source, every mode, and files that are made to hurt."""

import base64
import contextlib
import io
import os
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from lavish.common.errors import ConfigError, MediaError
from lavish.common.media import MediaLimits, image_digest, open_image

RNG = np.random.default_rng(5)
PICTURE = Image.fromarray(RNG.integers(0, 256, (7, 10, 3), dtype=np.uint8))
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def encode(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def data_url(encoded, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(encoded).decode()}"


def png(width, height, bits, color, rows=b"", extra=b""):
    """A PNG written by hand, so that its header may lie."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", rows) + chunk(b"IEND")


def chunk(kind, data=b""):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff(width, height, tile=None):
    """A grey TIFF of zeros in one strip or in one tile of another size."""
    pixels = zlib.compress(bytes(width * height))
    where = [(273, 1), (279, len(pixels))] if tile is None else [(322, tile), (323, tile), (324, 1), (325, len(pixels))]
    tags = [(256, width), (257, height), (258, 8), (259, 8), (262, 1), (277, 1), *where]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, start if tag in (273, 324) else value) for tag, value in sorted(tags)
    )
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels


def same(image, expected):
    assert (image.mode, image.size) == ("RGB", expected.size)
    assert np.array_equal(np.asarray(image), np.asarray(expected.convert("RGB")))


# --- sources ---


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["path", "string", "bytes", "bytearray", "memoryview", "data URL", "file", "PIL"])
def test_every_source_gives_the_same_picture(tmp_path, format, kind):
    encoded = encode(PICTURE, format)
    path = tmp_path / "picture"
    path.write_bytes(encoded)
    expected = Image.open(io.BytesIO(encoded))
    source = {
        "path": path,
        "string": str(path),
        "bytes": encoded,
        "bytearray": bytearray(encoded),
        "memoryview": memoryview(encoded),
        "data URL": data_url(encoded, "image/anything"),
        "file": io.BytesIO(encoded),
        "PIL": Image.open(io.BytesIO(encoded)),
    }[kind]
    same(open_image(source), expected)


def test_a_lossless_format_gives_the_very_pixels():
    for format in ("PNG", "BMP", "TIFF"):
        same(open_image(encode(PICTURE, format)), PICTURE)


def test_the_source_is_never_changed_or_shared():
    source = PICTURE.copy()
    source.info["transparency"] = b"\0"
    opened = open_image(source)
    opened.putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(np.asarray(source), np.asarray(PICTURE))
    assert source.info == {"transparency": b"\0"}


def test_an_open_file_is_read_from_where_it_stands_and_left_open(tmp_path):
    path = tmp_path / "two"
    path.write_bytes(b"head" + encode(PICTURE))
    with path.open("rb") as file:
        file.seek(4)
        same(open_image(file), PICTURE)
        assert not file.closed
        with pytest.raises(MediaError, match="open image file is empty"):
            open_image(file)


def test_a_text_file_and_a_closed_file_are_told_apart(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("hello")
    with (
        path.open() as text,
        pytest.raises(MediaError, match="gives str where bytes are needed; open it with mode 'rb'"),
    ):
        open_image(text)
    with pytest.raises(MediaError, match="cannot be read: I/O operation on closed file"):
        open_image(text)


@pytest.mark.parametrize("source", [None, 3, np.zeros((2, 2, 3), np.uint8).tolist()])
def test_what_is_no_source_at_all(source):
    with pytest.raises(MediaError, match=f"cannot be opened from {type(source).__name__}; give a path"):
        open_image(source)


def test_data_urls_are_read_as_clients_write_them():
    url = data_url(encode(PICTURE), "image/jpg")
    head, _, payload = url.partition(",")
    wrapped = head + "," + "\n".join(payload[start : start + 76] for start in range(0, len(payload), 76))
    for variant in (url, url.rstrip("="), "DATA:" + url[5:], wrapped, url.replace(";base64", "; charset=x;BASE64")):
        same(open_image(variant, allow_paths=False), PICTURE)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png,rawbytes", "only base64 data URLs"),
        ("data:image/png;base64", "only base64 data URLs"),
        ("data:", "only base64 data URLs"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,SECRET%2BSECRET", "no valid base64"),
        ("data:image/png;base64,SECRETü", "no valid base64"),
        ("data:image/png;base64,A", "no valid base64"),
        ("data:text/html;base64," + base64.b64encode(b"<html>SECRET").decode(), "is an HTML page"),
    ],
)
def test_bad_data_urls(url, message):
    with pytest.raises(MediaError, match=message) as caught:
        open_image(url)
    assert "SECRET" not in str(caught.value)


def test_paths_and_urls_can_be_forbidden(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(PICTURE))
    for source in (path, str(path), "nothing-here"):
        with pytest.raises(MediaError, match="paths are not opened here"):
            open_image(source, allow_paths=False)
    for url in ("https://media.test/a.png?key=1", "http://media.test/a.png", "HTTPS://media.test/a.png"):
        with pytest.raises(MediaError, match="URLs are not fetched here") as caught:
            open_image(url)
        assert "key" not in str(caught.value)
    with pytest.raises(MediaError, match="only https is fetched"):
        open_image("http://media.test/a.png", allow_urls=True)


# --- paths ---


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(MediaError, match=r"cat.png' does not exist \(looked from"):
        open_image(tmp_path / "cat.png")
    with pytest.raises(MediaError, match="is a folder; name one image file"):
        open_image(tmp_path)
    with pytest.raises(MediaError, match="cannot be opened: it is no valid file name"):
        open_image("a\0b")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MediaError, match="cannot be opened: Not a directory"):
        open_image(tmp_path / "file" / "cat.png")


def test_base64_given_as_a_path_is_not_echoed():
    payload = base64.b64encode(encode(PICTURE)).decode() * 10
    with pytest.raises(MediaError, match="Base64 text needs 'data:image/png;base64,' before it") as caught:
        open_image(payload)
    assert len(str(caught.value)) < 250


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs Unix")
def test_pipes_and_devices_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(MediaError, match="is a device, pipe or socket"):
            open_image(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(PICTURE))
    path.chmod(0)
    with pytest.raises(MediaError, match="may not be read by this user"):
        open_image(path)


# --- modes, orientation ---


def sixteen_bit():
    return Image.fromarray(np.array([[0, 100, 255, 256, 65535]], dtype=np.uint16))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "PA", "RGBa"]
)
def test_every_mode_becomes_rgb_as_in_the_release(mode):
    image = PICTURE.convert(mode) if mode not in ("PA", "RGBa", "LAB", "HSV") else Image.new(mode, (3, 2))
    same(open_image(image), image)


def test_alpha_is_dropped_and_not_blended():
    pixels = RNG.integers(0, 256, (7, 10, 4), dtype=np.uint8)
    pixels[..., 3] = 0
    for format in ("PNG", "TIFF"):
        opened = open_image(encode(Image.fromarray(pixels), format))
        assert np.array_equal(np.asarray(opened), pixels[..., :3])


def test_a_palette_with_transparency_loses_the_transparency_alone():
    palette = PICTURE.quantize(16)
    for transparency in (3, bytes(range(0, 256, 16))):  # Pillow warns about the second
        encoded = encode(palette, transparency=transparency)
        assert "transparency" in Image.open(io.BytesIO(encoded)).info
        same(open_image(encoded), palette)
    grey = PICTURE.convert("L")
    same(open_image(encode(grey, transparency=7)), grey)


def test_sixteen_bits_are_clipped_as_in_the_release():
    for format in ("PNG", "TIFF"):
        assert np.asarray(open_image(encode(sixteen_bit(), format)))[0, :, 0].tolist() == [0, 100, 255, 255, 255]


def test_a_cmyk_jpeg_opens():
    encoded = encode(PICTURE.convert("CMYK"), "JPEG")
    same(open_image(encoded), Image.open(io.BytesIO(encoded)))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(format, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(PICTURE, format, exif=exif)
    opened = open_image(encoded)
    same(opened, ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))))
    assert opened.size == (PICTURE.size if orientation < 5 else PICTURE.size[::-1])
    same(open_image(opened), opened)  # nothing is left that turns it again
    same(open_image(Image.open(io.BytesIO(encoded))), opened)


def test_exif_orientation_can_be_left_as_the_release_leaves_it():
    exif = Image.Exif()
    exif[0x0112] = 6
    same(open_image(encode(PICTURE, exif=exif), exif_rotation=False), PICTURE)


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0garbage garbage garbage"]
)
def test_a_damaged_exif_block_is_no_reason_to_fail(exif):
    same(open_image(encode(PICTURE, exif=exif)), PICTURE)


def test_an_orientation_that_is_no_orientation_is_ignored():
    for value in (0, 9, 4711):
        exif = Image.Exif()
        exif[0x0112] = value
        same(open_image(encode(PICTURE, exif=exif)), PICTURE)


# --- extension against content ---


def test_a_wrong_extension_is_no_obstacle(tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(encode(PICTURE, "PNG"))
    same(open_image(path), PICTURE)
    path.write_bytes(encode(PICTURE, "PNG")[:-30])
    with pytest.raises(MediaError, match=r"the PNG is damaged or cut off"):
        open_image(path)
    path.write_bytes(encode(PICTURE, "PNG")[:20])
    with pytest.raises(MediaError, match=r"is a damaged PNG: .*Its name ends in '.jpg', its content begins like PNG"):
        open_image(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"BMW is a car, and this is no bitmap at all.", "is text, not an image"),
        (b"hello", "is text, not an image"),
        (b"<!DOCTYPE html><html>", "is an HTML page"),
        (b"<?xml version='1.0'?><svg xmlns='x'>", "is an SVG drawing"),
        (b"%PDF-1.7\n", "is a PDF document"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"\0\0\0\x1cftypavif" + bytes(20), "is an AVIF image"),
        (b"\0\0\0\x1cftypheic" + bytes(20), "is a HEIC image"),
        (b"\0\0\0\x1cftypisom" + bytes(20), "is a video"),
        (b"\0\0\x01\0\x01\0" + bytes(20), "is an ICO icon"),
        (b"SIMPLE  =                    T", "is a FITS file"),
        (b"\x80\x81\x82\x83", "of no image format"),
        (b"data:image/png;base64,AAAA", "give it as str"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, content, words):
    path = tmp_path / "cat.png"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=rf"cat.png' is .*{words[3:]}.*allowed are PNG, JPEG.* \(judged by content\)"):
        open_image(path)


def test_formats_that_pillow_opens_and_lavish_does_not():
    for format in ("ICO", "PPM", "TGA", "PCX", "SGI", "JPEG2000", "PDF", "EPS", "DDS"):
        with pytest.raises(MediaError, match=r"judged by content"):
            open_image(encode(PICTURE, format))
    with pytest.raises(MediaError, match="is a GIF image; allowed are PNG, JPEG"):
        open_image(encode(PICTURE, "GIF"), limits=MediaLimits(formats=("PNG", "JPEG")))


# --- sizes and bombs ---


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_extreme_shapes_open(size):
    for format in ("PNG", "BMP", "TIFF", "GIF", "JPEG"):
        image = Image.new("RGB", size, (10, 200, 30))
        assert open_image(encode(image, format)).size == size


def test_a_bomb_png_is_refused_before_decoding():
    rows = zlib.compress(bytes((30000 // 8 + 1) * 1000))  # its header says 30,000 rows
    start = time.process_time()
    with pytest.raises(MediaError, match=r"30000 x 30000 = 900.0 megapixels, over the limit of 40"):
        open_image(png(30000, 30000, 1, 0, rows))
    assert time.process_time() - start < 0.5


def test_a_picture_between_the_limits_of_pillow_and_ours_warns_nobody():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MediaError, match=r"100.0 megapixels, over the limit"):
            open_image(png(10000, 10000, 8, 2))
        huge = MediaLimits(max_pixels=1_000_000_000)
        with pytest.raises(MediaError, match="damaged or cut off"):  # past the check, nothing to decode
            open_image(png(12000, 12000, 1, 0), limits=huge)
    assert Image.MAX_IMAGE_PIXELS == 89478485


@pytest.mark.parametrize("format", FORMATS)
def test_the_pixel_limit_holds_in_every_format(format):
    image = Image.new("L", (60, 50))
    source = encode(image, format)
    assert open_image(source, limits=MediaLimits(max_pixels=3000)).size == (60, 50)
    for each in (source, image):
        with pytest.raises(MediaError, match=r"60 x 50 = 0.0 megapixels, over the limit"):
            open_image(each, limits=MediaLimits(max_pixels=2999))


def test_a_side_limit_protects_the_resize():
    with pytest.raises(MediaError, match=r"a side over the limit of 65535"):
        open_image(png(1, 30_000_000, 1, 0))


def test_webp_canvases_are_checked_before_pillow_allocates_them():
    lossy, lossless = encode(PICTURE, "WEBP"), encode(PICTURE, "WEBP", lossless=True)
    animated = encode(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(180)])
    assert (lossy[12:16], lossless[12:16], animated[12:16]) == (b"VP8 ", b"VP8L", b"VP8X")
    for encoded in (lossy, lossless, animated):
        assert open_image(encoded).size == PICTURE.size
        with pytest.raises(MediaError, match=r"10 x 7"):
            open_image(encoded, limits=MediaLimits(max_pixels=69))
    huge = animated[:24] + b"\xff\x3f\x00\xff\x3f\x00" + animated[30:]
    with pytest.raises(MediaError, match=r"16384 x 16384"):
        open_image(huge)
    with pytest.raises(MediaError, match="its header gives no size"):
        open_image(b"RIFF\x10\0\0\0WEBPJUNK" + bytes(30))


def test_a_tiff_tile_larger_than_the_picture_is_checked():
    assert open_image(tiff(4, 4)).size == (4, 4)
    with pytest.raises(MediaError, match="60000 x 60000"):
        open_image(tiff(4, 4, tile=60000))


def test_a_gif_of_ten_thousand_frames_gives_its_first_in_no_time():
    frame = Image.new("P", (8, 8), 1)
    frame.putpalette([0, 0, 0, 250, 10, 20] + [0] * 762)
    whole = encode(frame, "GIF")
    start = whole.index(b"\x2c")
    encoded = whole[:-1] + whole[start:-1] * 9999 + b"\x3b"
    before = time.process_time()
    opened = open_image(encoded)
    assert time.process_time() - before < 0.5
    assert opened.getcolors() == [(64, (250, 10, 20))]


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (6, 4), color) for color in ((255, 0, 0), (0, 255, 0))]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        red, green, blue = open_image(encode(frames[0], format, save_all=True, append_images=frames[1:])).getpixel(
            (2, 2)
        )
        assert red > 240, format
        assert green < 20, format
        assert blue < 20, format


def test_a_jpeg_of_thousands_of_scans_is_refused():
    encoded = encode(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    last = encoded[encoded.rindex(b"\xff\xda") : -2]
    assert open_image(encoded).size == (64, 64)
    for bomb in (encoded[:-2] + last * 1000 + encoded[-2:], encoded[:2] + b"\xff\xfe\x00\x02" * 10000 + encoded[2:]):
        with pytest.raises(MediaError, match="JPEG in so many parts"):
            open_image(bomb)
    for filling in (b"\xff", b"\xff\x00", b"\xff\xd8"):
        before = time.process_time()
        with pytest.raises(MediaError, match="JPEG in so many parts"):
            open_image(b"\xff\xd8\xff" + filling * 2_000_000)
        assert time.process_time() - before < 0.5


def test_a_png_of_a_hundred_thousand_chunks_is_refused():
    rows = zlib.compress(bytes(4))
    assert open_image(png(3, 1, 8, 0, rows, extra=chunk(b"prVt") * 100)).size == (3, 1)
    with pytest.raises(MediaError, match="PNG in so many parts"):
        open_image(png(3, 1, 8, 0, rows, extra=chunk(b"prVt") * 100_000))


@pytest.mark.parametrize("kind", ["bytes", "path", "file", "data URL"])
def test_the_byte_limit_holds_for_every_source(tmp_path, kind):
    encoded = encode(PICTURE, "BMP")
    path = tmp_path / "a.bmp"
    path.write_bytes(encoded)

    def source():
        return {"bytes": encoded, "path": path, "file": io.BytesIO(encoded), "data URL": data_url(encoded)}[kind]

    same(open_image(source(), limits=MediaLimits(max_image_bytes=len(encoded))), PICTURE)
    with pytest.raises(MediaError, match=r"has over .* MB, the limit \(MediaLimits.max_image_bytes\)"):
        open_image(source(), limits=MediaLimits(max_image_bytes=len(encoded) - 1))


def test_an_endless_file_is_not_read_to_the_end():
    class Endless(io.RawIOBase):
        given = 0

        def read(self, size=-1):
            self.given += size
            return bytes(size)

    endless = Endless()
    with pytest.raises(MediaError, match="has over 20 MB"):
        open_image(endless)
    assert endless.given == 20_000_001


# --- damage ---


def test_an_empty_file(tmp_path):
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(MediaError, match=r"The image file '.*empty.png' is empty \(0 bytes\)"):
        open_image(path)
    with pytest.raises(MediaError, match="is empty"):
        open_image(b"")


@pytest.mark.parametrize("format", FORMATS)
def test_a_cut_file_is_refused_wherever_it_is_cut(format):
    encoded = encode(Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)), format)
    # The last bytes of some formats are an end mark that says nothing about the pixels.
    for share in (0.02, 0.1, 0.5, 0.9):
        with pytest.raises(MediaError):
            open_image(encoded[: int(len(encoded) * share)])


def test_a_truncated_jpeg_says_so(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode(Image.fromarray(RNG.integers(0, 256, (99, 99, 3), dtype=np.uint8)), "JPEG")[:3000])
    with pytest.raises(MediaError, match=r"photo.jpg' cannot be decoded; the JPEG is damaged or cut off: .*truncated"):
        open_image(path)
    with Image.open(path) as lazy, pytest.raises(MediaError, match="The Pillow image cannot be decoded"):
        open_image(lazy)


@pytest.mark.parametrize("format", FORMATS)
def test_random_damage_gives_a_picture_or_a_media_error(format):
    encoded = bytearray(encode(PICTURE.resize((33, 21)), format, **({"save_all": True} if format == "GIF" else {})))
    rng = np.random.default_rng(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow comments on damaged metadata
        for _ in range(150):
            damaged = bytearray(encoded)
            for _ in range(int(rng.integers(1, 6))):
                damaged[int(rng.integers(0, len(damaged)))] = int(rng.integers(0, 256))
            with contextlib.suppress(MediaError):  # any other exception fails the test
                assert open_image(bytes(damaged)).mode == "RGB"


def test_pillow_is_left_as_it_was():
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    open_image(encode(PICTURE))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


def test_many_threads_open_at_once():
    sources = [encode(PICTURE, format) for format in FORMATS] * 4
    expected = [image_digest(open_image(source)) for source in sources]
    found = [None] * len(sources)

    def work(index):
        limits = MediaLimits() if index % 2 else MediaLimits(max_pixels=70)
        found[index] = image_digest(open_image(sources[index], limits=limits))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(sources))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


# --- limits, digest, import ---


@pytest.mark.parametrize("field", ["max_image_bytes", "max_pixels", "max_side", "timeout_s"])
def test_limits_that_allow_nothing_are_refused(field):
    with pytest.raises(ConfigError, match=f"{field} must be above 0, found 0"):
        MediaLimits(**{field: 0})


def test_an_unknown_format_in_the_limits_is_refused():
    with pytest.raises(ConfigError, match=r"formats names 'PSD'.*choose from PNG, JPEG"):
        MediaLimits(formats=("PNG", "PSD"))


def test_the_digest_is_of_the_pixels():
    digest = image_digest(PICTURE)
    assert len(digest) == 64
    assert (
        digest == image_digest(open_image(encode(PICTURE, "PNG"))) == image_digest(open_image(encode(PICTURE, "BMP")))
    )
    changed = PICTURE.copy()
    changed.putpixel((9, 6), (0, 0, 0))
    square = Image.new("L", (4, 9))
    different = [PICTURE, changed, PICTURE.convert("L"), PICTURE.convert("RGBA"), square, square.resize((9, 4))]
    assert len({image_digest(image) for image in different}) == len(different)


def test_the_digest_of_a_palette_image_sees_the_palette():
    first, second = (Image.new("P", (3, 3), 0) for _ in range(2))
    first.putpalette([1, 2, 3])
    second.putpalette([4, 5, 6])
    assert image_digest(first) != image_digest(second)


def test_the_import_is_light():
    code = (
        "import sys, time; start = time.process_time(); import lavish.common.media; print(time.process_time() - start, "
        "[name for name in ('torch', 'numpy', 'PIL', 'ssl', 'http.client') if name in sys.modules])"
    )
    source = Path(__file__).parents[2] / "src"
    times = []
    for _ in range(3):
        run = [sys.executable, "-c", code]
        shown = subprocess.run(
            run, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(source)}
        )
        seconds, modules = shown.stdout.split(" ", 1)
        assert modules.strip() == "[]"
        times.append(float(seconds))
    assert min(times) < 0.05
