"""What differs between two pages, and what a resumed run may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdtrain.config.compare import Difference
from sdtrain.config.load import differences, load_training, refuse_on_resume
from sdtrain.config.run import TrainingConfig
from sdtrain.errors import ConfigError

TRAIN = Path(__file__).parents[3] / "configs/sd15/tiny/train.yaml"


def changed(*overrides: str) -> TrainingConfig:
    return load_training(TRAIN, overrides)


def test_equal_pages_do_not_differ() -> None:
    assert differences(changed(), changed()) == []
    refuse_on_resume(changed(), changed())


def test_differences_have_paths_and_both_values() -> None:
    found = differences(changed(), changed("seed=7", "ema=null", "denoiser.arch.channels=[32, 128]"))
    assert found == [
        Difference("seed", 42, 7),
        Difference("denoiser.arch.channels", [32, 64], [32, 128]),
        Difference("ema", {"decay": 0.99}, None),
    ]
    assert str(found[1]) == "denoiser.arch.channels: [32, 64] -> [32, 128]"


def test_other_kinds_of_a_section_differ_key_by_key() -> None:
    found = differences(changed(), changed("task.loss_weighting={type: min_snr}"))
    assert found == [
        Difference("task.loss_weighting.type", "none", "min_snr"),
        Difference("task.loss_weighting.gamma", None, 5.0),
    ]


@pytest.mark.parametrize(
    "override",
    [
        "trainer.max_steps=100",
        "trainer.log_every_steps=7",
        "trainer.compile=true",
        "trainer.compile_mode=reduce-overhead",
        "trainer.timeout_seconds=90",
        "trainer.hang_timeout_seconds=30",
        "trainer.max_hours=0.5",
        "data.num_workers=3",
        "data.prefetch=9",
        "data.micro_batch_size=4",
        "checkpoint.every_steps=17",
        "checkpoint.keep_every_steps=4",
        "validation=null",
        "validation.batch_size=1",
        "samples=null",
        "samples.prompts=[another]",
        "tracking.mode=offline",
        "run_dir=elsewhere",
        "name=other",
    ],
)
def test_allowed_on_resume(override: str) -> None:
    assert differences(changed(), changed(override)), "the override changes something"
    refuse_on_resume(changed(), changed(override))


def test_from_steps_to_epochs_is_allowed() -> None:
    refuse_on_resume(changed(), changed("trainer.max_steps=null", "trainer.max_epochs=2"))


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "task.condition_dropout=0.2",
        "data.manifest=other.json",
        "data.batch_size=16",
        "data.window_shards=3",
        "data.max_bad_fraction=0.5",
        "autoencoder.scaling_factor=2.0",
        "denoiser.arch.layers_per_block=2",
        "conditioner.trainable=false",
        "process.prediction_type=v_prediction",
        "optimizer.learning_rate=2e-3",
        "optimizer.warmup_steps=2",
        "trainer.precision=bf16",
        "trainer.gradient_checkpointing=blocks",
        "ema.decay=0.5",
        "ema=null",
    ],
)
def test_refused_on_resume(override: str) -> None:
    with pytest.raises(ConfigError, match="cannot resume") as caught:
        refuse_on_resume(changed(), changed(override))
    assert f"\n  {override.partition('=')[0]}: " in str(caught.value)


def test_refusal_names_everything_and_the_ways_out() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_on_resume(changed(), changed("seed=7", "data.num_workers=5", "optimizer.learning_rate=1"))
    assert str(caught.value) == (
        "this page cannot resume the run that stands in its folder (checkpoint -> page):\n"
        "  seed: 42 -> 7\n"
        "  optimizer.learning_rate: 0.001 -> 1.0\n"
        "Set these keys back, or start another run: run_dir=NEW_FOLDER. A resumed run may change name, run_dir, "
        "trainer.max_steps, trainer.max_epochs, trainer.log_every_steps, trainer.compile, "
        "trainer.compile_mode, trainer.timeout_seconds, trainer.hang_timeout_seconds, trainer.max_hours, "
        "data.num_workers, data.prefetch, data.read_retries, data.cache_dir, data.cache_gib, "
        "data.ram_cache_gib, data.micro_batch_size, task.loss_bins, trainer.oom_skip, health, "
        "checkpoint, validation, samples, tracking."
    )


def test_a_prefix_of_a_name_is_not_the_section() -> None:
    assert Difference("samples.seed", 0, 1).is_allowed_on_resume
    assert not Difference("samples_seen", 0, 1).is_allowed_on_resume
    assert not Difference("trainer.max_steps_more", 0, 1).is_allowed_on_resume
