"""What makes two rows the same: 128-bit identities of URLs, of URLs with captions, and of hashes of pictures.

An identity is two numbers of 64 bits, so that rows are compared, sorted and spread over buckets as arrays.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import mmh3
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.sources.laion import BATCH_ROWS, resolve_url_column
from sdtrain.errors import DataError

By = Literal["url", "url_text"]
Words = npt.NDArray[np.uint64]

Listed = tuple[Words, Words]
"""Halves of 128-bit digests, in ascending order."""

_KEY = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def identity(url: str, caption: str, by: By) -> bytes:
    """16 bytes that equal rows share; also the sample's key, the same in every run that keeps the row."""
    return _digest(url if by == "url" else f"{url}\0{caption}")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def laion_hash(url: str, caption: str) -> int:
    """The key that LAION's score tables are joined by: mmh3.hash64((url + text).encode())[0]."""
    return mmh3.hash64((url + caption).encode())[0]


@dataclass(frozen=True, slots=True)
class Identities:
    """Some rows of a file.

    Attributes:
        high: First half of each row's identity.
        low: Second half.
        row: The row's number in its file, ascending.
        place: Uniform in 64 bits and the same for all captions of a URL: what the validation split is drawn by.
    """

    high: Words
    low: Words
    row: npt.NDArray[np.int64]
    place: Words

    def take(self, positions: npt.NDArray[Any]) -> Identities:
        """Those rows."""
        return Identities(self.high[positions], self.low[positions], self.row[positions], self.place[positions])


class Identify(Protocol):
    """How the rows of a file become identities; rows that it leaves out are neither kept nor duplicates."""

    def facts(self) -> dict[str, Any]:
        """The settings that identities depend on, as JSON."""
        ...

    def lists(self) -> tuple[Path, ...]:
        """Files beside the table that decide which rows are left out."""
        ...

    def of(self, path: Path) -> Iterator[Identities]:
        """The rows of a parquet file, in its order, batch by batch."""
        ...


