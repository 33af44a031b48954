"""Shards of object storage on the node's own disk: bounded, shared by all processes of the node, safe against kill -9.

Locks live on the files themselves and belong to the kernel, so a killed process leaves none behind:

- `NAME.tar.part` is written under an exclusive lock: one download per node, the others wait. What a killed process
  left has no lock and is removed by the next one that needs room.
- A whole, verified, synced file is renamed to `NAME.tar`, and its lock becomes a shared one: the one of its reader.
- A file is removed only under an exclusive lock, which nobody gets while a reader lives.

Names are digests, so data sets and versions of a data set share what is the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sdtrain.data.shard import ShardReader, ShardUnavailableError, index_path
from sdtrain.data.storage import RemoteFolder
from sdtrain.errors import StorageError

_POLL_SECONDS = 0.05
_DOWNLOAD_SECONDS = 1800.0  # of another process, that this one waits for
_ROOM_SECONDS = 60.0  # for readers to close what they hold


class ShardFacts(Protocol):
    """What a manifest says of a shard."""

    @property
    def path(self) -> str:
        """Below the manifest's folder."""
        ...

    @property
    def size_bytes(self) -> int:
        """Of the tar."""
        ...

    @property
    def sha256(self) -> str:
        """Of the tar."""
        ...

    @property
    def index_sha256(self) -> str:
        """Of its sidecar."""
        ...


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    size_bytes: int
    used: float


