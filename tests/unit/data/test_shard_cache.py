"""The node's cache: bounded, one download a node, never a file taken from a reader, and nothing lost by kill -9."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdtrain.data.manifest import Manifest, describe_shard, write_manifest
from sdtrain.data.shard import ChecksumError, ShardUnavailableError, ShardWriter, index_path
from sdtrain.data.shard_cache import ShardCache
from sdtrain.data.storage import RemoteFolder
from sdtrain.errors import StorageError

NUM_SHARDS = 6
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def remote(tmp_path: Path) -> Manifest:
    """A data set of equally large shards; its folder is what the `file://` URL points at."""
    folder, entries = tmp_path / "remote", []
    for shard in range(NUM_SHARDS):
        path = folder / f"{shard:05d}.tar"
        with ShardWriter(path) as writer:
            for number in range(4):
                writer.write(f"k{shard}-{number}", {"moments.npy": np.full((8, 8, 8), shard, dtype=np.float16)})
        entries.append(describe_shard(path, split="train", folder=folder))
    return write_manifest(folder / "manifest.json", entries, fingerprint={})


@pytest.fixture
def source(remote: Manifest) -> RemoteFolder:
    return RemoteFolder(f"file://{remote.folder}")


def size_of(remote: Manifest) -> int:
    """Of one shard and its sidecar."""
    return max(shard.size_bytes + index_path(remote.shard_path(shard)).stat().st_size for shard in remote.shards)


def make(tmp_path: Path, remote: Manifest, shards: float = 3.5, **settings: float) -> ShardCache:
    return ShardCache(tmp_path / "cache", int(shards * size_of(remote)), **settings)


def held(cache: ShardCache) -> set[str]:
    """Digests of the shards in the cache."""
    return {path.name.partition("-")[0] for path in cache.folder.glob("*.tar")}


def bytes_of(cache: ShardCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.iterdir())


def downloads(monkeypatch: pytest.MonkeyPatch, log: Path) -> Callable[[], list[str]]:
    """Writes down every real download, of forked processes too."""
    real = RemoteFolder.download

    def logged(self: RemoteFolder, name: str, *arguments: Any, **settings: Any) -> None:
        with open(log, "a") as file:
            file.write(f"{name}\n")
        time.sleep(0.1)
        real(self, name, *arguments, **settings)

    monkeypatch.setattr(RemoteFolder, "download", logged)
    return lambda: sorted(log.read_text().split()) if log.exists() else []


def test_a_shard_is_fetched_once_with_its_sidecar(
    tmp_path: Path, remote: Manifest, source: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, fetched = make(tmp_path, remote), downloads(monkeypatch, tmp_path / "log")
    for _ in range(3):
        with cache.open(source, remote.shards[2]) as reader:
            assert reader.keys == [f"k2-{number}" for number in range(4)]
            assert (reader.decode(1, "moments.npy") == 2).all()
    assert fetched() == ["00002.tar"]
    assert held(cache) == {remote.shards[2].sha256}
    assert not list(cache.folder.glob("*.part"))


def test_the_least_recently_used_shards_leave_and_the_bound_holds(
    tmp_path: Path, remote: Manifest, source: RemoteFolder
) -> None:
    cache = make(tmp_path, remote)
    for shard in (0, 1, 2, 0, 3, 0, 4):
        cache.open(source, remote.shards[shard]).close()
        assert bytes_of(cache) <= cache.capacity_bytes
        time.sleep(0.01)  # times of use come from the file system
    assert held(cache) == {remote.shards[shard].sha256 for shard in (0, 3, 4)}
    assert len(list(cache.folder.glob("*.index.json"))) == 3


def test_a_shard_in_use_is_never_removed(tmp_path: Path, remote: Manifest, source: RemoteFolder) -> None:
    cache = make(tmp_path, remote, shards=2.5)
    with cache.open(source, remote.shards[0]) as reader:
        for shard in (1, 2, 3, 4, 5):
            cache.open(source, remote.shards[shard]).close()
            reader.check()
            assert remote.shards[0].sha256 in held(cache)
        assert (reader.decode(3, "moments.npy") == 0).all()


def _read_and_wait(cache: ShardCache, source: RemoteFolder, shard: Any, pipe: Any) -> None:
    reader = cache.open(source, shard)
    pipe.send("open")
    pipe.recv()
    reader.close()
    pipe.send("closed")
    pipe.recv()


def test_other_processes_readers_count_until_they_are_killed(
    tmp_path: Path, remote: Manifest, source: RemoteFolder
) -> None:
    cache = make(tmp_path, remote, shards=1.5, room_seconds=0.1)
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=_read_and_wait, args=(cache, source, remote.shards[0], theirs))
    child.start()
    assert ours.recv() == "open"
    with pytest.raises(StorageError, match=r"cache: no room for a shard of \d+ bytes: \d+ bytes there are in use, th"):
        cache.open(source, remote.shards[1])
    assert held(cache) == {remote.shards[0].sha256}
    assert not list(cache.folder.glob("*.part"))
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    cache.open(source, remote.shards[1]).close()
    assert held(cache) == {remote.shards[1].sha256}


def test_room_is_waited_for(tmp_path: Path, remote: Manifest, source: RemoteFolder) -> None:
    cache = make(tmp_path, remote, shards=1.5, room_seconds=10)
    reader = cache.open(source, remote.shards[0])
    timer = threading.Timer(0.3, reader.close)
    timer.start()
    cache.open(source, remote.shards[1]).close()
    timer.join()
    assert held(cache) == {remote.shards[1].sha256}


def _open_all(cache: ShardCache, source: RemoteFolder, shards: Any, seed: int, pipe: Any) -> None:
    found = []
    for shard in random.Random(seed).sample(shards, len(shards)):
        with cache.open(source, shard) as reader:
            found += [int(reader.decode(number, "moments.npy")[0, 0, 0]) for number in range(4)]
    pipe.send(sorted(found))


def test_processes_of_a_node_share_one_download(
    tmp_path: Path, remote: Manifest, source: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, fetched = make(tmp_path, remote, shards=20), downloads(monkeypatch, tmp_path / "log")
    pipes, children = [], []
    for seed in range(4):
        receiver, sender = FORK.Pipe(duplex=False)
        children.append(FORK.Process(target=_open_all, args=(cache, source, list(remote.shards), seed, sender)))
        pipes.append(receiver)
    for child in children:
        child.start()
    for pipe in pipes:
        assert pipe.poll(60)
        assert pipe.recv() == sorted(list(range(NUM_SHARDS)) * 4)
    for child in children:
        child.join()
    assert fetched() == [shard.path for shard in remote.shards]


def test_prefetched_shards_are_there_and_busy_ones_are_left_alone(
    tmp_path: Path, remote: Manifest, source: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, fetched = make(tmp_path, remote, shards=2.5), downloads(monkeypatch, tmp_path / "log")
    cache.prefetch(source, remote.shards[0])
    cache.open(source, remote.shards[0]).close()
    cache.prefetch(source, remote.shards[0])
    part = cache.folder / f"{remote.shards[1].sha256}-{remote.shards[1].index_sha256[:16]}.tar.part"
    with open(part, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        cache.prefetch(source, remote.shards[1])  # on its way elsewhere
    assert fetched() == ["00000.tar"]
    both = cache.open(source, remote.shards[0]), cache.open(source, remote.shards[1])
    with both[0], both[1], pytest.raises(StorageError, match="no room"):
        cache.prefetch(source, remote.shards[2])  # takes nothing from readers, and does not wait


def test_what_killed_processes_left_is_swept(tmp_path: Path, remote: Manifest, source: RemoteFolder) -> None:
    cache = make(tmp_path, remote)
    stale = cache.folder / "dead.tar.part"
    stale.write_bytes(b"x" * 10**6)  # far beyond the bound, and nobody's
    orphan = cache.folder / "lost.tar.index.json"
    orphan.write_text("{}")
    torn = cache.folder / f"{remote.shards[1].sha256}-{remote.shards[1].index_sha256[:16]}.tar.part"
    torn.write_bytes(b"half")
    live = cache.folder / "live.tar.part"
    with open(live, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        cache.open(source, remote.shards[0]).close()
        assert (stale.exists(), orphan.exists(), live.exists()) == (False, False, True)
        with cache.open(source, remote.shards[1]) as reader:
            assert (reader.decode(0, "moments.npy") == 1).all()
    assert not torn.exists()


def test_a_part_that_shrinks_is_no_longer_than_its_shard(
    tmp_path: Path, remote: Manifest, source: RemoteFolder
) -> None:
    """Room is reserved for tar and sidecar together; the file that appears has the tar's size alone."""
    cache = make(tmp_path, remote)
    cache.open(source, remote.shards[0]).close()
    (path,) = cache.folder.glob("*.tar")
    assert path.stat().st_size == remote.shards[0].size_bytes
    assert hashlib.sha256(path.read_bytes()).hexdigest() == remote.shards[0].sha256


