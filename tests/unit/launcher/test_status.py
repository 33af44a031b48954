import json

import pytest

from launcher.slurm_journal import Journal, Submission
from launcher.slurm_queue import QueuedJob
from launcher.status import exit_name, read_status, render
from sdtrain.errors import ConfigError
from sdtrain.run_dir import Exit, RunDir, append_json_line


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    return run


def test_a_finished_run(run):
    run.write_exit(Exit(0, "all 200 steps done", 200, 0, "a1"))
    for step in (90, 100, 200, 1000):
        (run.checkpoints / f"step-{step}").mkdir(parents=True)
    (run.checkpoints / "step-3000.tmp-1").mkdir()
    append_json_line(run.metrics, {"step": 190, "train/loss": 0.5})
    append_json_line(run.metrics, {"step": 200, "train/loss": 0.123456789})
    append_json_line(run.metrics, {"attempt": "a2", "resumed_step": 200})  # marks a start, holds no figures
    with run.metrics.open("a") as file:
        file.write('{"step": 210, "tra')  # torn by a kill
    status = read_status(run.path)
    assert status.exit is not None and status.exit.step == 200
    assert status.newest_checkpoint == run.checkpoints / "step-1000"  # by number, not by spelling
    assert status.metrics == {"step": 200, "train/loss": 0.123456789}
    lines = render(status).splitlines()
    assert lines[0] == f"run         {run.path}"
    assert lines[1].startswith("last exit   code 0 (done) at step 200, 20")
    assert lines[1].endswith("UTC: all 200 steps done")
    assert lines[3] == "metrics     step=200  train/loss=0.123457"


def test_a_run_that_left_no_word(run):
    append_json_line(run.ledger, {"event": "start"})
    status = read_status(run.path)
    assert (status.exit, status.newest_checkpoint, status.metrics) == (None, None, None)
    text = render(status)
    assert "last exit   no word: still running, or crashed" in text
    assert "checkpoint  none" in text and "metrics     none logged" in text


def test_json_holds_the_same_facts(run):
    run.write_exit(Exit(85, "", 3, 0, "a1"))
    found = json.loads(json.dumps(read_status(run.path).as_json()))
    assert found["exit"]["code"] == 85
    assert found["newest_checkpoint"] is None and found["metrics"] is None
    assert found["run"] == str(run.path)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"not a run folder \(none of config.yaml, metrics.jsonl, .* is there\); give the"
    ):
        read_status(tmp_path)


def test_exit_names():
    assert [exit_name(code) for code in (5, 7, 85, 42)] == ["diverged", "no progress", "requeue", "unknown"]


def test_the_progress_of_a_run_that_was_restarted(run):
    for attempt in ("a1", "a2"):
        append_json_line(run.ledger, {"event": "start", "attempt": attempt})
    text = render(read_status(run.path))
    assert "progress    no step logged yet, 1 restarts" in text
    figures = {"train/loss": 0.5, "train/images_per_second": 812.34, "train/eta_seconds": 93784.2}
    append_json_line(run.metrics, {"step": 190, **figures})
    append_json_line(run.metrics, {"step": 190, "train/checkpoint_stall_seconds": 0.1})
    text = render(read_status(run.path))
    assert "progress    step 190, loss 0.5000, 812.3 images/s, 1 restarts, ETA 1 day, 2:03:04" in text
    assert "\njob" not in text
    run.write_exit(Exit(0, "complete", 190, 0, "a2"))
    append_json_line(run.metrics, {"step": 191, "train/denoiser/loss": 0.25, "train/images_per_second": 1.0})
    assert render(read_status(run.path)).endswith("step 191, denoiser/loss 0.2500, 1.0 images/s, 1 restarts")


@pytest.mark.parametrize(
    ("queued", "text"),
    [
        (
            ("PENDING", "Resources", "0:00", "1:00:00", "", "2026-11-21T12:00:00"),
            "PENDING, Resources, starts about 2026",
        ),
        (("RUNNING", "None", "5:00", "1:00:00", "n[1-2]", "2026"), "RUNNING, for 5:00 of 1:00:00, on n[1-2]"),
        (("CANCELLED", "None", "5:00", "1:00:00", "", ""), "CANCELLED"),
        (None, "not known to a scheduler here"),
    ],
)
def test_the_job_of_a_run(run, monkeypatch, queued, text):
    Journal(run).add("submit", Submission("17", "/home/me", "train.yaml", [], {}))
    append_json_line(run.ledger, {"event": "start"})
    monkeypatch.setattr("launcher.status.find_job", lambda job: None if queued is None else QueuedJob(*queued))
    status = read_status(run.path)
    assert f"job         17: {text}" in render(status)
    assert status.as_json()["job"] == "17"


def test_a_run_is_read_without_slurm_too(run, monkeypatch):
    Journal(run).add("submit", Submission("17", "/home/me", "train.yaml", [], {}))
    monkeypatch.setenv("PATH", "")
    assert "job         17: not known to a scheduler here" in render(read_status(run.path))
