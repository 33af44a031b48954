"""The order: each sample once an epoch, whatever the ranks, the batch and the kills."""

from __future__ import annotations

import hashlib
import pickle
import random
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtrain.data import plan as plan_module
from sdtrain.data.plan import Order, rank_slice
from sdtrain.errors import DataError


def make(sizes: list[int], *, seed: int = 0, window: int = 3, sha: str = "m", shuffle: bool = True) -> Order:
    return Order(shard_sizes=sizes, manifest_sha256=sha, seed=seed, window_shards=window, shuffle=shuffle)


def everything(sizes: list[int]) -> list[tuple[int, int]]:
    return [(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)]


def epoch_of(order: Order, epoch: int) -> list[tuple[int, int]]:
    positions = range(epoch * len(order), (epoch + 1) * len(order))
    return [order.sample_at(position)[1:] for position in positions]


SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@given(sizes=SIZES, window=st.integers(1, 15), seed=st.integers(0, 2**64), epoch=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_every_epoch_holds_every_sample_once(sizes: list[int], window: int, seed: int, epoch: int):
    order = make(sizes, seed=seed, window=window)
    assert sorted(epoch_of(order, epoch)) == everything(sizes)
    assert order.sample_at(epoch * len(order)).epoch == epoch


@given(sizes=SIZES, window=st.integers(1, 15), positions=st.lists(st.integers(0, 200), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_a_position_does_not_depend_on_what_was_asked_before(sizes: list[int], window: int, positions: list[int]):
    used, fresh = make(sizes, window=window), pickle.loads(pickle.dumps(make(sizes, window=window)))
    asked = [used.sample_at(position) for position in positions]
    assert asked == [fresh.sample_at(position) for position in reversed(positions)][::-1]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    window=st.integers(1, 15),
    positions=st.lists(st.integers(0, 200), min_size=1, max_size=10),
)
@settings(max_examples=60, deadline=None)
def test_what_is_brought_ahead_is_what_comes(sizes: list[int], window: int, positions: list[int]):
    """The shards ahead are those of this window and of the next one, whatever the epoch, in the order of need."""
    order = make(sizes, window=window)
    for position in positions:
        windows = [order.window_at(position)]
        end = position
        while len(windows) < 3:
            end += 1
            if order.window_at(end) != windows[-1]:
                windows.append(order.window_at(end))
        first = next(p for p in range(position, -1, -1) if p == 0 or order.window_at(p - 1) != windows[0])
        needed = {order.sample_at(p).shard for p in range(first, end)}
        ahead = order.shards_ahead(position)
        assert needed <= set(ahead)
        assert len(ahead) == len(set(ahead)) <= 2 * window
        current = {order.sample_at(p).shard for p in range(first, end) if order.window_at(p) == windows[0]}
        assert current <= set(ahead[:window])


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, int]]]:
    """A batch size and attempts: (ranks, accumulation, steps until it is killed)."""
    batch_size = draw(st.sampled_from([1, 2, 6, 12, 24, 48]))
    attempts = []
    for _ in range(draw(st.integers(1, 6))):
        world_size = draw(st.sampled_from([n for n in range(1, batch_size + 1) if batch_size % n == 0]))
        rest = batch_size // world_size
        accumulation = draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
        attempts.append((world_size, accumulation, draw(st.integers(0, 7))))
    return batch_size, attempts


