"""The audit by hand-written ledgers, and of a real run in three attempts with its metrics and its W&B files."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sdtrain.checkpoints.manifest import folder_name
from sdtrain.errors import CheckpointError, ConfigError, ExitCode
from sdtrain.evaluation.audit import Audit, audit, examine
from sdtrain.run_dir import RunDir, append_json_line
from sdtrain.training import wandb_files
from sdtrain.training.metrics import MetricsLog, read_metrics
from tests.engines import one_rank, sdtrain
from tests.ledgers import commit, rollback, start
from tests.support import make_latent_manifest, tiny_page

START = 1_700_000_000.0


# What is printed --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """a saved at 2 and 4 and died at 5; b went on from 4 to the end."""
    run = RunDir(tmp_path / "run")
    a, b = start("a") | {"world_size": 2}, start("b", 4) | {"world_size": 1}
    end = {"event": "end", "attempt": "b", "code": 0, "reason": "complete", "step": 6}
    rows = [(10, a), (20, commit(2, None)), (30, commit(4, 2)), (60, b), (80, commit(6, 4, "b")), (90, end)]
    for at, row in rows:
        append_json_line(run.ledger, {"time": START + at} | row)
    append_json_line(run.metrics, {"time": START + 15, "attempt": "a", "resumed_step": 0, "process_started": START})
    figures = {"train/seconds": 10.0, "train/useful_seconds": 9.0}
    for at, attempt, step in ((20, "a", 2), (30, "a", 4), (40, "a", 5)):
        append_json_line(run.metrics, {"time": START + at, "attempt": attempt, "step": step, **figures})
    append_json_line(
        run.metrics, {"time": START + 65, "attempt": "b", "resumed_step": 4, "process_started": START + 50}
    )
    append_json_line(run.metrics, {"time": START + 80, "attempt": "b", "step": 6, **figures})
    return run


def shown(run: RunDir, **options: Any) -> tuple[str, Audit]:
    out = io.StringIO()
    found = audit(run.path, console=Console(file=out, width=200), **options)
    return out.getvalue(), found


def test_attempts_times_and_the_proof_are_printed(run: RunDir) -> None:
    text, found = shown(run)
    first, second = found.attempts
    assert (first.start_step, first.last_step, first.lost_steps) == (0, 5, 1)
    assert (second.start_step, second.last_step, second.lost_steps) == (4, 6, 0)
    assert (first.started, first.ended) == (START + 10, START + 40)
    assert "killed or stopped; the next start resumed" in text and "done: complete" in text
    assert found.time_use is not None
    assert found.time_use.goodput == pytest.approx(27 / 90)
    assert "goodput 30.0% of 1m 30s: 27s useful, 3s waiting for data or skipped, 10s lost and trained again" in text
    assert "10s between attempts" in text
    assert "lost    1 steps were trained and did not survive" in text
    assert "order   samples 0 to 47 were trained on exactly once: 3 contiguous ranges, 2 attempts" in text


def test_json_holds_the_same(run: RunDir) -> None:
    text, found = shown(run, as_json=True)
    said = json.loads(text)
    assert said == json.loads(json.dumps(found.to_json()))
    assert (said["lost_steps"], said["lineage"]["problems"]) == (1, [])
    assert said["time_use"]["goodput"] == pytest.approx(0.3)


def test_what_the_last_attempt_did_not_save_is_lost_too(run: RunDir) -> None:
    append_json_line(run.ledger, {"time": START + 100} | start("c", 6))
    append_json_line(run.metrics, {"time": START + 110, "attempt": "c", "step": 9})
    assert [attempt.lost_steps for attempt in examine(run.path).attempts] == [1, 0, 3]


def test_steps_that_a_rollback_undid_are_lost(run: RunDir) -> None:
    append_json_line(run.ledger, {"time": START + 100} | start("c", 6))
    append_json_line(run.metrics, {"time": START + 110, "attempt": "c", "step": 11})
    append_json_line(run.ledger, {"time": START + 111, **rollback(6, (48, 88)), "step": 11, "attempt": "c"})
    last = examine(run.path).attempts[-1]
    assert (last.last_step, last.lost_steps) == (6, 5)
    append_json_line(run.metrics, {"time": START + 120, "attempt": "c", "step": 8})
    last = examine(run.path).attempts[-1]
    assert (last.last_step, last.lost_steps) == (8, 7), "what it did since is not saved yet"


def test_left_out_positions_are_named(run: RunDir) -> None:
    append_json_line(run.ledger, {"time": START + 95} | start("c", 6))
    append_json_line(run.ledger, {"time": START + 96} | rollback(6, (48, 64)))
    row = commit(8, 6, "c", first_position=64, last_position=80)
    append_json_line(run.ledger, {"time": START + 97} | row)
    text, _ = shown(run)
    assert "left out on purpose: samples 48 to 63: the loss ran away" in text
    assert "samples 0 to 79 were trained on exactly once, but for 16 that were left out on purpose" in text


def test_a_run_that_has_not_saved_yet_has_nothing_to_prove(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.log("start", attempt="a", step=0, resumed_from=None)
    text, found = shown(run)
    assert "order   no commit in the ledger" in text
    assert found.time_use is not None and "goodput 0.0% of 0s" in text


def test_a_ledger_that_does_not_add_up_ends_with_exit_code_4(run: RunDir) -> None:
    append_json_line(run.ledger, {"time": START + 95} | commit(8, 6, "b", first_position=56))
    problem = f"not exactly once: samples 48 to 55 were skipped before {folder_name(8)}"
    with pytest.raises(CheckpointError) as caught:
        shown(run)
    assert caught.value.exit_code == ExitCode.CHECKPOINT == 4
    assert f"ledger.jsonl: {problem}. The weights did not see the data as planned: say so beside" in str(caught.value)


def test_a_folder_without_a_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no ledger.jsonl; give the run_dir of a `sdtrain train`"):
        examine(tmp_path)


# A real run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Path]:
    make_latent_manifest(tmp_path, train=40, validation=8)
    with one_rank():
        yield tmp_path


@pytest.mark.engine
def test_a_real_run_in_three_attempts(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It dies at step 5, one step after a save, is asked to leave at step 7, and is then complete at step 10."""
    page = tiny_page(
        world,
        world / "manifest.json",
        trainer={"max_steps": 10},
        tracking={"mode": "offline"},
        checkpoint={"asynchronous": False},
        task={"loss_bins": 4, "timesteps": {"quasi_random": True}},
    )
    run = RunDir(world / "run")
    real = MetricsLog.log

    def after_step(step: int, act: Callable[[], object]) -> None:
        def log(self: MetricsLog, at: int, row: dict[str, Any]) -> None:
            real(self, at, row)
            if at == step and "train/loss" in row:
                act()

        monkeypatch.setattr(MetricsLog, "log", log)

    def die() -> None:
        raise RuntimeError("the node is gone")

    after_step(5, die)
    assert sdtrain("train", page) == 1
    after_step(7, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert sdtrain("train", page) == 85
    monkeypatch.setattr(MetricsLog, "log", real)
    assert sdtrain("train", page) == 0
    capsys.readouterr()

    found = examine(run.path)
    assert found.lineage.problems == ()
    assert found.lineage.commits[-1].last == 80
    assert [(one.start_step, one.last_step, one.lost_steps) for one in found.attempts] == [
        (0, 5, 1),
        (4, 7, 0),
        (7, 10, 0),
    ]
    use = found.time_use
    assert use is not None
    assert 0 < use.goodput < 1
    assert use.lost_seconds > 0
    parts = (use.useful_seconds, use.idle_seconds, use.lost_seconds, use.between_seconds, use.other_seconds)
    assert sum(parts) == pytest.approx(use.wall_seconds)

    rows = read_metrics(run.metrics)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert "train/mfu" not in rows[0], "there is no peak of a CPU"
    for row in rows:
        bins = [row[f"train/loss_bin_{index:02d}"] for index in range(4)]  # two of eight even draws in each
        assert sum(bins) / 4 == pytest.approx(row["train/loss"], rel=1e-6)
        assert 0 <= row["train/goodput"] < 1

    files = sorted(run.path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    written = [list(wandb_files.records(path)) for path in files]
    assert len(written) == 3
    identities = {record.run.run_id for part in written for record in part if record.HasField("run")}
    assert identities == {run.wandb_id.read_text().strip()}
    history = [row for path in files for row in wandb_files.history(path)]
    assert [row["_step"] for row in history] == [row["train/step"] for row in history] == list(range(1, 11))
    told = [(record.alert.title, record.alert.level) for part in written for record in part if record.HasField("alert")]
    assert told == [("run stopped: bug", "ERROR"), ("run stopped: requeue", "INFO")]

    assert sdtrain("inspect", run.path, "--audit") == 0
    assert "samples 0 to 79 were trained on exactly once" in capsys.readouterr().out
    torn = [row for row in run.ledger_rows() if row.get("step") != 4 or row["event"] != "commit"]
    run.ledger.write_text("".join(json.dumps(row) + "\n" for row in torn))
    assert sdtrain("inspect", run.path, "--audit") == 4
