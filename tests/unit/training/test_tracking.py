from __future__ import annotations

import builtins
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdtrain.run_dir import RunDir
from sdtrain.training import tracking, wandb_files
from sdtrain.training.metrics import MetricsLog, read_metrics
from sdtrain.training.tracking import Tracker, has_key, resolve_mode, run_id


def parts(folder: Path) -> list[Path]:
    """The `.wandb` files of all attempts of a run folder, oldest first."""
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def history(folder: Path, count: int) -> list[dict[str, Any]]:
    """Logged rows of all attempts, oldest first; W&B's service may take a while to write the last of them."""
    deadline = time.monotonic() + 10
    while len(rows := [row for path in parts(folder) for row in wandb_files.history(path)]) < count:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return [{key: value for key, value in row.items() if key not in ("_runtime", "_timestamp")} for row in rows]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def test_a_key_is_found_in_the_environment_or_in_netrc(tmp_path: Path) -> None:
    assert not has_key({}, tmp_path)
    assert not has_key({"WANDB_API_KEY": ""}, tmp_path)
    assert has_key({"WANDB_API_KEY": "k"}, tmp_path)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password k\n")
    assert has_key({}, tmp_path)
    assert not has_key({"WANDB_BASE_URL": "https://wandb.example.org"}, tmp_path)
    (tmp_path / ".netrc").write_text("machine wandb.example.org login user password k\n")
    assert has_key({"WANDB_BASE_URL": "https://wandb.example.org:8080/x"}, tmp_path)
    (tmp_path / ".netrc").write_text("nonsense\n")
    assert not has_key({}, tmp_path)
    (tmp_path / "elsewhere").write_text("machine api.wandb.ai login user password k\n")
    assert has_key({"NETRC": str(tmp_path / "elsewhere")}, tmp_path)


