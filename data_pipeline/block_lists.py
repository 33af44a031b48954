"""Block lists: what must neither be fetched nor kept, one entry a line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.transport_policy import url_sha256
from sdtrain.errors import DataError

_SHA256 = re.compile(r"[0-9a-f]{64}", re.IGNORECASE)
_SHA256_OR_MD5 = re.compile(r"[0-9a-f]{64}|[0-9a-f]{32}", re.IGNORECASE)


def read_blocked_urls(paths: Sequence[Path]) -> frozenset[str]:
    """sha256 of the URLs of text files; a line is a URL or its sha256.

    Raises:
        DataError: A file cannot be read.
    """
    return frozenset(
        line.lower() if _SHA256.fullmatch(line) else url_sha256(line)
        for path in paths
        for _, line in _lines(path, "download.blocked_urls")
    )


def read_blocked_bytes(paths: Sequence[Path]) -> frozenset[str]:
    """Digests of the pictures' files that text files name; a line is a sha256 or an md5.

    Raises:
        DataError: A file cannot be read, or a line is neither.
    """
    digests = set()
    for path in paths:
        for number, line in _lines(path, "download.blocked_bytes"):
            if not _SHA256_OR_MD5.fullmatch(line):
                found = (
                    f"{path}, line {number}: {line[:80]!r} is neither a sha256 (64 hexadecimal digits) nor an md5 (32)"
                )
                raise DataError(f"download.blocked_bytes: {found}; correct or remove the line")
            digests.add(line.lower())
    return frozenset(digests)


def _lines(path: Path, key: str) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not blank."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{key}: {path}: cannot be read as text ({error}); give a text file with one entry a line"
        ) from None
