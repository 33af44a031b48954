"""One report, under the same names wherever it is shown."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdtrain import distributed
from sdtrain.errors import ExitCode
from sdtrain.run_dir import RunDir
from sdtrain.training import reporter as reporter_module
from sdtrain.training.goodput import Goodput
from sdtrain.training.metrics import MetricsLog, Throughput, read_metrics
from sdtrain.training.reporter import Reporter, memory_gib
from sdtrain.training.trainer import Report, StepResult
from sdtrain.training.utilisation import Utilisation


class Recorder:
    """Tracker and progress in one: writes down how it was called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log(self, step: int, row: dict[str, Any]) -> None:
        self.calls.append(("log", step, row))

    def log_images(self, step: int, key: str, files: list[Path]) -> None:
        self.calls.append(("images", step, key, files))

    def update(self, **figures: Any) -> None:
        self.calls.append(("update", figures))

    def alert(self, title: str, text: str, level: str) -> None:
        self.calls.append(("alert", title, text, level))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))

    def say(self, text: str) -> None:
        self.calls.append(("say", text))

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture(autouse=True)
def _fixed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter_module, "memory_gib", lambda: 1.5)


def result(**changes: Any) -> StepResult:
    values: dict[str, Any] = {"applied": True, "gradient_norm": 2.0, "learning_rate": 1e-3, "ema_decay": 0.9}
    return StepResult(**(values | changes))


def report(means: dict[str, float], results: dict[str, StepResult]) -> Report:
    return Report(
        step=10,
        samples_seen=80,
        means=means,
        results=results,
        seconds=4.0,
        data_wait_seconds=1.0,
        images=16,
        skipped=1,
    )


def make(metrics: MetricsLog | None, tracker: Any = None, progress: Any = None) -> Reporter:
    return Reporter(
        metrics=metrics, tracker=tracker, progress=progress, throughput=Throughput(), max_steps=20, batch_size=8
    )


COMMON = {
    "train/seconds": 4.0,
    "train/useful_seconds": 1.5,  # 1 of 4 s waited for data, 1 of 2 steps was skipped
    "train/steps_covered": 2.0,
    "train/samples_seen": 80.0,
    "train/images_per_second": 4.0,
    "train/data_wait_share": 0.25,
    "train/eta_seconds": 20.0,  # 80 images left at 4 a second
    "train/skipped_steps": 1.0,
    "train/memory_gib": 1.5,
}


def test_one_trainable_needs_no_name(tmp_path: Path) -> None:
    run, tracker, progress = RunDir(tmp_path), Recorder(), Recorder()
    reporter = make(MetricsLog(run, attempt="a"), tracker, progress)
    reporter.report(report({"denoiser/loss": 0.5, "denoiser/snr": 3.0}, {"denoiser": result()}))
    expected = COMMON | {
        "train/loss": 0.5,
        "train/snr": 3.0,
        "train/gradient_norm": 2.0,
        "train/learning_rate": 1e-3,
        "train/ema_decay": 0.9,
    }
    assert tracker.calls[0] == ("log", 10, expected)
    (row,) = read_metrics(run.metrics)
    assert row.pop("time") == pytest.approx(time.time(), abs=60)
    assert row == {"step": 10, "attempt": "a", **expected}
    assert progress.calls == [
        (
            "update",
            {
                "step": 10,
                "loss": 0.5,
                "learning_rate": 1e-3,
                "images_per_second": 4.0,
                "data_wait_share": 0.25,
                "memory_gib": 1.5,
                "eta_seconds": 20.0,
            },
        )
    ]


def test_several_trainables_keep_their_names(tmp_path: Path) -> None:
    tracker = Recorder()
    results = {"generator": result(ema_decay=None), "judge": result(learning_rate=2e-3, loss_scale=1024.0)}
    make(MetricsLog(RunDir(tmp_path), attempt="a"), tracker).report(
        report({"generator/loss": 0.5, "judge/loss": 0.25, "judge/logits/real": 1.0}, results)
    )
    assert tracker.calls[0][2] == COMMON | {
        "train/generator/loss": 0.5,
        "train/judge/loss": 0.25,
        "train/judge/logits/real": 1.0,
        "train/generator/gradient_norm": 2.0,
        "train/judge/gradient_norm": 2.0,
        "train/generator/learning_rate": 1e-3,
        "train/judge/learning_rate": 2e-3,
        "train/judge/ema_decay": 0.9,
        "train/judge/loss_scale": 1024.0,
    }


