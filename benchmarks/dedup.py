"""The four passes of `dedup` over a table of many rows: time, and the memory of the process that does all of it.

    python -m benchmarks.dedup --rows 10000000 --folder /tmp/laion-10m

Every row of the table takes part (no filter before it). One process does all passes one after another, so that its peak
is the memory that a worker needs; the limit holds for any number of rows, since a bucket has four million of them,
however many there are. What is left is checked against duckdb's count of distinct URLs.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from rich.console import Console

from benchmarks.laion_table import write_table
from data_pipeline.cluster import InlineExecutor
from data_pipeline.runner import Runner
from data_pipeline.stages.dedup import dedup_stages
from data_pipeline.stages.filter import FilterSettings, filter_stages
from data_pipeline.stages.metadata import MetadataStage

MAX_BYTES = 2 * 10**9
EVERYTHING = FilterSettings(
    min_aesthetic=None,
    aesthetic_scale="v2",
    min_similarity=None,
    min_width=None,
    min_height=None,
    min_aspect_ratio=None,
    max_aspect_ratio=None,
    min_caption_chars=None,
    max_caption_chars=None,
    max_pwatermark=None,
    nsfw_allow=None,
    max_punsafe=None,
    nulls={},
)


def peak_bytes() -> int:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def distinct_urls(tables: Path) -> int:
    import duckdb

    (row,) = duckdb.sql(f"SELECT count(DISTINCT URL) FROM read_parquet('{tables}/*.parquet')").fetchall()
    return row[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where the table lies or is made; default: a temporary folder")
    parser.add_argument("--samples-per-shard", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tables = arguments.folder or Path(scratch) / "tables"
        write_table(tables, arguments.rows)
        _measure(tables, Path(scratch), arguments)


def _measure(tables: Path, out: Path, arguments: argparse.Namespace) -> None:
    runner = Runner(output=out, executor=InlineExecutor(), console=Console(quiet=True))
    stages = [
        MetadataStage(str(tables), {}, out / "01-metadata"),
        *filter_stages(EVERYTHING, out / "01-metadata", out / "02-filter"),
    ]
    runner.run(stages)
    print(f"{arguments.rows:,} rows; peak before dedup {peak_bytes() / 1e9:.2f} GB")
    stages += dedup_stages(
        source=out / "02-filter",
        folder=out / "03-dedup",
        by="url",
        seed=0,
        num_validation=5000,
        samples_per_shard=arguments.samples_per_shard,
    )
    total = 0.0
    for stage in stages[2:]:
        started = time.perf_counter()
        runner.run(stages, [stage.name])
        took = time.perf_counter() - started
        total += took
        print(f"{stage.name:12} {took:7.1f} s, peak {peak_bytes() / 1e9:.2f} GB")
    found = json.loads((out / "03-dedup-pick" / "duplicates.json").read_text())
    rate = arguments.rows / total / 1e3
    print(f"all passes {total:.1f} s in one process, {rate:.0f} k rows/s; {found}")
    peak = peak_bytes()
    print(f"peak memory {peak / 1e9:.2f} GB (limit {MAX_BYTES / 1e9:.0f})")
    assert found["rows_out"] == distinct_urls(tables), "duckdb counts another number of URLs"
    assert peak < MAX_BYTES


if __name__ == "__main__":
    main()
