"""Data sets on object storage: any folder that fsspec can read, with credentials and options from the environment.

`s3://`, `gs://`, `az://`, `file://` and `memory://` are all the same here. What the library behind them raises, and
each of them raises its own, becomes one error that says which object was asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from sdtrain.data.shard import ShardUnavailableError
from sdtrain.errors import ConfigError, SdtrainError

Location = Path | str
"""A file on this machine, or a URL."""

MAX_SMALL_FILE_BYTES = 2**30
"""Largest manifest, sidecar or list that is read into memory."""

_CHUNK_BYTES = 8 * 2**20


def is_url(location: Location) -> TypeGuard[str]:
    """Whether a location is on object storage."""
    return isinstance(location, str) and "://" in location


class RemoteFolder:
    """A folder on object storage, read only; nothing in it is ever listed.

    File systems are looked up when they are needed: fsspec makes one per process, so a forked worker gets its own.

    Args:
        url: Of the folder, for example `s3://bucket/data`.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def url_of(self, name: str) -> str:
        """The URL of a file in the folder."""
        return f"{self.url}/{name}"

    def read_bytes(self, name: str) -> bytes:
        """A small file.

        Raises:
            FileNotFoundError: It is not there.
            ShardUnavailableError: It cannot be read, or is no small file.
            ConfigError: No installed library reads such URLs.
        """
        with _reading(self.url_of(name)) as (files, path), files.open(path, "rb") as file:
            data = file.read(MAX_SMALL_FILE_BYTES + 1)
        if len(data) > MAX_SMALL_FILE_BYTES:
            raise ShardUnavailableError(f"{self.url_of(name)}: more than {MAX_SMALL_FILE_BYTES} bytes")
        return data

    def download(self, name: str, target: BinaryIO, *, size_bytes: int, sha256: str) -> None:
        """Write a file's bytes to `target`, one request for every 8 MiB.

        Raises:
            ShardUnavailableError: It is not there, cannot be read, or is not the file of this size and digest.
            ConfigError: No installed library reads such URLs.
            OSError: `target` cannot be written.
        """
        url, digest = self.url_of(name), hashlib.sha256()
        try:
            with _reading(url) as (files, path):
                source = files.open(path, "rb", block_size=_CHUNK_BYTES, cache_type="none")
        except FileNotFoundError as error:
            raise ShardUnavailableError(f"{url}: not there") from error
        with source:
            for offset in range(0, size_bytes, _CHUNK_BYTES):
                wanted = min(_CHUNK_BYTES, size_bytes - offset)
                with _reading(url):
                    chunk = source.read(wanted)
                if len(chunk) != wanted:
                    raise ShardUnavailableError(f"{url}: ends after {offset + len(chunk)} of {size_bytes} bytes")
                digest.update(chunk)
                target.write(chunk)
            with _reading(url):
                more = source.read(1)
        if more or digest.hexdigest() != sha256:
            found = f"more than {size_bytes} bytes" if more else f"sha256 {digest.hexdigest()}"
            raise ShardUnavailableError(f"{url}: {found} found, the manifest says {size_bytes} bytes, sha256 {sha256}")


def read_beside(path: Location, name: str | None = None) -> bytes:
    """The small file at `path`, or the one called `name` in its folder.

    Raises:
        FileNotFoundError: It is not there.
        OSError: A file on this machine cannot be read.
        ShardUnavailableError: One on object storage cannot be read.
        ConfigError: No installed library reads such URLs.
    """
    if is_url(path):
        folder, _, own = path.rpartition("/")
        return RemoteFolder(folder).read_bytes(name or own)
    return (Path(path) if name is None else Path(path).with_name(name)).read_bytes()


@contextmanager
def _reading(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL and the path in it; one kind of error whatever library stands behind it."""
    try:
        yield _file_system(url)
    except (FileNotFoundError, SdtrainError):
        raise
    except Exception as error:  # every library behind fsspec has errors of its own, most of them no OSError
        raise ShardUnavailableError(
            f"{url}: cannot be read: {type(error).__name__}: {error}; check the address, and the credentials in the "
            "environment"
        ) from error


def _file_system(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{url}: no installed library reads this ({error}); install sdtrain[storage] for S3 and Google Cloud, or "
            "the package that fsspec names for another protocol"
        ) from error
