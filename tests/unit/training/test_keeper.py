"""Saving, the ledger, and which checkpoints a run takes over."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain.checkpoints import saver as saver_module
from sdtrain.checkpoints.manifest import Checkpoint, list_checkpoints
from sdtrain.checkpoints.protocol import Report, verify
from sdtrain.checkpoints.recut import read_span
from sdtrain.checkpoints.retention import Retention
from sdtrain.checkpoints.saver import Saved
from sdtrain.errors import CheckpointError, ExitCode, StorageError
from sdtrain.run_dir import RunDir
from sdtrain.training.keeper import CheckpointKeeper
from tests.engines import PlainEngine

IDENTITY = {"data_manifest_sha256": "abc", "seed": 7, "order_version": 1, "window_shards": 2, "batch_size": 8}


def committed(keeper: CheckpointKeeper, step: int) -> Path | None:
    """Save and wait; the committed folder, or None where the save failed."""
    keeper.save(step)
    path = keeper.join()
    return path if keeper.saved_step == step else None


def make(folder: Path, *, attempt: str = "a1", engine: PlainEngine | None = None, **changes: Any) -> CheckpointKeeper:
    values: dict[str, Any] = {
        "batch_size": 8,
        "config_text": "schema_version: 1\n",
        "identity": IDENTITY,
        "environment": {"git_commit": "0" * 40, "versions": {"torch": "2"}},
        "retention": Retention(keep_last=2),
    }
    return CheckpointKeeper(
        run=RunDir(folder), attempt=attempt, engines={"denoiser": engine or PlainEngine()}, **(values | changes)
    )


def commits(folder: Path) -> list[tuple[str, str, int, int, str | None]]:
    return [
        (row["checkpoint"], row["attempt"], row["first_position"], row["last_position"], row["parent"])
        for row in RunDir(folder).ledger_rows()
        if row["event"] == "commit"
    ]


def test_a_checkpoint_says_where_it_comes_from(tmp_path: Path) -> None:
    engine = PlainEngine()
    engine.applied_steps = 4
    keeper = make(tmp_path, engine=engine)
    path = committed(keeper, 5)
    assert path is not None
    assert path == tmp_path / "checkpoints" / "step-00000005"
    checkpoint = Checkpoint.open(path)
    assert verify(checkpoint) == []
    manifest = checkpoint.manifest
    assert (manifest["step"], manifest["samples_seen"], manifest["applied_steps"]) == (5, 40, {"denoiser": 4})
    assert (manifest["parent"], manifest["identity"]) == (None, IDENTITY)
    assert (manifest["git_commit"], manifest["versions"]) == ("0" * 40, {"torch": "2"})
    assert manifest["config_sha256"] == hashlib.sha256(b"schema_version: 1\n").hexdigest()
    assert (path / "config.yaml").read_text() == "schema_version: 1\n"


def test_the_ledger_tells_each_range_of_samples_once(tmp_path: Path) -> None:
    keeper = make(tmp_path)
    for step in (2, 4, 4, 5):
        committed(keeper, step)
    assert commits(tmp_path) == [
        ("step-00000002", "a1", 0, 16, None),
        ("step-00000004", "a1", 16, 32, "step-00000002"),
        ("step-00000005", "a1", 32, 40, "step-00000004"),
    ]
    row = RunDir(tmp_path).ledger_rows()[0]
    assert (row["step"], row["world_size"]) == (2, 1)


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    keeper = make(tmp_path)
    keeper.save(0)
    assert keeper.join() is None  # nothing was trained yet
    first = committed(keeper, 3)
    assert first is not None
    inode = (first / "MANIFEST.json").stat().st_ino
    assert committed(keeper, 3) == first
    assert (first / "MANIFEST.json").stat().st_ino == inode


def test_what_is_to_come_before_a_checkpoint_comes_before_each_one_once(tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []

    def before_save() -> dict[str, Any]:
        told.append(("before", keeper.saved_step))
        return {}

    keeper = make(tmp_path, before_save=before_save)
    keeper.on_saved = lambda saved: told.append(("saved", saved.step))
    for step in (3, 3, 5):
        keeper.save(step)
    keeper.finish(5)
    assert told == [("before", 0), ("before", 0), ("saved", 3), ("saved", 5)], "before the one in flight is waited for"


def test_old_checkpoints_go_and_the_one_that_was_resumed_stays(tmp_path: Path) -> None:
    committed(make(tmp_path), 1)
    keeper = make(tmp_path, attempt="a2")
    assert keeper.restore(list_checkpoints(tmp_path / "checkpoints")[0]) == 1
    for step in range(2, 8):
        committed(keeper, step)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "checkpoints")] == [7, 6, 1]


def test_every_n_th_stays(tmp_path: Path) -> None:
    keeper = make(tmp_path, retention=Retention(keep_last=2, keep_every_steps=2))
    for step in range(1, 7):
        committed(keeper, step)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "checkpoints")] == [6, 5, 4, 2]


def fail_times(monkeypatch: pytest.MonkeyPatch, outcomes: list[bool]) -> None:
    """Let saves find room on the disk or none, in this order."""
    left = iter(outcomes)
    room = "sdtrain.checkpoints.protocol.free_space"
    monkeypatch.setattr(room, lambda folder: (float("inf") if next(left) else 0.0,) * 2)


def test_the_third_failed_save_in_a_row_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_times(monkeypatch, [True, False, False, False])
    keeper = make(tmp_path)
    assert committed(keeper, 1) is not None
    assert committed(keeper, 2) is None
    assert committed(keeper, 3) is None
    with pytest.raises(StorageError) as raised:
        committed(keeper, 4)
    assert raised.value.exit_code == ExitCode.STORAGE == 8
    assert str(raised.value) == (
        f"{tmp_path / 'checkpoints'}: 3 saves in a row failed (see the log). Free some space or repair the file "
        "system, then start again: the newest committed checkpoint is intact."
    )
    assert commits(tmp_path) == [("step-00000001", "a1", 0, 8, None)]


def test_a_save_in_between_forgives_the_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_times(monkeypatch, [False, False, True, False, False, True])
    keeper = make(tmp_path)
    assert [committed(keeper, step) is not None for step in range(1, 7)] == [False, False, True, False, False, True]
    # what a failed save did not commit belongs to the next one
    assert commits(tmp_path) == [("step-00000003", "a1", 0, 24, None), ("step-00000006", "a1", 24, 48, "step-00000003")]


def test_a_real_full_disk_counts_as_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdtrain.checkpoints.protocol.free_space", lambda folder: (0.0, 0.0))
    assert committed(make(tmp_path), 1) is None
    assert commits(tmp_path) == []


def test_a_new_save_waits_for_the_one_in_flight_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = saver_module.write
    go_on = threading.Event()

    def slow(*args: Any) -> Report:
        go_on.wait(0.2)
        return real(*args)

    monkeypatch.setattr(saver_module, "write", slow)
    told: list[Saved] = []
    keeper = make(tmp_path, on_saved=told.append)
    keeper.save(1)
    assert keeper.is_writing
    keeper.save(1)  # is on its way
    keeper.save(2)
    assert "checkpoint of step 1 is still being written at step 2: training waits for it" in caplog.text
    assert [row[0] for row in commits(tmp_path)] == ["step-00000001"]
    go_on.set()
    keeper.finish(2)
    assert not keeper.is_writing
    assert [(saved.step, saved.path) for saved in told] == [
        (step, tmp_path / "checkpoints" / f"step-{step:08d}") for step in (1, 2)
    ]
    assert told[0].stall_seconds > 0.1 > told[1].stall_seconds
    rows = [row for row in RunDir(tmp_path).ledger_rows() if row["event"] == "commit"]
    assert [row["stall_seconds"] for row in rows] == [round(saved.stall_seconds, 3) for saved in told]
    assert [row["parent"] for row in rows] == [None, "step-00000001"]
    keeper.close()


def test_what_changes_after_a_save_is_not_in_it(tmp_path: Path) -> None:
    engine = PlainEngine()
    expected = engine.state["master"].clone()
    keeper = make(tmp_path, engine=engine)
    keeper.save(1)
    engine.state["master"].fill_(7)
    engine.applied_steps = 9
    keeper.join()
    checkpoint = Checkpoint.open(tmp_path / "checkpoints" / "step-00000001")
    assert torch.equal(read_span(checkpoint, "denoiser", 0, "master", 0, len(expected)), expected)
    assert checkpoint.manifest["applied_steps"] == {"denoiser": 0}


def test_the_end_of_a_run_tries_again_and_does_not_pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_times(monkeypatch, [False, False, True, False, False, False])
    keeper = make(tmp_path)
    keeper.save(4)
    keeper.finish(4)
    assert [row[0] for row in commits(tmp_path)] == ["step-00000004"]
    with pytest.raises(StorageError, match="3 saves in a row failed"):
        keeper.finish(5)


def test_restoring_waits_for_the_save_in_flight(tmp_path: Path) -> None:
    keeper = make(tmp_path)
    keeper.save(1)
    committed(keeper, 1)
    keeper.save(2)
    keeper.restore(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert [row[0] for row in commits(tmp_path)] == ["step-00000001", "step-00000002"]
    assert (keeper.saved_step, keeper.resumed_from) == (1, "step-00000001")


def test_a_checkpoint_holds_what_was_measured_at_its_own_step_and_the_best_survive_a_resume(tmp_path: Path) -> None:
    keep = Retention(keep_last=2, keep_best=1)
    keeper = make(tmp_path, retention=keep)
    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3)):
        keeper.note(step, {"validation/loss": loss})
        committed(keeper, step)
    committed(keeper, 5)
    again = make(tmp_path, attempt="a2", retention=keep)
    again.restore(list_checkpoints(tmp_path / "checkpoints")[0])
    for step in (6, 7, 8):
        committed(again, step)
    kept = list_checkpoints(tmp_path / "checkpoints")
    assert [(one.step, dict(one.figures)) for one in kept] == [(8, {}), (7, {}), (5, {}), (2, {"validation/loss": 0.1})]


def test_a_figure_that_validation_does_not_know_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keeper = make(tmp_path, retention=Retention(keep_last=2, keep_best=1, best_by="validation/los"))
    keeper.note(1, {"validation/loss": 0.5, "validation/loss_bin_00": 0.4})
    assert (
        "checkpoint.best_by = validation/los is no figure of validation (validation/loss, validation/loss_bin_00): no "
        "checkpoint is kept for it"
    ) in caplog.text


def test_restoring_goes_on_where_the_checkpoint_ends(tmp_path: Path) -> None:
    engine = PlainEngine()
    engine.applied_steps = 4
    committed(make(tmp_path, engine=engine), 5)
    fresh = PlainEngine()
    keeper = make(tmp_path, attempt="a2", engine=fresh)
    assert keeper.restore(list_checkpoints(tmp_path / "checkpoints")[0]) == 5
    assert fresh.applied_steps == 4
    committed(keeper, 5)
    committed(keeper, 6)
    assert commits(tmp_path) == [
        ("step-00000005", "a1", 0, 40, None),
        ("step-00000006", "a2", 40, 48, "step-00000005"),
    ]


def test_what_the_loop_knows_of_its_steps_is_there_again(tmp_path: Path) -> None:
    known = {"denoiser": {"losses": [0.1 + 0.2], "skipped": [[2, "loss spike"]], "row": []}}
    committed(make(tmp_path, before_save=lambda: known), 3)
    again = make(tmp_path, attempt="a2")
    assert again.health == {}
    again.restore(list_checkpoints(tmp_path / "checkpoints")[0])
    assert again.health == known


def test_after_a_rollback_the_next_start_forgets_the_skips_too(tmp_path: Path) -> None:
    """It went back to step 3 and died before it saved again: the ledger alone knows."""
    known = {"denoiser": {"losses": [0.5], "skipped": [[2, "loss spike"]], "row": [[2, "loss spike"]]}}
    committed(make(tmp_path, before_save=lambda: known), 3)
    place = {"checkpoint": "step-00000003", "position": 24, "left_out": [[24, 40]]}
    RunDir(tmp_path).log("rollback", attempt="a1", **place)
    again = make(tmp_path, attempt="a2")
    again.restore(list_checkpoints(tmp_path / "checkpoints")[0])
    assert again.health == {"denoiser": {"losses": [0.5], "skipped": [], "row": []}}
    assert again.positions.rollbacks == 1


def test_a_commit_whose_row_was_lost_is_told_by_the_next_attempt_once(tmp_path: Path) -> None:
    committed(make(tmp_path), 5)
    RunDir(tmp_path).ledger.unlink()
    for attempt in ("a2", "a3"):
        make(tmp_path, attempt=attempt).restore(list_checkpoints(tmp_path / "checkpoints")[0])
    assert commits(tmp_path) == [("step-00000005", "a1", 0, 40, None)]


def test_a_replayed_step_is_kept_and_told_once(tmp_path: Path) -> None:
    """Resumed from an older checkpoint by name, the run comes by steps that stand already."""
    first = make(tmp_path)
    committed(first, 2)
    committed(first, 4)
    again = make(tmp_path, attempt="a2")
    again.restore(list_checkpoints(tmp_path / "checkpoints")[1])
    assert committed(again, 4) == tmp_path / "checkpoints" / "step-00000004"
    assert [row[:2] for row in commits(tmp_path)] == [("step-00000002", "a1"), ("step-00000004", "a1")]


@pytest.mark.parametrize(("key", "value"), [("data_manifest_sha256", "xyz"), ("seed", 8), ("order_version", 2)])
def test_another_run_s_checkpoint_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    committed(make(tmp_path), 5)
    engine = PlainEngine()
    keeper = make(tmp_path, engine=engine, identity=IDENTITY | {key: value})
    with pytest.raises(CheckpointError) as raised:
        keeper.restore(list_checkpoints(tmp_path / "checkpoints")[0])
    assert raised.value.exit_code == ExitCode.CHECKPOINT == 4
    assert str(raised.value) == (
        f"{tmp_path / 'checkpoints' / 'step-00000005'}: belongs to another run:\n"
        f"  {key}: {IDENTITY[key]!r} then, {value!r} now\n"
        "A resume must see the same samples in the same order: restore these settings, or choose another run_dir for a "
        "new run."
    )
    assert engine.restored is None
