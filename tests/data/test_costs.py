"""Bytes and hours of a forecast: as a real run writes them, and as the settings say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build import stages_for
from data_pipeline.cluster import InlineExecutor
from data_pipeline.costs import Cost, Rows, StageCost, costs_of
from data_pipeline.plan_pictures import Pictures
from data_pipeline.planner import Forecast, forecast, plan_stages, tables_of
from data_pipeline.runner import Runner
from sdtrain.config.ingestion import IngestionConfig
from sdtrain.data.shard import ShardReader
from sdtrain.errors import ConfigError
from tests.data.test_adopt import OPEN, _unlimited, picture, sample, write_tar
from tests.support import write_tiny_autoencoder

__all__ = ["_unlimited"]

SIZES = ((96, 96), (128, 80), (80, 128), (150, 90), (40, 300))  # the last one is too small for any bucket
FOLDERS = {
    "adopt": "04-download",
    "select": "04-select",
    "buckets": "04-buckets",
    "tokens": "06-tokens",
    "encode": "07-encode",
    "captions": "07-captions",
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of others, an autoencoder, and other captions."""
    folder = tmp_path_factory.mktemp("given")
    samples = []
    for number in range(300):
        size = SIZES[number % 5]
        samples.append(sample(number, caption=f"a caption of some length, number {number}") | {"jpg": picture(7, size)})
        samples[-1]["jpg"] += number.to_bytes(2, "big")  # pictures of their own, of one size
    for index in range(3):
        write_tar(folder / f"shards/{index:05d}.tar", samples[100 * index : 100 * index + 100])
    write_tiny_autoencoder(folder / "autoencoder")
    (folder / "captions.jsonl").write_text(json.dumps({"url": "http://host/1.jpg", "caption": "another"}) + "\n")
    return folder


