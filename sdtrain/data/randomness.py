"""Counter-based random numbers: every draw is a pure function of (seed, stream, position).

Nothing here keeps a state, so the same draw comes out in any process, for any number of ranks, workers or devices, and
in any order of asking. The bits are raw Philox4x64-10 output; the transforms are ours, because numpy's distributions
may change between versions while the bit generator's stream may not. Golden values are frozen in the tests.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox); Box & Muller 1958.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt64

_DOMAIN = b"sdtrain.randomness/1"
_WORD_BITS = 64
_COUNTER_WORDS = 3
_UNIT_53 = 2.0**-53


@lru_cache(maxsize=1024)
def _key(seed: int, stream: str) -> int:
    """The 128-bit Philox key of a stream; hashing keeps neighbouring seeds and names unrelated."""
    digest = hashlib.blake2b(b"\0".join((_DOMAIN, str(seed).encode(), stream.encode())), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def _bits(seed: int, stream: str, counter: tuple[int, ...], count: int) -> UInt64[np.ndarray, " count"]:
    """Raw output for up to three counter words; the fourth, lowest word runs inside the draw."""
    if len(counter) > _COUNTER_WORDS:
        raise ValueError(f"random counter {counter}: {len(counter)} words given, at most {_COUNTER_WORDS} are allowed")
    if any(word < 0 or word.bit_length() > _WORD_BITS for word in counter):
        raise ValueError(f"random counter {counter} of stream {stream!r}: every word must be in [0, 2**64)")
    packed = sum(int(word) << (_WORD_BITS * place) for place, word in enumerate(counter, start=1))
    return np.random.Philox(key=_key(seed, stream), counter=packed).random_raw(count)


def philox_bits(seed: int, stream: str, position: int, count: int) -> UInt64[np.ndarray, " count"]:
    """Raw 64-bit words; a longer draw begins with the shorter one.

    Args:
        seed: Any integer; the run's seed.
        stream: Name of what is drawn; different names give unrelated words.
        position: Global position in the order of the run, in [0, 2**64).

    Raises:
        ValueError: position is negative or does not fit into 64 bits.
    """
    return _bits(seed, stream, (position,), count)


def uniforms(seed: int, stream: str, position: int, count: int = 1) -> Float64[np.ndarray, " count"]:
    """Uniform draws in [0, 1) on a grid of 2**-53: the upper 53 bits of each raw word."""
    return (philox_bits(seed, stream, position, count) >> np.uint64(11)) * _UNIT_53


def normals(seed: int, stream: str, position: int, shape: tuple[int, ...]) -> Float32[np.ndarray, "*shape"]:
    """Standard normal draws by Box-Muller, computed in float64 and rounded once to float32.

    The last bit of float64 `log`, `cos` and `sin` may differ between CPUs; the rounding hides it all but always.

    Args:
        shape: Shape of the draw of one sample, for example (4, 64, 64).
    """
    count = math.prod(shape)
    pairs = (count + 1) // 2
    grid = philox_bits(seed, stream, position, 2 * pairs) >> np.uint64(11)
    radius = np.sqrt(-2.0 * np.log((grid[:pairs] + np.uint64(1)) * _UNIT_53))  # in (0, 1]: the logarithm is finite
    angle = grid[pairs:] * (2.0 * np.pi * _UNIT_53)
    drawn = np.empty(2 * pairs, dtype=np.float32)
    drawn[:pairs] = radius * np.cos(angle)
    drawn[pairs:] = radius * np.sin(angle)
    return drawn[:count].reshape(shape)


def permutation(seed: int, stream: str, *counter: int, n: int) -> Int64[np.ndarray, " n"]:
    """A permutation of range(n): the stable argsort of n raw words.

    Args:
        counter: One to three words that tell permutations of a stream apart, for example (epoch, window).
    """
    return np.argsort(_bits(seed, stream, counter, n), kind="stable").astype(np.int64, copy=False)
