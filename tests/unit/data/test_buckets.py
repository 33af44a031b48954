"""Samples of several sizes: one shape a step on all ranks, every sample once an epoch, no tail dropped, no hang."""

from __future__ import annotations

import hashlib
import itertools
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtrain.data.dataset import ShardDataset
from sdtrain.data.loader import train_loader, validation_loader
from sdtrain.data.manifest import Manifest, describe_shard, write_manifest
from sdtrain.data.plan import BucketedOrder, Order, Place, order_of, rank_slice
from sdtrain.data.randomness import normals
from sdtrain.data.shard import ShardWriter
from sdtrain.errors import DataError
from sdtrain.records import Batch, DrawSpec

Shards = list[tuple[str, int]]


def make(shards: Shards, *, batch_size: int, seed: int = 0, window: int = 2, sha: str = "m") -> BucketedOrder:
    return BucketedOrder(
        shard_sizes=[size for _, size in shards],
        shard_buckets=[bucket for bucket, _ in shards],
        batch_size=batch_size,
        manifest_sha256=sha,
        seed=seed,
        window_shards=window,
    )


def sizes_of(shards: Shards) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for bucket, size in shards:
        sizes[bucket] += size
    return +sizes


SHARDS = st.lists(st.tuples(st.sampled_from(["tall", "wide", "square"]), st.integers(0, 9)), min_size=1, max_size=10)
SHARDS = SHARDS.filter(lambda shards: any(size for _, size in shards))


