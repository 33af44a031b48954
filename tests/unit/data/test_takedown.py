"""The take-down list: sealed entries, what they mask, and the places of samples in the order."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtrain.data.plan import BucketedOrder, Order
from sdtrain.data.takedown import TAKEDOWN, Takedown, append_entry, read_takedown
from sdtrain.errors import DataError
from tests.takedowns import entry, take_down


def test_a_list_reads_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    assert read_takedown(manifest) == Takedown() and Takedown().sha256 is None
    first, second = entry("a", "b"), entry("c", reason="a letter", requests=("c", "d"))
    append_entry(manifest, first)
    found = append_entry(manifest, second)
    assert read_takedown(manifest) == found == Takedown((first, second))
    assert found.keys == {"a", "b", "c"} and found.sha256 == found.digests[1] != found.digests[0]
    assert found.as_of(found.digests[0]) == Takedown((first,)) and found.as_of("0" * 64) == Takedown()
    text = (tmp_path / TAKEDOWN).read_text()
    assert found.to_json() == text and json.loads(text)["entries"][1]["sha256"] == found.sha256


def test_what_was_asked_of_which_manifest() -> None:
    old, new = ({"manifest.json": {"sha256": sha, "masked": 0}} for sha in ("old", "new"))
    found = Takedown((entry("a", manifests=old), entry("b", manifests=old), entry("a", manifests=new)))
    assert (found.asked("old"), found.pending("old")) == ({"a", "b"}, frozenset())
    assert (found.asked("new"), found.pending("new")) == ({"a"}, {"b"})
    assert found.pending("newer") == {"a", "b"}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "3",
        '{"keys": ["a"]}',
        '{"version": 2, "entries": []}',
        '{"version": 1, "entries": [{"sha256": "0"}]}',
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / TAKEDOWN).write_text(text)
    with pytest.raises(DataError, match=r"takedown.json: not a take-down list of `sdtrain-data takedown` \(\w+Error: "):
        read_takedown(tmp_path / "manifest.json")


def test_changed_entries_are_noticed(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    take_down(manifest, "a")
    take_down(manifest, "b")
    page = json.loads((tmp_path / TAKEDOWN).read_text())
    for change in ({"reason": "another"}, {"keys": []}, {"date": "2020-01-01"}, {"requests": ["a", "c"]}):
        changed = page | {"entries": [page["entries"][0] | change, page["entries"][1]]}
        (tmp_path / TAKEDOWN).write_text(json.dumps(changed))
        with pytest.raises(DataError, match=r"entry 1 of 2 has digest [0-9a-f]{64}, the file says [0-9a-f]{64}"):
            read_takedown(manifest)
    (tmp_path / TAKEDOWN).write_text(json.dumps(page | {"entries": page["entries"][1:]}))
    with pytest.raises(DataError, match="entry 1 of 1 has digest"):
        read_takedown(manifest)
    numbers = page["entries"][0] | {"keys": [1]}
    (tmp_path / TAKEDOWN).write_text(json.dumps(page | {"entries": [numbers]}))
    with pytest.raises(DataError, match="entry 1: requests and keys must be texts"):
        read_takedown(manifest)


def _add(manifest: Path, name: str) -> None:
    for number in range(10):
        take_down(manifest, f"{name}{number}")


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_add, args=(manifest, name)) for name in "xy"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert read_takedown(manifest).keys == {f"{name}{number}" for name in "xy" for number in range(10)}


# The inverse of the order ---------------------------------------------------------------------------------------------


def forward(order: Order | BucketedOrder, end: int) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for position in range(end):
        place = order.sample_at(position)
        found.setdefault((place.shard, place.sample), []).append(position)
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=7).filter(sum),
    st.integers(1, 4),
    st.integers(0, 60),
    st.booleans(),
)
def test_positions_are_the_inverse_of_places(sizes: list[int], window: int, end: int, shuffle: bool) -> None:
    order = Order(shard_sizes=sizes, manifest_sha256="m", seed=1, window_shards=window, shuffle=shuffle)
    every = [(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)]
    expected = {place: [] for place in every} | forward(order, end)
    assert order.positions_of(every, end) == expected
    assert order.positions_of(every[::3], end) == {place: expected[place] for place in every[::3]}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from("abc")), min_size=1, max_size=7),
    st.integers(1, 5),
    st.integers(0, 80),
)
def test_positions_are_the_inverse_of_places_over_buckets(shards: list[tuple[int, str]], batch: int, end: int) -> None:
    shards = [*shards, (3, "a")]
    order = BucketedOrder(
        shard_sizes=[size for size, _ in shards],
        shard_buckets=[bucket for _, bucket in shards],
        batch_size=batch,
        manifest_sha256="m",
        seed=1,
        window_shards=2,
    )
    every = [(shard, sample) for shard, (size, _) in enumerate(shards) for sample in range(size)]
    expected = {place: [] for place in every} | forward(order, end)
    assert order.positions_of(every, end) == expected
