"""Fetch the images of one part and write them as one shard.

img2dataset's own Reader, Downloader and Resizer do the work, part by part, inside our workers: its distributor submits
everything at once and never looks at a failed status, and its writer's tars differ from run to run. It opens URLs
through the hardened transport, never retries by itself, and hands its results to a collector that counts every row by
reason; the shard is written from that, sorted by key.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import io
import json
import math
import os
import re
import resource
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import RenderableType
from rich.table import Table

from data_pipeline.stage import Needs, Unit, Work, one_to_one
from data_pipeline.transport import HardenedOpener
from data_pipeline.transport_policy import Reason, TransportPolicy, is_permanent
from sdtrain.config.ingestion import DownloadConfig
from sdtrain.data.shard import ShardWriter
from sdtrain.errors import DataError
from sdtrain.run_dir import write_atomically

SUCCESS = "success"
TOO_SMALL = "too_small"
UNDECODABLE = "undecodable"
OUT_OF_MEMORY = "out_of_memory"
INTERNAL_ERROR = "internal_error"

_ROWS = 10**8  # img2dataset's keys are shard * _ROWS + row
_STACK_BYTES = 16 << 20
_MAX_UNEXPECTED = 5
_COUNTED = re.compile(r"http_\d{3}")
_KNOWN = frozenset(Reason)
_OTHER_PERMANENT = frozenset({TOO_SMALL, UNDECODABLE, OUT_OF_MEMORY})
_MESSAGES = (  # of urllib's Request and of img2dataset's Resizer, in the order of trying
    ("unknown url type", str(Reason.SCHEME)),
    ("Invalid IPv6 URL", str(Reason.URL)),
    ("image too small", TOO_SMALL),
    ("Image decoding error", UNDECODABLE),
    ("CV_IO_MAX_IMAGE", str(Reason.TOO_MANY_PIXELS)),
    ("Insufficient memory", OUT_OF_MEMORY),
    ("Failed to allocate", OUT_OF_MEMORY),
    ("Unable to allocate", OUT_OF_MEMORY),
    ("OpenCV", UNDECODABLE),
)
_OWN_COLUMNS = ("key", "url", "caption", "split")
_LEFT_OUT = ("key", "url", "caption", "split", "width", "height")  # stored under names of their own, or as measured


class ShardFailedError(RuntimeError):
    """Not one image of a part arrived, for reasons that may pass; the runner tries the part again."""


def reason_of(message: str | None) -> str:
    """The reason that a row is counted under, from img2dataset's error message; `success` for None."""
    if message is None:
        return SUCCESS
    first = message.partition(" ")[0]
    if first in _KNOWN or _COUNTED.fullmatch(first):
        return first
    if not message:  # str(MemoryError())
        return OUT_OF_MEMORY
    return next((reason for text, reason in _MESSAGES if text in message), INTERNAL_ERROR)