def test_a_window_of_skipped_steps_still_reports(tmp_path: Path) -> None:
    progress = Recorder()
    make(MetricsLog(RunDir(tmp_path), attempt="a"), None, progress).report(report({"denoiser/loss": float("nan")}, {}))
    assert progress.calls[0][1]["learning_rate"] == 0.0
    assert progress.calls[0][1]["loss"] != progress.calls[0][1]["loss"]


def test_figures_over_some_of_the_samples_are_quotients_of_their_pair(tmp_path: Path) -> None:
    """0.3 of the loss fell on the quarter of the samples in bin 3: their mean was 1.2; nobody was in bin 4."""
    tracker = Recorder()
    means = {
        "denoiser/loss": 0.5,
        "denoiser/loss_bin_03.sum": 0.3,
        "denoiser/loss_bin_03.count": 0.25,
        "denoiser/loss_bin_04.sum": 0.0,
        "denoiser/loss_bin_04.count": 0.0,
    }
    make(MetricsLog(RunDir(tmp_path), attempt="a"), tracker).report(report(means, {"denoiser": result()}))
    figures = tracker.calls[0][2]
    assert figures["train/loss_bin_03"] == pytest.approx(1.2)
    assert not any("loss_bin_04" in name or "." in name for name in figures)


def test_goodput_and_utilisation_where_they_are_known(tmp_path: Path) -> None:
    tracker = Recorder()
    reporter = make(MetricsLog(RunDir(tmp_path), attempt="a"), tracker)
    reporter.goodput = Goodput(time.time() - 10.0, useful=2.5)
    reporter.utilisation = Utilisation(forward_flops=100.0, peak_flops=2400.0)
    reporter.report(report({"denoiser/loss": 0.5}, {"denoiser": result()}))
    figures = tracker.calls[0][2]
    assert figures["train/goodput"] == pytest.approx(0.4, abs=0.01)  # 2.5 s before and 1.5 s now, of 10 s
    assert figures["train/mfu"] == pytest.approx(4.0 * 300 / 2400)  # 4 images a second, backward counted twice


def alerts(tracker: Recorder) -> list[tuple[str, str, str]]:
    return [call[1:] for call in tracker.calls if call[0] == "alert"]


def test_alerts_for_spikes_and_skipped_steps(tmp_path: Path) -> None:
    tracker = Recorder()
    reporter = make(MetricsLog(RunDir(tmp_path), attempt="a"), tracker)
    calm = replace(report({"denoiser/loss": 0.5, "denoiser/mse": 0.5}, {"denoiser": result()}), skipped=0)
    for _ in range(10):
        reporter.report(calm)
    assert alerts(tracker) == []
    reporter.report(replace(calm, step=110, means={"denoiser/loss": 2.0, "denoiser/mse": 99.0}))
    reporter.report(replace(calm, step=120, means={"denoiser/loss": float("nan")}, skipped=2))
    assert alerts(tracker) == [
        ("loss spike", "train/loss is 2 at step 110: 4.0 times the median of the last reports", "WARN"),
        ("loss spike", "train/loss is nan at step 120: not finite", "WARN"),
        ("skipped steps", "2 updates before step 120 were skipped: gradients were not finite", "WARN"),
    ]


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (ExitCode.DONE, "complete", []),
        (ExitCode.DONE, "STOP file: saved and stopped at step 5", [("run stopped: done", "INFO")]),
        (ExitCode.REQUEUE, "SIGUSR1: saved", [("run stopped: requeue", "INFO")]),
        (ExitCode.DIVERGED, "DivergedError: no", [("run stopped: diverged", "ERROR")]),
    ],
)
def test_alerts_for_stops(code: ExitCode, reason: str, expected: list[tuple[str, str]], tmp_path: Path) -> None:
    tracker = Recorder()
    make(MetricsLog(RunDir(tmp_path), attempt="a"), tracker).stop(code, reason)
    assert alerts(tracker) == [(title, reason, level) for title, level in expected]
    assert tracker.calls[-1] == ("finish", int(code)), "told before the run is closed"


