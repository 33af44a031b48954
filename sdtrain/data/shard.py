"""Shards: plain WebDataset tars with a sidecar index, written atomically, read by offset, never extracted.

`00000.tar` stands beside `00000.tar.index.json`, which holds the tar's digest and, per field, the offset, size and
CRC-32 of every sample. Reading takes one `pread` a field; a flipped bit costs one sample and is noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import secrets
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from sdtrain.data.decode import decode, encode
from sdtrain.errors import DataError
from sdtrain.run_dir import sync_folder, write_atomically

INDEX_VERSION = 1
MAX_FIELD_BYTES = 256 * 2**20
"""Largest field that is read, against a damaged or hostile size."""

ABSENT = -1
"""Size of a field that one sample of a foreign tar lacks."""

_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_FIELD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
_MAX_NAME = 100  # the name field of a ustar header
_BLOCK = tarfile.BLOCKSIZE


class ShardUnavailableError(DataError):
    """A shard or its sidecar is away, unreadable or incomplete: it may come back, so it is worth another look."""


class ChecksumError(DataError):
    """Bytes that were read in full are not those that were written."""


def index_path(shard: Path) -> Path:
    """The sidecar's name."""
    return shard.with_name(shard.name + ".index.json")


@dataclass(frozen=True, slots=True)
class FieldIndex:
    """Where one field of every sample lies.

    Attributes:
        offset: First byte in the tar, per sample.
        size: Bytes, per sample; ABSENT where the sample lacks the field.
        crc32: Checksum of those bytes, per sample.
    """

    offset: list[int]
    size: list[int]
    crc32: list[int]


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """What the sidecar says about its tar.

    Attributes:
        sha256: Digest of the tar.
        size_bytes: Size of the tar.
        keys: Sample keys in the order of the tar.
        fields: Field name -> where it lies.
    """

    sha256: str
    size_bytes: int
    keys: list[str]
    fields: dict[str, FieldIndex]

    def to_json(self) -> str:
        """Canonical text: the same index gives the same bytes."""
        return json.dumps({"version": INDEX_VERSION, **asdict(self)}, sort_keys=True, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, data: bytes, source: Path) -> ShardIndex:
        """Parse and check a sidecar.

        Raises:
            DataError: Not an index, of another version, or with places outside its tar.
        """
        try:
            page = json.loads(data)
            version = page.pop("version")
            if version != INDEX_VERSION:
                raise ValueError(f"version {version!r} found, {INDEX_VERSION} is read")
            fields = {name: FieldIndex(**columns) for name, columns in page.pop("fields").items()}
            index = cls(fields=fields, **page)
            index._check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{source}: not a valid shard index ({type(error).__name__}: {error}); "
                "write it again with build_index, or fetch the shard again"
            ) from error
        return index

    def _check(self) -> None:
        for name, columns in self.fields.items():
            if not len(columns.offset) == len(columns.size) == len(columns.crc32) == len(self.keys):
                raise ValueError(f"field {name!r} does not have {len(self.keys)} entries")
            for offset, size in zip(columns.offset, columns.size, strict=True):
                if size != ABSENT and not (size >= 0 and 0 <= offset <= self.size_bytes - size):
                    raise ValueError(f"field {name!r} lies outside the tar: {size} bytes at {offset}")


def _split_name(name: str) -> tuple[str, str]:
    """Key and field of a member name, cut at the first dot of the last path part, as webdataset does."""
    folder, slash, last = name.rpartition("/")
    stem, _, field = last.partition(".")
    return folder + slash + stem, field


def _check_member(member: tarfile.TarInfo, end: int, source: Path) -> None:
    name = member.name
    if member.size < 0 or member.offset_data < end:
        raise DataError(f"{source}: member {name!r} claims {member.size} bytes at {member.offset_data}; damaged header")
    is_file = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
    if not is_file and not _is_folder(member):
        raise DataError(f"{source}: member {name!r} is no regular file (type {member.type!r}); no links, no holes")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{source}: member {name!r} has an absolute name or '..' in it")
    if not is_file:
        return
    key, field = _split_name(name)
    if not key.rpartition("/")[2] or not field or not name.isprintable():
        raise DataError(f"{source}: member {name!r} has no key and field; names look like 'key.field'")


def _is_folder(member: tarfile.TarInfo) -> bool:
    """An entry for a folder, as `tar` adds them; one that claims to hold bytes is none."""
    return member.isdir() and member.size == 0


def _members(source: Path) -> Iterator[tarfile.TarInfo]:
    """Checked members, then the end mark: tarfile itself takes a damaged header for the end."""
    end = 0
    try:
        with tarfile.open(source, mode="r:") as tar:
            for member in tar:
                _check_member(member, end, source)
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                yield member
    except tarfile.TarError as error:
        raise DataError(f"{source}: not a readable tar: {error}") from error
    with open(source, "rb") as file:
        file.seek(end)
        if file.read(2 * _BLOCK) != bytes(2 * _BLOCK):
            raise DataError(f"{source}: no end-of-archive mark at byte {end}; the tar is damaged or cut off")


