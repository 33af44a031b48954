"""Format, size and frames of an image from its first bytes, before any decoder sees it.

Only what the pipeline accepts is known here: JPEG, PNG and WebP. Nothing is decompressed and nothing is allocated by
the sizes that a header claims, so a bomb costs no more than its own bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ImageFormat = Literal["jpeg", "png", "webp"]

SNIFF_BYTES = 16
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN, _JPEG_END = 0xDA, 0xD9


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image says of itself.

    Attributes:
        format: By magic bytes, whatever the server's content type says.
        width: In pixels, at least 1.
        height: In pixels, at least 1.
        bit_depth: Bits of one channel.
        animated: Whether it holds more than one frame.
    """

    format: ImageFormat
    width: int
    height: int
    bit_depth: int = 8
    animated: bool = False

    @property
    def pixels(self) -> int:
        """Pixels that a decoder would allocate for one frame."""
        return self.width * self.height


def sniff(first_bytes: bytes) -> ImageFormat | None:
    """The format by the first `SNIFF_BYTES` bytes; None for anything else."""
    if first_bytes.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if first_bytes.startswith(_PNG_SIGNATURE):
        return "png"
    if first_bytes[:4] == b"RIFF" and first_bytes[8:12] == b"WEBP":
        return "webp"
    return None


def read_header(body: bytes) -> ImageHeader:
    """Read the header of a JPEG, PNG or WebP.

    Raises:
        ValueError: Not one of the three formats, or its header is cut off or senseless.
    """
    readers = {"jpeg": _read_jpeg, "png": _read_png, "webp": _read_webp}
    image_format = sniff(body[:SNIFF_BYTES])
    if image_format is None:
        raise ValueError(f"begins with {body[:8]!r}, which is neither JPEG nor PNG nor WebP")
    try:
        header = readers[image_format](body)
    except IndexError as error:
        raise ValueError(f"the {image_format} header is cut off") from error
    if header.width < 1 or header.height < 1:
        raise ValueError(f"the {image_format} header says {header.width}x{header.height} pixels")
    return header


def count_scans(jpeg: bytes) -> int:
    """Upper bound of a JPEG's scans: entropy-coded data never holds the marker, metadata rarely does."""
    return jpeg.count(b"\xff\xda")


def _number(body: bytes, start: int, count: int, order: Literal["big", "little"]) -> int:
    """An unsigned integer; IndexError where the body ends before it."""
    if start + count > len(body):
        raise IndexError(start)
    return int.from_bytes(body[start : start + count], order)


def _read_jpeg(body: bytes) -> ImageHeader:
    """Walk the marker segments up to the frame header. Source: ITU-T T.81, annex B."""
    at = 2
    while True:
        if body[at] != 0xFF:
            raise ValueError(f"the jpeg header holds {body[at]:#04x} at byte {at} where a marker belongs")
        marker = body[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _JPEG_STANDALONE:
            at += 2
        elif marker in _JPEG_FRAMES:
            height, width = _number(body, at + 5, 2, "big"), _number(body, at + 7, 2, "big")
            return ImageHeader("jpeg", width, height, bit_depth=body[at + 4])
        elif marker in (_JPEG_SCAN, _JPEG_END):
            raise ValueError("the jpeg header holds no frame before its first scan")
        else:
            at += 2 + max(2, _number(body, at + 2, 2, "big"))


def _read_png(body: bytes) -> ImageHeader:
    """IHDR, then the chunk names before the data. Source: PNG specification, third edition, 5.6 and 11.3."""
    if body[12:16] != b"IHDR":
        raise ValueError("the png header does not begin with IHDR")
    width, height, bit_depth = _number(body, 16, 4, "big"), _number(body, 20, 4, "big"), body[24]
    at, animated = 8, False
    while at + 8 <= len(body) and (name := body[at + 4 : at + 8]) != b"IDAT":
        animated |= name == b"acTL"
        at += 12 + _number(body, at, 4, "big")
    return ImageHeader("png", width, height, bit_depth, animated)


def _read_webp(body: bytes) -> ImageHeader:
    """The first chunk of the container. Source: RFC 9649, sections 2.5 to 2.7 and 3.4; RFC 6386, section 9.1."""
    chunk = body[12:16]
    if chunk == b"VP8X":
        width, height = _number(body, 24, 3, "little") + 1, _number(body, 27, 3, "little") + 1
        return ImageHeader("webp", width, height, animated=bool(body[20] & 0x02))
    if chunk == b"VP8L":
        packed = _number(body, 21, 4, "little")
        return ImageHeader("webp", (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1)
    if chunk == b"VP8 ":
        return ImageHeader("webp", _number(body, 26, 2, "little") & 0x3FFF, _number(body, 28, 2, "little") & 0x3FFF)
    raise ValueError(f"the webp container begins with chunk {chunk!r}")
