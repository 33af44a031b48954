"""Own work is told apart from waiting, and one slow rank from noise."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from sdtrain import distributed
from sdtrain.training.stragglers import Stragglers, WorkClock


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pass_through(work: WorkClock, clock: Clock, *phases: tuple[str, float]) -> None:
    for phase, seconds in phases:
        work.beat(phase)
        clock.now += seconds


def test_reading_and_the_forward_are_own_work() -> None:
    clock = Clock()
    work = WorkClock(on_device=False, clock=clock)
    for _ in range(2):
        pass_through(work, clock, ("data", 1.0), ("forward", 2.0), ("backward", 8.0), ("step", 16.0), ("agree", 32.0))
    work.beat("report")
    assert work.take() == 6.0
    pass_through(work, clock, ("validation", 64.0), ("data", 0.5))
    work.beat("report")
    assert (work.take(), work.take()) == (0.5, 0.0)


@pytest.mark.gpu
def test_on_a_gpu_the_forward_counts_by_the_device_s_time() -> None:
    """Kernels are queued in microseconds and run for long."""
    big = torch.randn(8192, 8192, device="cuda")
    big @ big
    torch.cuda.synchronize()
    work = WorkClock(on_device=True)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):
        work.beat("data")
        work.beat("forward")
        start.record()
        for _ in range(20):
            big @ big
        end.record()
        work.beat("backward")
        for _ in range(40):
            big @ big
    work.beat("report")
    took = work.take()
    one = start.elapsed_time(end) / 1000
    assert 2 * one < took < 4.5 * one
    assert work.take() < one / 2


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What all ranks report next."""
    values: list[float] = []
    monkeypatch.setattr(distributed, "gather_values", lambda value: list(values))
    return values


def compare(gathered: list[float], ranks: Stragglers, *seconds: float) -> dict[str, float]:
    gathered[:] = seconds
    return ranks.figures(10.0)


def stragglers(num: int, **settings: Any) -> Stragglers:
    return Stragglers(WorkClock(on_device=False), [f"node{rank // 2}" for rank in range(num)], **settings)


def test_figures_name_the_slowest(gathered: list[float]) -> None:
    figures = compare(gathered, stragglers(4), 2.0, 2.0, 5.0, 2.5)
    assert figures == {"train/slowest_rank": 2.0, "train/step_seconds_max_over_median": 2.5}
    assert compare(gathered, stragglers(2), 3.0, 1.0)["train/step_seconds_max_over_median"] == 3.0
    assert compare(gathered, stragglers(2), 0.0, 0.0)["train/step_seconds_max_over_median"] == 1.0


def test_one_rank_is_compared_with_nobody() -> None:
    assert stragglers(1).figures(10.0) == {}


def test_a_rank_that_stays_slow_is_named_with_its_host(gathered: list[float], caplog: pytest.LogCaptureFixture) -> None:
    ranks = stragglers(4)
    for _ in range(2):
        compare(gathered, ranks, 2.0, 2.0, 2.0, 4.2)
    assert caplog.text == ""
    compare(gathered, ranks, 2.0, 2.0, 2.0, 4.2)
    assert "rank 3 on node1 needs 2.1 times the median time for its own part of a step" in caplog.text
    assert "for 3 reports in a row" in caplog.text
    for _ in range(3):
        compare(gathered, ranks, 2.0, 2.0, 2.0, 4.2)
    assert len(caplog.records) == 2 and "for 6 reports" in caplog.text, "a reminder, not a line per report"


@pytest.mark.parametrize(
    "noise",
    [
        [(2.0, 2.0, 2.0, 4.0), (2.0, 2.0, 4.0, 2.0)],  # now this one, now that one
        [(2.0, 2.0, 2.0, 4.0), (2.0, 2.0, 2.0, 4.0), (2.0, 2.0, 2.0, 2.0)],  # with breaks
        [(2.0, 2.0, 2.0, 2.9)],  # not by much
        [(0.02, 0.02, 0.02, 0.9)],  # costs less than a tenth of the step
    ],
)
def test_noise_is_no_straggler(
    gathered: list[float], caplog: pytest.LogCaptureFixture, noise: list[tuple[float, ...]]
) -> None:
    ranks = stragglers(4)
    for _ in range(6):
        for seconds in noise:
            compare(gathered, ranks, *seconds)
    assert caplog.text == ""


def test_only_rank_0_warns(
    gathered: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    ranks = stragglers(2, in_a_row=1)
    with caplog.at_level(logging.WARNING):
        assert compare(gathered, ranks, 1.0, 9.0)["train/slowest_rank"] == 1.0
    assert caplog.text == ""
