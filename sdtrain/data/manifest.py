"""The immutable list of shards that a run trains on, with digests and the facts that they were made with."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdtrain.data.shard import ShardIndex, ShardReader, index_path, read_index
from sdtrain.data.shard_cache import ShardCache
from sdtrain.data.storage import Location, RemoteFolder, is_url, read_beside
from sdtrain.data.takedown import Takedown, read_takedown
from sdtrain.errors import DataError
from sdtrain.run_dir import write_atomically

MANIFEST_VERSION = 1
FLIPPED: Mapping[str, str] = {"moments.npy": "moments_flipped.npy"}
"""A stored field -> the same of the mirrored picture, which shards may hold beside it."""

_ABSENT = "absent"
_BUCKET = re.compile(r"[A-Za-z0-9._-]+")
_SIDECAR_SHARE = 20  # a sidecar is smaller than this part of its tar
_COLUMNS = ("path", "split", "num_samples", "size_bytes", "sha256", "index_sha256")


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard of the data set.

    Attributes:
        path: Relative to the manifest's folder, with forward slashes.
        split: `train`, `validation`, ...
        num_samples: Samples in the tar.
        size_bytes: Size of the tar.
        sha256: Digest of the tar.
        index_sha256: Digest of its sidecar.
        fields: Field names in the shard, sorted.
        bucket: Which of the data set's sizes its samples have, for example `64x96`; None where all have one size.
    """

    path: str
    split: str
    num_samples: int
    size_bytes: int
    sha256: str
    index_sha256: str
    fields: tuple[str, ...]
    bucket: str | None = None

    def content(self) -> dict[str, Any]:
        """The row as plain values; a shard without a bucket says nothing of one, as before there were any."""
        row = {name: getattr(self, name) for name in _COLUMNS} | {"fields": list(self.fields)}
        return row if self.bucket is None else row | {"bucket": self.bucket}


def describe_shard(
    path: Path, *, split: str, folder: Path, bucket: str | None = None, index: ShardIndex | None = None
) -> ShardEntry:
    """The entry of a written shard, from its sidecar; the tar itself is not read again.

    Args:
        path: The tar, somewhere below `folder`.
        split: What it is for.
        folder: Where the manifest will stand.
        bucket: Name of its samples' size, where the data set has several.
        index: Its sidecar, where that has been read already.

    Raises:
        DataError: No valid sidecar, or the shard is not below the folder.
    """
    index = read_index(path) if index is None else index
    try:
        relative = path.resolve().relative_to(folder.resolve())
    except ValueError as error:
        raise DataError(f"{path}: the shard must lie below the manifest's folder {folder}") from error
    return ShardEntry(
        path=relative.as_posix(),
        split=split,
        num_samples=len(index.keys),
        size_bytes=index.size_bytes,
        sha256=index.sha256,
        index_sha256=hashlib.sha256(index_path(path).read_bytes()).hexdigest(),
        fields=tuple(sorted(index.fields)),
        bucket=bucket,
    )


