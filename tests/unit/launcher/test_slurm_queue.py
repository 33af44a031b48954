"""Slurm's words and numbers, and what is said where there is no Slurm, no job and no such rank."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from launcher import slurm_queue
from launcher.site import Site
from launcher.slurm import job_of, refuse_node_local
from launcher.slurm_journal import Journal, Start, Submission, refuse_second_job, resubmission
from launcher.slurm_queue import NodeGroup, QueuedJob, ask, groups_of, node_groups, requeue, seconds_of
from launcher.slurm_watch import cancel_run, tails
from sdtrain.errors import ConfigError
from sdtrain.run_dir import Exit, RunDir


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    return Journal(run)


def program(folder: Path, name: str, text: str) -> None:
    """A stand-in for one of Slurm's commands, found first."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    return folder


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        *(("24:00:00", 86400), ("1-00:00:00", 86400), ("2-12", 216000), ("1-01:30", 91800), ("90", 5400)),
        *(("1:30", 90), ("00:02:00", 120), ("infinite", None), ("UNLIMITED", None)),
    ],
)
def test_time_limits(limit: str, seconds: int | None) -> None:
    assert seconds_of(limit) == seconds


def test_what_is_no_time_limit() -> None:
    with pytest.raises(ValueError, match="tomorrow"):
        seconds_of("tomorrow")


def test_nodes_are_read_as_sinfo_writes_them(programs: Path) -> None:
    rows = ["gpu*|62|gpu:h100:8(S:0-1)|2-00:00:00", "gpu*|2|gpu:a100:4,gpu:a30:2|2-00:00:00", "cpu|9|(null)|infinite"]
    program(programs, "sinfo", "\n".join(f"echo '{row}'" for row in rows))
    assert node_groups() == [
        NodeGroup("gpu", True, 62, 8, 172800),
        NodeGroup("gpu", True, 2, 6, 172800),
        NodeGroup("cpu", False, 9, 0, None),
    ]
    assert {group.partition for group in groups_of(None)} == {"gpu"}
    program(programs, "sinfo", "echo 'gpu|62|gpu:8|infinite'; echo 'cpu|9|(null)|infinite'")
    with pytest.raises(ConfigError, match="the cluster has no default partition; give --partition, one of cpu, gpu"):
        groups_of(None)