@dataclass(frozen=True)
class TextIdentity:
    """By URL, or by URL and caption; without the URLs that are excluded.

    Attributes:
        by: What makes two rows equal.
        exclude: Lists of URLs, their keys (`identity` by URL) or their sha256.
    """

    by: By
    exclude: tuple[Path, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What makes rows equal; lists count by their content."""
        return {"by": self.by}

    def lists(self) -> tuple[Path, ...]:
        """The lists of excluded URLs."""
        return self.exclude

    def of(self, path: Path) -> Iterator[Identities]:
        """Hash URLs and captions, leave out what is excluded."""
        listed = read_excluded_urls(self.exclude)
        first = 0
        for batch in pq.ParquetFile(path).iter_batches(BATCH_ROWS, columns=["url", "caption"]):
            yield self.of_batch(batch, listed, first)
            first += batch.num_rows

    def of_batch(self, batch: pa.RecordBatch, listed: ExcludedUrls, first: int = 0) -> Identities:
        """As `of`, for rows in memory.

        Args:
            batch: With the columns url and caption.
            listed: What `read_excluded_urls` says of the lists.
            first: Number of the first row.
        """
        urls = batch["url"].fill_null("").to_pylist()
        url_high, url_low = high, low = to_words(map(_digest, urls))
        if self.by == "url_text":
            captions = batch["caption"].fill_null("").to_pylist()
            high, low = to_words(_digest(f"{url}\0{text}") for url, text in zip(urls, captions, strict=True))
        is_out = is_listed(url_high, url_low, listed.keys)
        if len(listed.sha256s[0]):
            is_out |= is_listed(*to_words(map(_sha256, urls)), listed.sha256s)
        rows = np.arange(first, first + len(urls), dtype=np.int64)
        return Identities(high, low, rows, url_high).take(np.flatnonzero(~is_out))


@dataclass(frozen=True)
class HashIdentity:
    """By a column of hashes, such as the sha256 of pictures, once pictures are there.

    Equal means the same hash (its first 128 bits). Rows without one stay out of it.

    Attributes:
        column: A text column of hexadecimal hashes.
    """

    column: str

    def facts(self) -> dict[str, Any]:
        """The column."""
        return {"column": self.column}

    def lists(self) -> tuple[Path, ...]:
        """None: what is excluded has no hash any more."""
        return ()

    def of(self, path: Path) -> Iterator[Identities]:
        """Read the column.

        Raises:
            DataError: It is absent, or a value is not hexadecimal.
        """
        if self.column not in pq.read_schema(path).names:
            raise DataError(f"{path}: no column {self.column!r}; run the stage that hashes the pictures")
        first = 0
        for batch in pq.ParquetFile(path).iter_batches(BATCH_ROWS, columns=[self.column]):
            texts = batch[self.column]
            rows = np.flatnonzero(texts.is_valid().to_numpy(zero_copy_only=False)) + first
            high, low = to_words(_from_hex(text, path) for text in texts.drop_null().to_pylist())
            yield Identities(high, low, rows, mixed(high ^ mixed(low)))
            first += len(texts)


def _from_hex(text: str, source: Path) -> bytes:
    try:
        return bytes.fromhex(text)[:16].rjust(16, b"\0")
    except ValueError:
        raise DataError(f"{source}: {text[:80]!r} is no hexadecimal hash") from None


def to_words(digests: Iterable[bytes]) -> tuple[Words, Words]:
    """The halves of 16-byte digests."""
    pairs = np.frombuffer(b"".join(digests), ">u8").astype(np.uint64).reshape(-1, 2)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def mixed(values: Words) -> Words:
    """A bijection of 64 bits that looks like chance: the finalizer of splitmix64 (Steele et al. 2014)."""
    bits = values ^ (values >> np.uint64(30))
    bits = bits * np.uint64(0xBF58476D1CE4E5B9)  # modulo 2**64, as arrays multiply
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def holdout_rank(place: Words, seed: int) -> Words:
    """Where rows stand in the queue for validation, uniform in 64 bits; all captions of a URL stand together."""
    return mixed(place ^ np.uint64(int.from_bytes(_digest(f"seed {seed}")[:8], "big")))


@dataclass(frozen=True, slots=True)
class ExcludedUrls:
    """The URLs on some lists: those known by their key, and those known by their sha256 (its first half)."""

    keys: Listed
    sha256s: Listed


def read_excluded_urls(paths: Sequence[Path]) -> ExcludedUrls:
    """The URLs on some lists.

    Args:
        paths: Text files with a URL, a key (32 hexadecimal digits) or the sha256 of a URL (64) in each line, or parquet
            files with a URL column.

    Raises:
        DataError: A list cannot be read or holds nothing.
    """
    keys, sha256s = set(), set()
    for entry in (entry for path in paths for entry in _entries(path)):
        if _SHA256.fullmatch(entry):
            sha256s.add(bytes.fromhex(entry)[:16])
        else:
            keys.add(bytes.fromhex(entry) if _KEY.fullmatch(entry) else _digest(entry))
    return ExcludedUrls(to_words(sorted(keys)), to_words(sorted(sha256s)))


def _entries(path: Path) -> list[str]:
    try:
        entries = _urls_of_table(path) if path.suffix == ".parquet" else _lines(path)
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise DataError(f"dedup.exclude: {path}: cannot be read ({error}); give a text or parquet file") from None
    if not entries:
        raise DataError(f"dedup.exclude: {path} is empty; give a URL or its hash in each line, or take it off the list")
    return entries


def _lines(path: Path) -> list[str]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _urls_of_table(path: Path) -> list[str]:
    column = resolve_url_column(pq.read_schema(path).names, str(path))
    return pq.read_table(path, columns=[column])[column].drop_null().to_pylist()


def is_listed(high: Words, low: Words, listed: Listed) -> npt.NDArray[np.bool_]:
    """Which identities are on a list.

    Args:
        high: First halves.
        low: Second halves.
        listed: The list.
    """
    listed_high, listed_low = listed
    found = np.zeros(len(high), bool)
    if not len(listed_high):
        return found
    start = np.searchsorted(listed_high, high)
    for place in np.flatnonzero(listed_high[np.minimum(start, len(listed_high) - 1)] == high):
        end = np.searchsorted(listed_high, high[place], side="right")
        found[place] = low[place] in listed_low[start[place] : end]
    return found
