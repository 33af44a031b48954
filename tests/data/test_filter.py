"""Every rule at its threshold and just beyond it, in every schema that has its column; nulls; the funnel's sums."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.build import filter_settings
from data_pipeline.cluster import InlineExecutor
from data_pipeline.funnel import Funnel
from data_pipeline.runner import Runner
from data_pipeline.sources import laion
from data_pipeline.sources.laion import Table, TableWriter
from data_pipeline.stages.filter import FilterSettings, FilterStage, apply_rules, filter_stages, rules_for
from data_pipeline.stages.metadata import MetadataStage
from data_pipeline.stages.percentiles import value_at_percentile
from sdtrain.config.ingestion import FilterConfig, NsfwConfig
from sdtrain.errors import DataError

PUBLISHED = filter_settings(FilterConfig())
"""Aesthetic 6.5, similarity 0.28, 512 pixels, ratio 0.5 - 2, caption 20 - 300, watermark 0.5, NSFW."""

GOOD = {
    "url": "http://a/1",
    "caption": "a caption of enough characters",
    "width": 600,
    "height": 600,
    "similarity": 0.3,
    "punsafe": 0.1,
    "pwatermark": 0.1,
    "aesthetic": 7.5,
    "score": 7.0,
    "nsfw": "UNLIKELY",
}

Family = dict[str, tuple[str, pa.DataType]]
SHARED: Family = {
    "URL": ("url", pa.string()),
    "TEXT": ("caption", pa.string()),
    "WIDTH": ("width", pa.int32()),
    "HEIGHT": ("height", pa.int32()),
    "similarity": ("similarity", pa.float64()),
}
JOINED: Family = {**SHARED, "punsafe": ("punsafe", pa.float32()), "pwatermark": ("pwatermark", pa.float32())}
FAMILIES: dict[str, Family] = {
    "laion2B-en": {**SHARED, "NSFW": ("nsfw", pa.string())},
    "laion2B-en-joined": JOINED,
    "laion2B-en-aesthetic": {
        **JOINED,
        "WIDTH": ("width", pa.float64()),
        "HEIGHT": ("height", pa.float64()),
        "aesthetic": ("aesthetic", pa.float32()),
    },
    "aesthetics-v2": {**JOINED, "aesthetic": ("aesthetic", pa.float32()), "AESTHETIC_SCORE": ("score", pa.float32())},
    "relaion": {
        "url": ("url", pa.string()),
        "caption": ("caption", pa.string()),
        "width": ("absent", pa.int32()),
        "height": ("absent", pa.int32()),
        "original_width": ("width", pa.int32()),
        "original_height": ("height", pa.int32()),
        "punsafe": ("punsafe", pa.float32()),
        "pwatermark": ("pwatermark", pa.float32()),
    },
}
SETTINGS: dict[str, FilterSettings] = {
    "laion2B-en": replace(PUBLISHED, min_aesthetic=None, max_pwatermark=None),
    "laion2B-en-joined": replace(PUBLISHED, min_aesthetic=None),
    "laion2B-en-aesthetic": replace(PUBLISHED, aesthetic_scale="v1", min_aesthetic=7.0),
    "aesthetics-v2": PUBLISHED,
    "relaion": replace(PUBLISHED, min_aesthetic=None, min_similarity=None),
}


def laion_table(tmp_path: Path, family: Family, rows: list[dict[str, Any]]) -> Table:
    arrays = {name: pa.array([row.get(key) for row in rows], kind) for name, (key, kind) in family.items()}
    pq.write_table(pa.table(arrays), tmp_path / "in.parquet")
    return Table.open(tmp_path / "in.parquet", {})


def survivors(tmp_path: Path, name: str, *rows: dict[str, Any], **settings) -> list[bool]:
    """Which of the rows pass; each row is GOOD with some changes."""
    family, chosen = FAMILIES[name], replace(SETTINGS[name], **settings)
    numbered = [{**GOOD, **row, "url": f"http://a/{index}"} for index, row in enumerate(rows)]
    table = laion_table(tmp_path, family, numbered)
    (batch,) = table.batches()
    passed, rejected = apply_rules(batch, rules_for(chosen, table.columns, table.source))
    assert sum(rejected.values()) == len(rows) - passed.num_rows
    left = set(passed["url"].to_pylist())
    return [row["url"] in left for row in numbered]


def next_after(value: float, towards: float, kind: pa.DataType) -> float:
    dtype = np.float32 if kind == pa.float32() else np.float64
    return float(np.nextafter(dtype(value), dtype(towards)))


def boundary_rows(name: str) -> list[tuple[str, dict[str, Any], bool]]:
    """(what, changes, passes) for every rule that this family's columns allow."""
    kinds = dict(FAMILIES[name].values())

    def below(key: str, value: float) -> float:
        return next_after(value, -math.inf, kinds[key])

    rows: list[tuple[str, dict[str, Any], bool]] = [
        ("width 512", {"width": 512}, True),
        ("width 511", {"width": 511}, False),
        ("height 512", {"height": 512}, True),
        ("height 511", {"height": 511}, False),
        ("ratio 2", {"width": 1024, "height": 512}, True),
        ("ratio above 2", {"width": 1025, "height": 512}, False),
        ("ratio 1/2", {"width": 512, "height": 1024}, True),
        ("ratio below 1/2", {"width": 512, "height": 1025}, False),
        ("caption 20", {"caption": "é" * 20}, True),
        ("caption 19", {"caption": " " + "é" * 19 + " "}, False),
        ("caption 300", {"caption": "x" * 300}, True),
        ("caption 301", {"caption": "x" * 301}, False),
    ]
    if "similarity" in kinds:
        rows += [("similarity", {"similarity": 0.28}, True), ("less", {"similarity": below("similarity", 0.28)}, False)]
    if name == "laion2B-en-aesthetic":
        rows += [("v1", {"aesthetic": 7.0}, True), ("below v1", {"aesthetic": below("aesthetic", 7.0)}, False)]
    if name == "aesthetics-v2":
        rows += [("v2", {"score": 6.5, "aesthetic": 0.0}, True), ("below v2", {"score": below("score", 6.5)}, False)]
    if "pwatermark" in kinds:
        rows += [("watermark", {"pwatermark": 0.5}, False), ("less", {"pwatermark": below("pwatermark", 0.5)}, True)]
    if "punsafe" in kinds:
        rows += [("punsafe", {"punsafe": 0.2}, False), ("less", {"punsafe": below("punsafe", 0.2)}, True)]
    if "nsfw" in kinds:
        rows += [(tag, {"nsfw": tag}, tag == "UNLIKELY") for tag in ("UNLIKELY", "UNSURE", "NSFW", "unlikely", "")]
    return rows


