"""Stage `dedup`: one row per URL over all files, the validation split, and parts of equal size for the download.

Four passes, each a stage of its own, so that memory stays bounded and any number of workers gives the same bytes:

1. `dedup-split`: each filtered file's identities, sorted into hash buckets (equal rows meet in one bucket).
2. `dedup-pick`: each bucket over all files; of equal rows the first by (file, row) stays.
3. `dedup-keep`: each filtered file's survivors, with key, hash and split.
4. `dedup`: numbered parts of `samples_per_shard` rows, each all train or all validation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import mmh3
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.sources.laion import BATCH_ROWS
from data_pipeline.stage import Needs, Stage, Unit, Work, numbered_files, one_to_one
from sdtrain.errors import DataError
from sdtrain.run_dir import write_atomically

By = Literal["url", "url_text"]
ROWS_PER_BUCKET = 4_000_000  # about 0.2 GB in a worker
_ROW_GROUP = 10_000
_IDENTITY = pa.schema([("high", pa.uint64()), ("low", pa.uint64()), ("row", pa.int64()), ("holdout", pa.uint64())])
_PICKED = pa.schema([("row", pa.int64()), ("holdout", pa.uint64())])


def identity(url: str, caption: str, by: By) -> bytes:
    """16 bytes that equal rows share; also the sample's key, the same in every run that keeps the row."""
    text = url if by == "url" else f"{url}\0{caption}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def holdout_rank(seed: int, url: str) -> int:
    """Where a URL stands in the queue for validation, uniform in 64 bits; all captions of a URL stand together."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{url}".encode(), digest_size=8).digest(), "big")


def laion_hash(url: str, caption: str) -> int:
    """The key that LAION's score tables are joined by: mmh3.hash64((url + text).encode())[0]."""
    return mmh3.hash64((url + caption).encode())[0]


def dedup_stages(
    *, source: Path, folder: Path, by: By, seed: int, num_validation: int, samples_per_shard: int
) -> list[Stage]:
    """The four passes.

    Args:
        source: Folder of the filter stage.
        folder: Folder of the parts; the first three passes lie beside it.
        by: What makes two rows equal.
        seed: Seed of the validation split.
        num_validation: How many rows are held out.
        samples_per_shard: Rows of one part.
    """
    split, pick, keep = (folder.with_name(f"{folder.name}-{name}") for name in ("split", "pick", "keep"))
    return [
        SplitStage(by, seed, source, split),
        PickStage(split, pick),
        KeepStage(by, num_validation, source, pick, keep),
        PartsStage(samples_per_shard, keep, folder),
    ]


