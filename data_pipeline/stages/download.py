"""Fetch the images of one part and write them as one shard.

img2dataset's own Reader and Downloader do the work, part by part, inside our workers (`data_pipeline.engine`): its
distributor submits everything at once and never looks at a failed status, and its writer's tars differ from run to run.
It opens URLs through the hardened transport and never retries by itself; the shard is written from what arrived, sorted
by row, and every other row is listed with its reason in `00000.failed.parquet` beside it.

Rounds: `download.retry_round` asks again for rows that failed for reasons that may pass, in shards that are committed.
Each shard remembers the round that it was last asked in, so a round that was interrupted goes on where it stopped, and
a round that is over is not repeated. The shard is written anew from its samples, byte for byte, and the newcomers, in
the order of the rows: it is the shard that would have been written had all of them arrived at once. Rows that failed
for good are never asked for again. Where the committed shard no longer fits (other settings, other input, a damaged
file) it is made from scratch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import os
import resource
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import RenderableType
from rich.table import Table

from data_pipeline.block_lists import read_blocked_bytes, read_blocked_urls
from data_pipeline.engine import INTERNAL_ERROR, SUCCESS, Arrived, Collector, run_engine
from data_pipeline.layout import shapes_of
from data_pipeline.ledger import Commit, Ledger, sha256_file
from data_pipeline.stage import Needs, Unit, Work, one_to_one, unit_name
from data_pipeline.transport import HardenedOpener
from data_pipeline.transport_policy import TransportPolicy, is_permanent, url_sha256
from sdtrain.config.ingestion import DownloadConfig
from sdtrain.data.shard import ShardReader, ShardWriter
from sdtrain.errors import DataError
from sdtrain.run_dir import write_atomically

_STACK_BYTES = 16 << 20
_MAX_UNEXPECTED = 5
_OWN_COLUMNS = ("key", "url", "caption", "split")
_LEFT_OUT = ("key", "url", "caption", "split", "width", "height")  # stored under names of their own, or as measured
_DIGESTS = ("md5", "sha256")
_FAILED = pa.schema([("row", pa.int32()), ("key", pa.string()), ("url", pa.string()), ("reason", pa.string())])


class ShardFailedError(RuntimeError):
    """Not one image of a part arrived, for reasons that may pass; the runner tries the part again."""


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
    version: str = "2"

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
        facts = self.settings.model_dump(mode="json", include=kept | {"max_pixels"}) | {"engine": _engine_version()}
        return facts | self._shapes()

    def _shapes(self) -> dict[str, Any]:
        """The shapes, where there is more than one."""
        if self.settings.resize_mode != "buckets":
            return {}
        return {"bucket_shapes": [list(size) for size in shapes_of(self.settings)]}

    def units(self) -> Sequence[Unit]:
        """One per part; a round beyond the first is part of its facts.

        Raises:
            ConfigError: No contact for the user agent.
            DataError: There is no part, or a block list cannot be read.
        """
        _ = self.policy
        commits = Ledger(self.folder).commits()
        units = one_to_one(self.source, ".parquet")
        return [replace(unit, facts=self._round(commits.get(unit.name))) for unit in units]

    def _round(self, commit: Commit | None) -> dict[str, int]:
        """The round that a unit is to be brought to: the settings', where that can bring anything, else its own."""
        asked = self.settings.retry_round
        done = commit.facts.get("round", 0) if commit else 0
        may_gain = commit is None or any(not _is_over(reason) for reason in commit.stats["reasons"])
        number = max(asked, done) if may_gain else done
        return {"round": number} if number else {}

    @property
    def policy(self) -> TransportPolicy:
        """The transport's policy by the settings; each process gets its share of what all of them may ask of a host."""
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
            max_retry_after_seconds=settings.max_retry_after_seconds,
            connections_per_host=max(1, settings.connections_per_host // settings.processes),
            host_gap_seconds=settings.host_gap_seconds * settings.processes,
            robots_rules=frozenset(rule.lower() for rule in settings.honored_robots_tags),
            blocked_urls=read_blocked_urls(settings.blocked_urls),
            blocked_bytes=read_blocked_bytes(settings.blocked_bytes),
        )

    def worker(self) -> Work:
        """Prepare the process, for good: environment, opener, memory limit."""
        os.environ.update(self._environment())
        for module in ("downloader", "reader"):  # before the limit: their memory counts as held
            importlib.import_module(f"img2dataset.{module}")
        from data_pipeline.resize import Resizer  # OpenCV reads its environment when it is loaded

        opener = HardenedOpener(self.policy)
        urllib.request.install_opener(cast(urllib.request.OpenerDirector, opener))
        if self.memory_limit_bytes is not None:
            limit_memory(self.memory_limit_bytes + self.settings.threads * _STACK_BYTES)
        resizer = Resizer(
            mode=self.settings.resize_mode,
            shapes=shapes_of(self.settings),
            only_if_bigger=self.settings.only_if_bigger,
            jpeg_quality=self.settings.jpeg_quality,
        )
        commits = Ledger(self.folder).commits() if self.settings.retry_round else {}
        return partial(self._work, resizer=resizer, commits=commits)

    def _work(self, unit: Unit, folder: Path, *, resizer: Any, commits: Mapping[str, Commit]) -> dict[str, Any]:
        """Bring one unit to its round."""
        collector = Collector(resizer)
        earlier = self._earlier(unit, commits.get(unit.name))
        return download_part(unit, folder, collector=collector, settings=self.settings, earlier=earlier)

    def _earlier(self, unit: Unit, commit: Commit | None) -> Earlier | None:
        """What an earlier round left; None where it is not what these settings would have made of this input."""
        if commit is None or commit.version != self.version:
            return None
        if {**commit.facts, "round": 0} != {**json.loads(json.dumps(self.config_facts())), "round": 0}:
            return None
        if [sha256_file(path) for path in unit.inputs] != list(commit.inputs.values()):
            return None
        files = {self.folder / name: sha256 for name, sha256 in commit.files.items()}
        if not all(path.exists() and sha256_file(path) == sha256 for path, sha256 in files.items()):
            return None
        return Earlier.read(self.folder / unit.name)

    def report(self, stats: Sequence[Mapping[str, Any]]) -> RenderableType:
        """Write `summary.json` and show it."""
        reasons = sum((Counter(row["reasons"]) for row in stats), Counter[str]())
        rows, stored = sum(row["rows"] for row in stats), reasons[SUCCESS]
        summary = {
            "shards": len(stats),
            "empty_shards": [unit_name(index) for index, row in enumerate(stats) if row["stored"] == 0],
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
        urls: The samples' URLs, by row.
        split: `train` or `validation`, of all rows.
        columns: What is stored beside url and caption.
    """

    path: Path
    keys: Sequence[str]
    urls: Sequence[str]
    split: str
    columns: Sequence[str]


@dataclass(frozen=True, slots=True)
class Earlier:
    """What an earlier round left of a unit.

    Attributes:
        shard: Its shard.
        failed: The reason of every row that is not in it.
    """

    shard: Path
    failed: Mapping[int, str]

    @classmethod
    def read(cls, stem: Path) -> Earlier:
        """Read the list of failures beside a shard."""
        table = pq.read_table(stem.with_name(f"{stem.name}.failed.parquet"), columns=["row", "reason"])
        rows = dict(zip(table["row"].to_pylist(), table["reason"].to_pylist(), strict=True))
        return cls(stem.with_name(f"{stem.name}.tar"), rows)

    def open_rows(self) -> list[int]:
        """Rows worth another question, ascending."""
        return sorted(row for row, reason in self.failed.items() if not is_permanent(reason))


def _is_over(reason: str) -> bool:
    return reason == SUCCESS or is_permanent(reason)


def read_part(path: Path, max_rows: int) -> Part:
    """Read keys, split and column names.

    Raises:
        DataError: A column is missing, the part mixes splits, or it has more rows than a shard takes.
    """
    names = pq.read_schema(path).names
    missing = [name for name in _OWN_COLUMNS if name not in names]
    if missing:
        raise DataError(f"{path}: columns {missing} are missing, there are {names}; run the stages before again")
    table = pq.read_table(path, columns=["key", "url", "split"])
    if table.num_rows > max_rows:
        found = f"{path}: {table.num_rows} rows, download.samples_per_shard allows {max_rows}"
        raise DataError(f"{found}; run the stages before again")
    splits = sorted(set(table["split"].to_pylist()), key=str)
    if len(splits) != 1:
        raise DataError(f"{path}: holds splits {splits}; a shard belongs to exactly one")
    columns = [name for name in names if name not in _LEFT_OUT]
    return Part(path, table["key"].to_pylist(), table["url"].to_pylist(), splits[0], columns)


def download_part(
    unit: Unit, folder: Path, *, collector: Collector, settings: DownloadConfig, earlier: Earlier | None = None
) -> dict[str, Any]:
    """Fetch one part, or what an earlier round left open of it, and write its shard; the working function.

    Raises:
        DataError: As `read_part`.
        ShardFailedError: Not one image arrived, for reasons that may pass.
    """
    part = read_part(unit.inputs[0], settings.samples_per_shard)
    asked = range(len(part.keys)) if earlier is None else earlier.open_rows()
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=folder) as scratch:
        table = part.path if earlier is None else _excerpt(part.path, asked, Path(scratch))
        run_engine(table, part.columns, Path(scratch), collector, settings)
    arrived = {asked[row]: image for row, image in collector.arrived.items()}
    failed = dict(earlier.failed) if earlier else {}
    failed |= {asked[row]: reason for row, reason in collector.failed.items()}
    failed |= {row: INTERNAL_ERROR for row in asked if row not in arrived and row not in failed}  # img2dataset lost it
    failed = {row: reason for row, reason in sorted(failed.items()) if row not in arrived}
    reasons = Counter({SUCCESS: len(part.keys) - len(failed)} if len(failed) < len(part.keys) else {})
    reasons.update(failed.values())
    _refuse_total_loss(reasons, part.path)
    _write_shard(folder / f"{unit.name}.tar", part, arrived, earlier)
    _write_failed(folder / f"{unit.name}.failed.parquet", part, failed)
    return {
        "rows": len(part.keys),
        "stored": reasons[SUCCESS],
        "split": part.split,
        "reasons": dict(sorted(reasons.items())),
        **({"unexpected": sorted(collector.unexpected)[:_MAX_UNEXPECTED]} if collector.unexpected else {}),
    }


def _excerpt(path: Path, rows: Sequence[int], scratch: Path) -> Path:
    """Some rows of a part as a part of their own."""
    pq.write_table(pq.read_table(path).take(pa.array(rows, pa.int64())), scratch / "open.parquet")
    return scratch / "open.parquet"


def _write_shard(path: Path, part: Part, arrived: Mapping[int, Arrived], earlier: Earlier | None) -> None:
    """Samples in the order of the rows: new ones, and those of the earlier shard as they are."""
    row_of = {key: row for row, key in enumerate(part.keys)}
    with ExitStack() as stack:
        writer = stack.enter_context(ShardWriter(path))
        shard = stack.enter_context(ShardReader(earlier.shard)) if earlier else None
        stored = {row_of[key]: sample for sample, key in enumerate(shard.keys)} if shard else {}
        for row in sorted({*arrived, *stored}):
            if row in arrived:
                writer.write(part.keys[row], sample_fields(arrived[row], part))
            elif shard is not None:
                writer.write(part.keys[row], {name: shard.read(stored[row], name) for name in ("jpg", "json", "txt")})


def _write_failed(path: Path, part: Part, failed: Mapping[int, str]) -> None:
    """Every row that is not in the shard, with its reason."""
    columns = [list(failed), [part.keys[row] for row in failed], [part.urls[row] for row in failed]]
    pq.write_table(pa.table([*columns, list(failed.values())], schema=_FAILED), path, compression="zstd")


def _refuse_total_loss(reasons: Mapping[str, int], part: Path) -> None:
    """A part without one image is a failure, unless asking again would bring the same answers."""
    if SUCCESS not in reasons and any(not is_permanent(reason) for reason in reasons):
        raise ShardFailedError(f"{part}: not one of {sum(reasons.values())} images arrived: {dict(reasons)}")


def sample_fields(arrived: Arrived, part: Part) -> dict[str, Any]:
    """Fields of one sample: `jpg`, `txt` and a `json` that says where it came from and what was cut."""
    row, layout = arrived.columns, arrived.picture.layout
    caption = row["caption"] or ""
    kept = {name: row[name] for name in part.columns if name not in _DIGESTS and _is_present(row[name])}
    facts = {
        "caption": caption,
        "url": row["url"],
        "url_sha256": url_sha256(row["url"]),
        **arrived.digests,
        "original_size": list(layout.original),
        "crop": layout.crop,
        "size": list(layout.stored),
        "width": layout.stored[0],
        "height": layout.stored[1],
        "split": part.split,
        "scores": {name: value for name, value in kept.items() if isinstance(value, float)},
        "source": {name: value for name, value in kept.items() if not isinstance(value, float)},
    }
    return {"jpg": arrived.picture.jpeg, "txt": caption, "json": facts}


def _is_present(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))
