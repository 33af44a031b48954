"""Bytes of a shard's field -> values, for bytes that nobody vouches for.

No pickle anywhere: arrays are raw numbers behind a capped header, text is UTF-8, images are opened by their magic bytes
and refused by their header's size before a pixel is decoded.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy.lib import format as npy_format
from PIL import Image

from sdtrain.errors import DataError

MAX_PIXELS = 64 * 2**20
"""Largest image that is decoded, height x width."""

MAX_NPY_HEADER_BYTES = 4096
"""Longest array header that is parsed; ours are 118 bytes."""

_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})
_TRANSPARENT_MODES = frozenset({"LA", "PA", "RGBA"})
_NUMBER_KINDS = "biuf"


def image_format(data: bytes) -> str | None:
    """`JPEG`, `PNG` or `WEBP` by the first bytes; None for anything else, whatever its name says."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "3 height width"]:
    """Pixels of a JPEG, PNG or WebP image; transparency is laid over white.

    Args:
        data: The encoded file.
        max_pixels: Largest height x width; checked on the header, before memory is taken for pixels.

    Raises:
        DataError: Not one of the three formats, too large, animated, of an odd colour mode, or damaged.
    """
    found = image_format(data)
    if found is None:
        raise DataError(f"image starts with {data[:8]!r}; only JPEG, PNG and WebP are allowed")
    try:
        with Image.open(io.BytesIO(data), formats=(found,)) as image:
            _check_header(image, found, max_pixels)
            pixels = np.asarray(_as_rgb(image))  # (H, W, 3)
    except DataError:
        raise
    except Exception as error:  # a hostile file makes PIL raise anything; it may cost one sample, never the run
        raise DataError(f"{found} image cannot be decoded: {type(error).__name__}: {error}") from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (3, H, W)


def _check_header(image: Image.Image, found: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(f"{found} image has {width} x {height} pixels; at most {max_pixels} are allowed")
    if found != "JPEG" and getattr(image, "n_frames", 1) > 1:
        raise DataError(f"{found} image has {getattr(image, 'n_frames', 1)} frames; one is allowed")
    if image.mode not in _MODES:
        raise DataError(f"{found} image has colour mode {image.mode!r}; allowed are {sorted(_MODES)}")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _TRANSPARENT_MODES or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


@lru_cache(maxsize=256)
def _npy_layout(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and type from a header; cached, as a shard repeats a few headers."""
    stream = io.BytesIO(header)
    version = npy_format.read_magic(stream)
    readers = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"format version {version}")
    return readers[version](stream, max_header_size=MAX_NPY_HEADER_BYTES)


def decode_npy(data: bytes) -> np.ndarray[Any, np.dtype[Any]]:
    """A read-only array over `data`; plain numbers only, nothing is unpickled.

    Raises:
        DataError: Not an array file, a header that is too long, a type that is not a plain number, or bytes missing.
    """
    width = 4 if data[6:7] == b"\x02" else 2  # the header's length field, by format version
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    if start > MAX_NPY_HEADER_BYTES:
        raise DataError(f"array header of {start} bytes; at most {MAX_NPY_HEADER_BYTES} are allowed")
    try:
        shape, fortran, dtype = _npy_layout(data[:start])
    except Exception as error:  # numpy evaluates the header as a literal: what a hostile one raises is open-ended
        raise DataError(f"not a .npy array: {error}") from error
    if dtype.kind not in _NUMBER_KINDS:
        raise DataError(f"array of type {dtype}; only plain numbers are allowed")
    expected = math.prod(shape) * dtype.itemsize
    if expected != len(data) - start or any(side < 0 for side in shape):
        raise DataError(f"array {shape} of {dtype} needs {expected} bytes, found {len(data) - start}")
    return np.frombuffer(data, dtype=dtype, offset=start).reshape(shape, order="F" if fortran else "C")


def decode_text(data: bytes) -> str:
    """UTF-8 text.

    Raises:
        DataError: Not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"text is not UTF-8: {error}") from error


def decode_json(data: bytes) -> Any:
    """A JSON value.

    Raises:
        DataError: Not JSON, or nested too deeply.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from error


DECODERS: dict[str, Callable[[bytes], Any]] = {
    "jpg": decode_image,
    "jpeg": decode_image,
    "png": decode_image,
    "webp": decode_image,
    "npy": decode_npy,
    "txt": decode_text,
    "json": decode_json,
}
"""By the last part of a field's name: `moments.npy` is decoded as `npy`."""


def decode(field: str, data: bytes) -> Any:
    """Decode by the field's ending.

    Raises:
        DataError: The ending has no decoder, or the bytes are damaged.
    """
    ending = field.rpartition(".")[2]
    if ending not in DECODERS:
        raise DataError(f"field {field!r} cannot be decoded; known endings are {sorted(DECODERS)}")
    return DECODERS[ending](data)


def encode(field: str, value: Any) -> bytes:
    """Encode by the field's ending, the same bytes for the same value.

    Args:
        field: Name in the shard, for example `moments.npy`, `txt`, `json`.
        value: Bytes pass as they are; text for `txt`, an array of numbers for `npy`, anything plain for `json`.

    Raises:
        DataError: The value does not fit the ending.
    """
    ending = field.rpartition(".")[2]
    if isinstance(value, bytes):
        return value
    if ending == "txt" and isinstance(value, str):
        return value.encode("utf-8")
    if ending == "json":
        return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    if ending == "npy" and isinstance(value, np.ndarray) and value.dtype.kind in _NUMBER_KINDS:
        stream = io.BytesIO()
        npy_format.write_array(stream, np.ascontiguousarray(value), version=(1, 0), allow_pickle=False)
        return stream.getvalue()
    what = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise DataError(
        f"field {field!r} cannot hold {what}; allowed are bytes, text for 'txt', "
        "plain values for 'json' and arrays of numbers for 'npy'"
    )
