"""Perceptual hashes of pictures, and all pairs of them within a Hamming radius without comparing all pairs.

The hash is the pHash of Zauner (2010): the low frequencies of a small grey picture, each above or below their median.
Bits and order are those of the package `imagehash`, so lists that it made can be used.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from PIL import Image

Hashes = npt.NDArray[np.uint64]

HASH_BITS = 64
_LOW = 8  # frequencies of each axis that count
_SIDE = 32
_NOISE = 1e-3  # of transforms of 32 x 32 bytes; without it the bits of a plain picture would be rounding errors
_PAIRS_AT_ONCE = 1 << 20
_SORTING = 20.0  # cost of sorting a hash in comparisons of two


@lru_cache(maxsize=1)
def _cosines() -> Float[np.ndarray, "low side"]:
    """The first rows of the DCT of type II."""
    frequency, place = np.arange(_LOW)[:, None], np.arange(_SIDE)[None, :]
    return 2 * np.cos(np.pi * frequency * (2 * place + 1) / (2 * _SIDE))


def perceptual_hash(picture: Image.Image) -> int:
    """The 64 bits of a picture, the lowest frequency first.

    Source: Zauner 2010, Implementation and Benchmarking of Perceptual Image Hash Functions, section 3.2.1.
    """
    small = picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    low = np.round(_cosines() @ np.asarray(small, np.float64) @ _cosines().T / _NOISE)  # (8, 8)
    bits = low.ravel() > np.median(low)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def hash_of_file(data: bytes) -> int:
    """The perceptual hash of an encoded picture.

    Raises:
        OSError: It cannot be decoded.
    """
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as picture:
        return perceptual_hash(picture)


def hash_text(value: int) -> str:
    """16 hexadecimal digits."""
    return f"{value:016x}"


def band_masks(count: int, radius: int) -> list[int]:
    """Masks such that any two hashes within `radius` are equal under at least one of them.

    The bits are cut into blocks, and each mask leaves `radius` blocks out: so many are all that the differing bits can
    touch. More blocks leave longer keys, which fewer hashes share by chance, but need more masks; the number of blocks
    is the one that costs least for `count` hashes that look like chance.

    Source: Manku, Jain & Das Sarma 2007, Detecting Near-Duplicates for Web Crawling, section 3.
    """

    def cost(blocks: int) -> float:
        pairs = count**2 / 2 ** (HASH_BITS * (blocks - radius) / blocks)
        return math.comb(blocks, radius) * (_SORTING * count + pairs)

    blocks = min(range(radius + 1, HASH_BITS // 2), key=cost)
    ends = [HASH_BITS * index // blocks for index in range(blocks + 1)]
    masks = [(1 << end) - (1 << start) for start, end in pairwise(ends)]
    return [sum(kept) for kept in combinations(masks, blocks - radius)]


def pairs_within(
    left: Hashes, right: Hashes, mask: int, radius: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Positions in `left` and `right` of hashes that are equal under a mask and within a radius, in bounded pieces."""
    keys, order = left & np.uint64(mask), np.argsort(right & np.uint64(mask), kind="stable")
    others = right[order] & np.uint64(mask)
    start = np.searchsorted(others, keys, side="left")
    count = np.searchsorted(others, keys, side="right") - start
    ends = np.cumsum(count)
    first = 0
    while first < len(left):
        done = int(ends[first - 1]) if first else 0
        last = max(int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")), first + 1)
        counts = count[first:last]
        mine = np.repeat(np.arange(first, last), counts)
        within = np.arange(len(mine)) - np.repeat(np.cumsum(counts) - counts, counts)
        theirs = order[start[mine] + within]
        is_near = np.bitwise_count(left[mine] ^ right[theirs]) <= radius
        yield mine[is_near], theirs[is_near]
        first = last
