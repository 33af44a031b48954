"""One report, under the same names wherever it is shown."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdtrain import distributed
from sdtrain.run_dir import RunDir
from sdtrain.training import reporter as reporter_module
from sdtrain.training.metrics import MetricsLog, Throughput, read_metrics
from sdtrain.training.reporter import Reporter, memory_gib
from sdtrain.training.trainer import Report, StepResult


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

    def finish(self) -> None:
        self.calls.append("finish")

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
    assert tracker.calls == [("log", 10, expected)]
    assert read_metrics(run.metrics) == [{"step": 10, "attempt": "a", **expected}]
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
    results = {"generator": result(ema_decay=None), "judge": result(learning_rate=2e-3)}
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
    }


def test_a_window_of_skipped_steps_still_reports(tmp_path: Path) -> None:
    progress = Recorder()
    make(MetricsLog(RunDir(tmp_path), attempt="a"), None, progress).report(report({"denoiser/loss": float("nan")}, {}))
    assert progress.calls[0][1]["learning_rate"] == 0.0
    assert progress.calls[0][1]["loss"] != progress.calls[0][1]["loss"]


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
    silent.close()
    assert asked == [1.5]


def test_pictures_go_to_the_tracker_and_nothing_goes_nowhere(tmp_path: Path) -> None:
    tracker, progress = Recorder(), Recorder()
    reporter = make(MetricsLog(RunDir(tmp_path), attempt="a"), tracker, progress)
    reporter.show(4, "samples", [tmp_path / "a.png"])
    reporter.show(4, "samples", [])
    assert tracker.calls == [("images", 4, "samples", [tmp_path / "a.png"])]
    reporter.close()
    assert (tracker.calls[-1], progress.calls) == ("finish", ["close"])


def test_memory_is_this_process_s_where_there_is_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(reporter_module.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=3 * 2**29)))
    assert memory_gib() == 1.5
    monkeypatch.setattr(reporter_module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(reporter_module.torch.cuda, "max_memory_allocated", lambda: 2**31)
    assert memory_gib() == 2.0
