"""Pictures of many pictures: one grid with a small caption under each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sdtrain.data.captions import clean_caption
from sdtrain.errors import DataError

PADDING = 6
FONT_SIZE = 11
MIN_CELL = 112  # smaller pictures are enlarged by a whole factor, so that a caption fits beside them
MAX_CAPTION_LINES = 3
_PAPER, _INK = (255, 255, 255), (60, 60, 67)


def wrap_caption(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels, broken at spaces; what does not fit in the last line ends in an ellipsis."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < MAX_CAPTION_LINES:
        taken = 1
        while taken < len(words) and font.getlength(" ".join(words[: taken + 1])) <= width:
            taken += 1
        lines.append(" ".join(words[:taken]))
        words = words[taken:]
    if words:
        lines[-1] += "…"
    return [_shortened(line, font, width) for line in lines]


def _shortened(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    stem = line.removesuffix("…")
    while stem and font.getlength(stem + "…") > width:
        stem = stem[:-1]
    return stem + "…"


def check_pixels(pixels: np.ndarray) -> None:
    """Refuse anything but uint8 (num, height, width, 3) with at least one picture.

    Raises:
        DataError: another shape or type.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or len(pixels) == 0:
        raise DataError(
            f"pixels: found {pixels.dtype} of shape {pixels.shape}, "
            "allowed is uint8 (num, height, width, 3) with num >= 1"
        )


def make_grid(pixels: np.ndarray, columns: int, captions: Sequence[str] | None = None) -> Image.Image:
    """One RGB picture of all pictures in reading order, on white.

    Args:
        pixels: (num, height, width, 3) uint8.
        columns: Pictures a row; fewer where there are fewer.
        captions: One a picture, cleaned and wrapped under it; None draws none.

    Raises:
        DataError: pixels of another shape or type, another number of captions, or no column.
    """
    check_pixels(pixels)
    if columns < 1:
        raise DataError(f"columns: found {columns}, allowed are 1 and more")
    if captions is not None and len(captions) != len(pixels):
        raise DataError(f"captions: found {len(captions)} for {len(pixels)} pictures, give one for each or none")
    height, width = pixels.shape[1:3]
    factor = max(1, math.ceil(MIN_CELL / width))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(FONT_SIZE)
    wrapped = [wrap_caption(clean_caption(caption), font, width) for caption in captions or []]
    line_height = FONT_SIZE + 3
    text_height = line_height * max((len(lines) for lines in wrapped), default=0)

    columns = min(columns, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    cell = (width + PADDING, height + text_height + PADDING)
    grid = Image.new("RGB", (columns * cell[0] + PADDING, rows * cell[1] + PADDING), _PAPER)
    draw = ImageDraw.Draw(grid)
    for i, picture in enumerate(pixels):
        left, top = PADDING + (i % columns) * cell[0], PADDING + (i // columns) * cell[1]
        enlarged = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
        grid.paste(enlarged, (left, top))
        for number, line in enumerate(wrapped[i] if wrapped else []):
            draw.text((left, top + height + 1 + number * line_height), line, fill=_INK, font=font)
    return grid
