"""Shards that blink, break or lie: what comes back is read, what does not costs its samples, and nothing else moves."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdtrain.data import dataset as dataset_module
from sdtrain.data.dataset import Sample, ShardDataset, retry_waits
from sdtrain.data.loader import train_loader
from sdtrain.data.manifest import Manifest, describe_shard, write_manifest
from sdtrain.data.plan import order_of
from sdtrain.data.shard import ShardWriter, index_path
from sdtrain.records import DrawSpec

NUM_SHARDS, PER_SHARD = 4, 6
TOTAL = NUM_SHARDS * PER_SHARD


def write_data(folder: Path, moments: Callable[[int], np.ndarray] | None = None) -> Manifest:
    entries = []
    for shard in range(NUM_SHARDS):
        path = folder / f"{shard:05d}.tar"
        with ShardWriter(path) as writer:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                value = moments(number) if moments else np.full((8, 2, 2), number, dtype=np.float16)
                writer.write(f"k{number}", {"moments.npy": value})
        entries.append(describe_shard(path, split="train", folder=folder))
    return write_manifest(folder / "manifest.json", entries, fingerprint={})


def make(manifest: Manifest, *, read_retries: int = 6, shuffle: bool = False) -> ShardDataset:
    return ShardDataset(
        manifest=manifest,
        split="train",
        fields={"moments": "moments.npy"},
        order=order_of(manifest, "train", seed=1, window_shards=2, shuffle=shuffle),
        seed=1,
        draws=DrawSpec(normals={"noise": (4, 2, 2)}),
        read_retries=read_retries,
    )


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_data(tmp_path)


@contextmanager
def later(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """Do something beside the block, after a while."""
    timer = threading.Timer(seconds, action)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def whole(samples: list[Sample]) -> bool:
    return all(
        sample.error is None
        and sample.weight == 1
        and sample.key == f"k{number}"
        and bool((sample.fields["moments"] == number).all())
        for number, sample in enumerate(samples)
    )


def read_all(dataset: ShardDataset) -> list[Sample]:
    return [dataset[position] for position in range(TOTAL)]


# What comes back ------------------------------------------------------------------------------------------------------


def test_a_shard_that_vanishes_and_comes_back_costs_no_sample(manifest: Manifest) -> None:
    lost = manifest.folder / "00002.tar"
    hidden = lost.rename(manifest.folder / "hidden")
    with later(0.5, lambda: hidden.rename(lost)):
        assert whole(read_all(make(manifest)))


def test_a_shard_that_is_still_being_copied_is_waited_for(manifest: Manifest) -> None:
    path = manifest.folder / "00001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:700])
    with later(0.4, lambda: path.write_bytes(data)):
        assert whole(read_all(make(manifest)))


def test_a_sidecar_that_is_still_being_copied_is_waited_for(manifest: Manifest) -> None:
    path = index_path(manifest.folder / "00001.tar")
    data = path.read_bytes()
    path.write_bytes(data[:100])
    with later(0.4, lambda: path.write_bytes(data)):
        assert whole(read_all(make(manifest)))


def test_a_shard_that_is_copied_anew_under_an_open_handle_is_waited_for(manifest: Manifest) -> None:
    path = manifest.folder / "00000.tar"
    data = path.read_bytes()
    dataset = make(manifest)
    first = dataset[0]
    os.truncate(path, 0)
    with later(0.4, lambda: path.write_bytes(data)):
        assert whole([first, *(dataset[position] for position in range(1, TOTAL))])


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_handle_gone_stale_is_opened_anew_without_waiting(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A stale handle needs an NFS server, so the kernel's answer is imitated, for the handles of before alone."""
    dataset = make(manifest, read_retries=0)
    first = dataset[0]
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    stale = {int(link.name) for link in links if link.readlink().is_relative_to(manifest.folder)}
    assert len(stale) == 1
    real = os.pread

    def pread(handle: int, size: int, offset: int) -> bytes:
        if handle in stale:
            stale.discard(handle)  # the number may be given out again
            raise OSError(number, os.strerror(number))
        return real(handle, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    started = time.monotonic()
    assert whole([first, *(dataset[position] for position in range(1, TOTAL))])
    assert time.monotonic() - started < 0.1


# What does not --------------------------------------------------------------------------------------------------------


def test_waiting_ends_and_a_lost_shard_is_waited_for_once(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(dataset_module.time, "sleep", waited.append)
    (manifest.folder / "00001.tar").unlink()
    dataset = make(manifest, read_retries=4)
    samples = read_all(dataset)
    assert waited == [0.1, 0.2, 0.4, 0.8], "the first of its samples waits, the others only look"
    assert [sample.error is not None for sample in samples] == [number // PER_SHARD == 1 for number in range(TOTAL)]
    assert {sample.error.shard for sample in samples if sample.error} == {"00001.tar"}


def test_a_shard_that_was_given_up_is_read_again_once_it_is_there(manifest: Manifest) -> None:
    lost = manifest.folder / "00001.tar"
    hidden = lost.rename(manifest.folder / "hidden")
    dataset = make(manifest, read_retries=0)
    assert not whole(read_all(dataset))
    hidden.rename(lost)
    assert whole(read_all(dataset))
    lost.rename(hidden)
    dataset.close()
    with later(0.3, lambda: hidden.rename(lost)):
        assert whole(read_all(make(manifest))), "being back, it is waited for again"


def test_all_waits_together_are_bounded() -> None:
    assert retry_waits(0) == []
    assert sum(retry_waits(6)) == pytest.approx(6.3)
    assert retry_waits(100)[-1] == 10.0


def _outcomes(dataset: ShardDataset, pipe: Any) -> None:
    pipe.send([(sample.key, sample.weight, sample.error) for sample in read_all(dataset)])


def test_another_process_finds_the_same(manifest: Manifest) -> None:
    """One that saw the shards whole, and forks that did not, agree on every sample of the damaged files."""
    dataset = make(manifest, read_retries=0)
    assert whole(read_all(dataset))
    os.truncate(manifest.folder / "00000.tar", 2000)
    (manifest.folder / "00001.tar").write_bytes(b"")
    data = bytearray((manifest.folder / "00002.tar").read_bytes())
    data[700] ^= 1
    (manifest.folder / "00002.tar").write_bytes(data)
    here = [(sample.key, sample.weight, sample.error) for sample in read_all(dataset)]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    fresh = make(manifest, read_retries=0)
    child = multiprocessing.get_context("fork").Process(target=_outcomes, args=(fresh, sender))
    child.start()
    assert receiver.poll(20)
    there = receiver.recv()
    child.join()
    assert there == here
    assert sum(weight == 0 for _, weight, _ in here) == 2 * PER_SHARD + 1


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (np.full((8, 2, 2), np.nan, np.float16), "field 'moments.npy' holds 32 of 32 values that are not finite"),
        (np.full((8, 2, 2), 1e9, np.float32), "field 'moments.npy' holds 32 of 32 values that are not finite"),
        (np.full((8, 2, 2), 1j, np.complex64), "array of type complex64; only plain numbers are allowed"),
        (np.full((8, 2, 3), 0, np.float16), "field 'moments.npy' is (8, 2, 3), the manifest says (8, 2, 2)"),
    ],
)
def test_moments_that_would_poison_a_step_are_a_tombstone(tmp_path: Path, broken: np.ndarray, text: str) -> None:
    def stored(number: int) -> np.ndarray | bytes:
        if number != 8:
            return np.full((8, 2, 2), number, dtype=np.float16)
        target = tmp_path / "value.npy"
        np.save(target, broken)
        return target.read_bytes()  # as a foreign writer would store it

    samples = read_all(make(write_data(tmp_path / "data", stored)))
    (bad,) = [sample for sample in samples if sample.error]
    assert (bad.key, bad.position, bad.weight) == ("k8", 8, 0.0)
    assert bad.error is not None
    assert bad.error.reason.endswith(text)
    assert not bad.fields["moments"].any()
    assert whole(samples[:8])


def test_fractions_are_no_tokens(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "0.tar") as writer:
        writer.write("a", {"tokens.npy": np.full(7, 0.5)})
    entry = describe_shard(tmp_path / "0.tar", split="train", folder=tmp_path)
    manifest = write_manifest(tmp_path / "m.json", [entry], fingerprint={})
    dataset = ShardDataset(
        manifest=manifest,
        split="train",
        fields={"tokens": "tokens.npy"},
        order=order_of(manifest, "train", seed=1, window_shards=1),
        seed=1,
        draws=DrawSpec(),
    )
    assert str(dataset[0].error).endswith("0.tar: field 'tokens.npy' holds float64, int64 is needed")


def test_two_ranks_with_workers_survive_a_blink_in_the_middle(manifest: Manifest) -> None:
    """Every shard goes away for a moment while both ranks read; together they see each sample once, unharmed."""
    folder = manifest.folder
    backup = shutil.copytree(folder, folder.parent / "backup")
    seen: list[str] = []

    def blink() -> None:
        for name in sorted(path.name for path in folder.glob("*.tar")):
            (folder / name).unlink()
            time.sleep(0.15)
            shutil.copyfile(backup / name, folder / name)

    with later(0.0, blink):
        for rank in range(2):
            loader = train_loader(
                make(manifest, shuffle=True),
                start_step=0,
                max_steps=TOTAL // 4,
                batch_size=4,
                micro_batch_size=1,
                world_size=2,
                rank=rank,
                num_workers=1,
                prefetch=2,
            )
            for _, _, batch in loader:
                assert batch.errors == ()
                seen += batch.keys
    assert sorted(seen) == sorted(f"k{number}" for number in range(TOTAL))
