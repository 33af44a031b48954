from __future__ import annotations

import pickle

import pytest

from sdtrain.data.lru import Lru


def test_the_least_recently_used_value_leaves():
    dropped: list[str] = []
    cache: Lru[int, str] = Lru(2, on_drop=dropped.append)
    for key in (1, 2, 1, 3):
        assert cache.get(key, lambda key=key: f"v{key}") == f"v{key}"
    assert dropped == ["v2"]
    assert cache.get(1, lambda: pytest.fail("made twice")) == "v1"
    cache.clear()
    assert dropped == ["v2", "v3", "v1"]
    assert len(cache) == 0


def test_failures_are_not_kept():
    cache: Lru[int, int] = Lru(1)
    with pytest.raises(ZeroDivisionError):
        cache.get(1, lambda: 1 // 0)
    assert cache.get(1, lambda: 5) == 5


def test_it_pickles():
    cache: Lru[int, int] = Lru(1)
    cache.get(1, lambda: 5)
    assert pickle.loads(pickle.dumps(cache)).get(1, lambda: 6) == 5


def test_no_capacity_is_refused():
    with pytest.raises(ValueError, match="cache capacity 0: at least 1 is needed"):
        Lru(0)


def test_one_value_can_be_dropped():
    dropped: list[str] = []
    cache: Lru[int, str] = Lru(2, on_drop=dropped.append)
    cache.get(1, lambda: "a")
    assert 1 in cache
    cache.discard(1)
    cache.discard(2)
    assert (dropped, 1 in cache, len(cache)) == (["a"], False, 0)
