"""Pixels: the same as img2dataset's Resizer where it does the same, upright and on white where it does not."""

from __future__ import annotations

import io
import warnings
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.layout import ResizeMode
from data_pipeline.resize import Resizer, _refusal, decode, orientation, turn
from data_pipeline.transport_policy import RefusedError


def picture(size: tuple[int, int], mode: str = "RGB", image_format: str = "JPEG", **options: Any) -> bytes:
    random = np.random.default_rng(size[0])
    cells = random.integers(0, 255, (size[1] // 4 + 1, size[0] // 4 + 1, 4), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(cells).resize(size).convert("RGB" if mode == "CMYK" else mode).convert(mode).save(
        stream, image_format, **options
    )
    return stream.getvalue()


@pytest.fixture(scope="module")
def img2dataset_resizer() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        from img2dataset.resizer import Resizer as Theirs
    return Theirs


def resizer(**changes: Any) -> Resizer:
    return Resizer(
        **{"mode": "center_crop", "shapes": ((32, 32),), "only_if_bigger": False, "jpeg_quality": 95, **changes}
    )


@pytest.mark.filterwarnings("ignore:value is deprecated")  # img2dataset's own call
@pytest.mark.parametrize("mode", ["center_crop", "keep_ratio", "border"])
@pytest.mark.parametrize("size", [(64, 48), (48, 65), (20, 20), (32, 50), (333, 77), (31, 64), (32, 32)])
def test_the_bytes_are_those_of_img2dataset(mode: ResizeMode, size: tuple[int, int], img2dataset_resizer: Any) -> None:
    theirs = img2dataset_resizer(32, mode, False, encode_quality=95)
    for colors, image_format in (("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("RGB", "WEBP")):
        body = picture(size, colors, image_format)
        jpeg, width, height, original_width, original_height, error = theirs(io.BytesIO(body))
        ours = resizer(mode=mode)(body)
        assert error is None
        assert ours.jpeg == jpeg, (colors, image_format)
        assert ours.layout.stored == (width, height)
        assert ours.layout.original == (original_width, original_height)


def test_buckets_store_the_nearest_shape() -> None:
    both = resizer(mode="buckets", shapes=((48, 24), (24, 48)))
    for size, shape in (((200, 110), (48, 24)), ((90, 200), (24, 48))):
        stored = both(picture(size))
        assert stored.layout.stored == shape
        assert Image.open(io.BytesIO(stored.jpeg)).size == shape


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(image_format: str, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    options: dict[str, Any] = {} if image_format == "JPEG" else {"lossless": True}
    body = picture((21, 13), "RGB", image_format, exif=exif, **options)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(body))).convert("RGB"), np.int16)
    ours = decode(body)[:, :, ::-1].astype(np.int16)
    assert ours.shape == upright.shape
    assert np.abs(ours - upright).max() <= (4 if image_format == "JPEG" else 0)


def test_the_layout_is_of_the_upright_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert resizer()(picture((64, 48), exif=exif)).layout.original == (48, 64)


@pytest.mark.parametrize(
    "exif", [b"", b"II", b"Exif\0\0", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 99]
)
def test_damaged_exif_means_upright(exif: bytes) -> None:
    assert orientation(exif) == 1


@pytest.mark.parametrize("value", [0, 9, 99])
def test_senseless_orientations_mean_upright(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert orientation(exif.tobytes()) == 1


def test_turning_is_undone_by_its_inverse() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for there, back in ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 8), (7, 7), (8, 6)):
        assert (turn(turn(pixels, there), back) == pixels).all()


def test_transparency_lies_on_white() -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4] = (10, 20, 30, 255)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    found = decode(stream.getvalue())
    assert found[0, 0].tolist() == [30, 20, 10] and found[7, 7].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\xff\xd8\xff\xe0nothing", "undecodable"),
        (picture((20, 31)), "too_small 20x31; stored are (32, 32)"),
    ],
)
def test_what_cannot_be_stored_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        resizer(only_if_bigger=True)(body)
    assert str(caught.value) == message


def test_pixels_of_more_than_eight_bits_are_refused() -> None:
    _, body = cv2.imencode(".png", np.full((40, 40), 1000, np.uint16))
    with pytest.raises(RefusedError, match="undecodable uint16 pixels"):
        resizer()(body.tobytes())


@pytest.mark.parametrize(
    ("message", "refusal"),
    [
        ("OpenCV(4.14.0) error: (-215) pixels <= CV_IO_MAX_IMAGE_PIXELS in function 'x'", "too_many_pixels for OpenCV"),
        ("OpenCV(4.14.0) error: (-4:Insufficient memory) Failed to allocate 4 bytes", "out_of_memory while decoding"),
        ("OpenCV(4.14.0)\n  error", "undecodable OpenCV(4.14.0) error"),
    ],
)
def test_errors_of_opencv_become_reasons(message: str, refusal: str) -> None:
    assert str(_refusal(message)) == refusal


def test_an_empty_body_is_undecodable() -> None:
    with pytest.raises(RefusedError, match=r"^undecodable"):
        resizer()(b"")


def test_no_memory_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoder(*arguments: Any, **options: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(cv2, "imdecodeWithMetadata", decoder)
    with pytest.raises(RefusedError, match="out_of_memory while decoding"):
        resizer()(picture((64, 48)))
