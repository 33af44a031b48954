"""The picture that may be stored, in every disguise, and bombs."""

from __future__ import annotations

import functools
import gzip
import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

SIDE = 64
Pixels = npt.NDArray[np.uint8]


@functools.cache
def quadrants() -> Pixels:
    """Four colours, so that a turn, a flip or a swapped channel is seen; (SIDE, SIDE, 3)."""
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    half = SIDE // 2
    pixels[:half, :half], pixels[:half, half:] = (200, 40, 40), (40, 180, 60)
    pixels[half:, :half], pixels[half:, half:] = (50, 60, 190), (230, 225, 215)
    return pixels


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(quadrants()).convert(mode)


def grey() -> Pixels:
    """What the picture looks like without its colours."""
    return np.asarray(picture("L").convert("RGB"))


def encoded(image: Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    if image_format == "JPEG":
        options = {"quality": 95, "subsampling": 0, **options}
    image.save(stream, image_format, **options)
    return stream.getvalue()


def jpeg(mode: str = "RGB", **options: Any) -> bytes:
    return encoded(picture(mode), "JPEG", **options)


def png(mode: str = "RGB", **options: Any) -> bytes:
    return encoded(picture(mode), "PNG", **options)


def palette() -> bytes:
    return encoded(picture().quantize(8), "PNG")


def turned(exif_orientation: int, image_format: str = "JPEG") -> bytes:
    """Stored lying, with the EXIF tag that lets viewers show it upright."""
    undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 3: Image.Transpose.ROTATE_180}
    lying = picture().transpose(undo[exif_orientation]) if exif_orientation in undo else picture()
    exif = Image.Exif()
    exif[0x0112] = exif_orientation
    body = encoded(lying, image_format, exif=exif)
    if exif_orientation in undo and image_format == "JPEG":
        upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(body))), np.int16)
        assert np.abs(upright - quadrants()).mean() < 6
    return body


def transparent() -> bytes:
    """Only the upper half is opaque; under the rest lies black."""
    pixels = np.dstack([quadrants(), np.full((SIDE, SIDE), 255, np.uint8)])
    pixels[SIDE // 2 :] = 0
    return encoded(Image.fromarray(pixels), "PNG")


def upper_half_on_white() -> Pixels:
    pixels = quadrants().copy()
    pixels[SIDE // 2 :] = 255
    return pixels


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int, bit_depth: int, color_type: int, data: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def with_png_chunk(body: bytes, name: bytes, data: bytes) -> bytes:
    """A chunk behind IHDR."""
    return body[:33] + png_chunk(name, data) + body[33:]


def with_jpeg_segment(body: bytes, marker: int, data: bytes) -> bytes:
    """A segment behind SOI."""
    return body[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data + body[2:]


def huge_exif() -> bytes:
    """Twelve EXIF segments of 64 KB each, where one is allowed."""
    body = jpeg()
    for _ in range(12):
        body = with_jpeg_segment(body, 0xE1, b"Exif\0\0" + bytes(65_000))
    return body


def png_bomb() -> bytes:
    """400 megapixels in a few dozen kilobytes, all of them really there."""
    return png_of(20_000, 20_000, 1, 0, zlib.compress(bytes(20_000 * 2_501), 9))


@functools.cache
def zeros() -> bytes:
    """100 MB in 100 KB."""
    return zlib.compress(bytes(100_000_000), 9)


def gzip_bomb() -> bytes:
    """1 GB in 1 MB: a hundred members in a row."""
    return gzip.compress(bytes(10_000_000)) * 100


def large_png() -> bytes:
    """16 megapixels in colour."""
    return png_of(4000, 4000, 8, 2, zlib.compress(bytes(4000 * 12_001), 9))


def black() -> Pixels:
    return np.zeros_like(quadrants())


def png_data_bomb() -> bytes:
    """A small picture whose compressed data goes on and on."""
    rows = b"".join(b"\0" + row.tobytes() for row in quadrants())
    return png_of(SIDE, SIDE, 8, 2, zlib.compress(rows + bytes(100_000_000), 9))


def jpeg_bomb() -> bytes:
    """A frame header of 65,500 x 65,500 pixels on a real JPEG."""
    body = bytearray(jpeg())
    frame = body.index(b"\xff\xc0")
    body[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    return bytes(body)


def scan_bomb() -> bytes:
    """A progressive JPEG of 4 megapixels that repeats its last scan 20,000 times: minutes of work in 800 KB."""
    body = encoded(Image.new("RGB", (2000, 2000), "white"), "JPEG", progressive=True)
    scan, end = body.rindex(b"\xff\xda"), body.rindex(b"\xff\xd9")
    return body[:end] + body[scan:end] * 20_000 + body[end:]


def webp_bomb() -> bytes:
    """A canvas of 16,384 x 16,384 pixels."""
    extended = struct.pack("<I", 0) + struct.pack("<I", 16_383)[:3] * 2
    chunks = b"VP8X" + struct.pack("<I", 10) + extended + encoded(picture(), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks


def gif_bomb() -> bytes:
    """A logical screen of 65,535 x 65,535 pixels."""
    body = bytearray(encoded(picture("P"), "GIF"))
    body[6:10] = b"\xff\xff\xff\xff"
    return bytes(body)


def animated(image_format: str) -> bytes:
    return encoded(picture(), image_format, save_all=True, append_images=[ImageOps.invert(picture())])


def sixteen_bit() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 16).save(stream, "PNG")
    return stream.getvalue()
