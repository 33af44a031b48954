"""Bytes that nobody vouches for become values or one clear error."""

from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from PIL import Image

from sdtrain.data.decode import MAX_NPY_HEADER_BYTES, decode, decode_image, decode_npy, encode, image_format
from sdtrain.errors import DataError


def encoded_image(kind: str, image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def gradient(height: int = 5, width: int = 7) -> np.ndarray:
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_lossless_images_come_back_channels_first(kind: str):
    data = encoded_image(kind, Image.fromarray(gradient()), lossless=True)
    pixels = decode("png", data)  # by magic bytes: the name may lie among the three formats
    assert image_format(data) == kind
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, gradient().transpose(2, 0, 1))


def test_jpeg_comes_back_nearly():
    flat = np.full((16, 24, 3), (200, 100, 50), dtype=np.uint8)
    pixels = decode("jpg", encoded_image("JPEG", Image.fromarray(flat), quality=95))
    assert pixels.shape == (3, 16, 24)
    assert np.abs(pixels.astype(int) - flat.transpose(2, 0, 1)).max() <= 3


def test_transparency_lies_over_white():
    layer = np.zeros((1, 2, 4), dtype=np.uint8)
    layer[0, 1] = (10, 20, 30, 255)
    pixels = decode_image(encoded_image("PNG", Image.fromarray(layer)))
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 0, 1].tolist() == [10, 20, 30]


def test_transparent_palette_lies_over_white():
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    pixels = decode_image(encoded_image("PNG", image, transparency=bytes([0, 255])))
    assert pixels[:, 0].T.tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize("mode", ["L", "1", "CMYK"])
def test_other_colour_modes_become_rgb(mode: str):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode_image(encoded_image(kind, Image.new(mode, (8, 8)))).shape == (3, 8, 8)


def test_other_formats_are_refused_whatever_their_name():
    data = encoded_image("GIF", Image.fromarray(gradient()))
    with pytest.raises(DataError, match=r"image starts with b'GIF87a.*'; only JPEG, PNG and WebP are allowed"):
        decode("jpg", data)


def test_large_images_are_refused_by_their_header():
    with pytest.raises(DataError, match=r"PNG image has 9000 x 9000 pixels; at most 67108864 are allowed"):
        decode_image(png_claiming(9000, 9000))
    with pytest.raises(DataError, match=r"PNG image has 7 x 5 pixels; at most 34 are allowed"):
        decode_image(encoded_image("PNG", Image.fromarray(gradient())), max_pixels=34)
    assert decode_image(encoded_image("PNG", Image.fromarray(gradient())), max_pixels=35).shape == (3, 5, 7)


def test_a_decompression_bomb_is_a_data_error():
    with pytest.raises(DataError, match=r"PNG image cannot be decoded: DecompressionBombError"):
        decode_image(png_claiming(60000, 60000))


def test_animations_are_refused():
    frames = [Image.fromarray(gradient()), Image.fromarray(255 - gradient())]
    data = encoded_image("WEBP", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=r"WEBP image has 2 frames; one is allowed"):
        decode_image(data)


def test_odd_colour_modes_are_refused():
    data = encoded_image("PNG", Image.fromarray(np.zeros((2, 2), dtype=np.uint16)))
    with pytest.raises(DataError, match=r"PNG image has colour mode 'I;16'; allowed are"):
        decode_image(data)