def _pread(handle: int, size: int, offset: int, source: Path) -> bytes:
    """Exactly `size` bytes.

    Raises:
        ShardUnavailableError: The bytes are not there, or not all of them.
        DataError: More than `MAX_FIELD_BYTES` are asked for.
    """
    if size > MAX_FIELD_BYTES:
        raise DataError(f"{source}: a field of {size} bytes at {offset}; at most {MAX_FIELD_BYTES} are read")
    try:
        data = os.pread(handle, size, offset)
        while 0 < len(data) < size:  # network file systems may answer in pieces
            piece = os.pread(handle, size - len(data), offset + len(data))
            if not piece:
                break
            data += piece
    except OSError as error:
        raise ShardUnavailableError(f"{source}: cannot read {size} bytes at {offset}: {error}") from error
    if len(data) != size:
        raise ShardUnavailableError(f"{source}: {len(data)} of {size} bytes found at {offset}; the tar is cut off")
    return data


def scan_tar(path: Path) -> ShardIndex:
    """Read a tar through and say where everything lies; any tar, also one that we did not write.

    Raises:
        DataError: As `survey_tar`.
    """
    return survey_tar(path)[0]


def survey_tar(path: Path) -> tuple[ShardIndex, int]:
    """Where everything lies in a tar, and how many entries for folders stand between; they are passed over.

    A file `folder/000.jpg` is the field `jpg` of the sample `folder/000`, as in webdataset.

    Raises:
        DataError: Links, devices, absolute names, `..`, duplicates, a sample in two places, damage.
    """
    keys: list[str] = []
    rows: list[dict[str, tuple[int, int, int]]] = []
    seen: set[str] = set()
    num_folders = 0
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            for member in _members(path):
                if _is_folder(member):
                    num_folders += 1
                    continue
                key, field = _split_name(member.name)
                if not keys or key != keys[-1]:
                    if key in seen:
                        raise DataError(f"{path}: sample {key!r} stands in two places; its fields must be neighbours")
                    seen.add(key)
                    keys.append(key)
                    rows.append({})
                if field in rows[-1]:
                    raise DataError(f"{path}: member {member.name!r} is there twice")
                data = _pread(file.fileno(), member.size, member.offset_data, path)
                rows[-1][field] = (member.offset_data, member.size, zlib.crc32(data))
            size_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"{path}: cannot read the shard: {error}") from error
    return ShardIndex(sha256=sha256, size_bytes=size_bytes, keys=keys, fields=_columns(rows)), num_folders


def _columns(rows: list[dict[str, tuple[int, int, int]]]) -> dict[str, FieldIndex]:
    columns = {}
    for name in sorted({name for row in rows for name in row}):
        places = [row.get(name, (0, ABSENT, 0)) for row in rows]
        columns[name] = FieldIndex(*(list(column) for column in zip(*places, strict=True)))
    return columns


def build_index(path: Path) -> ShardIndex:
    """Scan a tar and write its sidecar.

    Raises:
        DataError: As `scan_tar`; no sidecar is written then.
    """
    index = scan_tar(path)
    write_atomically(index_path(path), index.to_json())
    return index


