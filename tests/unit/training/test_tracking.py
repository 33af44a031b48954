from __future__ import annotations

import builtins
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdtrain.run_dir import RunDir
from sdtrain.training import tracking
from sdtrain.training.metrics import MetricsLog
from sdtrain.training.tracking import Tracker, has_key, resolve_mode, run_id

BLOCK = 32768


def records(path: Path) -> Iterator[Any]:
    """Records of a `.wandb` file: a 7-byte header, then LevelDB log blocks of protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, pending = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        room = BLOCK - position % BLOCK
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        if kind == 0:
            break
        pending += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(pending)
            pending = b""
            yield record


def history(folder: Path) -> list[dict[str, str]]:
    """Logged rows of all attempts of a run folder, oldest first."""
    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                rows.append({key: value for key, value in items.items() if key not in ("_runtime", "_timestamp")})
    return rows


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


@pytest.mark.heavy
def test_two_attempts_offline_make_one_run_without_replayed_steps(run: RunDir) -> None:
    metrics = MetricsLog(run, attempt="a")
    first = Tracker(run, project="p", name="n", mode="offline", config={"optimizer": {"learning_rate": 1e-4}})
    assert (first.mode, first.url) == ("offline", None)
    grid = run.path / "grid.png"
    Image.new("RGB", (8, 8), "red").save(grid)
    for step in (10, 20):
        metrics.log(step, {"train/loss": step / 100})
        first.log(step, {"train/loss": step / 100})
    first.log(20, {"validation/loss": 0.5})
    first.log_images(20, "samples", [grid, np.zeros((8, 8, 3), np.uint8)], ["a red square", "black"])
    first.finish()

    logged_until = tracking.last_logged_step(run.metrics)
    MetricsLog(run, attempt="b", resumed_step=10)
    second = Tracker(run, project="p", name="n", mode="offline", logged_until=logged_until)
    second.log(20, {"train/loss": 9.0})
    second.log_images(20, "samples", [grid])
    second.log(30, {"train/loss": 0.3})
    second.finish(exit_code=85)

    assert first.id == second.id == run.wandb_id.read_text().strip()
    rows = history(run.path)
    steps = [row["train/step"] for row in rows]
    assert steps == ["10", "20", "30"]
    assert [row["_step"] for row in rows] == steps
    assert [row["train/loss"] for row in rows] == ["0.1", "0.2", "0.3"]
    assert rows[1]["validation/loss"] == "0.5"
    assert rows[1]["samples/captions"] == '["a red square","black"]'
    assert len(list(run.path.glob("wandb/offline-run-*/files/media/images/samples_20_*.png"))) == 2

    parts = sorted(run.path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    written = [list(records(path)) for path in parts]
    assert {record.run.run_id for part in written for record in part if record.HasField("run")} == {first.id}
    configured = [item for record in written[0] if record.HasField("run") for item in record.run.config.update]
    assert any(item.key == "optimizer" and "0.0001" in item.value_json for item in configured)
    metrics_defined = [
        (record.metric.name, record.metric.glob_name, record.metric.step_metric) for record in written[0]
    ]
    assert ("train/step", "", "") in metrics_defined
    assert ("", "*", "train/step") in metrics_defined
    assert [record.exit.exit_code for record in written[1] if record.HasField("exit")] == [85]


@pytest.mark.heavy
def test_an_unreachable_server_means_offline(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_SECONDS", 2.0)
    tracker = Tracker(run, project="p", name="n", mode="online")
    assert tracker.mode == "offline"
    assert "W&B is out of reach" in caplog.text
    tracker.log(1, {"train/loss": 0.25})
    tracker.finish()
    assert [row["train/loss"] for row in history(run.path)] == ["0.25"]


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
    assert "W&B failed (ValueError" in caplog.text
