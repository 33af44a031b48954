"""Sizes before and after resizing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.layout import ResizeMode, Size, bucket_shapes, lay_out, nearest_shape, shapes_of, stored_areas
from sdtrain.config.ingestion import DownloadConfig

SQUARE = ((32, 32),)
SIDES = st.integers(1, 3000)


@pytest.mark.parametrize("image_size", [32, 64, 128, 256, 512, 768, 1024])
def test_buckets_have_near_equal_areas_in_steps_that_the_networks_can_halve(image_size: int) -> None:
    shapes = bucket_shapes(image_size)
    step = min(64, image_size // 4)
    assert (image_size, image_size) in shapes
    assert all(width % step == height % step == 0 for width, height in shapes)
    assert all(0.9 <= width * height / image_size**2 <= 1.1 for width, height in shapes)
    assert all(0.5 <= width / height <= 2 for width, height in shapes)
    assert {(height, width) for width, height in shapes} == set(shapes)


def test_the_buckets_of_512_and_1024() -> None:
    assert bucket_shapes(512) == ((384, 704), (448, 576), (512, 512), (576, 448), (704, 384))
    assert bucket_shapes(1024)[:5] == ((768, 1344), (832, 1280), (896, 1152), (960, 1088), (1024, 1024))


@pytest.mark.parametrize(
    ("size", "shape"),
    [((1000, 1000), (512, 512)), ((1200, 1000), (576, 448)), ((1100, 1000), (512, 512)), ((100, 900), (384, 704))],
)
def test_a_picture_goes_to_the_shape_of_the_nearest_aspect_ratio(size: Size, shape: Size) -> None:
    assert nearest_shape(*size, bucket_shapes(512)) == shape


def test_nearness_is_judged_by_the_logarithm() -> None:
    assert nearest_shape(13, 10, ((1, 1), (2, 1))) == (1, 1)  # 1.3: 0.3 and 0.7 away
    assert nearest_shape(145, 100, ((1, 1), (2, 1))) == (2, 1)  # nearer to 1 by difference, to 2 by ratio
    assert math.log(1.45) > math.log(2 / 1.45)


@pytest.mark.parametrize(
    ("original", "mode", "scaled", "stored", "crop"),
    [
        ((64, 48), "center_crop", (43, 32), (32, 32), [8, 0, 56, 48]),
        ((48, 65), "center_crop", (32, 43), (32, 32), [0, 8, 48, 56]),
        ((10, 10), "center_crop", (32, 32), (32, 32), [0, 0, 10, 10]),
        ((64, 48), "keep_ratio", (43, 32), (43, 32), [0, 0, 64, 48]),
        ((64, 48), "border", (32, 24), (32, 32), [0, 0, 64, 48]),
    ],
)
def test_layouts(original: Size, mode: ResizeMode, scaled: Size, stored: Size, crop: list[int]) -> None:
    layout = lay_out(original, mode, SQUARE)
    assert (layout.scaled, layout.stored, layout.crop) == (scaled, stored, crop)


@pytest.mark.parametrize(
    ("original", "mode", "enlarges"),
    [
        ((32, 32), "center_crop", False),
        ((31, 99), "center_crop", True),
        ((31, 99), "border", False),
        ((31, 31), "border", True),
        ((31, 99), "keep_ratio", True),
    ],
)
def test_what_would_have_to_be_enlarged(original: Size, mode: ResizeMode, enlarges: bool) -> None:
    assert lay_out(original, mode, SQUARE).enlarges == enlarges


@given(SIDES, SIDES, st.sampled_from(["center_crop", "buckets"]))
def test_a_scaled_picture_covers_its_shape_by_one_side(width: int, height: int, mode: ResizeMode) -> None:
    shapes = bucket_shapes(512) if mode == "buckets" else ((512, 512),)
    layout = lay_out((width, height), mode, shapes)
    over = [scaled - stored for scaled, stored in zip(layout.scaled, layout.stored, strict=True)]
    assert min(over) == 0 and layout.stored in shapes
    left, top, right, bottom = layout.crop
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_shapes_follow_from_the_settings() -> None:
    assert shapes_of(DownloadConfig(image_size=64)) == ((64, 64),)
    assert shapes_of(DownloadConfig(image_size=64, resize_mode="border")) == ((64, 64),)
    assert shapes_of(DownloadConfig(image_size=64, resize_mode="buckets")) == bucket_shapes(64)
    own = DownloadConfig(resize_mode="buckets", bucket_shapes=((64, 128),))
    assert shapes_of(own) == ((64, 128),)


@pytest.mark.parametrize("mode", ["center_crop", "keep_ratio", "border", "buckets"])
@given(sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=20))
def test_many_pictures_at_once_are_laid_out_like_each(mode: ResizeMode, sizes: list[Size]) -> None:
    shapes = bucket_shapes(64) if mode == "buckets" else SQUARE
    areas, is_enlarged = stored_areas(np.array(sizes, np.int64), mode, shapes)
    plans = [lay_out(size, mode, shapes) for size in sizes]
    assert areas.tolist() == [math.prod(plan.stored) for plan in plans]
    assert is_enlarged.tolist() == [plan.enlarges for plan in plans]