@given(shards=SHARDS, batch_size=st.integers(1, 20), window=st.integers(1, 4), seed=st.integers(0, 2**64))
@settings(max_examples=150, deadline=None)
def test_every_sample_comes_once_in_each_of_its_buckets_epochs(
    shards: Shards, batch_size: int, window: int, seed: int
) -> None:
    order, sizes, epochs = make(shards, batch_size=batch_size, seed=seed, window=window), sizes_of(shards), 4
    assert len(order) == sizes.total()
    num_batches = sum(epochs * size // batch_size for size in sizes.values())
    streams: dict[str, list[Place]] = {bucket: [] for bucket in sizes}
    for batch in range(num_batches):
        places = [order.sample_at(batch * batch_size + offset) for offset in range(batch_size)]
        (bucket,) = {shards[place.shard][0] for place in places}  # a global batch is of one bucket
        streams[bucket] += places
    for bucket, size in sizes.items():
        stream = streams[bucket]
        assert len(stream) == epochs * size // batch_size * batch_size, "what is left is less than a batch"
        everything = sorted(
            (at, one) for at, (name, count) in enumerate(shards) if name == bucket for one in range(count)
        )
        for epoch in range(len(stream) // size):
            seen = stream[epoch * size : (epoch + 1) * size]
            assert sorted(place[1:] for place in seen) == everything
            assert {place.epoch for place in seen} == {epoch}
        tail = [place[1:] for place in stream[len(stream) // size * size :]]
        assert len(set(tail)) == len(tail), "the epoch that has begun repeats nothing either"


@given(shards=SHARDS, batch_size=st.integers(1, 20), positions=st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
@settings(max_examples=80, deadline=None)
def test_a_position_does_not_depend_on_what_was_asked_before(
    shards: Shards, batch_size: int, positions: list[int]
) -> None:
    used = make(shards, batch_size=batch_size)
    fresh = pickle.loads(pickle.dumps(make(shards, batch_size=batch_size)))
    asked = [used.sample_at(position) for position in positions]
    assert asked == [fresh.sample_at(position) for position in reversed(positions)][::-1]


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, int]]]:
    """A batch size and attempts: (ranks, accumulation, steps until it is killed)."""
    batch_size = draw(st.sampled_from([1, 2, 6, 12, 24]))
    attempts = []
    for _ in range(draw(st.integers(1, 5))):
        world_size = draw(st.sampled_from([n for n in range(1, batch_size + 1) if batch_size % n == 0]))
        rest = batch_size // world_size
        accumulation = draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
        attempts.append((world_size, accumulation, draw(st.integers(0, 7))))
    return batch_size, attempts


@given(shards=SHARDS, history=histories())
@settings(max_examples=100, deadline=None)
def test_all_ranks_see_one_bucket_a_step_whatever_the_kills(
    shards: Shards, history: tuple[int, list[tuple[int, int, int]]]
) -> None:
    batch_size, attempts = history
    seen: list[Place] = []
    step = 0
    for world_size, accumulation, steps in attempts:
        order = make(shards, batch_size=batch_size)  # every attempt starts anew
        for current in range(step, step + steps):
            parts = [
                [
                    order.sample_at(position)
                    for position in rank_slice(
                        step=current,
                        batch_size=batch_size,
                        world_size=world_size,
                        rank=rank,
                        grad_accum_steps=accumulation,
                        micro_step=micro,
                    )
                ]
                for rank in range(world_size)
                for micro in range(accumulation)
            ]
            assert {len(part) for part in parts} == {batch_size // world_size // accumulation}
            assert len({shards[place.shard][0] for part in parts for place in part}) == 1
            seen += [place for part in parts for place in part]
        step += steps
    straight = make(shards, batch_size=batch_size)
    assert seen == [straight.sample_at(position) for position in range(step * batch_size)]


@given(shards=SHARDS, batch_size=st.integers(1, 12), position=st.integers(0, 300))
@settings(max_examples=80, deadline=None)
def test_what_is_brought_ahead_holds_the_next_batches(shards: Shards, batch_size: int, position: int) -> None:
    order = make(shards, batch_size=batch_size)
    ahead = order.shards_ahead(position)
    assert order.sample_at(position).shard in ahead
    assert len(ahead) == len(set(ahead))
    following = position
    while order.window_at(following) == order.window_at(position) and following < position + 300:
        assert order.sample_at(following).shard in ahead
        following += 1
    assert {shards[shard][0] for shard in ahead if shards[shard][1]} == set(sizes_of(shards)), "of every bucket"


def test_batches_of_all_buckets_are_mixed() -> None:
    shards: Shards = [("a", 400), ("b", 200), ("c", 100)]
    order = make(shards, batch_size=10)
    buckets = [shards[order.sample_at(batch * 10).shard][0] for batch in range(70)]
    assert Counter(buckets) == {"a": 40, "b": 20, "c": 10}
    runs = [len(list(run)) for _, run in itertools.groupby(buckets)]
    assert max(runs) < 20
    again = [shards[order.sample_at(700 + batch * 10).shard][0] for batch in range(70)]
    assert Counter(again) == Counter(buckets)
    assert again != buckets, "every epoch is mixed anew"


def test_seed_manifest_and_batch_size_each_change_the_order() -> None:
    shards: Shards = [("a", 40), ("b", 40)]
    orders = [
        make(shards, batch_size=4),
        make(shards, batch_size=4, seed=1),
        make(shards, batch_size=4, sha="n"),
        make(shards, batch_size=8),
    ]
    assert len({tuple(order.sample_at(position) for position in range(80)) for order in orders}) == 4


def test_the_order_is_frozen() -> None:
    order = make([("a", 7), ("b", 5), ("a", 6)], batch_size=4, seed=42)
    places = [tuple(order.sample_at(position)) for position in range(60)]
    golden = "8279ff79c4a3ff01ed7ca9e1b4d04cddfa41acd32af8940857ff318f5f9a55c7"
    assert hashlib.sha256(repr(places).encode()).hexdigest() == golden


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 0; at least 1 is needed"):
        make([("a", 1)], batch_size=0)
    with pytest.raises(DataError, match="the manifest m holds no samples in this split; nothing can be ordered"):
        make([("a", 0)], batch_size=1)
    with pytest.raises(IndexError, match="position -1: the order starts at 0"):
        make([("a", 1)], batch_size=1).sample_at(-1)


# With shards --------------------------------------------------------------------------------------------------------

BUCKETS = {"4x4": (4, 4, 26), "2x6": (2, 6, 13), "6x2": (6, 2, 9)}
TOTAL = sum(count for _, _, count in BUCKETS.values())


def write_data(folder: Path) -> Manifest:
    entries, number = [], 0
    for bucket, (height, width, count) in BUCKETS.items():
        for shard, first in enumerate(range(0, count, 5)):
            path = folder / f"{bucket}-{shard}.tar"
            with ShardWriter(path) as writer:
                for _ in range(first, min(first + 5, count)):
                    fields = {
                        "moments.npy": np.full((8, height, width), number, dtype=np.float16),
                        "tokens.npy": np.full(7, number, dtype=np.uint16),
                    }
                    writer.write(f"k{number}", fields)
                    number += 1
            entries.append(describe_shard(path, split="train", folder=folder, bucket=bucket))
    return write_manifest(folder / "manifest.json", entries, fingerprint={})


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_data(tmp_path_factory.mktemp("data"))


def open_data(manifest: Manifest, *, batch_size: int = 8, shuffle: bool = True) -> ShardDataset:
    return ShardDataset(
        manifest=manifest,
        split="train",
        fields={"moments": "moments.npy", "tokens": "tokens.npy"},
        order=order_of(manifest, "train", seed=3, window_shards=2, shuffle=shuffle, batch_size=batch_size),
        seed=3,
        draws=DrawSpec(
            normals={"noise": (4, 4, 4), "noise_offset": (4, 1, 1)}, uniforms=("timestep",), follows="moments"
        ),
        read_retries=0,
    )


def test_a_manifest_knows_the_shapes_of_its_buckets(manifest: Manifest) -> None:
    loaded = Manifest.load(manifest.folder / "manifest.json")
    assert loaded == manifest
    assert loaded.field_shapes == {"tokens.npy": (7,)}
    assert loaded.bucket_shapes == {
        bucket: {"moments.npy": (8, height, width)} for bucket, (height, width, _) in BUCKETS.items()
    }
    assert loaded.buckets("train") == sorted(BUCKETS)
    assert loaded.main_bucket("train") == "4x4"
    assert loaded.shapes_in("2x6") == {"moments.npy": (8, 2, 6), "tokens.npy": (7,)}


def test_one_bucket_is_none(tmp_path: Path) -> None:
    """Data sets of one size keep their order and their manifest's digest, whether the size has a name or not."""
    with ShardWriter(tmp_path / "a.tar") as writer:
        for number in range(9):
            writer.write(f"k{number}", {"moments.npy": np.zeros((8, 2, 2), np.float16)})
    plain, named = (
        write_manifest(
            tmp_path / f"{bucket}.json",
            [describe_shard(tmp_path / "a.tar", split="train", folder=tmp_path, bucket=bucket)],
            fingerprint={},
        )
        for bucket in (None, "2x2")
    )
    assert "bucket" not in plain.path.read_text()
    assert (plain.buckets("train"), named.buckets("train")) == ([None], ["2x2"])
    for manifest in (plain, named):
        assert isinstance(order_of(manifest, "train", seed=3, window_shards=2, batch_size=4), Order)
        assert manifest.shapes_in(manifest.main_bucket("train")) == {"moments.npy": (8, 2, 2)}
    assert plain.sha256 == "83ac4e8860741b5744e9c089f5cbfc02ea88ed748f9c8030f429e2a1eabc0871"


def test_manifests_whose_buckets_do_not_fit_together_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write("k", {"moments.npy": np.zeros((8, 2, 2), np.float16)})
    bare = describe_shard(tmp_path / "a.tar", split="train", folder=tmp_path)
    with pytest.raises(
        DataError, match=r"m.json: shard 'a.tar' has no bucket, other shards have one; all have one or n"
    ):
        write_manifest(tmp_path / "m.json", [bare, manifest.shards[0]], fingerprint={})
    odd = describe_shard(tmp_path / "a.tar", split="train", folder=tmp_path, bucket="2 x 2")
    with pytest.raises(
        DataError, match=r"m.json: shard 'a.tar' has bucket '2 x 2'; use letters, digits, '_', '-', '.'"
    ):
        write_manifest(tmp_path / "m.json", [odd], fingerprint={})
    with pytest.raises(ValueError, match="split 'train' has several buckets: their order needs the batch_size"):
        order_of(manifest, "train", seed=3, window_shards=2)


def test_a_bucket_without_a_field_is_named(tmp_path: Path, manifest: Manifest) -> None:
    shapes = {bucket: shapes for bucket, shapes in manifest.bucket_shapes.items() if bucket != "6x2"}
    lacking = Manifest(manifest.path, manifest.shards, {}, manifest.field_shapes, shapes)
    with pytest.raises(
        DataError, match=r"no shape of field 'moments.npy' of bucket '6x2' in field_shapes, which has \['t"
    ):
        open_data(lacking)


def test_samples_are_drawn_in_their_own_size(manifest: Manifest) -> None:
    dataset = open_data(manifest)
    for position in range(2 * TOTAL):
        sample = dataset[position]
        assert sample.error is None
        assert sample.normals["noise"].shape == (4, *sample.fields["moments"].shape[1:])
        assert sample.normals["noise_offset"].shape == (4, 1, 1)
        np.testing.assert_array_equal(
            sample.normals["noise"], normals(3, "noise", position, (4, *sample.fields["moments"].shape[1:]))
        )
    dataset.close()


def test_a_tombstone_has_its_buckets_shape(tmp_path: Path) -> None:
    manifest = write_data(tmp_path)
    (tmp_path / "2x6-0.tar").unlink()
    dataset = open_data(manifest)
    bad = [sample for sample in map(dataset.__getitem__, range(4 * TOTAL)) if sample.error]
    dataset.close()
    assert {sample.fields["moments"].shape for sample in bad} == {(8, 2, 6)}
    assert {sample.normals["noise"].shape for sample in bad} == {(4, 2, 6)}


def rows(batch: Batch) -> list[tuple[object, ...]]:
    return [
        (
            int(batch.positions[item]),
            batch.keys[item],
            batch.normals["noise"][item].numpy().tobytes(),
            batch.fields["moments"][item].numpy().tobytes(),
        )
        for item in range(len(batch))
    ]


def train(
    manifest: Manifest, start: int, end: int, *, world_size: int, num_workers: int = 0
) -> dict[int, tuple[list, set]]:
    """Samples by position, and the shapes that the ranks saw, of every step."""
    steps: dict[int, tuple[list, set]] = {step: ([], set()) for step in range(start, end)}
    for rank in range(world_size):
        loader = train_loader(
            open_data(manifest),
            start_step=start,
            max_steps=end,
            batch_size=8,
            micro_batch_size=2,
            world_size=world_size,
            rank=rank,
            num_workers=num_workers,
            prefetch=2,
        )
        for step, _, batch in loader:
            steps[step][0].extend(rows(batch))
            steps[step][1].add(tuple(batch.fields["moments"].shape))
    return {step: (sorted(found), shapes) for step, (found, shapes) in steps.items()}


def test_two_ranks_stopped_and_gone_on_with_by_one(manifest: Manifest) -> None:
    """Across the ends of epochs: same samples with the same draws, one shape a step, as many shapes as buckets."""
    end = 4 * TOTAL // 8
    straight = train(manifest, 0, end, world_size=1)
    pieces = train(manifest, 0, 7, world_size=2, num_workers=2) | train(manifest, 7, end, world_size=1, num_workers=1)
    assert pieces == straight
    assert all(len(shapes) == 1 for _, shapes in pieces.values())
    assert {shape for _, shapes in pieces.values() for shape in shapes} == {(2, 8, 4, 4), (2, 8, 2, 6), (2, 8, 6, 2)}
    counts = Counter(row[1] for found, _ in pieces.values() for row in found)
    assert counts.total() == end * 8
    assert set(counts.values()) <= {3, 4, 5}
    assert len(counts) == TOTAL


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_takes_all_buckets_as_they_stand(manifest: Manifest, world_size: int) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        loader = validation_loader(
            open_data(manifest, shuffle=False),
            num_samples=TOTAL,
            batch_size=4,
            world_size=world_size,
            rank=rank,
            num_workers=0,
            prefetch=1,
        )
        for batch in loader:
            assert 1 <= len(batch) <= 4
            seen += batch.positions.tolist()
        loader.close()
    assert seen == list(range(TOTAL))
