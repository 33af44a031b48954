"""Where tables of metadata lie: a folder or a glob on this machine, or any URL that fsspec reads.

`s3://`, `gs://`, `https://`, `file://` and Hugging Face repositories (`hf://datasets/ORG/NAME[@REVISION]/PATH`) are all
the same here; credentials and options come from the environment (`HF_TOKEN` and `HF_ENDPOINT` for the hub).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.data.storage import Location, is_url
from sdtrain.errors import ConfigError, DataError, SdtrainError

_CHUNK_BYTES = 8 << 20
_SUFFIX = ".parquet"
_TAGS = ("ETag", "etag", "blob_id", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime")
"""What stores call the tag of a file's content, the surest first."""


@dataclass(frozen=True, slots=True)
class RemoteTable:
    """One version of a file behind a URL.

    Attributes:
        url: Where it is.
        size_bytes: Its length.
        tag: Whatever the store tells contents apart by, as text; empty where it tells nothing.
        sha256: Its digest, hexadecimal, where the store knows it (Hugging Face's large files); else empty.
    """

    url: str
    size_bytes: int
    tag: str
    sha256: str

    def fetch(self, target: Path) -> None:
        """Copy it to this machine.

        Raises:
            DataError: It is not there, access is refused, or it is no longer the file that was listed.
            ConnectionError: It cannot be read now; another attempt may succeed.
            OSError: `target` cannot be written.
        """
        digest, size = hashlib.sha256(), 0
        with open(target, "wb") as file:
            for chunk in _chunks(self.url):
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        if size != self.size_bytes or (self.sha256 and digest.hexdigest() != self.sha256):
            raise DataError(
                f"{self.url}: {size} bytes with sha256 {digest.hexdigest()} arrived, {self.size_bytes} bytes"
                f"{f' with sha256 {self.sha256}' if self.sha256 else ''} were listed: the file was replaced meanwhile, "
                "or damaged on its way; run again"
            )


def find_tables(where: str) -> Sequence[Path] | Sequence[RemoteTable]:
    """The parquet files of a folder, of a glob (`**` crosses folders), or a single one, sorted by name.

    Raises:
        DataError: There is none, or the place cannot be reached.
        ConfigError: No installed library reads such URLs.
    """
    found = find_files(where, _SUFFIX)
    if not found:
        raise DataError(
            f"source.metadata: {where}: no parquet file there; give a folder of *.parquet, a glob such as "
            "FOLDER/**/*.parquet, or a URL of either (hf://datasets/ORG/NAME, s3://BUCKET/FOLDER)"
        )
    return found


def find_files(where: str, suffix: str) -> Sequence[Path] | Sequence[RemoteTable]:
    """As `find_tables` for files of any ending; may be empty."""
    return _remote_files(where, suffix) if is_url(where) else local_files(Path(where), suffix)


def local_files(place: Path, suffix: str) -> list[Path]:
    """The files of a folder, of a glob, or a single one, sorted by name."""
    root = Path(place.anchor)
    found = place.glob(f"*{suffix}") if place.is_dir() else root.glob(str(place.relative_to(root)))
    return sorted(path for path in found if path.is_file())


def _remote_files(url: str, suffix: str) -> list[RemoteTable]:
    with reaching(url) as (files, path):
        if ("*" in path or "[" in path) and not url.startswith("http"):
            found = files.glob(path, detail=True)
        else:
            place = files.info(path)
            rows = [place] if place["type"] == "file" else files.ls(path, detail=True)
            found = {row["name"]: row for row in rows}
        tables = [
            _remote_table(files.unstrip_protocol(name), row)
            for name, row in sorted(found.items())
            if row["type"] == "file" and (name.endswith(suffix) or len(found) == 1)
        ]
    return tables


def _remote_table(url: str, row: Mapping[str, Any]) -> RemoteTable:
    lfs = row.get("lfs")  # huggingface_hub.BlobLfsInfo
    tag = next((str(row[name]) for name in _TAGS if row.get(name)), "")
    return RemoteTable(url, int(row.get("size") or 0), tag, getattr(lfs, "sha256", ""))


def _chunks(url: str) -> Iterator[bytes]:
    with reaching(url, may_heal=True) as (files, path):
        source = files.open(path, "rb", block_size=_CHUNK_BYTES, cache_type="none")
    with source:
        while True:
            with reaching(url, may_heal=True):
                chunk = source.read(_CHUNK_BYTES)
            if not chunk:
                return
            yield chunk


@contextmanager
def reaching(location: Location, *, may_heal: bool = False) -> Iterator[tuple[Any, str]]:
    """The file system of a URL and the path in it; one line whatever library stands behind it.

    Args:
        location: The URL.
        may_heal: Raise what is not plainly final as ConnectionError, which the runner tries again.

    Raises:
        ConfigError: No installed library reads such URLs.
        DataError: Nothing is there, access is refused, or (without `may_heal`) anything else went wrong.
        ConnectionError: With `may_heal`, anything else.
    """
    try:
        yield _file_system(str(location))
    except SdtrainError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{location}: not there ({_one_line(error)}); check the address") from None
    except Exception as error:  # every library behind fsspec has errors of its own, most of them no OSError
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, PermissionError) or status in (401, 403):
            raise DataError(
                f"{location}: access refused ({_one_line(error)}); check the credentials in the environment: for a "
                "gated Hugging Face repository accept its terms there and set HF_TOKEN"
            ) from None
        message = f"{location}: cannot be read ({type(error).__name__}: {_one_line(error)})"
        if may_heal:
            raise ConnectionError(message) from error
        raise DataError(f"{message}; check the address, the network and the credentials in the environment") from None


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{url}: no installed library reads this ({_one_line(error)}); install sdtrain[storage] for S3, or the "
            "package that fsspec names for another protocol"
        ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
