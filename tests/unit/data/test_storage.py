"""Object storage through fsspec: files as they are, and one kind of error for all that can go wrong."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from sdtrain.data import storage as storage_module
from sdtrain.data.shard import ShardUnavailableError
from sdtrain.data.storage import RemoteFolder, is_url
from sdtrain.errors import ConfigError

DATA = bytes(range(256)) * 40
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(params=["memory", "file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RemoteFolder]:
    url = f"{request.param}://{tmp_path if request.param == 'file' else '/world'}"
    files: Any = fsspec.filesystem(request.param)
    with fsspec.open(f"{url}/a/data.bin", "wb", auto_mkdir=True) as file:
        file.write(DATA)
    yield RemoteFolder(url + "/")
    if request.param == "memory":
        files.store.clear()


def download(folder: RemoteFolder, *, size: int = len(DATA), sha256: str = SHA256, name: str = "a/data.bin") -> bytes:
    target = io.BytesIO()
    folder.download(name, target, size_bytes=size, sha256=sha256)
    return target.getvalue()


def test_what_is_a_url() -> None:
    assert is_url("s3://bucket/manifest.json")
    assert not is_url("data/manifest.json")
    assert not is_url(Path("data/manifest.json"))


def test_files_come_as_they_are(folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder.read_bytes("a/data.bin") == DATA
    assert download(folder) == DATA
    monkeypatch.setattr(storage_module, "_CHUNK_BYTES", 1000)
    assert download(folder) == DATA


def test_another_file_than_the_manifests_is_refused(folder: RemoteFolder) -> None:
    with pytest.raises(ShardUnavailableError, match=r"a/data.bin: ends after 10240 of 10241 bytes$"):
        download(folder, size=len(DATA) + 1)
    with pytest.raises(ShardUnavailableError, match=r"a/data.bin: more than 10239 bytes found, the manifest says 1"):
        download(folder, size=len(DATA) - 1)
    with pytest.raises(ShardUnavailableError, match=rf"a/data.bin: sha256 {SHA256} found, the manifest says .* 0$"):
        download(folder, sha256="0")


def test_a_file_that_is_not_there(folder: RemoteFolder) -> None:
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("a/none.bin")
    with pytest.raises(ShardUnavailableError, match=r"a/none.bin: not there"):
        download(folder, name="a/none.bin")


def test_large_files_are_not_read_into_memory(folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "MAX_SMALL_FILE_BYTES", 100)
    with pytest.raises(ShardUnavailableError, match=r"a/data.bin: more than 100 bytes"):
        folder.read_bytes("a/data.bin")


def test_protocols_that_nothing_installed_reads_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"s4://b/m.json: no installed library reads this \(Protocol not known: s4\)"):
        RemoteFolder("s4://b").read_bytes("m.json")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ConfigError, match=r"s3://b/m.json: no installed library reads this .*sdtrain\[storage\]"):
        RemoteFolder("s3://b").read_bytes("m.json")


def test_what_a_library_raises_becomes_one_error(folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each library behind fsspec has errors of its own; a denied bucket cannot be had without a server."""

    def denied(url: str) -> Any:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(fsspec.core, "url_to_fs", denied)
    with pytest.raises(ShardUnavailableError, match=r"a/data.bin: cannot be read: PermissionError: Access Denied; che"):
        folder.read_bytes("a/data.bin")
