"""img2dataset at work on the rows of one part.

Its Reader and Downloader run as they ship, in our process, on the opener that is installed there. What they take to be
their resizer and their writer is a `Collector`: it brings each picture to its size, compares digests, keeps what
arrived by row and gives every other row one reason.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.transport import body_digests
from data_pipeline.transport_policy import Reason, RefusedError
from sdtrain.config.ingestion import DownloadConfig

if TYPE_CHECKING:
    from data_pipeline.resize import Resized

SUCCESS = "success"
INTERNAL_ERROR = "internal_error"

_ROWS = 10**8  # img2dataset's keys are shard * _ROWS + row
_COUNTED = re.compile(r"http_\d{3}")
_KNOWN = frozenset(Reason)
_MESSAGES = (  # of urllib's Request, before the transport is asked
    ("unknown url type", str(Reason.SCHEME)),
    ("Invalid IPv6 URL", str(Reason.URL)),
    ("Unable to allocate", str(Reason.OUT_OF_MEMORY)),
)


def reason_of(message: str | None) -> str:
    """The reason that a row is counted under, from img2dataset's error message; `success` for None."""
    if message is None:
        return SUCCESS
    first = message.partition(" ")[0]
    if first in _KNOWN or _COUNTED.fullmatch(first):
        return first
    if not message:  # str(MemoryError())
        return str(Reason.OUT_OF_MEMORY)
    return next((reason for text, reason in _MESSAGES if text in message), INTERNAL_ERROR)


@dataclass(frozen=True, slots=True)
class Arrived:
    """A picture as it is stored, with what is known of it.

    Attributes:
        picture: The stored file and the sizes.
        digests: `md5` and `sha256` of the file that was fetched.
        columns: The row's values, by column.
    """

    picture: Resized
    digests: Mapping[str, str]
    columns: Mapping[str, Any]


@dataclass
class Collector:
    """What img2dataset believes to be its resizer and its writer; it calls one after the other, on one thread.

    A shard is about a hundred megabytes, and only what is complete can be sorted.

    Attributes:
        resizer: Brings one file to its size.
        arrived: Pictures by row.
        failed: The reason of every other row.
        unexpected: Messages behind `internal_error`.
    """

    resizer: Callable[[memoryview], Resized]
    arrived: dict[int, Arrived] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    unexpected: set[str] = field(default_factory=set)
    _last: tuple[Resized, Mapping[str, str]] | None = None

    def resize(self, stream: io.BytesIO, blurring: object = None) -> tuple[Any, ...]:
        """What img2dataset asks of a resizer: file, size, original size, error."""
        self._last = None
        body = stream.getbuffer()
        try:
            picture = self.resizer(body)
            self._last = picture, body_digests(body)
        except RefusedError as error:
            return (None, None, None, None, None, str(error))
        finally:
            body.release()
        return (picture.jpeg, *picture.layout.stored, *picture.layout.original, None)

    def write(self, image: bytes | None, key: str, caption: str | None, meta: Mapping[str, Any]) -> None:
        """Take one row: the file that `resize` gave, or None with the error message in `meta`."""
        row = int(key) % _ROWS
        reason = reason_of(meta["error_message"])
        if reason == INTERNAL_ERROR:
            self.unexpected.add(str(meta["error_message"])[:200])
        if image is None:
            self.failed[row] = reason
            return
        assert self._last is not None and self._last[0].jpeg is image
        picture, digests = self._last
        if _contradicts(digests, meta):
            self.failed[row] = str(Reason.DIGEST)
        else:
            self.arrived[row] = Arrived(picture, digests, meta)

    def close(self) -> None:
        """Nothing is open."""


def _contradicts(digests: Mapping[str, str], columns: Mapping[str, Any]) -> bool:
    """Whether the table names another digest; where it has no column or no value, every file will do."""
    named = {name: str(columns[name]).strip().lower() for name in digests if columns.get(name)}
    return any(digests[name] != value for name, value in named.items())


def run_engine(
    table: Path, columns: Sequence[str], scratch: Path, collector: Collector, settings: DownloadConfig
) -> None:
    """Let img2dataset work through a table; everything that it prints or leaves behind is dropped.

    Args:
        table: Parquet file with the columns url, caption and `columns`.
        columns: What is handed on to the collector.
        scratch: Folder for its temporary files.
        collector: Takes what arrives.
        settings: Threads and seconds; all else is the opener's and the collector's.
    """
    from img2dataset.downloader import Downloader
    from img2dataset.reader import Reader

    with _silence():
        reader = Reader(
            url_list=str(table),
            input_format="parquet",
            url_col="url",
            caption_col="caption",
            verify_hash_col=None,
            verify_hash_type=None,
            save_additional_columns=list(columns),
            number_sample_per_shard=_ROWS,
            done_shards=set(),
            tmp_path=str(scratch),
        )
        downloader = Downloader(
            sample_writer_class=lambda *_: collector,
            resizer=collector.resize,
            thread_count=settings.threads,
            save_caption=True,
            extract_exif=False,
            output_folder=str(scratch),
            column_list=reader.column_list,
            timeout=settings.timeout_seconds,
            number_sample_per_shard=_ROWS,
            oom_shard_count=5,
            compute_hash=None,
            verify_hash_type=None,
            encode_format="jpg",
            retries=0,  # the transport retries what may pass
            user_agent_token=None,
            disallowed_header_directives=None,
        )
        for shard in reader:
            downloader.download_shard(shard)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drop what img2dataset prints, and what image libraries write to the process's standard error."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
