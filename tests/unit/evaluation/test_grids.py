import re

import numpy as np
import pytest
from PIL import ImageFont

from sdtrain.data.captions import clean_caption
from sdtrain.errors import DataError
from sdtrain.evaluation import grids
from sdtrain.evaluation.grids import PADDING, make_grid, wrap_caption


def flat_pictures(count: int, size: int = 128) -> np.ndarray:
    """Pictures of one colour each, (10 i, 20, 30)."""
    pixels = np.zeros((count, size, size, 3), np.uint8)
    pixels[..., 1:] = 20, 30
    pixels[..., 0] = 10 * np.arange(count)[:, None, None]
    return pixels


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("cafe\u0301", "café"),  # NFC
        ("a \u202egniht\u202c b", "a gniht b"),  # right-to-left override
        ("\u2066isolate\u2069 \u200fmark", "isolate mark"),
        ("line\nbreak\tand\r\nmore", "line break and more"),
        ("bell\x07 \x1b[31mred", "bell [31mred"),
        ("zero\u200bwidth \ufeffmark", "zerowidth mark"),
        ("lone \ud800 surrogate", "lone surrogate"),
        ("e\u200b\u0301", "é"),  # composed after the invisible character is gone
        ("\u0915\u094d\u200d\u0937", "\u0915\u094d\u200d\u0937"),  # a joiner spells this word
        ("  spaces  ", "spaces"),
    ],
)
def test_captions_are_cleaned(raw, clean):
    assert clean_caption(raw) == clean
    clean_caption(raw).encode()


def test_pictures_stand_in_reading_order():
    grid = np.asarray(make_grid(flat_pictures(5), columns=3))
    assert grid.shape == (2 * (128 + PADDING) + PADDING, 3 * (128 + PADDING) + PADDING, 3)
    for i in range(5):
        top, left = (PADDING + (i // 3) * (128 + PADDING), PADDING + (i % 3) * (128 + PADDING))
        assert (grid[top : top + 128, left : left + 128] == [10 * i, 20, 30]).all()
    assert (grid[-100:, -100:] == 255).all()  # the empty place
    assert (grid[:PADDING] == 255).all()


def test_no_more_columns_than_pictures():
    assert make_grid(flat_pictures(2), columns=8).width == 2 * (128 + PADDING) + PADDING


def test_small_pictures_are_enlarged_by_a_whole_factor_without_blur():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    grid = np.asarray(make_grid(pixels, columns=1))[PADDING:-PADDING, PADDING:-PADDING]
    assert grid.shape == (112, 112, 3)
    assert (grid == pixels[0].repeat(14, axis=0).repeat(14, axis=1)).all()


def test_captions_are_drawn_under_their_pictures_and_nowhere_else():
    plain, captioned = make_grid(flat_pictures(2), 2), make_grid(flat_pictures(2), 2, captions=["left one", ""])
    below = np.asarray(captioned)[PADDING + 128 : -PADDING]
    assert captioned.height > plain.height
    assert (below[:, :134] < 200).any()
    assert (below[:, 134 + PADDING :] == 255).all()


def test_the_same_grid_for_captions_that_differ_in_invisible_characters():
    first, second = (make_grid(flat_pictures(1), 1, captions=[text]) for text in ("a\u202eb c", "ab  c\u200b"))
    assert first.tobytes() == second.tobytes()


def test_long_captions_wrap_and_end_in_an_ellipsis():
    font = ImageFont.load_default(grids.FONT_SIZE)
    lines = wrap_caption("a yellow handwritten seven on a blue background " * 3, font, 128)
    assert len(lines) == grids.MAX_CAPTION_LINES
    assert lines[-1].endswith("…") and not lines[0].endswith("…")
    assert all(font.getlength(line) <= 128 for line in lines)
    assert font.getlength(wrap_caption("w" * 200, font, 128)[0]) <= 128
    assert wrap_caption("one two", font, 128) == ["one two"]
    assert wrap_caption("", font, 128) == []


@pytest.mark.parametrize(
    ("pixels", "columns", "captions", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), 1, None, "found float32 of shape (2, 8, 8, 3), allowed is uint8"),
        (np.zeros((2, 3, 8, 8), np.uint8), 1, None, "found uint8 of shape (2, 3, 8, 8)"),
        (np.zeros((0, 8, 8, 3), np.uint8), 1, None, "with num >= 1"),
        (flat_pictures(2), 0, None, "columns: found 0, allowed are 1 and more"),
        (flat_pictures(2), 1, ["one"], "captions: found 1 for 2 pictures, give one for each or none"),
    ],
)
def test_what_does_not_fit_is_refused(pixels, columns, captions, message):
    with pytest.raises(DataError, match=re.escape(message)):
        make_grid(pixels, columns, captions)
