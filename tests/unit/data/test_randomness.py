"""Draws are pure functions of (seed, stream, position); their values are frozen here."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtrain.data.randomness import normals, permutation, philox_bits, uniforms

MASK = (1 << 64) - 1


def philox4x64_10(counter: list[int], key: list[int]) -> list[int]:
    """One block, written out from Salmon et al. 2011: an implementation independent of numpy's."""
    for turn in range(10):
        if turn:
            key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
        first, second = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [
            (second >> 64) ^ counter[1] ^ key[0],
            second & MASK,
            (first >> 64) ^ counter[3] ^ key[1],
            first & MASK,
        ]
    return counter


def test_bits_are_philox_of_hashed_key_and_position():
    digest = hashlib.blake2b(b"sdtrain.randomness/1\x0042\x00noise", digest_size=16).digest()
    key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")]
    expected = philox4x64_10([1, 7, 0, 0], list(key)) + philox4x64_10([2, 7, 0, 0], list(key))
    assert philox_bits(42, "noise", 7, 8).tolist() == expected


def test_golden_values():
    assert philox_bits(42, "noise", 7, 3).tolist() == [
        2155533930210996262,
        14195467227751041850,
        4554739159161841479,
    ]
    assert uniforms(42, "timestep", 7, 2).tolist() == [0.8761289817841917, 0.8877675253723684]
    assert normals(42, "noise", 7, (3,)).tolist() == [0.04019004479050636, 0.2982025444507599, 2.0717344284057617]
    assert permutation(42, "window", 1, 2, n=10).tolist() == [7, 1, 6, 8, 0, 5, 4, 2, 9, 3]
    digest = hashlib.sha256(normals(0, "noise", 0, (4, 8, 8)).tobytes()).hexdigest()
    assert digest == "a9ae3e66c53d2d1ac92110cf0dd4e58ebc4a84fcde849fd0a69853f4265b1da5"


def test_a_position_draws_the_same_whatever_was_drawn_before():
    alone = normals(3, "noise", 11, (4, 5))
    for position in range(20):
        normals(3, "noise", position, (7,))
        uniforms(3, "noise", position)
    np.testing.assert_array_equal(normals(3, "noise", 11, (4, 5)), alone)


@given(seed=st.integers(-(2**70), 2**70), position=st.integers(0, 2**64 - 1), count=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_a_longer_draw_begins_with_the_shorter_one(seed: int, position: int, count: int):
    longer = philox_bits(seed, "s", position, count + 9)
    np.testing.assert_array_equal(longer[:count], philox_bits(seed, "s", position, count))


def test_seed_stream_and_position_all_matter():
    draws = [
        philox_bits(1, "a", 0, 4),
        philox_bits(2, "a", 0, 4),
        philox_bits(1, "b", 0, 4),
        philox_bits(1, "a", 1, 4),
        philox_bits(1, "a", 2**63, 4),
    ]
    assert len({word for draw in draws for word in draw.tolist()}) == 20


def test_normals_are_standard_normal():
    drawn = normals(5, "noise", 0, (400_001,)).astype(np.float64)
    assert drawn.shape == (400_001,)
    assert abs(drawn.mean()) < 0.008
    assert abs(drawn.std() - 1) < 0.006
    assert abs((drawn**4).mean() - 3) < 0.08
    halves = np.corrcoef(drawn[:200_000], drawn[200_001:400_001])[0, 1]
    assert abs(halves) < 0.01
    positions = np.stack([normals(5, "noise", position, (2000,)) for position in range(8)])
    assert np.abs(np.corrcoef(positions) - np.eye(8)).max() < 0.1


def test_extreme_words_stay_finite_and_below_one(monkeypatch: pytest.MonkeyPatch):
    for word in (0, MASK):
        monkeypatch.setattr(
            "sdtrain.data.randomness.philox_bits",
            lambda *_, word=word: np.full(_[3], word, dtype=np.uint64),
        )
        assert 0.0 <= uniforms(0, "t", 0)[0] < 1.0
        assert np.isfinite(normals(0, "n", 0, (4,))).all()


def test_uniforms_fill_the_unit_interval_evenly():
    drawn = np.array([uniforms(9, "timestep", position)[0] for position in range(20_000)])
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    assert drawn.dtype == np.float64
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)


@given(n=st.integers(0, 300), counter=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_permutation_holds_every_number_once(n: int, counter: list[int]):
    order = permutation(1, "window", *counter, n=n)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))


def test_permutations_are_even():
    places = np.array([permutation(1, "window", 0, window, n=6).tolist() for window in range(6000)])
    counts = np.stack([np.bincount(places[:, column], minlength=6) for column in range(6)])
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000 * 5 / 6)


def test_shapes_and_types():
    assert normals(0, "n", 0, ()).shape == ()
    assert normals(0, "n", 0, (3, 1, 5)).shape == (3, 1, 5)
    assert normals(0, "n", 0, (3,)).dtype == np.float32
    assert philox_bits(0, "n", 0, 3).dtype == np.uint64


@pytest.mark.parametrize("position", [-1, 2**64])
def test_positions_outside_64_bits_are_refused(position: int):
    with pytest.raises(ValueError, match=r"of stream 'noise': every word must be in \[0, 2\*\*64\)"):
        normals(0, "noise", position, (2,))


def test_too_many_counter_words_are_refused():
    with pytest.raises(ValueError, match=r"random counter \(1, 2, 3, 4\): 4 words given, at most 3 are allowed"):
        permutation(0, "window", 1, 2, 3, 4, n=5)
