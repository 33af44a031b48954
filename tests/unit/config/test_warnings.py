"""Settings without effect are named, and good pages are silent."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdtrain.config.base import Section
from sdtrain.config.load import load_config
from sdtrain.config.warnings import warnings

CONFIGS = Path(__file__).parents[3] / "configs/sd15"


@pytest.mark.parametrize(
    ("page", "overrides", "line"),
    [
        (
            "train",
            ["optimizer.warmup_steps=0"],
            "optimizer.warmup_start_lr has no effect: optimizer.warmup_steps is 0",
        ),
        (
            "train",
            ["optimizer.lr_schedule=constant"],
            "optimizer.final_lr_fraction has no effect: optimizer.lr_schedule is constant",
        ),
        (
            "train",
            ["optimizer.weight_decay=0", "optimizer.weight_decay_on=matrices"],
            "optimizer.weight_decay_on has no effect: optimizer.weight_decay is 0",
        ),
        (
            "tiny/train",
            ["samples.every_steps=100"],
            "samples.every_steps = 100 is beyond trainer.max_steps = 4: only the end counts",
        ),
        (
            "tiny/train",
            ["validation.every_steps=5"],
            "validation.every_steps = 5 is beyond trainer.max_steps = 4: only the end counts",
        ),
        (
            "tiny/train",
            ["data.cache_dir=/scratch"],
            "data.cache_dir has no effect: data.manifest is a file on this machine",
        ),
        (
            "train",
            ["task.timesteps={logit_mean: 0.5}"],
            "task.timesteps.logit_mean has no effect: task.timesteps.distribution is uniform",
        ),
        (
            "train",
            ["task.timesteps={distribution: uniform, logit_std: 1.0}"],
            "task.timesteps.logit_std has no effect: task.timesteps.distribution is uniform",
        ),
        (
            "train",
            ["health={spike_ratio: null, spike_deviations: 9.0}"],
            "health.spike_deviations has no effect: health.spike_ratio is null",
        ),
        ("sample", ["sampler=ddpm", "eta=0.5"], "eta has no effect: sampler is ddpm"),
        ("sample", ["sampler=euler", "eta=0.0"], "eta has no effect: sampler is euler"),
        (
            "train",
            ["checkpoint.best_by=validation/accuracy"],
            "checkpoint.best_by has no effect: checkpoint.keep_best is null",
        ),
        ("train", ["checkpoint.best_is=highest"], "checkpoint.best_is has no effect: checkpoint.keep_best is null"),
        (
            "train",
            ["checkpoint.upload_keep=same"],
            "checkpoint.upload_keep has no effect: checkpoint.upload_to is null",
        ),
        (
            "train",
            ["trainer.compile=false", "trainer.compile_mode=reduce-overhead"],
            "trainer.compile_mode has no effect: trainer.compile is false",
        ),
        ("tiny/train", ["data.prefetch=2"], "data.prefetch has no effect: data.num_workers is 0"),
        (
            "train",
            ["task.condition_dropout=0"],
            "samples.guidance_scale = 7.5 means nothing: with task.condition_dropout = 0 the network never learns the "
            "empty condition",
        ),
        (
            "autoencoder",
            ["trainer.precision=bf16"],
            "trainer.precision = bf16 has no effect: autoencoders are trained in fp32",
        ),
        (
            "train",
            ["trainer.precision=fp16"],
            "trainer.precision = fp16 is for GPUs without bf16 (V100, T4): its range is small, and steps that overflow "
            "are thrown away until the loss scale fits; anywhere else bf16 is as fast and needs no scale",
        ),
        (
            "train",
            ["trainer.precision=fp32", "trainer.reduce_precision=working"],
            "trainer.reduce_precision = working has no effect: trainer.precision is fp32, so gradients are fp32",
        ),
        (
            "autoencoder",
            ["trainer.reduce_precision=working"],
            "trainer.reduce_precision = working has no effect: task.type is autoencoding, so gradients are fp32",
        ),
        ("autoencoder", ["conditioner={type: none}"], "conditioner has no effect: task.type is autoencoding"),
        (
            "data",
            ["download.contact=null"],
            "download.contact is empty: nothing is downloaded before it names an e-mail or URL for site owners",
        ),
        (
            "data",
            ["download.contact=me", "filter.min_aesthetic=null"],
            "filter.aesthetic_scale has no effect: filter.min_aesthetic is null",
        ),
        (
            "data",
            ["download.contact=me", "content_dedup={by: bytes, radius: 2}"],
            "content_dedup.radius has no effect: content_dedup.by is bytes",
        ),
        (
            "data",
            ["download.contact=me", "download.allow_loopback=true"],
            "download.allow_loopback is true: URLs of this machine are fetched; for tests and the demo only",
        ),
        ("tiny/data", ["dedup.by=url_text"], "dedup has no effect: source.type is digits"),
        ("tiny/data", ["filter.min_width=64"], "filter has no effect: source.type is digits"),
        ("sample", ["sampler=ddpm"], "eta has no effect: sampler is ddpm"),
    ],
)
def test_one_warning(page: str, overrides: list[str], line: str) -> None:
    assert warnings(load_config(CONFIGS / f"{page}.yaml", overrides)) == [line]


def test_cosine_betas() -> None:
    config = load_config(CONFIGS / "train.yaml", ["process.beta_schedule=cosine"])
    assert warnings(config) == [
        f"process.{key} has no effect: process.beta_schedule is cosine" for key in ("beta_start", "beta_end")
    ]


def test_a_flow_has_no_betas() -> None:
    process = "process={prediction_type: flow, beta_start: 0.001, beta_end: 0.02}"
    assert warnings(load_config(CONFIGS / "train.yaml", [process])) == [
        f"process.{key} has no effect: process.prediction_type is flow" for key in ("beta_start", "beta_end")
    ]
    shaped = "task.timesteps={distribution: logit_normal, logit_mean: 0.0, logit_std: 1.0}"
    assert warnings(load_config(CONFIGS / "train.yaml", ["process={prediction_type: flow}", shaped])) == []


def test_unconditional() -> None:
    config = load_config(CONFIGS / "train.yaml", ["conditioner={type: none}"])
    assert warnings(config) == [
        "task.condition_dropout has no effect: conditioner.type is none",
        "samples.prompts and samples.guidance_scale have no effect: conditioner.type is none",
    ]


@pytest.mark.parametrize(
    "page", ["train", "train_2x32gb", "autoencoder", "sample", "tiny/train", "tiny/data", "tiny/sample"]
)
def test_good_pages_are_silent(page: str) -> None:
    assert warnings(load_config(CONFIGS / f"{page}.yaml")) == []


def test_other_sections_have_no_warnings() -> None:
    assert warnings(Section()) == []
