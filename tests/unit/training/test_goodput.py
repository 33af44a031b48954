"""What the time of a run went into, worked out by hand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from sdtrain.run_dir import RunDir, append_json_line
from sdtrain.training.goodput import Goodput, time_use, useful_seconds
from sdtrain.training.metrics import MetricsLog

START = 1_700_000_000.0


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def metrics(run: RunDir, at: float, **row: Any) -> None:
    append_json_line(run.metrics, {"time": START + at, **row})


def stretch(run: RunDir, at: float, attempt: str, step: int, seconds: float, useful: float) -> None:
    figures = {"train/seconds": seconds, "train/useful_seconds": useful}
    metrics(run, at, step=step, attempt=attempt, **figures)


def ledger(run: RunDir, at: float, event: str, **facts: Any) -> None:
    append_json_line(run.ledger, {"event": event, "time": START + at, **facts})


def test_useful_is_what_neither_waits_nor_is_skipped() -> None:
    assert useful_seconds(seconds=10.0, data_wait_seconds=2.0, steps=4, skipped=1) == 6.0
    assert useful_seconds(seconds=1.0, data_wait_seconds=1.1, steps=4, skipped=0) == 0.0
    assert useful_seconds(seconds=0.0, data_wait_seconds=0.0, steps=0, skipped=0) == 0.0


def test_two_attempts_add_up(run: RunDir) -> None:
    """20 s of starting, 30 s of steps of which 10 were lost, a save, a kill, 15 s of nobody, then the rest."""
    ledger(run, 18.0, "start", attempt="a", step=0)
    metrics(run, 20.0, attempt="a", resumed_step=0, process_started=START)
    stretch(run, 30.0, "a", 10, 10.0, 9.0)
    stretch(run, 40.0, "a", 20, 10.0, 8.0)
    metrics(run, 44.0, step=20, attempt="a", **{"validation/loss": 1.0})
    ledger(run, 45.0, "commit", attempt="a", step=20)
    stretch(run, 55.0, "a", 30, 10.0, 10.0)  # killed: these ten steps are trained again
    metrics(run, 80.0, attempt="b", resumed_step=20, process_started=START + 70.0)
    stretch(run, 92.0, "b", 30, 12.0, 11.0)
    ledger(run, 100.0, "end", attempt="b", step=30)
    use = time_use(run)
    assert use is not None
    assert (use.started, use.wall_seconds) == (START, 100.0)
    assert (use.useful_seconds, use.idle_seconds, use.lost_seconds) == (28.0, 4.0, 10.0)
    assert use.between_seconds == 15.0  # from 55 to 70
    assert use.other_seconds == 43.0  # 20 + 5 until the kill; 10 + 8 after it
    assert use.goodput == 0.28


def test_an_attempt_before_its_first_report_counts_as_life(run: RunDir) -> None:
    ledger(run, 10.0, "start", attempt="a", step=0)
    ledger(run, 60.0, "start", attempt="b", step=0)
    use = time_use(run)
    assert use is not None
    assert (use.wall_seconds, use.between_seconds, use.useful_seconds, use.goodput) == (50.0, 50.0, 0.0, 0.0)


def test_a_folder_without_times_has_no_goodput(run: RunDir) -> None:
    assert time_use(run) is None
    append_json_line(run.metrics, {"attempt": "a", "resumed_step": 0})
    append_json_line(run.metrics, {"attempt": "a", "step": 1, "train/loss": 1.0})
    assert time_use(run) is None
    assert Goodput.of(run).add(0.0) == 0.0


def test_a_resumed_run_goes_on_with_what_survives(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: START + 20.0)
    MetricsLog(run, attempt="a")
    stretch(run, 30.0, "a", 10, 10.0, 9.0)
    stretch(run, 40.0, "a", 20, 10.0, 8.0)
    MetricsLog(run, attempt="b", resumed_step=10)
    goodput = Goodput.of(run)
    assert goodput.useful == 9.0
    goodput.started = START
    monkeypatch.setattr(time, "time", lambda: START + 50.0)
    assert goodput.add(6.0) == pytest.approx(0.3)


def test_an_attempt_s_log_begins_with_its_process(run: RunDir) -> None:
    """The imports and everything before the first row are part of the wall time."""
    MetricsLog(run, attempt="a")
    use = time_use(run)
    assert use is not None
    assert 0.2 < time.time() - use.started < 24 * 3600