def test_memory_is_that_of_the_fullest_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "max_over_ranks", lambda value: value + 1)
    tracker = Recorder()
    make(MetricsLog(RunDir(tmp_path), attempt="a"), tracker).report(report({"denoiser/loss": 1.0}, {}))
    assert tracker.calls[0][2]["train/memory_gib"] == 2.5


def test_other_ranks_take_part_in_the_collective_and_stay_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(distributed, "max_over_ranks", lambda value: asked.append(value) or value)
    silent = make(None)
    silent.report(report({"denoiser/loss": 1.0}, {}))
    silent.log(3, {"validation/loss": 1.0})
    silent.show(3, "samples", [Path("a.png")])
    silent.alert("nobody", "hears")
    silent.stop(ExitCode.DIVERGED, "nan")
    assert asked == [1.5]


def test_pictures_go_to_the_tracker_and_nothing_goes_nowhere(tmp_path: Path) -> None:
    tracker, progress = Recorder(), Recorder()
    reporter = make(MetricsLog(RunDir(tmp_path), attempt="a"), tracker, progress)
    reporter.show(4, "samples", [tmp_path / "a.png"])
    reporter.show(4, "samples", [])
    assert tracker.calls == [("images", 4, "samples", [tmp_path / "a.png"])]
    reporter.stop(ExitCode.DONE, "complete")
    assert (tracker.calls[1:], progress.calls) == ([("finish", 0)], ["close"])


def test_memory_is_this_process_s_where_there_is_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(reporter_module.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=3 * 2**29)))
    assert memory_gib() == 1.5
    monkeypatch.setattr(reporter_module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(reporter_module.torch.cuda, "max_memory_allocated", lambda: 2**31)
    assert memory_gib() == 2.0


def test_what_is_compiled_after_warm_up_is_logged_said_and_alerted(tmp_path: Path) -> None:
    figures = {
        "compile/graphs": 12.0,
        "compile/seconds": 41.25,
        "compile/graph_breaks": 1.0,
        "compile/recompiles": 0.0,
        "compile/first_step_seconds": 65.0,
    }
    told: list[tuple[dict[str, float], list[str]]] = [
        (figures, []),
        (figures | {"compile/recompiles": 5.0}, [f"inner in step {step}: 0/1: a guard" for step in range(5)]),
        (figures | {"compile/recompiles": 6.0}, ["inner in step 9: 0/1: a guard"]),
    ]
    tracker, progress = Recorder(), Recorder()
    reporter = make(MetricsLog(RunDir(tmp_path), attempt="a"), tracker, progress)
    watch: Any = SimpleNamespace(figures=lambda: told.pop(0))
    reporter.compiles = watch
    for step in (10, 20, 30):
        reporter.report(replace(report({"denoiser/loss": 0.5}, {"denoiser": result()}), step=step, skipped=0))
    rows = read_metrics(RunDir(tmp_path).metrics)
    assert [row["compile/recompiles"] for row in rows] == [0, 5, 6]
    assert rows[0]["compile/first_step_seconds"] == 65
    many = (
        "compiled again after warm-up, which every rank waits for:\n  inner in step 0: 0/1: a guard\n"
        "  inner in step 1: 0/1: a guard\n  inner in step 2: 0/1: a guard\n  and 2 more"
    )
    one = "compiled again after warm-up, which every rank waits for:\n  inner in step 9: 0/1: a guard"
    assert [call[1] for call in progress.calls if call[0] == "say"] == [
        "first step: 65.0 s; compiled so far: 12 graphs in 41.2 s, 1 graph breaks",
        many,
        one,
    ]
    alerts = [call for call in tracker.calls if call[0] == "alert"]
    assert alerts == [("alert", "recompiled", many, "WARN"), ("alert", "recompiled", one, "WARN")]