def page(given: Path, out: Path, **sections: Any) -> IngestionConfig:
    values: dict[str, Any] = {
        "schema_version": 1,
        "kind": "ingestion",
        "output": str(out),
        "source": {"type": "shards", "shards": str(given / "shards")},
        "filter": OPEN.model_dump(),
        "validation": {"num_samples": 60},
        "download": {"image_size": 64, "samples_per_shard": 100},
        "encode": {"autoencoder": str(given / "autoencoder"), "batch_size": 8, "check_samples": 0},
        "plan": {"encode_images_per_second": 10, "images_per_core_second": 20},
        "runner": {"workers": 4},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return IngestionConfig.model_validate(values, strict=False)


def plan(config: IngestionConfig) -> Forecast:
    Runner(output=config.output, executor=InlineExecutor()).run(plan_stages(config))
    return forecast(config)


def by_stage(found: Forecast | Cost) -> dict[str, StageCost]:
    return {cost.stage: cost for cost in (found.costs if isinstance(found, Forecast) else found.stages)}


def bytes_per_pixel(folder: Path) -> float:
    """Of the stored pictures of a run."""
    size = pixels = 0
    for path in sorted(folder.glob("*.tar")):
        with ShardReader(path) as shard:
            for row in range(len(shard)):
                facts = shard.decode(row, "json")
                size += len(shard.read(row, "jpg"))
                pixels += facts["width"] * facts["height"]
    return size / pixels


@pytest.mark.parametrize("resize_mode", ["center_crop", "buckets"])
def test_a_forecast_of_shards_is_what_the_run_then_writes(given: Path, tmp_path: Path, resize_mode: str) -> None:
    extras = {"content_dedup": {"by": "bytes"}, "captions": {"table": str(given / "captions.jsonl"), "by": "url"}}
    download: dict[str, Any] = {"resize_mode": resize_mode}
    if resize_mode == "buckets":
        download["bucket_shapes"] = [[48, 80], [64, 64], [80, 48]]
    encode = {"flips": True}
    config = page(given, tmp_path, download=download, encode=encode, **extras)
    first = plan(config)
    assert first.rows_in == first.sampled == 300 and first.funnel[-1].left == 300
    assert "20.0 % of the pictures are too small (download.only_if_bigger)" in first.assumptions
    Runner(output=tmp_path, executor=InlineExecutor(), max_attempts=1).run(stages_for(config))
    summary = json.loads((tmp_path / "04-download/summary.json").read_text())
    assert first.images == summary["stored"] == 240
    known = {"stored_bytes_per_pixel": bytes_per_pixel(tmp_path / "04-download")}
    costs = by_stage(plan(page(given, tmp_path, download=download, encode=encode, plan=known, **extras)))
    assert set(costs) >= set(FOLDERS) - ({"buckets"} if resize_mode == "center_crop" else set())
    for stage, folder in FOLDERS.items():
        if stage in costs:
            files = [path for path in (tmp_path / folder).glob("0*.*") if not path.name.endswith(".stats.json")]
            assert costs[stage].writes == pytest.approx(sum(path.stat().st_size for path in files), rel=0.04), stage
    assert costs["metadata"].reads == costs["adopt"].reads == 0, "nothing is fetched"
    assert costs["encode"].hours == pytest.approx((240 + 192) / 10 / 3600)  # 240 * 60 / 300 of them are held out
    assert costs["adopt"].hours == pytest.approx(300 / 80 / 3600)
    assert (costs["content-dedup"].hours, costs["content-dedup"].note) == (None, "not forecast")


def test_flips_and_sizes_change_bytes_and_hours(given: Path, tmp_path: Path) -> None:
    plain = by_stage(plan(page(given, tmp_path)))["encode"]
    flipped = by_stage(plan(page(given, tmp_path, encode={"flips": True}, validation={"num_samples": 0})))["encode"]
    assert plain.hours is not None and flipped.hours == pytest.approx(2 * plain.hours)
    moments = 2 * 4 * (64 // 2) ** 2 * 2
    assert flipped.writes - plain.writes == pytest.approx(240 * moments, rel=0.08)
    estimated = {"encode_images_per_second": None}
    square = by_stage(plan(page(given, tmp_path, plan=estimated)))["encode"]
    tall = {"resize_mode": "buckets", "bucket_shapes": [[64, 128]], "only_if_bigger": False}
    long = by_stage(plan(page(given, tmp_path, plan=estimated, download=tall)))["encode"]
    assert square.hours is not None and long.hours == pytest.approx(2 * square.hours * 300 / 240)


def test_scores_are_in_the_forecast_with_hours_where_their_speed_is_known(given: Path, tmp_path: Path) -> None:
    scores = {"weights": str(given / "none.safetensors")}
    found = plan(page(given, tmp_path, scores=scores))
    score = by_stage(found)["score"]
    assert (score.hours, score.note) == (None, "not forecast") and score.writes > 0
    assert "hours of the scores are not forecast: give plan.score_images_per_second" in found.assumptions
    _, table = tables_of(found)
    assert "not forecast" in list(table.columns[3].cells)
    known = by_stage(plan(page(given, tmp_path, scores=scores, plan={"score_images_per_second": 5, "num_gpus": 2})))
    assert known["score"].hours == pytest.approx(240 / 10 / 3600) and known["score"].note == ""


def test_shards_elsewhere_are_not_copied_for_a_forecast(given: Path, tmp_path: Path) -> None:
    config = page(given, tmp_path, source={"shards": "memory://bucket/shards"})
    with pytest.raises(ConfigError, match=r"memory://bucket/shards: plan looks into the shards, which would copy all "):
        plan_stages(config)
    (tmp_path / "01-metadata").mkdir()
    (tmp_path / "01-metadata/ledger.jsonl").touch()
    assert [stage.name for stage in plan_stages(config)] == ["metadata", "plan-sample"]
    cost = costs_of(config, MILLION, 10**6, SQUARE, tar_bytes=9 * 10**9)
    metadata = by_stage(cost)["metadata"]
    assert (metadata.reads, metadata.writes) == (9 * 10**9, 9 * 10**9 + 10**6)
    assert metadata.hours == pytest.approx(72 / 3600)


MILLION = Rows(tables=2_000_000, passed=1_500_000, kept=1_000_000)
SQUARE = Pictures(found_pixels=1e6, stored_pixels=512**2, large_enough=1.0, text_bytes=2048)
UNKNOWN = Pictures(found_pixels=None, stored_pixels=512**2, large_enough=1.0, text_bytes=2048)


def laion(tmp_path: Path, **sections: Any) -> IngestionConfig:
    values = {
        "schema_version": 1,
        "kind": "ingestion",
        "output": str(tmp_path),
        "source": {"type": "laion", "metadata": str(tmp_path)},
        "download": {"processes": 10},
    }
    return IngestionConfig.model_validate({**values, **sections}, strict=False)


def test_costs_follow_from_rows_sizes_and_assumptions(tmp_path: Path) -> None:
    config = laion(tmp_path, plan={"link_success": 0.5}, encode={"autoencoder": "org/name"})
    cost = costs_of(config, MILLION, 400_000_000, SQUARE)
    stages = by_stage(cost)
    assert cost.images == 500_000 and list(stages) == ["metadata", "filter", "dedup", "download", "tokens", "encode"]
    assert stages["filter"].writes == 1_500_000 * 200 and stages["metadata"].reads == 0
    assert stages["download"].reads == 500_000 * 200_000
    assert stages["download"].writes == pytest.approx(500_000 * (35_000 + 2048 + 768 + 105), rel=0.01)
    assert stages["download"].hours == pytest.approx(1_000_000 / 600 / 3600), "the processes are the limit"
    assert stages["encode"].writes == pytest.approx(500_000 * (65_536 + 1024 + 2048 + 1024 + 128), rel=0.01)
    assert stages["encode"].hours == pytest.approx(500_000 * 1.1167e12 / (0.3 * 156e12) / 3600)
    assert stages["tokens"].writes == pytest.approx(500_000 * (1024 + 59), rel=0.02)
    assert "the limit of the download is the processes" in cost.assumptions
    assert any("0.262 megapixels (download.resize_mode center_crop) with 0.1335" in line for line in cost.assumptions)


def test_slow_lines_many_gpus_and_measured_speeds_change_the_hours(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "encode": {"autoencoder": str(tmp_path), "precision": "bf16"},
        "download": {"processes": 100},
    }
    (tmp_path / "config.json").write_text(json.dumps({"latent_channels": 16, "block_out_channels": [32, 64]}))
    settings = {"bandwidth_mbit": 100, "num_gpus": 4, "encode_images_per_second": 50, "link_success": 1}
    config = laion(tmp_path, plan=settings, source={"type": "laion", "metadata": "s3://bucket/x"}, **sections)
    cost = costs_of(config, MILLION, 400_000_000, UNKNOWN)
    stages = by_stage(cost)
    assert stages["download"].hours == pytest.approx(1_000_000 * 512**2 * 0.2 * 8 / 100e6 / 3600)
    assert stages["encode"].hours == pytest.approx(1_000_000 / 200 / 3600)
    assert stages["encode"].writes == pytest.approx(1_000_000 * 2 * 16 * 256**2 * 2, rel=0.01)
    assert stages["metadata"].reads == stages["metadata"].writes == 400_000_000
    assert stages["metadata"].hours == pytest.approx(400_000_000 * 8 / 100e6 / 3600)
    assert "the limit of the download is the bandwidth" in cost.assumptions
    curated = {"content_dedup": {}, "captions": {"table": "new.jsonl"}}
    cost = costs_of(laion(tmp_path, **curated, **sections), MILLION, 400_000_000, UNKNOWN)
    written = {stage.stage: stage.writes for stage in cost.stages}
    assert written["select"] == written["download"] and written["captions"] == written["encode"]
    assert any(line.startswith("content_dedup and scores reject no picture") for line in cost.assumptions)
    without = costs_of(laion(tmp_path), MILLION, 400_000_000, UNKNOWN)
    assert [stage.stage for stage in without.stages][-1] == "download"
    captioned = by_stage(costs_of(laion(tmp_path, captions=curated["captions"]), MILLION, 400_000_000, UNKNOWN))
    assert captioned["captions"].writes == captioned["download"].writes
