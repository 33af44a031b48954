"""Bring one picture to its size: decode, turn upright, scale, cut or pad, encode.

Sizes, filters and rounding are those of img2dataset's Resizer, so an upright picture gets the bytes that it would get
there. Beside it this one turns pictures as their EXIF orientation says, and knows the mode `buckets`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipeline.layout import Layout, ResizeMode, Size, lay_out
from data_pipeline.transport_policy import Reason, RefusedError

Pixels = npt.NDArray[np.uint8]

_ORIENTATION = 0x0112
_OUT_OF_MEMORY = ("Insufficient memory", "Failed to allocate", "Unable to allocate")


@dataclass(frozen=True, slots=True)
class Resized:
    """A picture as it is stored.

    Attributes:
        jpeg: The file.
        layout: Sizes.
    """

    jpeg: bytes
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Resizer:
    """Brings pictures to one size, or to one of several.

    Attributes:
        mode: See `lay_out`.
        shapes: What can be stored.
        only_if_bigger: Refuse what would have to be enlarged.
        jpeg_quality: Of the stored files.
    """

    mode: ResizeMode
    shapes: tuple[Size, ...]
    only_if_bigger: bool
    jpeg_quality: int

    def __call__(self, body: bytes | memoryview) -> Resized:
        """Resize one encoded picture.

        Raises:
            RefusedError: With reason undecodable, too_small, too_many_pixels or out_of_memory.
        """
        try:
            return self._resize(body)
        except MemoryError as error:
            raise RefusedError(Reason.OUT_OF_MEMORY, "while decoding") from error
        except cv2.error as error:
            raise _refusal(str(error)) from error

    def _resize(self, body: bytes | memoryview) -> Resized:
        pixels = decode(body)
        layout = lay_out((pixels.shape[1], pixels.shape[0]), self.mode, self.shapes)
        if self.only_if_bigger and layout.enlarges:
            width, height = layout.original
            raise RefusedError(Reason.TOO_SMALL, f"{width}x{height}; stored are {layout.stored}")
        pixels = fit(scale(pixels, layout), layout.stored)
        _, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, self.jpeg_quality])
        return Resized(jpeg.tobytes(), layout)


def _refusal(message: str) -> RefusedError:
    """What an error of OpenCV means."""
    if "CV_IO_MAX_IMAGE" in message:
        return RefusedError(Reason.TOO_MANY_PIXELS, "for OpenCV")
    if any(text in message for text in _OUT_OF_MEMORY):
        return RefusedError(Reason.OUT_OF_MEMORY, "while decoding")
    return RefusedError(Reason.UNDECODABLE, " ".join(message.split())[:200])


def decode(body: bytes | memoryview) -> Pixels:
    """Upright pixels, (height, width) or (height, width, 3) in OpenCV's order; what is transparent lies on white.

    Raises:
        RefusedError: With reason undecodable.
    """
    flags = cv2.IMREAD_UNCHANGED
    decoded, kinds, metadata = cv2.imdecodeWithMetadata(np.frombuffer(body, np.uint8), flags=flags)
    if decoded is None or decoded.dtype != np.uint8:
        raise RefusedError(Reason.UNDECODABLE, "" if decoded is None else f"{decoded.dtype} pixels")
    pixels = cast(Pixels, decoded)
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        pixels = _on_white(pixels)
    exif = [bytes(data) for kind, data in zip(kinds, metadata, strict=True) if kind == cv2.IMAGE_METADATA_EXIF]
    return turn(pixels, orientation(exif[0])) if exif else pixels


def _on_white(pixels: Pixels) -> Pixels:
    """Colours over white by alpha, rounded."""
    alpha = pixels[:, :, 3, np.newaxis]
    return np.rint((alpha / 255 * pixels[..., :3] + 255 - alpha).clip(0, 255)).astype(np.uint8)


def orientation(exif: bytes) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none or the block is damaged."""
    tags = Image.Exif()
    try:
        tags.load(exif)
        value: Any = tags.get(_ORIENTATION)
    except Exception:  # Pillow raises whatever its parser of TIFF meets: struct, syntax, key, value, overflow errors
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def turn(pixels: Pixels, exif_orientation: int) -> Pixels:
    """Pixels as they are meant to be seen. Source: EXIF 2.32, tag 274."""
    if exif_orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if exif_orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if exif_orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def scale(pixels: Pixels, layout: Layout) -> Pixels:
    """Area-averaged when made smaller, Lanczos when enlarged."""
    if layout.scaled == layout.original:
        return pixels
    interpolation = cv2.INTER_LANCZOS4 if layout.enlarges else cv2.INTER_AREA
    return np.asarray(cv2.resize(pixels, layout.scaled, interpolation=interpolation), np.uint8)


def fit(pixels: Pixels, size: Size) -> Pixels:
    """Cut to the middle, and fill up with white around it."""
    height, width = pixels.shape[:2]
    left, top = max(0, (width - size[0]) // 2), max(0, (height - size[1]) // 2)
    pixels = pixels[top : top + size[1], left : left + size[0]]
    across, down = size[0] - pixels.shape[1], size[1] - pixels.shape[0]
    if across == down == 0:
        return pixels
    sides = (down // 2, down - down // 2, across // 2, across - across // 2)
    return np.asarray(cv2.copyMakeBorder(pixels, *sides, cv2.BORDER_CONSTANT, value=(255, 255, 255)), np.uint8)
