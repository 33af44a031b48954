"""Stages `metadata` and `adopt`: shards that exist already take the way of downloaded ones, without the download.

`metadata` lists the samples of each tar as a table of LAION's columns, so that filter, dedup, validation split and
parts are the same for both. `adopt` then does with the pictures of a part what `download` does with what it fetches:
header, caps and block lists, one size by the same code under the worker's memory limit, one shard sorted by row, every
other row listed with its reason.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from data_pipeline.block_lists import read_blocked_bytes, read_blocked_urls
from data_pipeline.engine import SUCCESS, Arrived
from data_pipeline.layout import shapes_of
from data_pipeline.sources.laion import ALIASES, TableWriter
from data_pipeline.sources.shards import ForeignShard, Place, RejectedError, Sample, find_shards, read_member
from data_pipeline.sources.tables import RemoteTable
from data_pipeline.stage import Needs, Unit, Work, one_to_one, unit_name
from data_pipeline.stages.download import Part, limit_memory, read_part, sample_fields
from data_pipeline.transport import body_digests
from data_pipeline.transport_policy import Reason, RefusedError, check_image, url_sha256
from sdtrain.config.ingestion import DownloadConfig
from sdtrain.data.shard import ShardWriter
from sdtrain.errors import DataError
from sdtrain.run_dir import write_atomically

if TYPE_CHECKING:
    from data_pipeline.resize import Resizer

_TAR_SHIFT = 32  # sample_id = number of the tar, then row of its table
_KINDS = {"text": pa.string(), "number": pa.float64(), "integer": pa.int64()}
_REJECTED = pa.schema([("row", pa.int32()), ("key", pa.string()), ("url", pa.string()), ("reason", pa.string())])


@dataclass(frozen=True)
class ShardTablesStage:
    """For each tar its samples as `<tar>.parquet`, with a card like those of LAION's tables.

    A tar that is not on this machine is copied beside it. `sample_id` says where a row comes from. A sample without a
    URL is known by its picture: its `url` is `sha256:` and the digest.

    Attributes:
        shards: Folder, glob or URL of the tars.
        max_bytes: Largest picture.
        folder: Where tables, cards and copies go.
    """

    shards: str
    max_bytes: int
    folder: Path
    name: str = "metadata"
    version: str = "shards-1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """The cap on pictures."""
        return {"max_bytes": self.max_bytes}

    def units(self) -> list[Unit]:
        """The tars in the order of their names; a remote one is known by what its store says of it."""
        return [
            Unit(index, (), {"remote": asdict(tar)}) if isinstance(tar, RemoteTable) else Unit(index, (tar,))
            for index, tar in enumerate(find_shards(self.shards))
        ]

    def worker(self) -> Work:
        """Fetch what is remote, look at every sample."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            if unit.inputs:
                tar = source = str(unit.inputs[0].absolute())
            else:
                remote = RemoteTable(**unit.facts["remote"])
                tar, source = f"{unit.name}.tar", remote.url
                remote.fetch(folder / tar)
            samples, rejected, folders = _samples_of(folder / tar, source, self.max_bytes)
            size, columns = (folder / tar).stat().st_size, {}
            if samples:  # a tar of which nothing can be taken has no card: the stages after it do not see it
                names = _write_table(folder / f"{unit.name}.parquet", samples, unit.index)
                columns = {name: name for name in names}
                card = {
                    "file": f"{unit.name}.parquet",
                    "tar": tar,
                    "source": source,
                    "rows": len(samples),
                    "bytes": size,
                    "columns": columns,
                    "present": names,
                }
                (folder / f"{unit.name}.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
            counts: dict[str, Any] = {"rows": len(samples), "rejected": dict(sorted(rejected.items()))}
            counts |= {"folders": folders} if folders else {}
            return {"source": source, "bytes": size, "columns": columns, **counts}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """Write `summary.json`, say what can be taken.

        Raises:
            DataError: Nothing can.
        """
        rejected = sum((Counter(row["rejected"]) for row in stats), Counter[str]())
        rows, folders = sum(row["rows"] for row in stats), sum(row.get("folders", 0) for row in stats)
        summary = {"shards": len(stats), "samples": rows + rejected.total(), "rows": rows, "rejected": dict(rejected)}
        summary |= {"folders": folders} if folders else {}
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        words = "".join(f", {count:,} {reason}" for reason, count in sorted(rejected.items()))
        words += f", {folders:,} folder entries passed over" if folders else ""
        if not rows:
            raise DataError(
                f"source.shards: {self.shards}: {len(stats)} tars without a sample that can be taken{words}; a sample "
                "needs a picture (jpg, jpeg, png or webp)"
            )
        return f"metadata: {rows:,} samples in {len(stats)} shards{words}"


def _samples_of(tar: Path, source: str, max_bytes: int) -> tuple[list[Sample], Counter[str], int]:
    """The samples that can be taken, how many cannot by reason, and how many entries for folders stand between them.

    They are sorted by key: img2dataset writes them as they arrive, under keys that count the rows of its table.
    """
    shard = ForeignShard(tar, source, max_bytes)
    samples, rejected = [], Counter[str]()
    try:
        for number in range(len(shard.keys)):
            try:
                samples.append(shard.sample(number))
            except RejectedError as error:
                rejected[str(error)] += 1
    finally:
        shard.close()
    return sorted(samples, key=lambda sample: sample.key), rejected, shard.num_folders


def _write_table(path: Path, samples: Sequence[Sample], number: int) -> list[str]:
    """Columns that any sample has a value of; returns those that are ours. Where a picture lies stands beside them."""
    rows = [{**sample.columns, "sample_id": number << _TAR_SHIFT | row} for row, sample in enumerate(samples)]
    names = [name for name in ALIASES if any(row.get(name) is not None for row in rows)]
    columns = {name: pa.array([row.get(name) for row in rows], _KINDS[ALIASES[name][0]]) for name in names}
    columns |= {
        "tar_key": pa.array([sample.key for sample in samples], pa.string()),
        "tar_offset": pa.array([sample.picture.offset for sample in samples], pa.int64()),
        "tar_size": pa.array([sample.picture.size for sample in samples], pa.int64()),
    }
    with TableWriter(path) as writer:
        writer.add(pa.record_batch(list(columns.values()), names=list(columns)))
    return names


@dataclass(frozen=True)
class AdoptStage:
    """One shard of images for each part of the tables, of the fields, keys and order of a downloaded one.

    Attributes:
        tables: Folder of the tables and cards.
        source: Folder of the parts.
        folder: Where the shards go.
        settings: How images are checked and brought to one size; the keys about the network do not matter.
        memory_limit_bytes: What a worker may take beyond what it holds after its start; None leaves it unlimited.
    """

    tables: Path
    source: Path
    folder: Path
    settings: DownloadConfig
    memory_limit_bytes: int | None = None
    name: str = "adopt"
    version: str = "1"

    @property
    def needs(self) -> Needs:
        """Long-lived processes: the memory limit is for good."""
        return Needs(keeps_worker=True, environment=self._environment())

    def _environment(self) -> dict[str, str]:
        return {"OPENCV_IO_MAX_IMAGE_PIXELS": str(self.settings.max_pixels), "OMP_NUM_THREADS": "1"}

    def config_facts(self) -> dict[str, Any]:
        """What the pixels depend on."""
        kept = {"image_size", "resize_mode", "only_if_bigger", "jpeg_quality", "samples_per_shard", "max_pixels"}
        return self.settings.model_dump(mode="json", include=kept) | {"shapes": shapes_of(self.settings)}

    def units(self) -> list[Unit]:
        """One for each part; parts hold the digests of their pictures, so a changed tar changes them."""
        return one_to_one(self.source, ".parquet")

    def worker(self) -> Work:
        """Prepare the process, for good: environment, memory limit."""
        os.environ.update(self._environment())
        from data_pipeline.resize import Resizer  # OpenCV reads its environment when it is loaded

        if self.memory_limit_bytes is not None:
            limit_memory(self.memory_limit_bytes)
        taker = _Taker(
            settings=self.settings,
            resizer=Resizer(
                mode=self.settings.resize_mode,
                shapes=shapes_of(self.settings),
                only_if_bigger=self.settings.only_if_bigger,
                jpeg_quality=self.settings.jpeg_quality,
            ),
            blocked_urls=read_blocked_urls(self.settings.blocked_urls),
            blocked_bytes=read_blocked_bytes(self.settings.blocked_bytes),
        )

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            return _adopt_part(unit, folder, self.tables, taker)

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> Table:
        """Write `summary.json` and show it."""
        reasons = sum((Counter(row["reasons"]) for row in stats), Counter[str]())
        summary = {
            "shards": len(stats),
            "empty_shards": [unit_name(index) for index, row in enumerate(stats) if row["stored"] == 0],
            "rows": reasons.total(),
            "stored": reasons[SUCCESS],
            "reasons": dict(reasons.most_common()),
        }
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        table = Table("outcome", "images", "share", title="adopt")
        for reason, count in sorted(reasons.items(), key=lambda item: (item[0] != SUCCESS, -item[1], item[0])):
            table.add_row(reason, f"{count:,}", f"{count / reasons.total():.1%}")
        return table


@dataclass(frozen=True, slots=True, kw_only=True)
class _Taker:
    """Decides over one picture."""

    settings: DownloadConfig
    resizer: Resizer
    blocked_urls: frozenset[str]
    blocked_bytes: frozenset[str]

    def take(self, body: bytes, row: Mapping[str, Any]) -> Arrived:
        """The picture as it is stored.

        Raises:
            RefusedError: With the reason that is counted.
            DataError: It is not the picture that was listed.
        """
        if hashlib.sha256(body).hexdigest() != row["sha256"]:
            raise DataError(f"source.shards: the picture of {row['url']} has changed since it was listed; run again")
        if url_sha256(row["url"]) in self.blocked_urls:
            raise RefusedError(Reason.BLOCKED_URL)
        digests = body_digests(memoryview(body))
        if not self.blocked_bytes.isdisjoint(digests.values()):
            raise RefusedError(Reason.BLOCKED_BYTES)
        check_image(body, self.settings.max_pixels)
        return Arrived(self.resizer(body), digests, row)


def _adopt_part(unit: Unit, folder: Path, tables: Path, taker: _Taker) -> dict[str, Any]:
    """Write the shard of one part; the working function."""
    part = read_part(unit.inputs[0], taker.settings.samples_per_shard)
    rejected: dict[int, str] = {}
    with ShardWriter(folder / f"{unit.name}.tar") as writer:
        for number, (row, origin, body) in enumerate(_pictures(part, tables)):
            try:
                fields = sample_fields(taker.take(body, row), part)
            except RefusedError as error:
                rejected[number] = error.reason
            else:
                writer.write(part.keys[number], {**fields, "json": fields["json"] | {"adopted": origin}})
    columns = [list(rejected), [part.keys[row] for row in rejected], [part.urls[row] for row in rejected]]
    listed = pa.table([*columns, list(rejected.values())], schema=_REJECTED)
    pq.write_table(listed, folder / f"{unit.name}.failed.parquet", compression="zstd")
    reasons = Counter(rejected.values())
    stored = len(part.keys) - len(rejected)
    reasons.update({SUCCESS: stored} if stored else {})
    return {"rows": len(part.keys), "stored": stored, "split": part.split, "reasons": dict(sorted(reasons.items()))}


def _pictures(part: Part, tables: Path) -> Iterator[tuple[dict[str, Any], dict[str, str], bytes]]:
    """Of each row its columns, where it comes from, and the picture's file."""
    rows = pq.read_table(part.path).to_pylist()
    for number, group in groupby(rows, key=lambda row: row["sample_id"] >> _TAR_SHIFT):
        with _Tar(tables, number) as tar:
            for row in group:
                place = row["sample_id"] & ((1 << _TAR_SHIFT) - 1)
                yield row, tar.origin(place), tar.read(place)


class _Tar:
    """A tar whose samples are known from its table.

    Args:
        tables: Folder of the tables and cards.
        number: Of the tar.

    Raises:
        DataError: It is no longer there.
    """

    def __init__(self, tables: Path, number: int):
        card = json.loads((tables / f"{unit_name(number)}.json").read_text(encoding="utf-8"))
        names = ["tar_key", "tar_offset", "tar_size"]
        self._path, self._source = tables / card["tar"], card["source"]
        self._places = pq.read_table(tables / card["file"], columns=names).to_pydict()
        try:
            self._handle = os.open(self._path, os.O_RDONLY)
        except OSError as error:
            raise DataError(
                f"{self._source}: cannot be opened ({error.strerror}); shards must stay where they are until stage "
                "adopt is done"
            ) from None

    def origin(self, row: int) -> dict[str, str]:
        """Where a sample was found."""
        return {"shard": self._source.rpartition("/")[2], "key": self._places["tar_key"][row]}

    def read(self, row: int) -> bytes:
        """The picture of a row of the table."""
        place = Place(self._places["tar_offset"][row], self._places["tar_size"][row])
        return read_member(self._handle, place, self._path)

    def __enter__(self) -> _Tar:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._handle)