@pytest.mark.parametrize("name", FAMILIES)
def test_boundary_rows_of_every_rule_in_every_schema(tmp_path, name):
    rows = boundary_rows(name)
    found = survivors(tmp_path, name, *(changes for _, changes, _ in rows))
    assert dict(zip([what for what, _, _ in rows], found, strict=True)) == {what: passes for what, _, passes in rows}


def test_thresholds_are_compared_in_the_column_s_own_precision(tmp_path):
    # float32(0.7) is less than 0.7: compared as doubles, a row that says 0.7 would fail "at least 0.7"
    rows = ({"score": 0.7}, {"score": next_after(0.7, 0.0, pa.float32())})
    assert survivors(tmp_path, "aesthetics-v2", *rows, min_aesthetic=0.7) == [True, False]


@pytest.mark.parametrize(
    ("family", "column", "rule"),
    [
        ("aesthetics-v2", "score", "aesthetic"),
        ("aesthetics-v2", "similarity", "similarity"),
        ("aesthetics-v2", "width", "size"),
        ("aesthetics-v2", "height", "size"),
        ("aesthetics-v2", "caption", "caption"),
        ("aesthetics-v2", "pwatermark", "pwatermark"),
        ("aesthetics-v2", "punsafe", "nsfw"),
        ("laion2B-en", "nsfw", "nsfw"),
    ],
)
def test_nulls_follow_their_rule_s_policy(tmp_path, family, column, rule):
    row = {column: None}
    assert survivors(tmp_path, family, row) == [False]
    keep = {**PUBLISHED.nulls, rule: "keep"}
    assert survivors(tmp_path, family, row, nulls=keep) == [True]
    others = dict.fromkeys(PUBLISHED.nulls, "keep") | {rule: "reject"}
    assert survivors(tmp_path, family, row, nulls=others) == [False]


def test_nan_is_null_and_a_known_bad_side_beats_an_unknown_one(tmp_path):
    keep = dict.fromkeys(PUBLISHED.nulls, "keep")
    rows = ({"score": math.nan}, {"width": 100, "height": None}, {"width": 600, "height": None})
    assert survivors(tmp_path, "aesthetics-v2", *rows, nulls=keep) == [True, False, True]
    assert survivors(tmp_path, "aesthetics-v2", *rows) == [False, False, False]