def test_a_damaged_copy_is_replaced(tmp_path: Path, remote: Manifest, source: RemoteFolder) -> None:
    cache = make(tmp_path, remote)
    cache.open(source, remote.shards[0]).close()
    (path,) = cache.folder.glob("*.tar")
    for harm in (
        lambda: index_path(path).write_text("{}"),
        lambda: index_path(path).unlink(),
        lambda: os.truncate(path, 9),
    ):
        harm()
        cache.open(source, remote.shards[0]).close()
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with cache.open(source, remote.shards[0]) as reader:
        with pytest.raises(ChecksumError):
            reader.decode(0, "moments.npy")
        cache.discard(remote.shards[0])
        with pytest.raises(ShardUnavailableError, match="removed or replaced while it was open"):
            reader.check()
    with cache.open(source, remote.shards[0]) as reader:
        assert (reader.decode(0, "moments.npy") == 0).all()


def test_a_disk_that_damages_what_it_is_given_is_named(
    tmp_path: Path, remote: Manifest, source: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, rename = make(tmp_path, remote), Path.rename

    def damaging(self: Path, target: Path) -> Path:
        os.truncate(self, 10)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", damaging)
    with pytest.raises(
        ShardUnavailableError, match=r"\.tar: what was fetched from file:.*00000.tar was damaged at once; c"
    ):
        cache.open(source, remote.shards[0])
    assert held(cache) == set()


def test_storage_that_holds_something_else_is_refused(tmp_path: Path, remote: Manifest, source: RemoteFolder) -> None:
    cache, path = make(tmp_path, remote), remote.shard_path(remote.shards[0])
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(ShardUnavailableError, match=r"00000.tar: sha256 \w+ found, the manifest says \d+ bytes, sh"):
        cache.open(source, remote.shards[0])
    path.write_bytes(data)
    index = index_path(path).read_bytes()
    index_path(path).write_bytes(index + b" ")
    with pytest.raises(ShardUnavailableError, match=r"00000.tar.index.json: sha256 \w+ found, the manifest says \w+$"):
        cache.open(source, remote.shards[0])
    index_path(path).unlink()
    with pytest.raises(ShardUnavailableError, match=r"00000.tar.index.json: not there"):
        cache.open(source, remote.shards[0])
    assert [path.name for path in cache.folder.iterdir()] == [".lock"]


def test_a_full_or_forbidden_disk_ends_the_run(
    tmp_path: Path, remote: Manifest, source: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file \(data.cache_dir\): File exists; free the disk, lower data"):
        ShardCache(tmp_path / "file", 10**9)
    cache = make(tmp_path, remote)

    def full(self: RemoteFolder, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RemoteFolder, "download", full)
    with pytest.raises(StorageError, match=r"cache \(data.cache_dir\): No space left on device; free the disk"):
        cache.open(source, remote.shards[0])
    assert not list(cache.folder.glob("*.part"))


def _churn(cache: ShardCache, source: RemoteFolder, shards: Any, seed: int) -> None:
    """Read shards at random for ever, in a cache that holds only some of them."""
    chosen = random.Random(seed)
    while True:
        with cache.open(source, chosen.choice(shards)) as reader:
            reader.decode(0, "moments.npy")


def test_kill_9_at_any_moment_leaves_a_cache_that_works(tmp_path: Path, remote: Manifest, source: RemoteFolder) -> None:
    cache, chance = make(tmp_path, remote), random.Random(0)
    for attempt in range(12):
        children = [
            FORK.Process(target=_churn, args=(cache, source, list(remote.shards), 10 * attempt + one))
            for one in range(2)
        ]
        for child in children:
            child.start()
        time.sleep(chance.uniform(0.05, 0.25))
        for child in children:
            assert child.is_alive()
            child.kill()
            child.join()
    for shard, number in itertools.product(remote.shards, range(4)):
        with cache.open(source, shard) as reader:
            reader.decode(number, "moments.npy")
    assert bytes_of(cache) <= cache.capacity_bytes
    assert not list(cache.folder.glob("*.part"))
    for path in cache.folder.glob("*.tar"):
        assert path.name.startswith(hashlib.sha256(path.read_bytes()).hexdigest())
        assert index_path(path).exists()