def test_commands_that_are_missing_fail_or_do_not_answer(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(programs, "squeue", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    with pytest.raises(ConfigError, match="squeue -j 1 failed: slurm_load_jobs error: Unable to contact"):
        ask("squeue", "-j", "1")
    program(programs, "sinfo", "sleep 5")
    monkeypatch.setattr(slurm_queue, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(ConfigError, match=r"sinfo did not answer within 0.2 s; is slurmctld up \(scontrol ping\)\?"):
        ask("sinfo")
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(
        ConfigError, match=r"sbatch is not there: run this on a login node .* with --dry-run; to try it"
    ):
        ask("sbatch")


def test_a_job_that_has_left_the_queue_is_looked_up_in_the_accounts(programs: Path) -> None:
    program(programs, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    program(programs, "sacct", "echo 'CANCELLED by 1000|None|00:05:00|01:00:00|n[1-2]|2026-11-21T10:00:00'")
    found = slurm_queue.find_job("7")
    assert found is not None and (found.state, found.is_over) == ("CANCELLED", True)
    program(programs, "sacct", "true")
    assert slurm_queue.find_job("7") is None
    program(programs, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert slurm_queue.find_job("7") is None


# Before a job ---------------------------------------------------------------------------------------------------------


def test_the_number_of_gpus_comes_from_somewhere() -> None:
    assert job_of({}, Site(gpus_per_node=4), "n", "auto").world_size == 4
    assert job_of({"gpus_per_node": 8, "nodes": 2}, Site(gpus_per_node=4), "n", "auto").world_size == 16
    with pytest.raises(ConfigError, match="--gpus-per-node is missing: give it, or gpus_per_node in the site's file"):
        job_of({}, Site(), "n", "auto")


def test_folders_of_one_node(tmp_path: Path) -> None:
    def refuse(run: str, site: Site | None = None) -> None:
        refuse_node_local(tmp_path / run, site or Site(), str(mounts))

    mounts = tmp_path / "mounts"
    table = f"/dev/vda / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\nlocal {tmp_path}/my\\040disk xfs rw 0 0\n"
    mounts.write_text(table)
    (tmp_path / "my disk").mkdir()
    refuse("run")
    refuse("my disk/run", Site(shared_folders=(tmp_path / "my disk",)))
    with pytest.raises(ConfigError, match=r"my disk/run: lies on /.*/my disk, a disk of this node \(xfs\) that other"):
        refuse("my disk/run")
    mounts.write_text(table + f"overlay {tmp_path} overlay rw 0 0\n")
    with pytest.raises(ConfigError, match=r"give a run_dir on the file system that they share, or name the folder und"):
        refuse("run")


# After a job ----------------------------------------------------------------------------------------------------------


def test_a_run_that_never_was_a_job(journal: Journal) -> None:
    with pytest.raises(ConfigError, match=r"no Slurm job of this run is known .* submit it with: sdtrain-launch slurm"):
        resubmission(journal, {})
    with pytest.raises(ConfigError, match=r"no Slurm job of this run is known .* is not there\); nothing to cancel"):
        cancel_run(journal, now=False)
    with pytest.raises(ConfigError, match="no Slurm job of this run has started yet"):
        list(tails(journal, None, 10))


def test_a_run_has_one_job_at_a_time(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = {"8": QueuedJob("PENDING", "Resources", "", "", "", "")}
    monkeypatch.setattr("launcher.slurm_journal.find_job", jobs.get)
    refuse_second_job(journal)
    journal.add("submit", Submission("7", "/home/me", "train.yaml", [], {}))
    refuse_second_job(journal)
    journal.add("submit", Submission("8", "/home/me", "train.yaml", [], {}))
    with pytest.raises(
        ConfigError, match="its job 8 is PENDING; it goes on by itself, or end it first with: sdtrain-l"
    ):
        refuse_second_job(journal)
    jobs["8"] = QueuedJob("FAILED", "NonZeroExitCode", "", "", "", "")
    refuse_second_job(journal)


def test_a_resubmission_takes_the_stored_page_once_there_is_one(journal: Journal) -> None:
    home = str(journal.run_dir.path)
    first = Submission("7", home, "train.yaml", ["seed=3"], {"nodes": 8, "gpus_per_node": 8, "mode": "srun"})
    journal.add("submit", first)
    again = resubmission(journal, {"nodes": 4})
    assert (again.config, again.overrides, again.options["nodes"]) == ("train.yaml", ["seed=3"], 4)
    journal.run_dir.config.write_text("seed: 3\n")
    again = resubmission(journal, {})
    assert again.overrides == [f"run_dir={journal.run_dir.path}"]
    assert (again.config, again.folder, again.options) == (str(journal.run_dir.config), home, first.options)


def test_a_resubmission_from_a_folder_that_is_gone(journal: Journal) -> None:
    journal.add("submit", Submission("7", "/home/gone", "train.yaml", [], {}))
    with pytest.raises(
        ConfigError, match=r"was submitted from /home/gone, which is gone, .* submit it with: sdtrain-la"
    ):
        resubmission(journal, {})


def test_a_job_that_was_submitted_by_hand_is_resubmitted(journal: Journal) -> None:
    journal.add("start", Start("7", 0, "slurm-7.0", 4, 2, None, []))
    with pytest.raises(ConfigError, match="no Slurm job of this run is known"):
        resubmission(journal, {})
    journal.run_dir.config.write_text("seed: 3\n")
    assert resubmission(journal, {}).options == {"nodes": 2, "gpus_per_node": 4}


def test_the_logs_of_the_rank_to_blame_come_first(journal: Journal) -> None:
    journal.add("start", Start("7", 1, "slurm-7.1", 2, 2, None, []))
    folder = journal.folder / "slurm-7.1"
    folder.mkdir()
    (journal.folder / "slurm-7.out").write_text("a\nb\nc\n")
    (folder / "rank-0.log").write_text("zero\n")
    (folder / "rank-3.log").write_text("three\n")
    assert [(path.name, text) for path, text in tails(journal, None, 2)] == [
        ("slurm-7.out", "b\nc"),
        ("rank-0.log", "zero"),
    ]
    journal.run_dir.write_exit(Exit(6, "rank 3 died", 4, 3, "a"))
    assert [text for _, text in tails(journal, None, 2)] == ["b\nc", "three"]
    with pytest.raises(ConfigError, match="--rank 4: job 7 has ranks 0 to 3"):
        list(tails(journal, 4, 2))
    (folder / "rank-3.log").unlink()
    (folder / "node-1.log").write_text("agent\n")
    assert [path.name for path, _ in tails(journal, 3, 2)] == ["slurm-7.out", "node-1.log"]


@pytest.mark.parametrize(
    ("seconds", "calls"), [(0, "requeue 7\n"), (240, "requeue 7\nupdate jobid=7 StartTime=now+240\n")]
)
def test_a_requeued_job_may_have_to_wait(programs: Path, tmp_path: Path, seconds: int, calls: str) -> None:
    """The wait is asked for after the requeue, which tells this very process to end."""
    program(programs, "scontrol", f"echo $* >> {tmp_path}/calls; [ $1 = update ] || kill -TERM $PPID")
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        requeue("7", delay_seconds=seconds)
        assert (signal.getsignal(signal.SIGTERM) is signal.SIG_IGN) is (seconds > 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "calls").read_text() == calls
