"""Stage `dedup`: one row per URL over all files, the validation split, and parts of equal size for the download.

Four passes, each a stage of its own, so that memory stays bounded and any number of workers gives the same bytes:

1. `dedup-split`: each filtered file's identities, sorted into hash buckets (equal rows meet in one bucket).
2. `dedup-pick`: each bucket over all files; of equal rows the first by (file, row) stays, the others are listed.
3. `dedup-keep`: each filtered file's survivors, with key, hash, split and the number of rows they stand for.
4. `dedup`: numbered parts of `samples_per_shard` rows, each all train or all validation.

The first two passes know identities only (`data_pipeline.stages.identity`): they find pictures of equal bytes as well
(`data_pipeline.stages.content_dedup`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.sources.laion import BATCH_ROWS, TableWriter
from data_pipeline.stage import Needs, Stage, Unit, Work, numbered_files, one_to_one
from data_pipeline.stages.identity import By, Identify, Identities, TextIdentity, holdout_rank, identity, laion_hash
from sdtrain.errors import DataError
from sdtrain.run_dir import write_atomically

ROWS_PER_BUCKET = 4_000_000  # about 0.4 GB in a worker
ROWS_IN_MEMORY = 1_000_000  # of a file, while it is split
_ROW_GROUP = 10_000
_IDENTITY = pa.schema([("high", pa.uint64()), ("low", pa.uint64()), ("row", pa.int64()), ("place", pa.uint64())])
_PICKED = pa.schema([("row", pa.int64()), ("rank", pa.uint64()), ("copies", pa.int32())])
_GROUPS = pa.schema([("kept_file", pa.int32()), ("kept_row", pa.int64()), ("file", pa.int32()), ("row", pa.int64())])


def dedup_stages(
    *,
    source: Path,
    folder: Path,
    by: By,
    seed: int,
    num_validation: int,
    samples_per_shard: int,
    exclude: Sequence[Path] = (),
) -> list[Stage]:
    """The four passes.

    Args:
        source: Folder of the filter stage.
        folder: Folder of the parts; the first three passes lie beside it.
        by: What makes two rows equal.
        seed: Seed of the validation split.
        num_validation: How many rows are held out.
        samples_per_shard: Rows of one part.
        exclude: Lists of URLs that must not be kept.
    """
    split, pick, keep = (folder.with_name(f"{folder.name}-{name}") for name in ("split", "pick", "keep"))
    return [
        SplitStage(TextIdentity(by, tuple(exclude)), source, split),
        PickStage(seed, num_validation, split, pick),
        KeepStage(by, num_validation, source, pick, keep),
        PartsStage(samples_per_shard, keep, folder),
    ]


@dataclass(frozen=True)
class SplitStage:
    """Pass 1: identities of one filtered file, in runs of one record batch per bucket."""

    identify: Identify
    source: Path
    folder: Path
    name: str = "dedup-split"
    version: str = "2"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """What makes rows equal."""
        return self.identify.facts()

    def units(self) -> list[Unit]:
        """One for each filtered file; the number of buckets follows from the number of rows.

        Raises:
            DataError: No row is left to work on, or a list of excluded URLs is not there.
        """
        lists = self.identify.lists()
        for path in lists:
            if not path.is_file():
                raise DataError(f"dedup.exclude: {path}: no such file")
        units = one_to_one(self.source, ".parquet")
        rows = sum(pq.read_metadata(unit.inputs[0]).num_rows for unit in units)
        if rows == 0:
            raise DataError(f"{self.source}: no row passed the filter; {self.source / 'funnel.json'} shows which rule")
        buckets = -(-rows // ROWS_PER_BUCKET)
        return [replace(unit, inputs=(*unit.inputs, *lists), facts={"buckets": buckets}) for unit in units]

    def worker(self) -> Work:
        """Identify every row, sort by bucket."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            path, buckets = unit.inputs[0], unit.facts["buckets"]
            rows = 0
            schema = _IDENTITY.with_metadata({"buckets": str(buckets)})
            with _writing(folder / f"{unit.name}.arrow", schema) as writer:
                for chunk in _gathered(self.identify.of(path)):
                    rows += len(chunk.row)
                    for part in _by_bucket(chunk, buckets):
                        writer.write_batch(_batch(schema, part.high, part.low, part.row, part.place))
            return {"rows": rows, "excluded": pq.read_metadata(path).num_rows - rows}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> None:
        """The next pass tells it."""