@dataclass
class Collector:
    """What img2dataset believes to be its writer: keeps images in memory by row, and counts every row by reason.

    A shard is about a hundred megabytes, and only what is complete can be sorted.
    """

    images: dict[int, tuple[bytes, Mapping[str, Any]]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    unexpected: set[str] = field(default_factory=set)

    def write(self, image: bytes | None, key: str, caption: str | None, meta: Mapping[str, Any]) -> None:
        """Take one row: an encoded image, or None with the error message in `meta`."""
        reason = reason_of(meta["error_message"])
        self.reasons[reason] += 1
        if reason == INTERNAL_ERROR:
            self.unexpected.add(str(meta["error_message"])[:200])
        if image is not None:
            self.images[int(key) % _ROWS] = (image, meta)

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class DownloadStage:
    """One shard of images for each part of the metadata.

    Attributes:
        source: Folder of parquet parts with the columns url, caption, split and whatever else is kept beside them.
        folder: Where the shards go.
        settings: How images are fetched and brought to one size.
        memory_limit_bytes: What a worker may take beyond what it holds after its start; None leaves it unlimited.
    """

    source: Path
    folder: Path
    settings: DownloadConfig
    memory_limit_bytes: int | None = None
    name: str = "download"
    version: str = "1"

    @property
    def needs(self) -> Needs:
        """Long-lived processes: importing img2dataset takes seconds, and the opener is installed process-wide."""
        return Needs(keeps_worker=True, max_workers=self.settings.processes, environment=self._environment())

    def _environment(self) -> dict[str, str]:
        pixels = str(self.settings.max_pixels)
        return {"NO_ALBUMENTATIONS_UPDATE": "1", "OPENCV_IO_MAX_IMAGE_PIXELS": pixels, "OMP_NUM_THREADS": "1"}

    def config_facts(self) -> Mapping[str, Any]:
        """What the pixels depend on; patience and parallelism only decide which of them arrive today."""
        kept = {"image_size", "resize_mode", "only_if_bigger", "jpeg_quality", "samples_per_shard", "max_bytes"}
        return self.settings.model_dump(mode="json", include=kept | {"max_pixels"}) | {"engine": _engine_version()}

    def fingerprint(self) -> dict[str, Any]:
        """What a manifest says of the images."""
        kept = {"image_size", "resize_mode", "only_if_bigger", "jpeg_quality"}
        return {"transform": self.settings.model_dump(mode="json", include=kept) | {"engine": _engine_version()}}

    def units(self) -> Sequence[Unit]:
        """One per part.

        Raises:
            ConfigError: No contact for the user agent.
            DataError: There is no part.
        """
        _ = self.policy
        return one_to_one(self.source, ".parquet")

    @property
    def policy(self) -> TransportPolicy:
        """The transport's policy by the settings."""
        settings = self.settings
        return TransportPolicy(
            contact=settings.contact or "",
            allowed_ports=settings.allowed_ports,
            allow_loopback=settings.allow_loopback,
            max_redirects=settings.max_redirects,
            max_bytes=settings.max_bytes,
            max_pixels=settings.max_pixels,
            timeout_seconds=settings.timeout_seconds,
            total_timeout_seconds=settings.total_timeout_seconds,
            retries=settings.retries,
        )

    def worker(self) -> Work:
        """Prepare the process, for good: environment, opener, memory limit."""
        os.environ.update(self._environment())
        for module in ("downloader", "reader", "resizer"):  # before the limit: their memory counts as held
            importlib.import_module(f"img2dataset.{module}")
        opener = HardenedOpener(self.policy)
        urllib.request.install_opener(cast(urllib.request.OpenerDirector, opener))
        if self.memory_limit_bytes is not None:
            limit_memory(self.memory_limit_bytes + self.settings.threads * _STACK_BYTES)
        return partial(download_part, settings=self.settings)

    def report(self, stats: Sequence[Mapping[str, Any]]) -> RenderableType:
        """Write `summary.json` and show it."""
        reasons = sum((Counter(row["reasons"]) for row in stats), Counter[str]())
        rows, stored = sum(row["rows"] for row in stats), reasons[SUCCESS]
        summary = {
            "shards": len(stats),
            "empty_shards": [f"{index:05d}" for index, row in enumerate(stats) if row["stored"] == 0],
            "rows": rows,
            "stored": stored,
            "success_rate": round(stored / rows, 4) if rows else None,
            "reasons": dict(reasons.most_common()),
        }
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return _table(reasons, rows)


def _table(reasons: Counter[str], rows: int) -> Table:
    table = Table("outcome", "images", "share", title="download")
    for reason, count in sorted(reasons.items(), key=lambda item: (item[0] != SUCCESS, -item[1], item[0])):
        table.add_row(reason, str(count), f"{count / rows:.1%}")
    return table


def _engine_version() -> str:
    return f"img2dataset {importlib.metadata.version('img2dataset')}"


def limit_memory(extra_bytes: int) -> None:
    """Let this process take `extra_bytes` beyond what it holds now; a bomb then meets a MemoryError, not the kernel."""
    held = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            held = int(line.split()[1]) * 1024
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = held + extra_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


@dataclass(frozen=True, slots=True)
class Part:
    """What is known of a part before anything is fetched.

    Attributes:
        path: The parquet file.
        keys: The samples' keys, by row.
        split: `train` or `validation`, of all rows.
        columns: What is stored beside url and caption.
    """

    path: Path
    keys: Sequence[str]
    split: str
    columns: Sequence[str]


def read_part(path: Path, max_rows: int) -> Part:
    """Read keys, split and column names.

    Raises:
        DataError: A column is missing, the part mixes splits, or it has more rows than a shard takes.
    """
    import pyarrow.parquet as pq

    names = pq.read_schema(path).names
    missing = [name for name in _OWN_COLUMNS if name not in names]
    if missing:
        raise DataError(f"{path}: columns {missing} are missing, there are {names}; run the stages before again")
    table = pq.read_table(path, columns=["key", "split"])
    if table.num_rows > max_rows:
        found = f"{path}: {table.num_rows} rows, download.samples_per_shard allows {max_rows}"
        raise DataError(f"{found}; run the stages before again")
    splits = sorted(set(table["split"].to_pylist()), key=str)
    if len(splits) != 1:
        raise DataError(f"{path}: holds splits {splits}; a shard belongs to exactly one")
    return Part(path, table["key"].to_pylist(), splits[0], [name for name in names if name not in _LEFT_OUT])


def download_part(unit: Unit, folder: Path, *, settings: DownloadConfig) -> dict[str, Any]:
    """Fetch one part and write its shard; the working function.

    Raises:
        DataError: As `read_part`.
        ShardFailedError: Not one image arrived, for reasons that may pass.
    """
    part = read_part(unit.inputs[0], settings.samples_per_shard)
    collector = Collector()
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=folder) as scratch:
        run_engine(part, unit.index, Path(scratch), collector, settings)
    collector.reasons[INTERNAL_ERROR] += len(part.keys) - collector.reasons.total()  # rows that img2dataset lost
    reasons = {reason: count for reason, count in sorted(collector.reasons.items()) if count}
    _refuse_total_loss(reasons, part.path)
    with ShardWriter(folder / f"{unit.name}.tar") as writer:
        for row, (image, meta) in sorted(collector.images.items()):
            writer.write(part.keys[row], sample_fields(image, meta, part, settings.image_size))
    stored = {"rows": len(part.keys), "stored": len(collector.images), "split": part.split, "reasons": reasons}
    unexpected = sorted(collector.unexpected)[:_MAX_UNEXPECTED]
    return stored | ({"unexpected": unexpected} if unexpected else {})


