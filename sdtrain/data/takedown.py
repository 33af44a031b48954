"""The take-down list beside a data set: samples that must never be read again, whatever the manifest lists.

`takedown.json` lies in the folder of the manifests and masks keys in every one of them; manifests and shards stay as
they are, and so does the order of all other samples. The list only grows: each of its entries carries a digest of
itself and of the entries before it, so that none can be changed, moved or taken out without being noticed. It is read
once, when a manifest is; what is added later counts for a running job from its next start.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from sdtrain.data.shard import ShardUnavailableError
from sdtrain.data.storage import Location, read_beside
from sdtrain.errors import DataError, StorageError
from sdtrain.run_dir import write_atomically

TAKEDOWN = "takedown.json"
TAKEDOWN_VERSION = 1


class Searched(TypedDict):
    """A manifest as it was when requests were looked up in it.

    Attributes:
        sha256: The manifest's digest.
        masked: Its samples that the entry's keys mask.
    """

    sha256: str
    masked: int


@dataclass(frozen=True, slots=True)
class Entry:
    """What one list of requests masked.

    Attributes:
        date: When it was added, UTC, ISO 8601.
        reason: Why, in words.
        list_name: Name of the list's file.
        list_sha256: Digest of the list.
        requests: What was asked for, sorted: keys, sha256 of pictures, sha256 of URLs (never a URL itself).
        keys: Samples that are masked, sorted.
        manifests: The manifests that were searched, by file name.
    """

    date: str
    reason: str
    list_name: str
    list_sha256: str
    requests: tuple[str, ...]
    keys: tuple[str, ...]
    manifests: Mapping[str, Searched]

    def digest(self, previous: str) -> str:
        """Names this entry and, through the digest of the one before it, all earlier ones."""
        page = json.dumps(asdict(self) | {"previous": previous}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(page.encode()).hexdigest()


@dataclass(frozen=True)
class Takedown:
    """All entries of a list, oldest first; empty where there is no list."""

    entries: tuple[Entry, ...] = ()

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """The digest of every entry; the last one names the whole list."""
        digests: list[str] = []
        for entry in self.entries:
            digests.append(entry.digest(digests[-1] if digests else ""))
        return tuple(digests)

    @property
    def sha256(self) -> str | None:
        """Names the list as it is; None where it is empty."""
        return self.digests[-1] if self.digests else None

    @cached_property
    def keys(self) -> frozenset[str]:
        """Samples that are masked."""
        return frozenset(key for entry in self.entries for key in entry.keys)

    def as_of(self, sha256: str | None) -> Takedown:
        """The list as it was when `sha256` named it; empty where it never did."""
        count = self.digests.index(sha256) + 1 if sha256 in self.digests else 0
        return Takedown(self.entries[:count])

    def asked(self, manifest_sha256: str) -> frozenset[str]:
        """Requests that were looked up in a manifest."""
        return frozenset(
            request
            for entry in self.entries
            if manifest_sha256 in {one["sha256"] for one in entry.manifests.values()}
            for request in entry.requests
        )

    def pending(self, manifest_sha256: str) -> frozenset[str]:
        """Requests that were never looked up in a manifest, because it is younger than they are."""
        every = frozenset(request for entry in self.entries for request in entry.requests)
        return every - self.asked(manifest_sha256)

    def to_json(self) -> str:
        """The file's text."""
        rows = [asdict(entry) | {"sha256": sha256} for entry, sha256 in zip(self.entries, self.digests, strict=True)]
        return json.dumps({"version": TAKEDOWN_VERSION, "entries": rows}, indent=1, sort_keys=True) + "\n"


def read_takedown(manifest: Location) -> Takedown:
    """The list beside a manifest.

    Args:
        manifest: The manifest's file or URL.

    Raises:
        DataError: The list is there, but is none, or was changed by hand; or whether it is there cannot be told.
    """
    path = f"{str(manifest).rpartition('/')[0] or '.'}/{TAKEDOWN}"
    try:
        return _parse(json.loads(read_beside(manifest, TAKEDOWN)))
    except FileNotFoundError:
        return Takedown()
    except ShardUnavailableError as error:
        raise DataError(
            f"{error}. Whether there is a take-down list must be known: some stores tell only those who may list the "
            'folder; allow that, or put {"version": 1, "entries": []} there'
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: not a take-down list of `sdtrain-data takedown` ({type(error).__name__}: {error}); it is never "
            "edited, so that nothing can leave it unseen: put back the file as it was written"
        ) from error


def _parse(page: Mapping[str, Any]) -> Takedown:
    if page["version"] != TAKEDOWN_VERSION:
        raise ValueError(f"version {page['version']!r} found, {TAKEDOWN_VERSION} is read")
    entries, stated = [], []
    for row in page["entries"]:
        facts: dict[str, Any] = dict(row)
        stated.append(facts.pop("sha256"))
        facts |= {name: tuple(row[name]) for name in ("requests", "keys")}
        entries.append(Entry(**facts))
    found = Takedown(tuple(entries))
    for number, (entry, said, is_so) in enumerate(zip(entries, stated, found.digests, strict=True), start=1):
        if not all(isinstance(text, str) for text in (*entry.requests, *entry.keys)):
            raise TypeError(f"entry {number}: requests and keys must be texts")
        if said != is_so:
            raise ValueError(f"entry {number} of {len(entries)} has digest {is_so}, the file says {said}")
    return found


def append_entry(manifest: Path, entry: Entry) -> Takedown:
    """Add an entry to the list beside a manifest; readers see the list without it or with it, never a part.

    Raises:
        DataError: What stands there is no take-down list.
        StorageError: The folder cannot be written to.
    """
    path = manifest.with_name(TAKEDOWN)
    try:
        with open(path.with_name(f".{TAKEDOWN}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            grown = Takedown((*read_takedown(manifest).entries, entry))
            write_atomically(path, grown.to_json())
    except OSError as error:
        raise StorageError(
            f"{path}: the take-down list cannot be written: {error.strerror}; nothing was masked here: make the folder "
            "writable and run again"
        ) from error
    return grown