def _gathered(batches: Iterator[Identities]) -> Iterator[Identities]:
    """The same rows in larger batches; one batch at least."""
    waiting: list[Identities] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(one.row) for one in waiting) >= ROWS_IN_MEMORY:
            yield _joined(waiting)
            waiting = []
    yield _joined(waiting)


def _joined(batches: Sequence[Identities]) -> Identities:
    return Identities(
        _concatenated([batch.high for batch in batches], np.uint64),
        _concatenated([batch.low for batch in batches], np.uint64),
        _concatenated([batch.row for batch in batches], np.int64),
        _concatenated([batch.place for batch in batches], np.uint64),
    )


def _concatenated(arrays: Sequence[npt.NDArray[Any]], dtype: type) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *arrays])


def _by_bucket(rows: Identities, buckets: int) -> Iterator[Identities]:
    """The rows of each bucket in turn, ascending; a row's bucket follows from its identity alone."""
    bucket = (rows.high ^ rows.low) % np.uint64(buckets)
    order = np.argsort(bucket, kind="stable")
    ends = np.searchsorted(bucket[order], np.arange(buckets + 1, dtype=np.uint64))
    return (rows.take(order[start:end]) for start, end in pairwise(ends))


@dataclass(frozen=True)
class PickStage:
    """Pass 2: survivors of one bucket, one record batch per filtered file, rows ascending.

    Beside them `<bucket>.groups.parquet` lists every duplicate with the row that was kept for it, and
    `<bucket>.ranks.npy` holds the bucket's first rows in the queue for validation.
    """

    seed: int
    num_validation: int
    source: Path
    folder: Path
    name: str = "dedup-pick"
    version: str = "2"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """What the validation split depends on."""
        return {"seed": self.seed, "num_validation": self.num_validation}

    def units(self) -> list[Unit]:
        """One for each bucket; each reads its batches of every file."""
        files = tuple(numbered_files(self.source, ".arrow"))
        with _open_batches(files[0]) as reader:
            buckets = int(reader.schema.metadata[b"buckets"])
        return [Unit(bucket, files, {"bucket": bucket, "buckets": buckets}) for bucket in range(buckets)]

    def worker(self) -> Work:
        """Sort the bucket by identity; of each run the first by (file, row) stays."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            parts = [_read_batches(path, unit.facts["bucket"], unit.facts["buckets"]) for path in unit.inputs]
            file = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part["row"]) for part in parts])
            high, low, row, place = (np.concatenate([part[name] for part in parts]) for name in _IDENTITY.names)
            del parts
            kept, copies, groups = _first_of_each(high, low)
            ranks = holdout_rank(place[kept], self.seed)
            ends = np.searchsorted(file[kept], np.arange(len(unit.inputs) + 1))
            with _writing(folder / f"{unit.name}.arrow", _PICKED) as writer:
                for start, end in pairwise(ends):
                    chosen = slice(start, end)
                    writer.write_batch(_batch(_PICKED, row[kept[chosen]], ranks[chosen], copies[chosen]))
            winner, loser = groups
            columns = (file[winner], row[winner], file[loser], row[loser])
            table = pa.Table.from_batches([_batch(_GROUPS, *columns)])
            pq.write_table(table, folder / f"{unit.name}.groups.parquet", compression="zstd")
            np.save(folder / f"{unit.name}.ranks.npy", np.sort(ranks)[: self.num_validation], allow_pickle=False)
            return {"rows_in": len(row), "rows_out": len(kept)}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """How many rows were there before."""
        excluded = sum(row["excluded"] for row in _stats_of(numbered_files(self.source, ".arrow")))
        rows_in, rows_out = (sum(row[name] for row in stats) for name in ("rows_in", "rows_out"))
        funnel = {"rows_in": rows_in + excluded, "excluded": excluded, "duplicates": rows_in - rows_out}
        write_atomically(self.folder / "duplicates.json", json.dumps(funnel | {"rows_out": rows_out}, indent=2) + "\n")
        words = f", {excluded:,} excluded" if excluded else ""
        told = f"{rows_in - rows_out:,} of {rows_in + excluded:,} rows are duplicates{words}, {rows_out:,} left"
        return f"{self.name.removesuffix('-pick')}: {told}"


def _first_of_each(
    high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Find equal identities.

    Returns:
        Ascending positions of the first row of each identity (the sort is stable); the rows of that identity; and for
        each further row (position of the first, its own position), ascending by the latter.
    """
    order = np.lexsort((low, high))
    is_first = np.ones(len(order), bool)
    is_first[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
    starts = np.flatnonzero(is_first)
    copies = np.diff(starts, append=len(order)).astype(np.int32)
    firsts = order[starts]
    back = np.argsort(firsts)
    losers = order[~is_first]
    winners = np.repeat(firsts, copies - 1)
    by_loser = np.argsort(losers)
    return firsts[back], copies[back], (winners[by_loser], losers[by_loser])


@dataclass(frozen=True)
class KeepStage:
    """Pass 3: surviving rows of one filtered file, train rows first, then validation rows."""

    by: By
    num_validation: int
    filtered: Path
    picked: Path
    folder: Path
    name: str = "dedup-keep"
    version: str = "2"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """What makes rows equal: it is the key."""
        return {"by": self.by}

    def _last_holdout(self) -> int:
        """The `num_validation`-th smallest rank over all survivors; -1 holds out none.

        Raises:
            DataError: Nothing would remain to train on.
        """
        if self.num_validation == 0:
            return -1
        buckets = numbered_files(self.picked, ".arrow")
        total = sum(row["rows_out"] for row in _stats_of(buckets))
        if total <= self.num_validation:
            raise DataError(
                f"validation.num_samples = {self.num_validation}, but only {total} rows are left after dedup: "
                "nothing would remain to train on; lower it, or loosen the filter"
            )
        ranks = np.concatenate([np.load(path.with_suffix(".ranks.npy"), allow_pickle=False) for path in buckets])
        return int(np.partition(ranks, self.num_validation - 1)[self.num_validation - 1])

    def units(self) -> list[Unit]:
        """One for each filtered file; each reads its batch of every bucket."""
        picked = tuple(numbered_files(self.picked, ".arrow"))
        last = self._last_holdout()
        files = one_to_one(self.filtered, ".parquet")
        return [
            Unit(unit.index, (*unit.inputs, *picked), {"batch": position, "files": len(files), "last_holdout": last})
            for position, unit in enumerate(files)
        ]

    def worker(self) -> Work:
        """Take the survivors, add key, hash, split and copies."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            filtered, *picked = unit.inputs
            parts = [_read_batches(path, unit.facts["batch"], unit.facts["files"]) for path in picked]
            row, rank, copies = (np.concatenate([part[name] for part in parts]) for name in _PICKED.names)
            order = np.argsort(row)
            row, rank, copies = row[order], rank[order], copies[order]
            last = unit.facts["last_holdout"]
            is_held_out = rank <= np.uint64(last) if last >= 0 else np.zeros(len(row), bool)
            held_out: list[pa.RecordBatch] = []
            with TableWriter(folder / f"{unit.name}.parquet", row_group=_ROW_GROUP) as writer:
                for batch, places in _chosen(filtered, row):
                    split = is_held_out[places]
                    batch = _with_keys(batch, split, copies[places], self.by)
                    writer.add(batch.filter(pa.array(~split)))
                    held_out.append(batch.filter(pa.array(split)))
                for batch in held_out:
                    writer.add(batch)
            return {"train": int((~is_held_out).sum()), "validation": int(is_held_out.sum())}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> None:
        """The parts tell it."""


def _chosen(path: Path, rows: npt.NDArray[np.int64]) -> Iterator[tuple[pa.RecordBatch, slice]]:
    """Some rows of a file, batch by batch, and where their numbers stand in `rows`, which ascends."""
    first = 0
    for batch in pq.ParquetFile(path).iter_batches(BATCH_ROWS):
        start, end = np.searchsorted(rows, [first, first + batch.num_rows])
        yield batch.take(pa.array(rows[start:end] - first)), slice(start, end)
        first += batch.num_rows
    if first == 0:
        yield pa.RecordBatch.from_pylist([], pq.read_schema(path)), slice(0, 0)


def _with_keys(
    batch: pa.RecordBatch, is_held_out: npt.NDArray[np.bool_], copies: npt.NDArray[np.int32], by: By
) -> pa.RecordBatch:
    """Add `key` (hex of the identity), `hash` (LAION's), `split` and `copies` (rows that this one stands for)."""
    urls, captions = (batch[name].fill_null("").to_pylist() for name in ("url", "caption"))
    pairs = list(zip(urls, captions, strict=True))
    columns = {
        "key": pa.array([identity(url, caption, by).hex() for url, caption in pairs], pa.string()),
        "hash": pa.array([laion_hash(url, caption) for url, caption in pairs], pa.int64()),
        "split": pa.array(np.where(is_held_out, "validation", "train").tolist(), pa.string()),
        "copies": pa.array(copies),
    }
    for name, values in columns.items():
        batch = batch.append_column(name, values)
    return batch


@dataclass(frozen=True)
class PartsStage:
    """Pass 4: numbered parts of equal size, train parts first; each becomes one shard."""

    samples_per_shard: int
    source: Path
    folder: Path
    name: str = "dedup"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """Nothing beyond each part's slices."""
        return {}

    def units(self) -> list[Unit]:
        """Cut the survivors, file after file, into parts."""
        files = numbered_files(self.source, ".parquet")
        stats = _stats_of(files)
        train = [(index, 0, row["train"]) for index, row in enumerate(stats)]
        validation = [(index, row["train"], row["validation"]) for index, row in enumerate(stats)]
        units = []
        for split, spans in (("train", train), ("validation", validation)):
            for part in _cut(spans, self.samples_per_shard):
                inputs = tuple(files[index] for index, _, _ in part)
                facts = {"split": split, "slices": [[start, count] for _, start, count in part]}
                units.append(Unit(len(units), inputs, facts))
        return units

    def worker(self) -> Work:
        """Copy the slices of one part."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            slices = zip(unit.inputs, unit.facts["slices"], strict=True)
            tables = [_read_rows(path, start, count) for path, (start, count) in slices]
            # files may be of different schemas (one has AESTHETIC_SCORE, another not): absent values are null
            table = pa.concat_tables(
                [table.replace_schema_metadata() for table in tables], promote_options="permissive"
            )
            with TableWriter(folder / f"{unit.name}.parquet") as writer:
                for batch in table.to_batches():
                    writer.add(batch)
            return {"rows": table.num_rows, "split": unit.facts["split"]}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """Rows and parts of each split."""
        words = []
        for split in ("train", "validation"):
            rows = [row["rows"] for row in stats if row["split"] == split]
            words.append(f"{sum(rows):,} {split} rows in {len(rows)} parts")
        return f"dedup: {', '.join(words)}"


def _cut(spans: Sequence[tuple[int, int, int]], size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut consecutive (file, start, count) spans into groups of `size` rows; the last may be smaller."""
    group, room = [], size
    for file, start, count in spans:
        while count > 0:
            taken = min(count, room)
            group.append((file, start, taken))
            start, count, room = start + taken, count - taken, room - taken
            if room == 0:
                yield group
                group, room = [], size
    if group:
        yield group


def _read_rows(path: Path, start: int, count: int) -> pa.Table:
    """Rows [start, start + count), reading only the row groups that hold them."""
    file = pq.ParquetFile(path)
    ends = np.cumsum([file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)])
    first, last = np.searchsorted(ends, [start, start + count - 1], side="right")
    offset = start - (int(ends[first - 1]) if first else 0)
    return file.read_row_groups(list(range(first, last + 1))).slice(offset, count)


def _stats_of(files: Sequence[Path]) -> list[dict[str, Any]]:
    return [json.loads(path.with_suffix(".stats.json").read_text(encoding="utf-8")) for path in files]


@contextmanager
def _writing(path: Path, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        yield writer


def _batch(schema: pa.Schema, *columns: npt.NDArray[Any]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(values) for values in columns], schema=schema)


def _open_batches(path: Path) -> pa.ipc.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(str(path)))


def _read_batches(path: Path, first: int, step: int) -> dict[str, npt.NDArray[Any]]:
    """Batches `first`, `first + step`, ... of a file, joined."""
    with _open_batches(path) as reader:
        batches = [reader.get_batch(index) for index in range(first, reader.num_record_batches, step)]
        table = pa.Table.from_batches(batches, reader.schema)
    return {name: table[name].to_numpy() for name in table.schema.names}