@dataclass(frozen=True)
class Manifest:
    """A data set: nothing in it changes once it is written, and its digest names it.

    Attributes:
        path: Where the manifest stands, a file or a URL; not part of its content, so a data set can be moved.
        shards: Sorted by split and path.
        fingerprint: What the shards were made with: autoencoder, tokenizer, transform.
        field_shapes: Field name -> shape of one decoded sample, for the fields that have one shape everywhere.
        bucket_shapes: Bucket -> the same for the fields whose shape depends on it.
        cache: Where shards of object storage are kept on this node.
    """

    path: Location
    shards: tuple[ShardEntry, ...]
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    field_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    bucket_shapes: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    cache: ShardCache | None = field(default=None, compare=False)

    @property
    def folder(self) -> Path:
        """The folder that the shards' paths start from.

        Raises:
            DataError: It is on object storage.
        """
        if is_url(self.path):
            raise DataError(f"{self.path}: this needs the files on this machine; copy the data set here first")
        return Path(self.path).parent

    @cached_property
    def remote(self) -> RemoteFolder | None:
        """The folder on object storage that the shards' paths start from; None for files on this machine."""
        return RemoteFolder(self.path.rpartition("/")[0]) if is_url(self.path) else None

    @cached_property
    def sha256(self) -> str:
        """Digest of the canonical content."""
        return _digest(self.content())

    @cached_property
    def takedown(self) -> Takedown:
        """The samples that must not be read, as the list beside the manifest said when it was first asked for.

        Raises:
            DataError: What stands there is no take-down list, or it cannot be told whether there is one.
        """
        return read_takedown(self.path)

    def content(self) -> dict[str, Any]:
        """What the file holds, as plain values."""
        page = {
            "version": MANIFEST_VERSION,
            "shards": [shard.content() for shard in self.shards],
            "fingerprint": dict(self.fingerprint),
            "field_shapes": _as_lists(self.field_shapes),
        }
        if self.bucket_shapes:
            page["bucket_shapes"] = {bucket: _as_lists(shapes) for bucket, shapes in self.bucket_shapes.items()}
        return page

    def buckets(self, split: str) -> list[str | None]:
        """The buckets of a split that hold samples, sorted; `[None]` where all samples have one size."""
        found = {shard.bucket for shard in self.split(split) if shard.num_samples}
        return sorted(found, key=str) or [None]

    def shapes_in(self, bucket: str | None) -> dict[str, tuple[int, ...]]:
        """Field name -> shape of one decoded sample of a bucket."""
        return {**self.field_shapes, **(self.bucket_shapes.get(bucket, {}) if bucket else {})}

    def main_bucket(self, split: str) -> str | None:
        """The bucket of most samples, the first by name among equals: what is drawn without a sample has its size."""
        counts = dict.fromkeys(self.buckets(split), 0)
        for shard in self.split(split):
            if shard.num_samples:
                counts[shard.bucket] += shard.num_samples
        return max(counts, key=lambda bucket: counts[bucket])

    @cached_property
    def _splits(self) -> dict[str, tuple[ShardEntry, ...]]:
        splits: dict[str, list[ShardEntry]] = {}
        for shard in self.shards:
            splits.setdefault(shard.split, []).append(shard)
        return {name: tuple(shards) for name, shards in splits.items()}

    def split(self, name: str) -> tuple[ShardEntry, ...]:
        """The shards of a split.

        Raises:
            DataError: There are none.
        """
        if name not in self._splits:
            raise DataError(f"{self.path}: no split {name!r}; it has {sorted(self._splits)}")
        return self._splits[name]

    def num_samples(self, split: str) -> int:
        """Samples of a split."""
        return sum(shard.num_samples for shard in self.split(split))

    def shard_path(self, shard: ShardEntry) -> Path:
        """Where a shard lies on this machine."""
        return self.folder / shard.path

    def open_shard(self, shard: ShardEntry) -> ShardReader:
        """A reader whose index is the one that the manifest names.

        Raises:
            ShardUnavailableError: The shard is missing or damaged, but may come back.
            DataError: It has another number of samples, or is on object storage and no cache was given.
            StorageError: The cache's disk has no room.
        """
        if self.remote is None:
            reader = ShardReader(self.shard_path(shard), index_sha256=shard.index_sha256)
        else:
            reader = self._cache.open(self.remote, shard)
        if len(reader) != shard.num_samples:
            reader.close()
            raise DataError(f"{reader.path}: {len(reader)} samples found, {self.path} says {shard.num_samples}")
        return reader

    def prefetch(self, shard: ShardEntry) -> None:
        """Bring a shard of object storage onto this node, unless it is here or on its way.

        Raises:
            DataError: As `open_shard`.
            StorageError: As `open_shard`.
        """
        if self.remote is not None:
            self._cache.prefetch(self.remote, shard)

    def drop_copy(self, shard: ShardEntry) -> bool:
        """Forget this node's copy of a shard, which turned out to be damaged; whether it was a copy."""
        if self.remote is None:
            return False
        self._cache.discard(shard)
        return True

    @property
    def _cache(self) -> ShardCache:
        if self.cache is None:
            raise DataError(
                f"{self.path}: shards of object storage are read through a folder on this node's own disk; "
                "set data.cache_dir"
            )
        return self.cache

    @classmethod
    def load(cls, path: Location, *, cache: ShardCache | None = None) -> Manifest:
        """Read a manifest and check its digest.

        Args:
            path: A file, or a URL of object storage.
            cache: For the shards of a URL; without one only the manifest itself can be read.

        Raises:
            DataError: Missing, damaged, edited by hand, of another version, or with paths that leave its folder.
            ConfigError: A URL that no installed library reads.
        """
        path = path if is_url(path) else Path(path)
        try:
            page = json.loads(read_beside(path))
        except OSError as error:
            raise DataError(
                f"{path}: cannot read the manifest: {error.strerror or 'not there'}; check data.manifest, or build the "
                "data first"
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: the manifest is not JSON: {error}") from error
        try:
            manifest = cls._from_content(path, page, cache)
            stated = page["sha256"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path}: not a valid manifest ({type(error).__name__}: {error})") from error
        if manifest.sha256 != stated:
            raise DataError(
                f"{path}: content has sha256 {manifest.sha256}, the file says {stated}; manifests are never edited, "
                "write a new one"
            )
        return manifest

    @classmethod
    def _from_content(cls, path: Location, page: Mapping[str, Any], cache: ShardCache | None) -> Manifest:
        if page["version"] != MANIFEST_VERSION:
            raise ValueError(f"version {page['version']!r} found, {MANIFEST_VERSION} is read")
        shards = _entries(page["shards"])
        _check_shards(shards)
        bucket_shapes = {bucket: _as_tuples(shapes) for bucket, shapes in page.get("bucket_shapes", {}).items()}
        return cls(path, shards, page["fingerprint"], _as_tuples(page["field_shapes"]), bucket_shapes, cache)


def _entries(rows: list[dict[str, Any]]) -> tuple[ShardEntry, ...]:
    """The rows of a file as entries; a row is given up as its entry is made, so that never both lists are whole."""
    same: dict[Any, Any] = {}  # one object for every split, bucket and list of fields, however many shards
    rows.reverse()
    shards = []
    while rows:
        row = rows.pop()
        row["fields"] = tuple(row["fields"])
        for name in ("fields", "split", "bucket"):
            if name in row:
                row[name] = same.setdefault(row[name], row[name])
        shards.append(ShardEntry(**row))
    return tuple(shards)


def _as_lists(shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in shapes.items()}


def _as_tuples(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in shapes.items()}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_shards(shards: Sequence[ShardEntry]) -> None:
    seen: set[str] = set()
    for shard in shards:
        if shard.path.startswith("/") or ".." in shard.path.split("/"):
            raise ValueError(f"shard path {shard.path!r} leaves the manifest's folder")
        if shard.path in seen:
            raise ValueError(f"shard {shard.path!r} is listed twice")
        if shard.num_samples < 0:
            raise ValueError(f"shard {shard.path!r} has {shard.num_samples} samples")
        if shard.bucket is not None and not _BUCKET.fullmatch(shard.bucket):
            raise ValueError(f"shard {shard.path!r} has bucket {shard.bucket!r}; use letters, digits, '_', '-', '.'")
        seen.add(shard.path)
    bare = [shard.path for shard in shards if shard.bucket is None]
    if bare and len(bare) < len(shards):
        raise ValueError(f"shard {bare[0]!r} has no bucket, other shards have one; all have one or none has")


def write_manifest(
    path: Path,
    shards: Sequence[ShardEntry],
    *,
    fingerprint: Mapping[str, Any],
    field_shapes: Mapping[str, Sequence[int]] | None = None,
    bucket_shapes: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
) -> Manifest:
    """Write a manifest once; writing the same content again does nothing.

    Args:
        path: Usually `<data set>/manifest.json`; the shards lie below its folder.
        shards: In any order; they are sorted, so the digest does not depend on who finished first.
        fingerprint: Plain values: what the shards were made with.
        field_shapes: Shape of one sample by field; None reads it off the first sample (of every bucket).
        bucket_shapes: Bucket -> the shapes that depend on it; goes with `field_shapes`.

    Raises:
        DataError: Another manifest stands there already, or the shards do not fit together.
    """
    ordered = tuple(sorted(shards, key=lambda shard: (shard.split, shard.path)))
    try:
        _check_shards(ordered)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    plain = json.loads(json.dumps(dict(fingerprint)))  # what a reader will see: lists for tuples
    if field_shapes is None:
        field_shapes, bucket_shapes = _shapes_of_first_samples(Manifest(path, ordered, plain))
    of_buckets = {bucket: _as_tuples(shapes) for bucket, shapes in (bucket_shapes or {}).items()}
    manifest = Manifest(path, ordered, plain, _as_tuples(field_shapes), of_buckets)
    if path.exists():
        if Manifest.load(path).sha256 != manifest.sha256:
            raise DataError(f"{path}: another manifest stands here, and manifests never change; choose a new folder")
        return manifest
    page = manifest.content() | {"sha256": manifest.sha256}
    write_atomically(path, json.dumps(page, indent=1, sort_keys=True) + "\n")
    return manifest


Shapes = dict[str, tuple[int, ...]]


def _shapes_of_first_samples(manifest: Manifest) -> tuple[Shapes, dict[str, Shapes]]:
    """The shapes that all buckets share, and those that differ, by bucket."""
    found: dict[str | None, Shapes] = {}
    for shard in manifest.shards:
        if shard.num_samples > 0 and shard.bucket not in found:
            with manifest.open_shard(shard) as reader:
                values = {name: reader.decode(0, name) for name in reader.fields}
            found[shard.bucket] = {name: value.shape for name, value in values.items() if isinstance(value, np.ndarray)}
    first = next(iter(found.values()), {})
    shared = {name: shape for name, shape in first.items() if all(one.get(name) == shape for one in found.values())}
    of_buckets = {
        bucket: {name: shape for name, shape in shapes.items() if name not in shared}
        for bucket, shapes in found.items()
        if bucket is not None
    }
    return shared, {bucket: shapes for bucket, shapes in of_buckets.items() if shapes}


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def check_fingerprint(manifest: Manifest, expected: Mapping[str, Any]) -> None:
    """Refuse shards that were made with another autoencoder, tokenizer or transform than the recipe's.

    Args:
        expected: What the recipe needs, nested as in the manifest; facts that it does not name are not compared.

    Raises:
        DataError: Names each fact that differs, as found and as expected.
    """
    found, wanted = _flatten(manifest.fingerprint), _flatten(json.loads(json.dumps(dict(expected))))
    lines = [
        f"  {name}: found {found.get(name, _ABSENT)!r}, expected {value!r}"
        for name, value in sorted(wanted.items())
        if name not in found or found[name] != value
    ]
    if lines:
        raise DataError(
            "\n".join([f"{manifest.path}: the shards were made with other parts than this recipe's:", *lines])
            + "\nMake the shards again with the recipe's parts, or point data.manifest at shards that fit."
        )


def verify(
    manifest: Manifest,
    *,
    deep: bool = False,
    watched: Callable[[Sequence[ShardEntry]], Iterable[ShardEntry]] = iter,
) -> None:
    """Check that every shard is there.

    Args:
        manifest: Of shards on a disk.
        deep: Also read every byte and compare the digests; otherwise existence and sizes.
        watched: Passes the shards on, such as a progress bar.

    Raises:
        DataError: Lists every shard that is missing or damaged.
    """
    shards = watched(manifest.shards)
    problems = [problem for shard in shards if (problem := _problem(manifest, shard, deep)) is not None]
    if problems:
        head = f"{manifest.path}: {len(problems)} of {len(manifest.shards)} shards are missing or damaged:"
        raise DataError("\n".join([head, *(f"  {problem}" for problem in problems)]))


def _problem(manifest: Manifest, shard: ShardEntry, deep: bool) -> str | None:
    path = manifest.shard_path(shard)
    try:
        size = path.stat().st_size
        index_path(path).stat()
        if size != shard.size_bytes:
            return f"{path}: {size} bytes found, expected {shard.size_bytes}"
        if deep:
            read_index(path, index_sha256=shard.index_sha256)
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                return f"{path}: sha256 {found} found, expected {shard.sha256}"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except DataError as error:
        return str(error)
    return None


def bytes_in_use(manifest: Manifest, *, window_shards: int) -> int:
    """Most bytes of shards and sidecars that a run holds at a time: the window before, this one and the next one.

    Workers cross from one window to the next at different moments, so the one before is still open in some.
    """
    sizes: dict[tuple[str, str | None], list[int]] = {}
    for shard in manifest.shards:
        sizes.setdefault((shard.split, shard.bucket), []).append(shard.size_bytes)
    total = sum(sum(sorted(group, reverse=True)[: 3 * window_shards + 1]) for group in sizes.values())
    return total + total // _SIDECAR_SHARE


class Record(NamedTuple):
    """One sample of an offline pass: its key and its decoded fields."""

    key: str
    fields: dict[str, Any]


def read_fields(manifest: Manifest, split: str, fields: Sequence[str]) -> Iterator[Record]:
    """Every sample of a split once, in the order of the manifest, for passes outside training.

    Samples that are taken down are left out.

    Args:
        fields: Names as in the shards: `moments.npy`, `txt`, `json`, `jpg`, ...

    Raises:
        DataError: A shard or sample cannot be read; offline passes want all of them.
    """
    for shard in manifest.split(split):
        with manifest.open_shard(shard) as reader:
            for sample, key in enumerate(reader.keys):
                if key not in manifest.takedown.keys:
                    yield Record(key, {name: reader.decode(sample, name) for name in fields})