def test_auto_is_online_with_a_key_and_offline_without(tmp_path: Path) -> None:
    assert resolve_mode("auto", {}, tmp_path) == "offline"
    assert resolve_mode("auto", {"WANDB_API_KEY": "k"}, tmp_path) == "online"
    assert resolve_mode("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, tmp_path) == "disabled"
    assert resolve_mode("auto", {"WANDB_MODE": "dryrun"}, tmp_path) == "offline"
    assert resolve_mode("offline", {"WANDB_API_KEY": "k", "WANDB_MODE": "online"}, tmp_path) == "offline"


def test_the_id_is_made_once(run: RunDir) -> None:
    made = run_id(run)
    assert len(made) == 8
    assert run_id(run) == made
    assert run.wandb_id.read_text() == made + "\n"


def test_disabled_leaves_nothing(run: RunDir) -> None:
    tracker = Tracker(run, project="p", name="n", mode="disabled")
    tracker.log(1, {"train/loss": 1.0})
    tracker.log_images(1, "samples", [])
    tracker.finish()
    assert (tracker.id, tracker.url) == ("", None)
    assert not run.path.exists()


def test_three_attempts_offline_make_one_history_without_gaps_or_replayed_steps(run: RunDir) -> None:
    """The first attempt gets to 30 and dies, the second goes on from 20 and loses its last rows to a kill."""
    grid = run.path / "grid.png"
    grid.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(grid)

    def attempt(name: str, resumed_step: int) -> tuple[MetricsLog, Tracker]:
        metrics = MetricsLog(run, attempt=name, resumed_step=resumed_step)
        config = {"optimizer": {"learning_rate": 1e-4}}
        past = read_metrics(run.metrics)
        return metrics, Tracker(run, project="p", name="n", mode="offline", config=config, past=past)

    def report(metrics: MetricsLog, tracker: Tracker | None, step: int, loss: float) -> None:
        metrics.log(step, {"train/loss": loss})
        if tracker is not None:
            tracker.log(step, {"train/loss": loss})

    metrics, first = attempt("a", 0)
    assert (first.mode, first.url) == ("offline", None)
    for step in (10, 20, 30):
        report(metrics, first, step, step / 100)
        if step == 20:
            first.log(20, {"validation/loss": 0.5})
            first.log_images(20, "samples", [grid, np.zeros((8, 8, 3), np.uint8)], ["a red square", "black"])
    first.alert("loss spike", "train/loss is 9", "ERROR")
    first.finish(exit_code=1)

    metrics, second = attempt("b", 20)
    report(metrics, second, 30, 9.0)
    second.log_images(20, "samples", [grid])
    report(metrics, second, 40, 0.4)
    report(metrics, None, 50, 0.5)  # killed before W&B got it
    second.finish(exit_code=85)

    metrics, third = attempt("c", 50)
    report(metrics, third, 60, 0.6)
    third.finish()

    assert [row["step"] for row in read_metrics(run.metrics)] == [10, 20, 30, 40, 50, 60]
    rows = history(run.path, 6)
    steps = [row["train/step"] for row in rows]
    assert steps == [10, 20, 30, 40, 50, 60]
    assert [row["_step"] for row in rows] == steps
    assert [row["train/loss"] for row in rows] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert rows[1]["validation/loss"] == 0.5
    assert rows[1]["samples/captions"] == ["a red square", "black"]
    assert len(list(run.path.glob("wandb/offline-run-*/files/media/images/samples_20_*.png"))) == 2
    assert wandb_files.last_tracked_step(run.path) == 60

    written = [list(wandb_files.records(path)) for path in parts(run.path)]
    identities = {record.run.run_id for part in written for record in part if record.HasField("run")}
    assert identities == {first.id} == {second.id} == {third.id} == {run.wandb_id.read_text().strip()}
    assert len(written) == 3
    configured = [item for record in written[0] if record.HasField("run") for item in record.run.config.update]
    assert any(item.key == "optimizer" and "0.0001" in item.value_json for item in configured)
    metrics_defined = [
        (record.metric.name, record.metric.glob_name, record.metric.step_metric) for record in written[0]
    ]
    assert ("train/step", "", "") in metrics_defined
    assert ("", "*", "train/step") in metrics_defined
    told = [
        (record.alert.title, record.alert.text, record.alert.level) for record in written[0] if record.HasField("alert")
    ]
    assert told == [("loss spike", "train/loss is 9", "ERROR")]
    exits = [record.exit.exit_code for part in written for record in part if record.HasField("exit")]
    assert exits == [1, 85, 0]


def test_an_unreachable_server_means_offline(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_SECONDS", 2.0)
    started = time.monotonic()
    tracker = Tracker(run, project="p", name="n", mode="online")
    assert time.monotonic() - started < 20, "a few seconds past INIT_TIMEOUT_SECONDS"
    assert tracker.mode == "offline"
    assert "W&B is out of reach" in caplog.text
    started = time.monotonic()
    for step in range(1, 201):
        tracker.log(step, {"train/loss": 0.25})
    tracker.alert("loss spike", "nobody hears")
    assert time.monotonic() - started < 1, "training only fills a queue"
    started = time.monotonic()
    tracker.finish()
    assert time.monotonic() - started < 20
    assert [row["train/step"] for row in history(run.path, 200)] == list(range(1, 201))


def test_a_service_that_hangs_holds_nobody_up(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first call never returns: what follows is queued, then dropped, and the end waits for the limit alone."""
    for_ever = threading.Event()

    class Hung:
        def log(self, *given: object, **more: object) -> None:
            for_ever.wait()

    monkeypatch.setattr(tracking, "_start", lambda *given: (Hung(), "offline"))
    monkeypatch.setattr(tracking, "QUEUE_LENGTH", 5)
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "FINISH_GRACE_SECONDS", 0.1)
    started = time.monotonic()
    tracker = Tracker(run, project="p", name="n", mode="offline")
    for step in range(100):
        tracker.log(step, {"train/loss": 1.0})
    tracker.finish()
    tracker.finish()
    assert time.monotonic() - started < 5
    for_ever.set()
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "W&B does not keep up: figures are left out there, metrics.jsonl holds everything",
        "W&B did not finish within 0 s and is left behind; `wandb sync` sends what its folder holds, and "
        "metrics.jsonl holds everything",
    ]


def test_online_the_server_says_how_far_the_history_got(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    class Resumed:
        starting_step = 21
        url = "http://127.0.0.1/run"

        def __init__(self) -> None:
            self.steps: list[int] = []

        def log(self, row: dict[str, Any], step: int) -> None:
            self.steps.append(step)

        def finish(self, exit_code: int) -> None:
            self.steps.append(-exit_code)

    resumed = Resumed()
    monkeypatch.setattr(tracking, "_start", lambda *given: (resumed, "online"))
    past = [{"step": step, "attempt": "a", "train/loss": 1.0} for step in (10, 20, 30)]
    tracker = Tracker(run, project="p", name="n", mode="online", past=past)
    assert tracker.url == resumed.url
    tracker.log(40, {"train/loss": 1.0})
    tracker.finish(exit_code=85)
    assert resumed.steps == [30, 40, -85]


def test_a_missing_package_costs_one_warning(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def without_wandb(name: str, *given: Any) -> Any:
        if name == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'")
        return real(name, *given)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    tracker = Tracker(run, project="p", name="n", mode="offline")
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish()
    assert tracker.mode == "disabled"
    assert [record.getMessage() for record in caplog.records] == [
        "W&B failed (ModuleNotFoundError: No module named 'wandb'); training goes on without it, "
        "metrics.jsonl holds everything"
    ]


def test_a_run_that_breaks_while_logging_costs_one_warning(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def log(self, *given: object, **more: object) -> None:
            raise BrokenPipeError("the service is gone")

    monkeypatch.setattr(tracking, "_start", lambda *given: (Broken(), "offline"))
    tracker = Tracker(run, project="p", name="n", mode="offline")
    for step in range(5):
        tracker.log(step, {"train/loss": 1.0})
        tracker.log_images(step, "samples", [np.zeros((4, 4, 3), np.uint8)])
    tracker.finish()
    assert len(caplog.records) == 1
    assert "W&B failed (BrokenPipeError: the service is gone)" in caplog.text


def test_captions_must_fit_the_images_and_still_never_raise(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "_start", lambda *given: (object(), "offline"))
    tracker = Tracker(run, project="p", name="n", mode="offline")
    tracker.log_images(1, "samples", [np.zeros((4, 4, 3), np.uint8)], ["one", "two"])
    tracker.finish()
    assert "W&B failed (ValueError" in caplog.text