class ShardCache:
    """A bounded folder of shards.

    Args:
        folder: On the node's own disk; may be shared by runs, each of which keeps to its own bound.
        capacity_bytes: Of all files together, those in the making included.
        room_seconds: How long a reader waits for others to close a shard, where every cached one is in use.

    Raises:
        StorageError: The folder cannot be made.
    """

    def __init__(self, folder: Path, capacity_bytes: int, *, room_seconds: float = _ROOM_SECONDS) -> None:
        self.folder = folder
        self.capacity_bytes = capacity_bytes
        self._room_seconds = room_seconds
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)

    def open(self, source: RemoteFolder, shard: ShardFacts) -> ShardReader:
        """A reader of the cached shard, fetched first where it is missing; it stays cached until it is closed.

        Raises:
            ShardUnavailableError: The storage does not give the shard that the manifest names.
            StorageError: The cache has no room, or its disk refuses writes.
        """
        reader = self._open_copy(source, shard) or self._open_copy(source, shard)
        if reader is None:
            raise ShardUnavailableError(
                f"{self._path(shard)}: what was fetched from {source.url_of(shard.path)} was damaged at once; check "
                "this node's disk"
            )
        return reader

    def _open_copy(self, source: RemoteFolder, shard: ShardFacts) -> ShardReader | None:
        """A reader; None where the copy was damaged, or left by a process killed while it removed it."""
        path = self._path(shard)
        with self._writing():
            handle = self._hold(source, shard, path)
        try:
            return ShardReader(path, index_sha256=shard.index_sha256, handle=handle)
        except ShardUnavailableError:
            self.discard(shard)
            return None

    def prefetch(self, source: RemoteFolder, shard: ShardFacts) -> None:
        """Fetch a shard that is neither here nor on its way; takes only room that is free or no longer used.

        Raises:
            ShardUnavailableError: As `open`.
            StorageError: As `open`.
        """
        path = self._path(shard)
        with self._writing():
            handle = self._hold_present(path)
            if handle is None and (part := self._claim(path)) is not None:
                handle = self._download(source, shard, path, part, room_seconds=0.0)
            if handle is not None:
                os.close(handle)

    def discard(self, shard: ShardFacts) -> None:
        """Forget a damaged copy, also while it is read: its readers notice and open the next one."""
        path = self._path(shard)
        index_path(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What the disk refuses is no fault of the data: it ends the run instead of costing samples."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self.folder} (data.cache_dir): {error.strerror or error}; free the disk, lower data.cache_gib below "
                "what is free there, or choose another folder on this node's own disk"
            ) from error

    def _path(self, shard: ShardFacts) -> Path:
        return self.folder / f"{shard.sha256}-{shard.index_sha256[:16]}.tar"

    # One file ---------------------------------------------------------------------------------------------------------

    def _hold(self, source: RemoteFolder, shard: ShardFacts, path: Path) -> int:
        """The open file under a shared lock: as it stands, or downloaded here, or by another process meanwhile."""
        deadline = time.monotonic() + _DOWNLOAD_SECONDS
        while True:
            if (handle := self._hold_present(path)) is not None:
                return handle
            if (part := self._claim(path)) is not None:
                handle = self._download(source, shard, path, part, room_seconds=self._room_seconds)
                if os.fstat(handle).st_nlink:
                    return handle
                os.close(handle)  # removed in the moment between its two locks
            if time.monotonic() > deadline:
                raise ShardUnavailableError(
                    f"{source.url_of(shard.path)}: another process of this node has been fetching it into "
                    f"{self.folder} for {_DOWNLOAD_SECONDS:.0f} s; see what it is doing"
                )
            time.sleep(_POLL_SECONDS)

    def _hold_present(self, path: Path) -> int | None:
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if _lock(handle, fcntl.LOCK_SH) and os.fstat(handle).st_nlink:
            with suppress(PermissionError):  # another user's file
                os.utime(handle)  # the least recently used one leaves first
            return handle
        os.close(handle)  # about to be removed
        return None

    def _claim(self, path: Path) -> int | None:
        """The exclusive right to make a file, as an open `.part`; None where another process has it or has used it."""
        part = _part(path)
        handle = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        if _lock(handle, fcntl.LOCK_EX) and _is_open_as(handle, part):
            if not path.exists():
                return handle
            part.unlink()
        os.close(handle)
        return None

    def _download(self, source: RemoteFolder, shard: ShardFacts, path: Path, part: int, *, room_seconds: float) -> int:
        """Fill a claimed file, verify it, let it appear with its sidecar; returns it under a shared lock."""
        try:
            index = self._read_index(source, shard)
            self._reserve(path, part, shard.size_bytes + len(index), room_seconds)
            with os.fdopen(part, "wb", closefd=False) as target:
                source.download(shard.path, target, size_bytes=shard.size_bytes, sha256=shard.sha256)
                target.truncate()
                target.flush()
                os.fsync(part)
            with open(index_path(path), "wb") as sidecar:
                sidecar.write(index)
                sidecar.flush()
                os.fsync(sidecar.fileno())
            _part(path).rename(path)
            fcntl.flock(part, fcntl.LOCK_SH)
            return part
        except BaseException:
            _part(path).unlink(missing_ok=True)
            os.close(part)
            raise

    def _read_index(self, source: RemoteFolder, shard: ShardFacts) -> bytes:
        name = f"{shard.path}.index.json"
        try:
            index = source.read_bytes(name)
        except FileNotFoundError as error:
            raise ShardUnavailableError(f"{source.url_of(name)}: not there") from error
        found = hashlib.sha256(index).hexdigest()
        if found != shard.index_sha256:
            raise ShardUnavailableError(
                f"{source.url_of(name)}: sha256 {found} found, the manifest says {shard.index_sha256}"
            )
        return index

    # Room -------------------------------------------------------------------------------------------------------------

    def _reserve(self, path: Path, part: int, size_bytes: int, room_seconds: float) -> None:
        """Give the claimed file its size before its bytes come, so that whoever counts the folder counts it in full.

        Raises:
            StorageError: Everything else in the folder is in use, or the disk is full.
        """
        deadline = time.monotonic() + room_seconds
        while True:
            with self._alone():
                used = self._make_room(size_bytes, keep=_part(path))
                free = shutil.disk_usage(self.folder).free
                if used + size_bytes <= self.capacity_bytes and size_bytes <= free:
                    os.ftruncate(part, size_bytes)
                    return
            if time.monotonic() >= deadline:
                raise StorageError(
                    f"{self.folder}: no room for a shard of {size_bytes} bytes: {used} bytes there are in use, the "
                    f"bound is {self.capacity_bytes} (data.cache_gib) and {free} bytes of the disk are free. Raise "
                    "data.cache_gib, free the disk, or lower data.window_shards or data.num_workers in a new run"
                )
            time.sleep(_POLL_SECONDS)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time counts and removes."""
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _make_room(self, size_bytes: int, *, keep: Path) -> int:
        """Remove what killed processes left, then the least recently used shards; returns the bytes that stay."""
        entries = self._entries(keep)
        used = sum(entry.size_bytes for entry in entries)
        for entry in sorted(entries, key=lambda entry: entry.used):
            leftover = entry.path.suffix == ".part"
            missing = used + size_bytes > self.capacity_bytes or size_bytes > shutil.disk_usage(self.folder).free
            if (leftover or missing) and self._remove_unused(entry.path):
                used -= entry.size_bytes
        return used

    def _entries(self, keep: Path) -> list[_Entry]:
        """Every tar with its sidecar, and every `.part` but `keep`; sidecars alone are removed."""
        sizes, entries = {}, []
        for file in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process renames its part
                sizes[file] = file.stat()
        for file, facts in sizes.items():
            if file.suffix in (".tar", ".part") and file != keep:
                sidecar = sizes.get(index_path(file))
                size = facts.st_size + (sidecar.st_size if sidecar else 0)
                entries.append(_Entry(file, size, facts.st_mtime))
            elif file.name.endswith(".tar.index.json"):
                tar = file.with_name(file.name.removesuffix(".index.json"))
                if not _part(tar).exists() and not tar.exists():  # in the order in which a part becomes a tar
                    file.unlink(missing_ok=True)
        return entries

    def _remove_unused(self, path: Path) -> bool:
        """Remove a file that nobody reads or writes; whether it is gone."""
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            if not _lock(handle, fcntl.LOCK_EX):
                return False
            if _is_open_as(handle, path):
                index_path(path).unlink(missing_ok=True)  # first: without the tar, its next maker would lose a new one
                path.unlink()
            return True
        finally:
            os.close(handle)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _lock(handle: int, kind: int) -> bool:
    """Try to lock an open file; the lock goes with its last handle, however the process ends."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_open_as(handle: int, path: Path) -> bool:
    """Whether a name still belongs to an open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
