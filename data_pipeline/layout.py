"""Where the pixels of a picture go: sizes before and after, for each way of resizing. Numbers only, no picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sdtrain.config.ingestion import DownloadConfig

Size = tuple[int, int]
"""Width and height in pixels."""

ResizeMode = Literal["center_crop", "keep_ratio", "border", "buckets"]
_MAX_BUCKET_ASPECT = 2.0


def bucket_shapes(image_size: int) -> tuple[Size, ...]:
    """Shapes of about `image_size` squared pixels, from twice as high as wide to twice as wide as high.

    Sides are multiples of 64 pixels (SD's autoencoder and UNet each halve three times), or of a quarter of `image_size`
    where that is less; each short side goes with the long side that comes nearest in area.
    """
    step = min(64, max(8, image_size // 4 // 8 * 8))
    pairs = [(short, round(image_size**2 / short / step) * step) for short in range(step, image_size + 1, step)]
    near = [(short, long) for short, long in pairs if short <= long <= _MAX_BUCKET_ASPECT * short]
    return tuple(sorted({*near, *((long, short) for short, long in near)}))


def shapes_of(settings: DownloadConfig) -> tuple[Size, ...]:
    """What the download stores pictures as (or fits them to): one square, or the shapes of the buckets."""
    if settings.resize_mode != "buckets":
        return ((settings.image_size, settings.image_size),)
    return settings.bucket_shapes or bucket_shapes(settings.image_size)


def nearest_shape(width: int, height: int, shapes: Sequence[Size]) -> Size:
    """The shape whose aspect ratio is nearest by its logarithm; of equally near ones the first."""
    aspect = math.log(width / height)
    return min(shapes, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the pixels of a picture go.

    Attributes:
        original: Size of the upright picture.
        scaled: Its size after scaling.
        stored: Its size after cutting or padding.
    """

    original: Size
    scaled: Size
    stored: Size

    @property
    def enlarges(self) -> bool:
        """Whether pixels are made up."""
        return self.scaled[0] > self.original[0] or self.scaled[1] > self.original[1]

    @property
    def crop(self) -> list[int]:
        """Left, top, right, bottom of what was kept, in original pixels (rounded down)."""
        kept = [
            min(side, round(side * stored / scaled))
            for side, scaled, stored in zip(self.original, self.scaled, self.stored, strict=True)
        ]
        left, top = ((side - part) // 2 for side, part in zip(self.original, kept, strict=True))
        return [left, top, left + kept[0], top + kept[1]]


def lay_out(original: Size, mode: ResizeMode, shapes: Sequence[Size]) -> Layout:
    """Plan one picture.

    Args:
        original: Size of the upright picture.
        mode: `center_crop` and `buckets` cover the nearest of `shapes` and cut what stands over, `keep_ratio` covers
            the first and cuts nothing, `border` fits into the first and fills up with white.
        shapes: What can be stored; one square in all modes but `buckets`.
    """
    width, height = original
    target = nearest_shape(width, height, shapes)
    choose = min if mode == "border" else max
    scale = choose(target[0] / width, target[1] / height)
    scaled = max(1, round(width * scale)), max(1, round(height * scale))
    return Layout(original, scaled, scaled if mode == "keep_ratio" else target)


def stored_areas(
    sizes: npt.NDArray[np.int64], mode: ResizeMode, shapes: Sequence[Size]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """What `lay_out` says of many pictures at once.

    Args:
        sizes: Width and height of each, above 0, (N, 2).
        mode: As for `lay_out`.
        shapes: As for `lay_out`.

    Returns:
        Pixels of each stored picture, and whether some of them are made up.
    """
    targets = np.array(shapes, np.float64)  # (S, 2)
    aspects = np.log(sizes[:, 0] / sizes[:, 1])[:, None]
    target = targets[np.abs(np.log(targets[:, 0] / targets[:, 1]) - aspects).argmin(1)]  # (N, 2)
    scale = target / sizes
    scaled = np.maximum(1, np.rint(sizes * (scale.min(1) if mode == "border" else scale.max(1))[:, None]))
    return (scaled if mode == "keep_ratio" else target).prod(1), (scaled > sizes).any(1)
