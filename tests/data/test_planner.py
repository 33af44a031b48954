"""The forecast is close to what the run finds, costs follow from it, and rules without effect are told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.laion_table import write_table
from data_pipeline.build import stages_for
from data_pipeline.cluster import InlineExecutor
from data_pipeline.planner import Forecast, forecast, plan_stages, tables_of
from data_pipeline.runner import Runner
from sdtrain.config.ingestion import IngestionConfig
from sdtrain.errors import ConfigError, DataError

LOOSE = {"min_aesthetic": 6.0, "min_similarity": 0.2, "min_width": 100, "min_height": 100, "min_caption_chars": 5}


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    write_table(folder, 600_000, files=3)
    return folder


def page(tables: Path, out: Path, **sections) -> IngestionConfig:
    values = {
        "schema_version": 1,
        "kind": "ingestion",
        "output": str(out),
        "source": {"type": "laion", "metadata": str(tables)},
        "validation": {"num_samples": 100},
        "download": {"image_size": 64, "only_if_bigger": False, "samples_per_shard": 10_000},
    }
    return IngestionConfig.model_validate({**values, **sections}, strict=False)


def plan(config: IngestionConfig) -> Forecast:
    Runner(output=config.output, executor=InlineExecutor()).run(plan_stages(config))
    return forecast(config)


def real_funnel(config: IngestionConfig) -> dict[str, int]:
    """Rows left after each rule and after dedup, as the run itself counts them."""
    stages = stages_for(config)
    last = [stage.name for stage in stages].index("dedup-pick")
    Runner(output=config.output, executor=InlineExecutor()).run(stages[: last + 1])
    funnel = json.loads((config.output / "02-filter/funnel.json").read_text())
    duplicates = json.loads((config.output / "03-dedup-pick/duplicates.json").read_text())
    return {row["rule"]: row["left"] for row in funnel["rules"]} | {"duplicates": duplicates["rows_out"]}


def test_one_percent_of_the_urls_forecast_the_funnel_within_five_percent(tables, tmp_path):
    config = page(tables, tmp_path, filter=LOOSE, plan={"min_sample_rows": 0})
    found = plan(config)
    assert 5_000 < found.sampled < 7_000 and found.rows_in == 600_000
    real = real_funnel(config)
    assert [line.rule for line in found.funnel] == list(real)
    for line in found.funnel:
        assert abs(line.left - real[line.rule]) <= 0.05 * real[line.rule], line
    inside = [abs(line.left - real[line.rule]) <= line.margin for line in found.funnel]
    assert sum(inside) >= len(inside) - 1, "a 95 % interval fails one time in twenty"
    assert real["nsfw"] - real["duplicates"] > 0.05 * real["nsfw"], "there is something to forecast"


def test_a_sample_of_all_urls_is_the_funnel_itself(tmp_path):
    first, _ = write_table(tmp_path / "tables", 20_000, files=2)
    (tmp_path / "list.txt").write_text("\n".join(pq.read_table(first)["URL"].to_pylist()[::40]))
    config = page(
        tmp_path / "tables",
        tmp_path / "out",
        filter={**LOOSE, "percentiles": {"similarity": 20, "pwatermark": 90}},
        dedup={"by": "url_text", "exclude": [str(tmp_path / "list.txt")]},
        plan={"min_sample_rows": 10**6},
    )
    found = plan(config)
    real = real_funnel(config)
    excluded = json.loads((tmp_path / "out/03-dedup-pick/duplicates.json").read_text())["excluded"]
    lines = {line.rule: line for line in found.funnel}
    assert {rule: line.left for rule, line in lines.items() if rule != "excluded"} == real
    assert lines["excluded"].rejected == excluded > 0 and lines["excluded"].setting == "dedup.exclude"
    assert (
        found.sampled == 20_000
        and json.loads((tmp_path / "out/00-plan/forecast.json").read_text())["rows_in"] == 20_000
    )


def v2_table(folder: Path, **columns: pa.Array) -> Path:
    """Ten rows that pass the published rules, some columns of them replaced; None drops one."""
    count = 10
    values = {
        "URL": pa.array([f"http://host/{row}" for row in range(count)]),
        "TEXT": pa.array(["a caption of more than twenty characters"] * count),
        "WIDTH": pa.array([600] * 9 + [400], pa.int32()),
        "HEIGHT": pa.array([600] * 9 + [400], pa.int32()),
        "similarity": pa.array(np.linspace(0.1, 0.5, count)),
        "punsafe": pa.array([0.1] * count, pa.float32()),
        "pwatermark": pa.array(np.linspace(0.9, 0, count).astype(np.float32)),
        "AESTHETIC_SCORE": pa.array([6.5] * 9 + [8.0], pa.float32()),
        **columns,
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{len(list(folder.iterdir()))}.parquet"
    pq.write_table(pa.table({name: column for name, column in values.items() if column is not None}), path)
    return folder


def test_rules_that_cannot_reject_anything_are_told_with_the_values_that_prove_it(tmp_path):
    tables = v2_table(tmp_path / "tables")
    found = plan(page(tables, tmp_path / "cut"))
    assert found.warnings[:3] == (
        "filter.min_aesthetic: aesthetic v2 >= 6.5 cannot reject anything in these tables: aesthetic_v2 is 6.5 to 8; "
        "were they cut before?",
        "filter: aspect_ratio 0.5 - 2 rejects none of the 10 sampled rows",
        "filter: caption 20 - 300 characters rejects none of the 10 sampled rows",
    )
    found = plan(page(tables, tmp_path / "higher", filter={"min_aesthetic": 6.6, "min_width": 400, "min_height": 400}))
    assert not any("min_aesthetic" in line for line in found.warnings)
    assert any("filter.min_width and min_height: size width >= 400, height >= 400" in line for line in found.warnings)
    lower = v2_table(tables, AESTHETIC_SCORE=pa.array([6.7] * 9 + [None], pa.float32()))
    found = plan(page(lower, tmp_path / "nulls"))
    assert (
        "cannot reject anything in these tables but the 1 rows without a value: aesthetic_v2 is 6.5 to 8"
        in (found.warnings[0])
    )
    v2_table(tables, AESTHETIC_SCORE=pa.array([6.4] * 10, pa.float32()))
    found = plan(page(lower, tmp_path / "lower"))
    assert not any("min_aesthetic" in line for line in found.warnings), "one table of three has rows to reject"


def test_tables_that_do_not_fit_the_filter_are_told_all_at_once(tmp_path):
    tables = v2_table(tmp_path / "tables", AESTHETIC_SCORE=None)
    v2_table(tables)
    v2_table(tables, pwatermark=None)
    message = (
        r"^2 of 3 tables do not fit the filter:\n  .*0\.parquet: filter\.min_aesthetic needs a column AESTHETIC_SCORE; "
        r".*\n  .*2\.parquet: filter\.max_pwatermark needs a column pwatermark; columns present: URL"
    )
    with pytest.raises(DataError, match=message):
        plan(page(tables, tmp_path / "out"))


def test_a_percentile_of_nothing_is_refused_as_by_the_run(tmp_path):
    tables = v2_table(tmp_path / "tables", similarity=pa.nulls(10, pa.float64()))
    with pytest.raises(DataError, match=r"filter\.percentiles: no row has a value of similarity; switch this"):
        plan(page(tables, tmp_path / "out", filter={"percentiles": {"similarity": 30}}))


def test_a_small_sample_and_a_small_or_empty_rest_are_told(tables, tmp_path):
    found = plan(page(tables, tmp_path / "coarse", plan={"sample": 0.0005, "min_sample_rows": 0}))
    assert "the number of rows left is known to" in found.warnings[-1] and "set plan.sample or" in found.warnings[-1]
    tables = v2_table(tmp_path / "tables")
    found = plan(page(tables, tmp_path / "few"))
    assert found.warnings[-1] == "validation.num_samples = 100 takes all 4 rows: nothing would remain to train on"
    assert {line.margin for line in found.funnel} == {0}, "a sample of all rows has no error"
    found = plan(page(tables, tmp_path / "none", filter={"min_aesthetic": 9.0}))
    assert found.warnings[-1] == "no sampled row of 10 is left: loosen the rule that rejects most"
    with pytest.raises(DataError, match=r"00-plan: no row was sampled; raise plan\.sample or plan\.min_sample_rows"):
        plan(page(tables, tmp_path / "zero", plan={"sample": 1e-9, "min_sample_rows": 0}))


def test_other_thresholds_are_forecast_from_the_same_sample(tmp_path, capsys):
    tables = v2_table(tmp_path / "tables")
    plan(page(tables, tmp_path / "out"))
    found = plan(page(tables, tmp_path / "out", filter={"min_similarity": 0.4}))
    assert "plan-sample: 1 of 1 up to date" in capsys.readouterr().out
    assert {line.rule: line.left for line in found.funnel}["similarity"] == 3


def test_only_metadata_can_be_planned_from(tmp_path):
    config = page(tmp_path, tmp_path, source={"type": "digits"})
    with pytest.raises(
        ConfigError, match=r"source\.type: digits has no metadata to plan from; plan needs laion or shards"
    ):
        plan_stages(config)


def test_the_forecast_is_shown_as_two_tables(tmp_path):
    found = plan(page(v2_table(tmp_path / "tables"), tmp_path / "out"))
    funnel, costs = tables_of(found)
    assert funnel.row_count == 1 + len(found.funnel) and costs.row_count == len(found.costs)