class ShardWriter:
    """Writes one shard through webdataset; it appears under its name complete or not at all.

    Same samples in the same order give the same bytes: fields sorted, no times, no user names.

    Args:
        path: Where the tar goes, for example `latents/00000.tar`; its sidecar goes beside it.
    """

    def __init__(self, path: Path) -> None:
        from webdataset.writer import TarWriter  # a slow import that readers do without

        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        self._file = io.BufferedWriter(io.FileIO(self._temporary, "wb"))
        self._tar = TarWriter(self._file, encoder=False, mtime=0)
        self._keys: set[str] = set()
        self._fields: list[str] | None = None

    def write(self, key: str, fields: Mapping[str, Any]) -> None:
        """Append one sample.

        Args:
            key: Unique in the shard; letters, digits, `_`, `-` and `/`.
            fields: Field name -> bytes, text (`txt`), plain values (`json`) or an array of numbers (`npy`).

        Raises:
            DataError: A name that the format does not allow, a key twice, or other fields than the first sample's.
        """
        self._check_names(key, sorted(fields))
        encoded = {name: encode(name, value) for name, value in fields.items()}
        self._keys.add(key)
        self._tar.write({"__key__": key, **encoded})

    def _check_names(self, key: str, names: list[str]) -> None:
        if not _KEY.fullmatch(key):
            raise DataError(f"{self.path}: key {key!r} is not allowed; use letters, digits, '_', '-' and '/'")
        if key in self._keys:
            raise DataError(f"{self.path}: key {key!r} is written twice")
        for name in names:
            if not _FIELD.fullmatch(name) or len(key) + 1 + len(name) > _MAX_NAME:
                raise DataError(
                    f"{self.path}: field {name!r} of key {key!r} is not allowed; use letters, digits, '_' and '.', "
                    f"at most {_MAX_NAME} characters with the key"
                )
        if self._fields is None:
            self._fields = names
        if names != self._fields:
            raise DataError(f"{self.path}: key {key!r} has fields {names}, the samples before it {self._fields}")

    def close(self) -> ShardIndex:
        """Finish the tar, wait for the disk, and let it appear; the sidecar first, so a shard never lacks one."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = scan_tar(self._temporary)
        write_atomically(index_path(self.path), index.to_json())
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)
        return index

    def abort(self) -> None:
        """Leave no trace; after `close` there is none to remove."""
        with contextlib.suppress(OSError, ValueError):  # a full disk fails here a second time
            self._tar.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()


class ShardReader:
    """Reads fields of one shard by offset; safe to use after a fork, as reads share no file position.

    Args:
        path: The tar; its sidecar must stand beside it.
        index_sha256: The sidecar's digest as the manifest says it; None trusts the sidecar.
        handle: The tar, already open; the reader closes it. None opens it.

    Raises:
        ShardUnavailableError: Tar or sidecar missing, incomplete, or not belonging together.
        DataError: A sidecar that nobody vouches for is damaged.
    """

    def __init__(self, path: Path, *, index_sha256: str | None = None, handle: int | None = None) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY) if handle is None else handle
        except OSError as error:
            raise ShardUnavailableError(f"{path}: cannot open the shard: {error.strerror}") from error
        try:
            self.index = read_index(path, index_sha256=index_sha256)
            self.check()
        except BaseException:
            self.close()
            raise

    @property
    def keys(self) -> list[str]:
        """Sample keys in the order of the tar."""
        return self.index.keys

    @property
    def fields(self) -> list[str]:
        """Field names."""
        return sorted(self.index.fields)

    def __len__(self) -> int:
        return len(self.index.keys)

    def check(self) -> None:
        """Whether the open file still is the whole shard, as whoever opens it now would find it.

        Raises:
            ShardUnavailableError: It was removed or cut off since it was opened.
        """
        try:
            facts = os.fstat(self._handle)
        except OSError as error:
            raise ShardUnavailableError(f"{self.path}: the open shard is lost: {error.strerror}") from error
        if facts.st_size != self.index.size_bytes:
            raise ShardUnavailableError(
                f"{self.path}: {facts.st_size} bytes found, its index says {self.index.size_bytes}; "
                "the tar is cut off or was replaced, fetch it again"
            )
        if facts.st_nlink == 0:
            raise ShardUnavailableError(f"{self.path}: the shard was removed or replaced while it was open")

    def read(self, sample: int, field: str) -> bytes:
        """The bytes of one field, checked against their checksum.

        Raises:
            ShardUnavailableError: The bytes cannot be read just now.
            ChecksumError: They are not those that were written.
            DataError: No such field.
        """
        columns = self.index.fields.get(field)
        if columns is None or columns.size[sample] == ABSENT:
            raise DataError(f"{self.path}: sample {self.keys[sample]!r} has no field {field!r}; it has {self.fields}")
        data = _pread(self._handle, columns.size[sample], columns.offset[sample], self.path)
        if zlib.crc32(data) != columns.crc32[sample]:
            raise ChecksumError(f"{self.path}: field {field!r} of sample {self.keys[sample]!r} fails its checksum")
        return data

    def decode(self, sample: int, field: str) -> Any:
        """One field as a value: array, pixels (3, H, W), text or plain values, by the field's ending.

        Raises:
            DataError: As `read`, or the bytes cannot be decoded.
        """
        data = self.read(sample, field)
        try:
            return decode(field, data)
        except DataError as error:
            raise DataError(f"{self.path}: field {field!r} of sample {self.keys[sample]!r}: {error}") from error

    def close(self) -> None:
        """Give the file back."""
        os.close(self._handle)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_index(path: Path, *, index_sha256: str | None = None) -> ShardIndex:
    """The sidecar of the tar at `path`.

    Raises:
        ShardUnavailableError: Missing, or not (yet) the one that `index_sha256` names.
        DataError: Damaged, where `index_sha256` is None.
    """
    sidecar = index_path(path)
    try:
        data = sidecar.read_bytes()
    except OSError as error:
        raise ShardUnavailableError(
            f"{sidecar}: cannot read the shard index: {error.strerror}; write it with build_index"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if index_sha256 is not None and found != index_sha256:
        raise ShardUnavailableError(
            f"{sidecar}: sha256 {found} found, the manifest says {index_sha256}; the index is damaged or was replaced"
        )
    return ShardIndex.from_json(data, sidecar)