def run_engine(part: Part, index: int, scratch: Path, collector: Collector, settings: DownloadConfig) -> None:
    """Let img2dataset work through one part; everything that it prints or leaves behind is dropped."""
    from img2dataset.downloader import Downloader
    from img2dataset.reader import Reader
    from img2dataset.resizer import Resizer

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        reader = Reader(
            url_list=str(part.path),
            input_format="parquet",
            url_col="url",
            caption_col="caption",
            verify_hash_col=None,
            verify_hash_type=None,
            save_additional_columns=list(part.columns),
            number_sample_per_shard=_ROWS,
            done_shards=set(),
            tmp_path=str(scratch),
            start_shard_id=index,
        )
        downloader = Downloader(
            sample_writer_class=lambda *_: collector,
            resizer=Resizer(
                image_size=settings.image_size,
                resize_mode=settings.resize_mode,
                resize_only_if_bigger=False,  # else an image whose shorter side fits exactly would not be cropped
                min_image_size=settings.image_size if settings.only_if_bigger else 0,
                encode_quality=settings.jpeg_quality,
            ),
            thread_count=settings.threads,
            save_caption=True,
            extract_exif=False,
            output_folder=str(scratch),
            column_list=reader.column_list,
            timeout=settings.timeout_seconds,
            number_sample_per_shard=_ROWS,
            oom_shard_count=5,
            compute_hash="sha256",
            verify_hash_type=None,
            encode_format="jpg",
            retries=0,  # the transport retries what may pass
            user_agent_token=None,
            disallowed_header_directives=None,
        )
        for shard in reader:
            downloader.download_shard(shard)


def _refuse_total_loss(reasons: Mapping[str, int], part: Path) -> None:
    """A part without one image is a failure, unless asking again would bring the same answers."""
    passing = {
        reason: count
        for reason, count in reasons.items()
        if not is_permanent(reason) and reason not in _OTHER_PERMANENT
    }
    if reasons and SUCCESS not in reasons and passing:
        raise ShardFailedError(f"{part}: not one of {sum(reasons.values())} images arrived: {dict(reasons)}")


def sample_fields(image: bytes, meta: Mapping[str, Any], part: Part, image_size: int) -> dict[str, Any]:
    """Fields of one sample: `jpg`, `txt` and a `json` that says where it came from and what was cut."""
    width, height, caption = meta["original_width"], meta["original_height"], meta["caption"] or ""
    kept = {name: meta[name] for name in part.columns if _is_present(meta[name])}
    facts = {
        "caption": caption,
        "url": meta["url"],
        "url_sha256": hashlib.sha256(meta["url"].encode()).hexdigest(),
        "sha256": meta["sha256"],
        "original_size": [width, height],
        "crop": center_square(width, height),
        "size": [image_size, image_size],
        "split": part.split,
        "scores": {name: value for name, value in kept.items() if isinstance(value, float)},
        "source": {name: value for name, value in kept.items() if not isinstance(value, float)},
    }
    return {"jpg": image, "txt": caption, "json": facts}


def _is_present(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def center_square(width: int, height: int) -> list[int]:
    """Left, top, right, bottom of the square that was kept, in original pixels (rounded down)."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return [left, top, left + side, top + side]
