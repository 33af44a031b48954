"""Which stages a page becomes, and where they write."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.build import executor_for, filter_settings, stages_for
from sdtrain.config.ingestion import FilterConfig, IngestionConfig, NsfwConfig

LAION = {"type": "laion", "metadata": "metadata"}
DIGITS = {"type": "digits", "num_images": 100}
ENCODE = {"autoencoder": "folder"}


def page(**changes) -> IngestionConfig:
    contact = {"contact": "someone@example.org"}
    values = {"schema_version": 1, "kind": "ingestion", "output": "out", "source": LAION, "download": contact}
    return IngestionConfig.model_validate({**values, **changes}, strict=False)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (
            {"encode": ENCODE},
            [
                *("01-metadata:metadata", "02-filter:filter", "03-dedup-split:dedup-split", "03-dedup-pick:dedup-pick"),
                *("03-dedup-keep:dedup-keep", "03-dedup:dedup", "04-download:download", "05-images:images"),
                *("06-tokens:tokens", "07-encode:encode", "08-manifest:manifest"),
            ],
        ),
        ({"source": DIGITS}, ["04-download:digits", "05-images:images", "08-manifest:manifest"]),
    ],
)
def test_a_page_becomes_its_stages(changes, names):
    assert [f"{stage.folder.name}:{stage.name}" for stage in stages_for(page(**changes))] == names


def test_each_stage_reads_what_the_one_before_wrote():
    by_name = {stage.name: stage for stage in stages_for(page(encode=ENCODE))}
    for name, source in {
        "filter": "metadata",
        "dedup-split": "filter",
        "download": "dedup",
        "tokens": "download",
    }.items():
        assert by_name[name].source == by_name[source].folder
    assert (
        by_name["encode"].images == by_name["download"].folder and by_name["encode"].tokens == by_name["tokens"].folder
    )
    assert by_name["images"].target == Path("out/images.json") and by_name["manifest"].target == Path(
        "out/manifest.json"
    )
    assert by_name["manifest"].source == by_name["encode"].folder
    without = {stage.name: stage for stage in stages_for(page())}
    assert without["manifest"].source == without["images"].source == without["download"].folder


def test_settings_reach_their_stages():
    changes = {"seed": 7, "validation": {"num_samples": 9}, "dedup": {"by": "url_text"}}
    by_name = {stage.name: stage for stage in stages_for(page(**changes))}
    assert by_name["dedup-split"].config_facts() == {"by": "url_text"}
    assert by_name["dedup-pick"].config_facts() == {"seed": 7, "num_validation": 9}
    assert by_name["dedup-keep"].num_validation == 9 and by_name["dedup"].samples_per_shard == 1000
    assert by_name["download"].memory_limit_bytes == page().runner.memory_per_worker_bytes
    transform = by_name["images"].config_facts()["fingerprint"]["transform"]
    assert transform == {"image_size": 512, "resize_mode": "center_crop", "jpeg_quality": 95}
    executor = executor_for(page(runner={"workers": 3, "address": "auto"}))
    assert (executor.workers, executor.address, executor.memory_per_worker_bytes) == (3, "auto", 4_000_000_000)


def test_every_filter_setting_arrives():
    values = {
        "min_aesthetic": 1.5,
        "aesthetic_scale": "v1",
        "min_similarity": 0.1,
        "min_width": 2,
        "min_height": 3,
        "min_aspect_ratio": 0.25,
        "max_aspect_ratio": 4.0,
        "min_caption_chars": 5,
        "max_caption_chars": 6,
        "max_pwatermark": 0.75,
    }
    nulls = {"aesthetic": "keep"}
    settings = filter_settings(FilterConfig(**values, nsfw=NsfwConfig(allow=("A",), max_punsafe=0.5), nulls=nulls))
    found = vars(settings)
    assert {key: found[key] for key in values} == values
    assert (settings.nsfw_allow, settings.max_punsafe, settings.nulls["aesthetic"]) == (("A",), 0.5, "keep")
