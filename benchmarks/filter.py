"""The stage `filter` beside duckdb and polars doing the same work on the same files with the same number of threads.

    python -m benchmarks.filter --rows 10000000 --folder /tmp/laion-10m

The work: read LAION's parquet files, apply the published rules, count the rows that each rule is the first to reject,
write the rows that pass as zstd parquet. All three must agree on every count and on the set of rows, which is asserted.

Ours is the stage as it ships, on Ray, with its plan, digests, syncs and ledger; Ray's own start is not counted. duckdb
has no query with two results, so it reads the table twice, once to count and once to write: that is its fastest form.
Rounds alternate, figures are medians; on a machine whose speed drifts only the ratio means anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("POLARS_MAX_THREADS", str(os.cpu_count() or 1))  # polars reads it when it is imported

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from benchmarks.laion_table import write_table
from data_pipeline.build import filter_settings
from data_pipeline.cluster import RayExecutor
from data_pipeline.runner import Runner
from data_pipeline.stages.filter import filter_stages
from data_pipeline.stages.metadata import MetadataStage
from sdtrain.config.ingestion import FilterConfig

COLUMNS = ("URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "hash", "punsafe", "pwatermark", "AESTHETIC_SCORE")
MAX_RATIO = 1.2

RULES = {
    "url": "length(URL) > 0",
    "aesthetic": "AESTHETIC_SCORE >= 6.5::FLOAT",
    "similarity": "similarity >= 0.28::DOUBLE",
    "size": "WIDTH >= 512 AND HEIGHT >= 512",
    "aspect_ratio": "WIDTH::DOUBLE / HEIGHT BETWEEN 0.5 AND 2.0",
    "caption": "length(trim(TEXT)) BETWEEN 20 AND 300",
    "pwatermark": "pwatermark < 0.5::FLOAT",
    "nsfw": "punsafe < 0.2::FLOAT AND NOT isnan(punsafe)",
}


@dataclass(frozen=True)
class Result:
    """What one engine found: rows rejected by each rule, rows that passed, and a sum over their hashes."""

    rejected: Mapping[str, int]
    passed: int
    hashes: int


def result_of(rejected: Mapping[str, int], files: list[Path], column: str) -> Result:
    values = pa.chunked_array([pq.read_table(path, columns=[column])[column].combine_chunks() for path in files])
    total = int(values.to_numpy().view("uint64").sum()) if len(values) else 0
    return Result({rule: rejected.get(rule, 0) for rule in RULES}, len(values), total)


class Ours:
    """The stage on warm Ray workers."""

    def __init__(self, tables: Path, out: Path, threads: int):
        self._out = out
        self._runner = Runner(output=out, executor=RayExecutor(threads), console=Console(quiet=True))
        settings = filter_settings(FilterConfig())
        self._stages = [MetadataStage(str(tables), {}, out / "01-metadata")]
        self._stages += filter_stages(settings, out / "01-metadata", out / "02-filter")
        self._runner.run(self._stages)

    def prepare(self) -> None:
        shutil.rmtree(self._out / "02-filter", ignore_errors=True)

    def work(self) -> None:
        self._runner.run(self._stages, ["filter"])

    def result(self) -> Result:
        page = json.loads((self._out / "02-filter" / "funnel.json").read_text())
        rejected = {row["rule"]: row["rejected"] for row in page["rules"]}
        return result_of(rejected, sorted((self._out / "02-filter").glob("0*.parquet")), "source_hash")


class Duckdb:
    """Two queries: the counts, then the rows."""

    def __init__(self, tables: Path, out: Path, threads: int):
        import duckdb

        self._target = out / "duckdb.parquet"
        self._connection = duckdb.connect(config={"threads": threads})
        self._source = f"read_parquet('{tables}/*.parquet')"
        cases = " ".join(f"WHEN NOT coalesce({rule}, false) THEN '{name}'" for name, rule in RULES.items())
        self._verdict = f"CASE {cases} ELSE 'passed' END"
        self._counts: dict[str, int] = {}

    def prepare(self) -> None:
        self._target.unlink(missing_ok=True)

    def work(self) -> None:
        counts = self._connection.sql(f"SELECT {self._verdict} AS verdict, count(*) FROM {self._source} GROUP BY 1")
        self._counts = dict(counts.fetchall())
        rules = " AND ".join(f"({rule})" for rule in RULES.values())
        rows = f"SELECT {', '.join(COLUMNS)} FROM {self._source} WHERE {rules}"
        self._connection.sql(f"COPY ({rows}) TO '{self._target}' (FORMAT parquet, COMPRESSION zstd)")

    def result(self) -> Result:
        return result_of(self._counts, [self._target], "hash")


class Polars:
    """One pass of the streaming engine with two results."""

    def __init__(self, tables: Path, out: Path, threads: int):
        import polars

        assert polars.thread_pool_size() == threads, "for other numbers of threads set POLARS_MAX_THREADS as well"
        self._polars, self._tables, self._target = polars, tables, out / "polars.parquet"
        self._counts: dict[str, int] = {}

    def prepare(self) -> None:
        self._target.unlink(missing_ok=True)

    def work(self) -> None:
        pl = self._polars
        ratio = pl.col("WIDTH").cast(pl.Float64) / pl.col("HEIGHT")
        rules = {
            "url": pl.col("URL").str.len_bytes() > 0,
            "aesthetic": pl.col("AESTHETIC_SCORE") >= pl.lit(6.5, pl.Float32),
            "similarity": pl.col("similarity") >= 0.28,
            "size": (pl.col("WIDTH") >= 512) & (pl.col("HEIGHT") >= 512),
            "aspect_ratio": (ratio >= 0.5) & (ratio <= 2.0),
            "caption": pl.col("TEXT").str.strip_chars().str.len_chars().is_between(20, 300),
            "pwatermark": pl.col("pwatermark") < pl.lit(0.5, pl.Float32),
            "nsfw": (pl.col("punsafe") < pl.lit(0.2, pl.Float32)) & pl.col("punsafe").is_not_nan(),
        }
        verdict: Any = pl.lit(0, pl.UInt8)
        for place, rule in reversed(list(enumerate(rules.values(), 1))):
            verdict = pl.when(rule.fill_null(False)).then(verdict).otherwise(pl.lit(place, pl.UInt8))
        rows = pl.scan_parquet(self._tables / "*.parquet").select(*COLUMNS, verdict=verdict)
        passed = rows.filter(pl.col("verdict") == 0).select(COLUMNS)
        counts, _ = pl.collect_all(
            [
                rows.group_by("verdict").len(),
                passed.sink_parquet(self._target, compression="zstd", lazy=True),
            ],
            engine="streaming",
        )
        names = dict(enumerate(rules, 1))
        self._counts = {names[place]: count for place, count in counts.iter_rows() if place}

    def result(self) -> Result:
        return result_of(self._counts, [self._target], "hash")


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where the table lies or is made; default: a temporary folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="engines, comma separated, for a look at one of them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tables = arguments.folder or Path(scratch) / "tables"
        write_table(tables, arguments.rows)
        _compare(tables, Path(scratch), arguments)


def _compare(tables: Path, scratch: Path, arguments: argparse.Namespace) -> None:
    kinds = {"ours": Ours, "duckdb": Duckdb, "polars": Polars}
    chosen = arguments.only.split(",") if arguments.only else list(kinds)
    engines = {name: kinds[name](tables, scratch, arguments.threads) for name in chosen}
    times: dict[str, list[float]] = {name: [] for name in engines}
    results = []
    for turn in range(arguments.rounds + 1):
        for name, engine in engines.items():
            engine.prepare()
            took = seconds(engine.work)
            if turn == 0:  # warms caches
                results.append(engine.result())
            else:
                times[name].append(took)
    assert all(result == results[0] for result in results), results
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"{arguments.rows:,} rows, {arguments.threads} threads, {results[0].passed:,} pass: {dict(results[0].rejected)}"
    )
    for name, values in times.items():
        rate = arguments.rows / medians[name] / 1e6
        print(f"{name:8} {medians[name]:7.2f} s  {rate:6.2f} M rows/s  {[round(value, 2) for value in values]}")
    if len(engines) > 1 and "ours" in engines:
        ratio = medians["ours"] / min(value for name, value in medians.items() if name != "ours")
        print(f"ours / fastest peer: {ratio:.2f} (limit {MAX_RATIO})")


if __name__ == "__main__":
    main()