def test_pictures_without_pixels_have_no_ratio(tmp_path):
    rows = ({"width": 0, "height": 0}, {"width": 5, "height": 0})
    assert survivors(tmp_path, "aesthetics-v2", *rows, min_width=None, min_height=None) == [False, False]


def test_rows_without_a_url_never_pass(tmp_path):
    table = laion_table(tmp_path, FAMILIES["aesthetics-v2"], [GOOD, {**GOOD, "url": None}, {**GOOD, "url": ""}])
    (batch,) = table.batches()
    passed, rejected = apply_rules(batch, rules_for(PUBLISHED, table.columns, table.source))
    assert passed.num_rows == 1 and rejected["url"] == 2


def test_rules_that_are_off_need_no_column(tmp_path):
    kept = ("aesthetic_scale", "nulls", "percentiles", "keep_rejected")
    off = {key: None for key in vars(PUBLISHED) if key not in kept}
    bad = {"width": 1, "height": 9, "caption": "", "pwatermark": 1.0, "punsafe": 1.0, "score": 0.0, "similarity": -1.0}
    assert survivors(tmp_path, "aesthetics-v2", bad, **off) == [True]
    table = laion_table(tmp_path, {name: SHARED[name] for name in ("URL", "TEXT")}, [GOOD])
    rules = rules_for(replace(PUBLISHED, **off), table.columns, table.source)
    assert [rule.name for rule in rules] == ["url"]
    assert filter_settings(FilterConfig(nsfw=None)).nsfw_allow is None
    assert filter_settings(FilterConfig(nsfw=NsfwConfig(allow=("UNLIKELY", "UNSURE")))).nsfw_allow == (
        "UNLIKELY",
        "UNSURE",
    )


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "laion2B-en-joined",
            {},
            r"in\.parquet: filter\.min_aesthetic needs a column AESTHETIC_SCORE; columns present: URL, TEXT, WIDTH, "
            r"HEIGHT, similarity, punsafe, pwatermark; or switch the rule off with filter\.min_aesthetic: null",
        ),
        ("laion2B-en-aesthetic", {}, r"needs a column AESTHETIC_SCORE; .*; set filter\.aesthetic_scale: v1 \(with a"),
        ("relaion", {"aesthetic_scale": "v1"}, r"filter\.min_aesthetic needs a column aesthetic; .*original_width"),
        ("relaion", {"min_aesthetic": None}, r"filter\.min_similarity needs a column similarity"),
        ("laion2B-en", {"min_aesthetic": None}, r"filter\.max_pwatermark needs a column pwatermark"),
        ("no size", {"min_aesthetic": None}, r"filter\.min_width needs a column WIDTH"),
        (
            "no size",
            {"min_aesthetic": None, "min_width": None, "min_height": None, "min_aspect_ratio": None},
            r"filter\.max_aspect_ratio needs a column WIDTH",
        ),
        ("no safety", {"min_aesthetic": None}, r"filter\.nsfw needs a column NSFW or punsafe"),
    ],
)
def test_a_rule_without_its_column_is_an_error_that_names_the_columns(tmp_path, family, changes, message):
    families = {
        **FAMILIES,
        "no size": {name: spec for name, spec in JOINED.items() if name not in ("WIDTH", "HEIGHT")},
        "no safety": {name: spec for name, spec in JOINED.items() if name != "punsafe"},
    }
    table = laion_table(tmp_path, families[family], [GOOD])
    with pytest.raises(DataError, match=message):
        rules_for(replace(PUBLISHED, **changes), table.columns, table.source)


def test_the_first_rule_that_rejects_counts_and_the_funnel_adds_up(tmp_path):
    rows = [{}, {"score": 1.0, "width": 1}, {"width": 1}, {"width": 2000}, {"pwatermark": 0.9, "punsafe": 0.9}, {}]
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for index in range(3):
        laion_table(tmp_path, FAMILIES["aesthetics-v2"], [{**GOOD, **row} for row in rows[: 2 * index + 2]])
        (tmp_path / "in.parquet").rename(source / f"{index}.parquet")
    stages = [
        MetadataStage(str(source), {}, out / "01-metadata"),
        FilterStage(PUBLISHED, out / "01-metadata", out / "02-filter"),
    ]
    Runner(output=out, executor=InlineExecutor()).run(stages)
    page = json.loads((out / "02-filter" / "funnel.json").read_text())
    assert page["rows_in"] == 2 + 4 + 6
    assert {row["rule"]: row["rejected"] for row in page["rules"]} == {
        **dict.fromkeys(("url", "similarity", "caption", "nsfw"), 0),
        "aesthetic": 3,
        "size": 2,
        "aspect_ratio": 2,
        "pwatermark": 1,
    }
    assert page["rows_out"] == 4 == page["rules"][-1]["left"]
    assert [row["left"] for row in page["rules"]] == [12, 9, 9, 7, 5, 5, 4, 4]
    files = sorted((out / "02-filter").glob("0*.parquet"))
    assert [pq.read_metadata(path).num_rows for path in files] == [1, 1, 2]


