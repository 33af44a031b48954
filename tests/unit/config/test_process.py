"""Noise levels and timesteps on a page: what is refused, and what the page's numbers become."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sdtrain import build
from sdtrain.config.load import load_training
from sdtrain.config.run import TrainingConfig
from sdtrain.config.task import LatentDiffusionTask
from sdtrain.errors import ConfigError

TRAIN = Path(__file__).parents[3] / "configs/sd15/tiny/train.yaml"
FLOW = ["process={prediction_type: flow, shift: 3.0}"]
V = ["process.prediction_type=v_prediction"]
TASK = "task.timesteps.phases"


def page(*overrides: str) -> TrainingConfig:
    return load_training(TRAIN, overrides)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["process={prediction_type: epsilon}"],
            "process.beta_schedule (command line): is missing; process.prediction_type = epsilon needs one of linear, "
            "scaled_linear, cosine",
        ),
        (
            ["process={prediction_type: flow, beta_schedule: linear}"],
            'process.beta_schedule = "linear" (command line): must be left out: process.prediction_type = flow has no '
            "betas",
        ),
        (
            ["process.shift=3.0"],
            "process.shift = 3.0 (command line): is for process.prediction_type = flow, which is epsilon here; leave",
        ),
        (
            ["process.zero_terminal_snr=true"],
            "process.zero_terminal_snr = true (command line): needs process.prediction_type = v_prediction or sample; "
            "epsilon cannot tell an image from pure noise",
        ),
        (
            ["process={prediction_type: flow, zero_terminal_snr: true}"],
            "needs process.prediction_type = v_prediction or sample; flow ends in pure noise anyway",
        ),
        (["process.noise_offset=-0.1"], "process.noise_offset = -0.1 (command line): must be >= 0"),
        (["process.shift=0"], "process.shift = 0 (command line): must be > 0"),
        ([f"{TASK}=[{{until: 0.5}}]"], "must end at ascending shares of the run, the last at 1.0; [0.5]"),
        ([f"{TASK}=[{{until: 0.5}}, {{until: 0.5}}, {{}}]"], "the last at 1.0; [0.5, 0.5, 1.0]"),
        ([f"{TASK}=[{{edges: [0.5, 0.2], weights: [1.0, 1.0, 1.0]}}]"], "task.timesteps.phases.0.edges"),
        ([f"{TASK}=[{{edges: [0.5], weights: [1.0]}}]"], "must be one more than edges, 2 in all"),
        ([f"{TASK}=[{{weights: [0.0]}}]"], "must hold a number above 0"),
        ([f"{TASK}=[{{edges: [1.0], weights: [1.0, 1.0]}}]"], "must be < 1"),
        (["task.loss_bins=101"], "task.loss_bins = 101 (command line): must be <= 100"),
    ],
)
def test_refusals(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)):
        page(*overrides)


def test_a_page_that_says_nothing_gets_the_plain_process() -> None:
    config = page()
    assert isinstance(config.task, LatentDiffusionTask) and config.process is not None
    process = build.build_process(config.process)
    assert (process.zero_terminal_snr, process.ends_in_noise, config.process.noise_offset) == (False, False, 0.0)
    sampling = build.build_timesteps(config.task.timesteps, batch_size=8, total_steps=100)
    assert (sampling.distribution, sampling.strata, sampling.phases) == ("uniform", None, ())


def test_zero_terminal_snr_and_flow_reach_the_process() -> None:
    rescaled = page("process.zero_terminal_snr=true", *V).process
    flow = page(*FLOW).process
    assert rescaled is not None and flow is not None
    assert build.build_process(rescaled).ends_in_noise
    assert (build.build_process(flow).prediction_type, build.build_process(flow).shift) == ("flow", 3.0)


def test_timesteps_reach_the_sampling_with_phases_as_steps() -> None:
    config = page(
        "task.timesteps={distribution: logit_normal, logit_mean: 0.5, logit_std: 0.8, quasi_random: true, phases: "
        "[{until: 0.333, edges: [0.5], weights: [1.0, 2.5]}, {until: 0.667}, {edges: [0.25], weights: [2.0, 0.0]}]}"
    )
    assert isinstance(config.task, LatentDiffusionTask)
    sampling = build.build_timesteps(config.task.timesteps, batch_size=8, total_steps=300)
    assert (sampling.distribution, sampling.logit_mean, sampling.logit_std) == ("logit_normal", 0.5, 0.8)
    assert sampling.strata == 8
    assert [phase.until_step for phase in sampling.phases] == [100, 200, None]
    assert [phase.weights for phase in sampling.phases] == [(1.0, 2.5), (1.0,), (2.0, 0.0)]
    short = build.build_timesteps(config.task.timesteps, batch_size=8, total_steps=2)
    assert [phase.until_step for phase in short.phases] == [1, 1, None], "a phase may have no step of its own"


@pytest.mark.parametrize(
    "override", ["process.noise_offset=0.1", "task.timesteps.quasi_random=true", "task.timesteps.logit_std=2.0"]
)
def test_a_resumed_run_may_not_change_its_draws(override: str) -> None:
    from sdtrain.config.load import refuse_on_resume

    with pytest.raises(ConfigError, match=override.split("=")[0]):
        refuse_on_resume(page(), page(override))
    refuse_on_resume(page(), page("task.loss_bins=4"))
