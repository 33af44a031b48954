"""The forecast from one percent of the URLs beside what filter and dedup then count over the whole table.

    python -m benchmarks.plan --rows 10000000 --folder /tmp/laion-10m

Every line of the funnel must be within five percent. The sample is drawn once; a second forecast with other thresholds
is timed too, since that is what a plan is for.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.laion_table import write_table
from data_pipeline.build import stages_for
from data_pipeline.cluster import RayExecutor
from data_pipeline.planner import forecast, plan_stages
from data_pipeline.runner import Runner
from sdtrain.config.ingestion import IngestionConfig

MAX_DEVIATION = 0.05


def page(tables: Path, out: Path, **filter_settings: Any) -> IngestionConfig:
    values = {
        "schema_version": 1,
        "kind": "ingestion",
        "output": str(out),
        "source": {"type": "laion", "metadata": str(tables)},
        "filter": filter_settings,
        "plan": {"sample": 0.01, "min_sample_rows": 0},
    }
    return IngestionConfig.model_validate(values, strict=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where the table lies or is made; default: a temporary folder")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tables = arguments.folder or Path(scratch) / "tables"
        write_table(tables, arguments.rows)
        _compare(tables, Path(scratch) / "out", arguments.workers)


def _compare(tables: Path, out: Path, workers: int) -> None:
    config = page(tables, out)
    with RayExecutor(workers) as executor:
        runner = Runner(output=out, executor=executor, console=Console(quiet=True))
        stages = stages_for(config)
        runner.run(stages, ["metadata"])
        started = time.perf_counter()
        runner.run(plan_stages(config))
        sampled = time.perf_counter()
        found = forecast(config)
        planned = time.perf_counter()
        forecast(page(tables, out, min_aesthetic=6.0, min_similarity=0.25))
        again = time.perf_counter()
        runner.run(stages, ["filter", "dedup-split", "dedup-pick"])
        done = time.perf_counter()
    real = {row["rule"]: row["left"] for row in json.loads((out / "02-filter/funnel.json").read_text())["rules"]}
    real["duplicates"] = json.loads((out / "03-dedup-pick/duplicates.json").read_text())["rows_out"]
    print(f"{found.rows_in:,} rows, {found.sampled:,} sampled in {sampled - started:.1f} s; forecast in", end=" ")
    print(f"{planned - sampled:.2f} s, another one in {again - planned:.2f} s; the run itself {done - again:.1f} s")
    deviations = []
    for line in found.funnel:
        deviations.append(abs(line.left - real[line.rule]) / real[line.rule])
        print(
            f"{line.rule:13} {line.left:>12,} +- {line.margin:>8,}   real {real[line.rule]:>12,}  {deviations[-1]:6.2%}"
        )
    print(f"largest deviation {max(deviations):.2%} (limit {MAX_DEVIATION:.0%})")
    assert max(deviations) <= MAX_DEVIATION


if __name__ == "__main__":
    main()