def test_funnels_of_different_schemas_add_up_under_one_name():
    one = Funnel.empty([("size", ">= 1"), ("nsfw", "in {UNLIKELY}")]).add(10, {"size": 2, "nsfw": 3})
    two = Funnel.empty([("size", ">= 1"), ("nsfw", "punsafe < 0.2")]).add(5, {"size": 1, "nsfw": 0})
    total = Funnel.total([one, two])
    assert total == Funnel.from_json(total.to_json()) and total.rows_out == 9
    assert [(rule.setting, rule.rejected) for rule in total.rules] == [
        (">= 1", 3),
        ("in {UNLIKELY} | punsafe < 0.2", 3),
    ]
    assert total.table().row_count == 3


def test_an_empty_filtered_file_keeps_its_columns(tmp_path):
    table = laion_table(tmp_path, FAMILIES["aesthetics-v2"], [{**GOOD, "score": 1.0}])
    (batch,) = table.batches()
    passed, _ = apply_rules(batch, rules_for(PUBLISHED, table.columns, table.source))
    assert passed.num_rows == 0 and passed.schema == batch.schema


def stages_over(tmp_path: Path, files: list[list[dict[str, Any]]], settings: FilterSettings):
    """The stages up to the filter over some files of the V2 schema."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for index, rows in enumerate(files):
        numbered = [{**GOOD, "url": f"http://a/{index}/{row}", **changes} for row, changes in enumerate(rows)]
        laion_table(tmp_path, FAMILIES["aesthetics-v2"], numbered)
        (tmp_path / "in.parquet").rename(source / f"{index}.parquet")
    return [
        MetadataStage(str(source), {}, out / "01-metadata"),
        *filter_stages(settings, out / "01-metadata", out / "02-filter"),
    ]


def passed_urls(out: Path) -> list[str]:
    files = sorted((out / "02-filter").glob("0000?.parquet"))
    return [url for path in files for url in pq.read_table(path)["url"].to_pylist()]


def test_percentiles_are_exact_over_all_files_however_the_rows_are_spread(tmp_path):
    scores = np.random.default_rng(0).normal(6, 1, 400).astype(np.float32)
    rows: list[dict[str, Any]] = [{"score": float(score)} for score in scores]
    rows += [{"score": None}, {"score": -math.inf}]
    settings = replace(PUBLISHED, min_aesthetic=None, percentiles={"aesthetic": 70.0, "pwatermark": 100.0})
    expected = np.sort(scores)[280]  # 70 % of 400 values lie below it
    for name, files in {"one": [rows], "three": [rows[300:], rows[:10], rows[10:300]]}.items():
        (tmp_path / name).mkdir()
        stages = stages_over(tmp_path / name, files, settings)
        Runner(output=tmp_path / name / "out", executor=InlineExecutor()).run(stages, ["metadata", "filter"])
        page = json.loads((tmp_path / name / "out/02-filter/funnel.json").read_text())
        lines = {row["rule"]: row for row in page["rules"]}
        assert lines["aesthetic_percentile"]["setting"] == f">= percentile 70 = {expected:g}"
        assert lines["aesthetic_percentile"]["rejected"] == 282 and lines["pwatermark_percentile"]["rejected"] == 0
        assert page["rows_out"] == len(passed_urls(tmp_path / name / "out")) == (scores >= expected).sum() == 120
    assert [stage.name for stage in stages] == ["metadata", "filter-percentiles", "filter"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("percent", [0, 12.5, 50, 99.9, 100])
def test_the_value_at_a_percentile_is_that_of_a_sort(dtype, percent):
    values = np.random.default_rng(1).normal(0, 1, 1000).astype(dtype)
    values[:200] = values[0]  # ties
    values[200:205] = 0
    parts = [np.sort(part) for part in np.split(values, [0, 1, 300, 310])]
    expected = np.sort(values)[min(int(1000 * percent / 100), 999)]
    assert value_at_percentile(parts, percent, "score") == float(expected)


def test_percentiles_without_a_column_or_a_value_are_errors(tmp_path):
    settings = replace(PUBLISHED, min_aesthetic=None, percentiles={"aesthetic": 50.0})
    (tmp_path / "none").mkdir()
    stages = stages_over(tmp_path / "none", [[{"score": None}]], settings)
    with pytest.raises(DataError, match=r"filter\.percentiles: no row has a value of aesthetic_v2; switch this perc"):
        Runner(output=tmp_path / "none/out", executor=InlineExecutor()).run(stages)
    stages = stages_over(tmp_path, [[{}]], replace(settings, aesthetic_scale="v1", percentiles={"similarity": 1.0}))
    path = tmp_path / "source/0.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["similarity"]), path)
    with pytest.raises(
        DataError, match=r"0\.parquet: filter\.percentiles needs a column similarity; columns present: "
    ):
        Runner(output=tmp_path / "out", executor=InlineExecutor()).run(stages)
    table = laion_table(tmp_path, FAMILIES["relaion"], [GOOD])
    with pytest.raises(DataError, match=r"filter\.percentiles\.similarity needs a column similarity"):
        rules_for(replace(settings, percentiles={"similarity": 1.0}, min_similarity=None), table.columns, table.source)


def test_rejected_rows_are_kept_with_their_reason_where_that_is_wanted(tmp_path):
    rows = [{}, {"score": 1.0, "width": 1}, {"width": 1}, {"pwatermark": None}, {"url": None}]
    stages = stages_over(tmp_path, [rows], replace(PUBLISHED, keep_rejected=True))
    Runner(output=tmp_path / "out", executor=InlineExecutor()).run(stages)
    rejected = pq.read_table(tmp_path / "out/02-filter/00000.rejected.parquet")
    assert rejected["rejected_by"].to_pylist() == ["aesthetic", "size", "pwatermark", "url"]
    assert rejected["url"].to_pylist() == ["http://a/0/1", "http://a/0/2", "http://a/0/3", None]
    kept = pq.read_table(tmp_path / "out/02-filter/00000.parquet")
    assert kept["url"].to_pylist() == ["http://a/0/0"] and "rejected_by" not in kept.column_names


def test_many_small_batches_become_few_row_groups(tmp_path):
    table = pa.table({"url": ["u"] * 10, "caption": ["c"] * 10})
    with TableWriter(tmp_path / "t.parquet", row_group=40) as writer:
        for _ in range(10):
            writer.add(table.to_batches()[0])
    groups = pq.read_metadata(tmp_path / "t.parquet")
    assert [groups.row_group(index).num_rows for index in range(groups.num_row_groups)] == [40, 40, 20]


@pytest.mark.parametrize("fewest", [0, 20_000])
@pytest.mark.parametrize("column", ["URL", "TEXT"])
def test_text_that_is_no_utf8_is_an_error_whichever_library_reads_it(tmp_path, monkeypatch, column, fewest):
    """A parquet file may call any bytes a string."""
    monkeypatch.setattr(laion, "_FEWEST_ROWS", fewest)
    stages = stages_over(tmp_path, [[{}, {"score": 1.0}]], PUBLISHED)
    path = tmp_path / "source/0.parquet"
    table = pq.read_table(path)
    values = pa.array([table[column][0].as_py().encode(), b"a caption of enough characters \xff"], pa.binary())
    wrong = pa.BinaryArray.from_buffers(pa.string(), 2, values.buffers())
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, wrong), path)
    with pytest.raises(DataError, match=rf"0\.parquet: column {column} does not hold text: .*UTF8"):
        Runner(output=tmp_path / "out", executor=InlineExecutor()).run(stages)


@pytest.mark.parametrize("family", [*FAMILIES, "text"])
def test_both_ways_of_reading_give_the_same_rows(tmp_path, monkeypatch, family):
    rows = [
        {},
        {"caption": None},
        {"url": None, "nsfw": None},
        {"url": "", "caption": "é ü"},
        {"width": None},
        {"score": math.nan},
    ]
    families = {**FAMILIES, "text": {name: SHARED[name] for name in ("URL", "TEXT")}}
    table = laion_table(tmp_path, families[family], [{**GOOD, **row} for row in rows])
    expected = pa.Table.from_batches(list(table.batches()))
    everything = np.arange(len(rows))
    for fewest in (0, 20_000):
        monkeypatch.setattr(laion, "_FEWEST_ROWS", fewest)
        (found,) = table.chunks()
        assert pa.Table.from_batches([found.take(everything)]) == expected
        some = expected.schema.names[1:3]
        assert found.take(everything[1:3], some).to_pylist() == expected.select(some).slice(1, 2).to_pylist()
        assert found.has_text("url").tolist() == [True, True, False, False, True, True]