@dataclass(frozen=True)
class SplitStage:
    """Pass 1: identities of one filtered file, one record batch per bucket."""

    by: By
    seed: int
    source: Path
    folder: Path
    name: str = "dedup-split"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """What makes rows equal, and the seed."""
        return {"by": self.by, "seed": self.seed}

    def units(self) -> list[Unit]:
        """One for each filtered file; the number of buckets follows from the number of rows.

        Raises:
            DataError: No row is left to work on.
        """
        units = one_to_one(self.source, ".parquet")
        rows = sum(pq.read_metadata(unit.inputs[0]).num_rows for unit in units)
        if rows == 0:
            raise DataError(f"{self.source}: no row passed the filter; {self.source / 'funnel.json'} shows which rule")
        buckets = -(-rows // ROWS_PER_BUCKET)
        return [replace(unit, facts={"buckets": buckets}) for unit in units]

    def worker(self) -> Work:
        """Hash every row, sort by bucket."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            buckets = unit.facts["buckets"]
            columns = _identities(unit.inputs[0], self.by, self.seed)
            bucket = columns["high"] % np.uint64(buckets)
            order = np.argsort(bucket, kind="stable")
            ends = np.searchsorted(bucket[order], np.arange(buckets + 1, dtype=np.uint64))
            slices = (order[start:end] for start, end in pairwise(ends))
            batches = ({name: values[rows] for name, values in columns.items()} for rows in slices)
            _write_batches(folder / f"{unit.name}.arrow", _IDENTITY, batches)
            return {"rows": len(order)}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> None:
        """Nothing of interest yet."""


def _identities(path: Path, by: By, seed: int) -> dict[str, npt.NDArray[Any]]:
    high, low, holdout = [], [], []
    for batch in pq.ParquetFile(path).iter_batches(BATCH_ROWS, columns=["url", "caption"]):
        for url, caption in zip(batch["url"].to_pylist(), batch["caption"].to_pylist(), strict=True):
            url, caption = url or "", caption or ""
            key = identity(url, caption, by)
            high.append(int.from_bytes(key[:8], "big"))
            low.append(int.from_bytes(key[8:], "big"))
            holdout.append(holdout_rank(seed, url))
    columns = {"high": high, "low": low, "holdout": holdout}
    arrays: dict[str, npt.NDArray[Any]] = {name: np.array(values, np.uint64) for name, values in columns.items()}
    return arrays | {"row": np.arange(len(high), dtype=np.int64)}


@dataclass(frozen=True)
class PickStage:
    """Pass 2: survivors of one bucket, one record batch per filtered file, rows ascending."""

    source: Path
    folder: Path
    name: str = "dedup-pick"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """Nothing beyond the bucket's number."""
        return {}

    def units(self) -> list[Unit]:
        """One for each bucket; each reads its batch of every file."""
        files = tuple(numbered_files(self.source, ".arrow"))
        with _open_batches(files[0]) as reader:
            buckets = reader.num_record_batches
        return [Unit(bucket, files, {"bucket": bucket}) for bucket in range(buckets)]

    def worker(self) -> Work:
        """Sort the bucket by identity; of each run the first by (file, row) stays."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            parts = [_read_batch(path, unit.facts["bucket"]) for path in unit.inputs]
            sizes = [len(part["row"]) for part in parts]
            columns = {name: np.concatenate([part[name] for part in parts]) for name in _IDENTITY.names}
            first = _first_of_each(columns["high"], columns["low"])
            file = np.repeat(np.arange(len(parts)), sizes)[first]
            ends = np.searchsorted(file, np.arange(len(parts) + 1))
            slices = (first[start:end] for start, end in pairwise(ends))
            batches = ({name: columns[name][rows] for name in _PICKED.names} for rows in slices)
            _write_batches(folder / f"{unit.name}.arrow", _PICKED, batches)
            return {"rows_in": sum(sizes), "rows_out": len(first)}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> str:
        """How many rows were there before."""
        rows_in, rows_out = (sum(row[name] for row in stats) for name in ("rows_in", "rows_out"))
        funnel = {"rows_in": rows_in, "duplicates": rows_in - rows_out, "rows_out": rows_out}
        write_atomically(self.folder / "duplicates.json", json.dumps(funnel, indent=2) + "\n")
        return f"dedup: {rows_in - rows_out:,} of {rows_in:,} rows are duplicates, {rows_out:,} left"


def _first_of_each(high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Ascending positions of the first row of each identity: the sort is stable."""
    order = np.lexsort((low, high))
    is_first = np.ones(len(order), bool)
    is_first[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
    return np.sort(order[is_first])


@dataclass(frozen=True)
class KeepStage:
    """Pass 3: surviving rows of one filtered file, train rows first, then validation rows."""

    by: By
    num_validation: int
    filtered: Path
    picked: Path
    folder: Path
    name: str = "dedup-keep"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)

    def config_facts(self) -> dict[str, Any]:
        """What makes rows equal: it is the key."""
        return {"by": self.by}

    def _last_holdout(self) -> int:
        """The `num_validation`-th smallest rank over all survivors, in memory for that many; -1 holds out none.

        Raises:
            DataError: Nothing would remain to train on.
        """
        if self.num_validation == 0:
            return -1
        smallest, total = np.empty(0, np.uint64), 0
        for path in numbered_files(self.picked, ".arrow"):
            for batch in _read_batches(path):
                total += len(batch["holdout"])
                smallest = np.concatenate([smallest, batch["holdout"]])
                if len(smallest) > self.num_validation:
                    smallest = np.partition(smallest, self.num_validation - 1)[: self.num_validation]
        if total <= self.num_validation:
            raise DataError(
                f"validation.num_samples = {self.num_validation}, but only {total} rows are left after dedup: "
                "nothing would remain to train on; lower it, or loosen the filter"
            )
        return int(smallest.max())

    def units(self) -> list[Unit]:
        """One for each filtered file; each reads its batch of every bucket."""
        picked = tuple(numbered_files(self.picked, ".arrow"))
        last = self._last_holdout()
        return [
            Unit(unit.index, (*unit.inputs, *picked), {"batch": position, "last_holdout": last})
            for position, unit in enumerate(one_to_one(self.filtered, ".parquet"))
        ]

    def worker(self) -> Work:
        """Take the survivors, add key, hash and split."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            filtered, *picked = unit.inputs
            parts = [_read_batch(path, unit.facts["batch"]) for path in picked]
            rows = np.concatenate([part["row"] for part in parts])
            ranks = np.concatenate([part["holdout"] for part in parts])
            last = unit.facts["last_holdout"]
            is_held_out = ranks <= np.uint64(last) if last >= 0 else np.zeros(len(ranks), bool)
            order = np.lexsort((rows, is_held_out))  # train rows first, each split in the file's order
            table = pq.read_table(filtered).take(pa.array(rows[order]))
            table = _with_keys(table, is_held_out[order], self.by)
            pq.write_table(table, folder / f"{unit.name}.parquet", compression="zstd", row_group_size=_ROW_GROUP)
            return {"train": int((~is_held_out).sum()), "validation": int(is_held_out.sum())}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> None:
        """The parts tell it."""


def _with_keys(table: pa.Table, is_held_out: npt.NDArray[np.bool_], by: By) -> pa.Table:
    """Add `key` (hex of the identity), `hash` (LAION's) and `split`."""
    pairs = [(url or "", caption or "") for url, caption in zip(*_texts(table), strict=True)]
    keys = pa.array([identity(url, caption, by).hex() for url, caption in pairs], pa.string())
    hashes = pa.array([laion_hash(url, caption) for url, caption in pairs], pa.int64())
    splits = pa.array(np.where(is_held_out, "validation", "train").tolist(), pa.string())
    return table.append_column("key", keys).append_column("hash", hashes).append_column("split", splits)


def _texts(table: pa.Table) -> tuple[list[str | None], list[str | None]]:
    return table["url"].to_pylist(), table["caption"].to_pylist()


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
        stats = [json.loads(path.with_suffix(".stats.json").read_text(encoding="utf-8")) for path in files]
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
            pq.write_table(table, folder / f"{unit.name}.parquet", compression="zstd")
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


def _write_batches(path: Path, schema: pa.Schema, batches: Iterator[Mapping[str, npt.NDArray[Any]]]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(pa.record_batch([pa.array(batch[name]) for name in schema.names], schema=schema))


def _open_batches(path: Path) -> pa.ipc.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(str(path)))


def _read_batch(path: Path, index: int) -> dict[str, npt.NDArray[Any]]:
    with _open_batches(path) as reader:
        return _to_numpy(reader.get_batch(index))


def _read_batches(path: Path) -> Iterator[dict[str, npt.NDArray[Any]]]:
    with _open_batches(path) as reader:
        for index in range(reader.num_record_batches):
            yield _to_numpy(reader.get_batch(index))


def _to_numpy(batch: pa.RecordBatch) -> dict[str, npt.NDArray[Any]]:
    return {name: batch[name].to_numpy() for name in batch.schema.names}