@given(sizes=SIZES, window=st.integers(1, 15), history=histories())
@settings(max_examples=100, deadline=None)
def test_kills_and_changes_of_world_size_lose_and_repeat_nothing(
    sizes: list[int], window: int, history: tuple[int, list[tuple[int, int, int]]]
):
    batch_size, attempts = history
    seen: list[int] = []
    step = 0
    for world_size, accumulation, steps in attempts:
        for current in range(step, step + steps):
            ranks = [
                rank_slice(
                    step=current,
                    batch_size=batch_size,
                    world_size=world_size,
                    rank=rank,
                    grad_accum_steps=accumulation,
                    micro_step=micro,
                )
                for rank in range(world_size)
                for micro in range(accumulation)
            ]
            assert {len(positions) for positions in ranks} == {batch_size // world_size // accumulation}
            seen += [position for positions in ranks for position in positions]
        step += steps
    assert seen == list(range(step * batch_size))
    order = make(sizes, window=window)
    places = [order.sample_at(position)[1:] for position in seen]
    for start in range(0, len(places) - len(order) + 1, len(order)):
        assert sorted(places[start : start + len(order)]) == everything(sizes)


def test_a_life_of_kills_over_24_16_48_7_1_64_ranks_is_exact():
    """Each attempt is killed after reading ahead; only steps that were taken count, and the next goes on from there."""
    sizes = [random.Random(shard).randint(90, 110) for shard in range(40)]
    batch_size = 24 * 16 * 7  # 2688: divided by 24, 16, 48, 7, 1 and 64
    taken: dict[int, tuple[int, int]] = {}
    step = 0
    for world_size, steps, read_ahead in [(24, 2, 1), (16, 1, 2), (48, 2, 3), (7, 1, 0), (1, 1, 2), (64, 3, 1)]:
        order = make(sizes, seed=7, window=8)  # a new process
        for current in range(step, step + steps + read_ahead):
            for rank in range(world_size):
                positions = rank_slice(
                    step=current,
                    batch_size=batch_size,
                    world_size=world_size,
                    rank=rank,
                    grad_accum_steps=1,
                    micro_step=0,
                )
                places = {position: tuple(order.sample_at(position)[1:]) for position in positions}
                if current < step + steps:
                    assert not taken.keys() & places.keys()
                    taken |= places
        step += steps
    assert sorted(taken) == list(range(10 * batch_size))
    total = sum(sizes)
    for epoch in range(10 * batch_size // total):
        places = [taken[position] for position in range(epoch * total, (epoch + 1) * total)]
        assert sorted(places) == everything(sizes)
    assert 10 * batch_size // total >= 6


def test_samples_are_mixed_within_windows_of_shards():
    order = make([50] * 12, window=4)
    places = epoch_of(order, 0)
    windows = [places[start : start + 200] for start in range(0, 600, 200)]
    shards = [{shard for shard, _ in window} for window in windows]
    assert [len(window) for window in shards] == [4, 4, 4]
    assert set.union(*shards) == set(range(12))
    assert all(len({shard for shard, _ in window[:40]}) == 4 for window in windows)  # mixed, not one after the other


def test_seed_epoch_manifest_window_and_version_each_change_the_order(monkeypatch: pytest.MonkeyPatch):
    sizes = [20] * 10
    base = epoch_of(make(sizes), 0)
    others = [
        epoch_of(make(sizes, seed=1), 0),
        epoch_of(make(sizes), 1),
        epoch_of(make(sizes, sha="n"), 0),
        epoch_of(make(sizes, window=4), 0),
    ]
    monkeypatch.setattr(plan_module, "ORDER_VERSION", 2)
    others.append(epoch_of(make(sizes), 0))
    assert all(other != base for other in others)
    assert len({tuple(other) for other in others}) == len(others)
    for other in others:
        assert sum(mine == theirs for mine, theirs in zip(base, other, strict=True)) < 20  # not merely somewhere


def test_the_order_is_frozen():
    places = [tuple(make([3, 4, 5], seed=42, window=2).sample_at(position)) for position in range(30)]
    assert places[:3] == [(0, 2, 1), (0, 2, 2), (0, 2, 0)]
    assert (
        hashlib.sha256(repr(places).encode()).hexdigest()
        == "5af2ffb0cb113832925b8ad041244ea0f92fb7e748f48db48f85c5d2f3d519ba"
    )


def test_orders_are_even():
    """Every sample is first equally often: no bias through windows of different sizes within a shard's window."""
    firsts = [make([2, 2, 2], seed=seed, window=3).sample_at(0)[1:] for seed in range(3000)]
    counts = np.array([firsts.count(place) for place in everything([2, 2, 2])])
    assert np.abs(counts - 500).max() < 5 * np.sqrt(500)


def test_validation_keeps_the_manifests_order():
    order = make([2, 0, 3], shuffle=False, window=1)
    assert epoch_of(order, 0) == epoch_of(order, 5) == everything([2, 0, 3])


def test_twelve_million_samples_cost_a_few_windows():
    tracemalloc.start()
    started = time.perf_counter()
    order = make([1000] * 12_000, window=16)
    seen = {order.sample_at(position) for position in (0, 11_999_999, 12_000_000, 40_123_456_789)}
    seconds = time.perf_counter() - started
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(seen) == 4
    assert peak < 8 * 2**20  # 12M ids would be 96 MB
    print(f"four far positions of 12M samples: {1000 * seconds:.1f} ms, peak {peak / 2**20:.1f} MiB")


def test_state_names_what_changed():
    state = make([5, 5], seed=1).state(23)
    assert state["epoch"] == 2
    assert make([5, 5], seed=1).check_state(state) == 23
    with pytest.raises(DataError) as caught:
        make([5, 5], seed=2, sha="other").check_state(state)
    assert str(caught.value).splitlines() == [
        "the checkpoint was made with another order of samples:",
        "  manifest_sha256: the checkpoint has 'm', this run 'other'",
        "  seed: the checkpoint has 1, this run 2",
        "Resume with the same manifest, seed, data.window_shards and version, or start a new run.",
    ]


def test_impossible_orders_are_refused():
    with pytest.raises(ValueError, match="window_shards is 0; at least 1 is needed"):
        make([1], window=0)
    with pytest.raises(DataError, match="the manifest m holds no samples in this split; nothing can be ordered"):
        make([0, 0])
    with pytest.raises(DataError, match="holds no samples"):
        make([])
    with pytest.raises(IndexError, match="position -1: the order starts at 0"):
        make([1]).sample_at(-1)


@pytest.mark.parametrize(("batch_size", "world_size", "accumulation"), [(10, 3, 1), (10, 2, 2), (0, 1, 1), (8, 0, 1)])
def test_batches_that_do_not_divide_are_refused(batch_size: int, world_size: int, accumulation: int):
    with pytest.raises(ValueError, match=rf"batch_size {batch_size} does not divide into {world_size} ranks x"):
        rank_slice(
            step=0, batch_size=batch_size, world_size=world_size, rank=0, grad_accum_steps=accumulation, micro_step=0
        )


@pytest.mark.parametrize(("step", "rank", "micro"), [(-1, 0, 0), (0, 2, 0), (0, -1, 0), (0, 0, 2), (0, 0, -1)])
def test_places_outside_the_run_are_refused(step: int, rank: int, micro: int):
    with pytest.raises(
        ValueError, match=rf"step {step}, rank {rank}, micro_step {micro}: outside of 2 ranks x 2 accum"
    ):
        rank_slice(step=step, batch_size=8, world_size=2, rank=rank, grad_accum_steps=2, micro_step=micro)