def test_cut_off_images_are_refused():
    data = encoded_image("JPEG", Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))
    with pytest.raises(DataError, match=r"JPEG image cannot be decoded: OSError"):
        decode_image(data[: len(data) // 2])


@given(st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x00\x00\x00WEBP"]), st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_rubbish_is_a_data_error(magic: bytes, rest: bytes):
    with pytest.raises(DataError):
        decode_image(magic + rest)


@given(
    st_numpy.arrays(
        dtype=st.sampled_from(["<f2", "<f4", "<u2", "|i1", "<i8", "|b1"]),
        shape=st_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
    ),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_arrays_come_back(array: np.ndarray, fortran: bool):
    stream = io.BytesIO()
    np.save(stream, np.asfortranarray(array) if fortran else array, allow_pickle=False)
    back = decode("moments.npy", stream.getvalue())
    assert back.dtype == array.dtype
    assert not back.flags.writeable
    np.testing.assert_array_equal(back, array)


def test_pickled_arrays_are_refused_and_never_run():
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    stream = io.BytesIO()
    np.save(stream, np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"array of type object; only plain numbers are allowed"):
        decode_npy(stream.getvalue())
    with pytest.raises(DataError, match=r"not a \.npy array: "):
        decode_npy(pickle.dumps(Trap()))


def test_long_headers_are_refused():
    header = b"\x93NUMPY\x01\x00" + (60000).to_bytes(2, "little") + b" " * 60000
    with pytest.raises(DataError, match=rf"array header of 60010 bytes; at most {MAX_NPY_HEADER_BYTES} are allowed"):
        decode_npy(header)


@pytest.mark.parametrize(
    ("shape", "body", "text"),
    [
        ("(3,)", 4, r"array \(3,\) of float16 needs 6 bytes, found 4"),
        ("(2000000000, 2000000000)", 4, r"needs 8000000000000000000 bytes, found 4"),
        ("(-1, -2)", 4, r"array \(-1, -2\) of float16 needs 4 bytes, found 4"),
    ],
)
def test_wrong_sizes_are_refused_before_memory_is_taken(shape: str, body: int, text: str):
    header = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}}}".encode()
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(body)
    with pytest.raises(DataError, match=text):
        decode_npy(data)


@given(st.binary(max_size=150))
@example(b"")
@example(b"\x93NUMPY\x03\x00\x02\x00{}")
@example(b"\x93NUMPY\x01\x00\x04\x00\xff\xff((")
@settings(max_examples=100, deadline=None)
def test_rubbish_arrays_are_data_errors(rest: bytes):
    for data in (rest, b"\x93NUMPY\x01\x00" + rest):
        with pytest.raises(DataError):
            decode_npy(data)


def test_text_and_json():
    assert decode("txt", "Grüße 日本".encode()) == "Grüße 日本"
    assert decode("json", b'{"a": [1, 2.5]}') == {"a": [1, 2.5]}
    with pytest.raises(DataError, match=r"text is not UTF-8: "):
        decode("txt", b"\xff\xfe")
    with pytest.raises(DataError, match=r"not JSON: "):
        decode("json", b"{")
    with pytest.raises(DataError, match=r"not JSON: "):
        decode("json", b"[" * 200_000)


def test_unknown_endings_are_refused():
    with pytest.raises(DataError, match=r"field 'weights.pyd' cannot be decoded; known endings are \['jpeg', 'jpg'"):
        decode("weights.pyd", b"")


def test_encoding_is_the_inverse_and_canonical():
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    np.testing.assert_array_equal(decode("x.npy", encode("x.npy", array)), array)
    np.testing.assert_array_equal(decode("x.npy", encode("x.npy", array.T)), array.T)
    assert encode("json", {"b": 1, "a": "ü"}) == encode("json", {"a": "ü", "b": 1}) == '{"a":"ü","b":1}'.encode()
    assert encode("txt", "ü") == b"\xc3\xbc"
    assert encode("jpg", b"raw") == b"raw"


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("x.npy", np.array([None]), "array of object"),
        ("jpg", np.zeros(3), "array of float64"),
        ("pyd", {"a": 1}, "dict"),
        ("txt", 3, "int"),
    ],
)
def test_values_that_do_not_fit_are_refused(field: str, value: object, what: str):
    with pytest.raises(DataError, match=rf"field '{field}' cannot hold {what}; allowed are bytes, text for 'txt'"):
        encode(field, value)
