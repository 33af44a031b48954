from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from sdtrain.run_dir import RunDir
from sdtrain.training.metrics import MetricsLog, SpikeWatch, Throughput, joined_pairs, read_metrics


def test_rows_of_one_step_are_joined(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    log = MetricsLog(run, attempt="a")
    log.log(10, {"train/loss": 0.5})
    log.log(20, {"train/loss": 0.4})
    log.log(20, {"validation/loss": 0.45})
    rows = read_metrics(run.metrics)
    assert all(abs(row.pop("time") - time.time()) < 60 for row in rows)
    assert rows == [
        {"step": 10, "attempt": "a", "train/loss": 0.5},
        {"step": 20, "attempt": "a", "train/loss": 0.4, "validation/loss": 0.45},
    ]


def test_a_dead_attempts_rows_past_the_resume_are_left_out_and_kept_in_the_file(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    first = MetricsLog(run, attempt="a")
    for step in (10, 20, 30, 40):
        first.log(step, {"train/loss": float(step)})
    before = run.metrics.read_bytes()
    second = MetricsLog(run, attempt="b", resumed_step=25)
    assert [row["step"] for row in read_metrics(run.metrics)] == [10, 20]
    second.log(30, {"train/loss": 3.0})
    rows = read_metrics(run.metrics)
    assert [(row["step"], row["attempt"], row["train/loss"]) for row in rows] == [
        (10, "a", 10.0),
        (20, "a", 20.0),
        (30, "b", 3.0),
    ]
    assert run.metrics.read_bytes().startswith(before)


def test_chained_resumes_and_a_fresh_start(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for attempt, resumed, steps in (("a", 0, (1, 2, 3, 4)), ("b", 2, (3, 4, 5)), ("c", 4, (5, 6)), ("d", 2, (3,))):
        log = MetricsLog(run, attempt=attempt, resumed_step=resumed)
        for step in steps:
            log.log(step, {})
    assert [(row["step"], row["attempt"]) for row in read_metrics(run.metrics)] == [(1, "a"), (2, "a"), (3, "d")]
    MetricsLog(run, attempt="e").log(1, {})
    assert [(row["step"], row["attempt"]) for row in read_metrics(run.metrics)] == [(1, "e")]


def test_a_torn_line_costs_one_row(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    MetricsLog(run, attempt="a").log(1, {"train/loss": 1.0})
    with open(run.metrics, "ab") as file:
        file.write(b'{"step": 2, "train/lo')
    MetricsLog(run, attempt="b", resumed_step=1).log(2, {"train/loss": 2.0})
    assert [row["train/loss"] for row in read_metrics(run.metrics)] == [1.0, 2.0]


def test_foreign_lines_are_left_out_and_nothing_is_no_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text("3\nnull\n" + json.dumps({"note": "no step"}) + "\n")
    assert read_metrics(path) == []


def test_speed_is_that_of_the_last_stretches() -> None:
    speed = Throughput(stretches=2)
    assert (speed.images_per_second, speed.data_wait_share, speed.eta_seconds(10)) == (0.0, 0.0, math.inf)
    speed.add(images=1000, seconds=1.0, data_wait_seconds=1.0)
    speed.add(images=60, seconds=2.0, data_wait_seconds=0.5)
    speed.add(images=30, seconds=1.0, data_wait_seconds=0.25)
    assert speed.images_per_second == pytest.approx(30.0)
    assert speed.data_wait_share == pytest.approx(0.25)
    assert speed.eta_seconds(900) == pytest.approx(30.0)


def test_pairs_become_quotients_and_other_names_with_dots_stay() -> None:
    means = {"a.sum": 1.0, "a.count": 0.5, "b.sum": 0.0, "b.count": 0.0, "c.sum": 3.0, "d.e": 4.0, "f": 5.0}
    assert joined_pairs(means) == {"a": 2.0, "c.sum": 3.0, "d.e": 4.0, "f": 5.0}


def test_a_spike_is_what_stands_out_from_the_median() -> None:
    watch = SpikeWatch(factor=3.0, memory=5, least=3)
    assert [watch.see(value) for value in (1.0, 100.0, 1.0)] == [None, None, None], "too early to tell"
    assert watch.see(3.0) is None  # median 1
    assert watch.see(12.0) == pytest.approx(6.0)  # median of 1, 100, 1, 3
    assert watch.see(math.nan) == math.inf
    assert watch.see(math.inf) == math.inf
    assert [watch.see(100.0) for _ in range(4)][-1] is None, "a loss that stays high is no spike"
