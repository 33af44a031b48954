"""Runs on a real cluster as an operator has them: submitted, watched, told to leave, requeued, cancelled, resumed.

The tests without the mark `long` are the short form.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sdtrain.errors import ExitCode
from tests.slurm.cluster import REPOSITORY, SCRIPTS, ClusterRun, slurm

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

NewRun = Callable[[str], ClusterRun]
SLOW = {"batch_size": 16}


def test_a_job_is_told_to_leave_and_goes_on_to_its_last_step(new_run: NewRun) -> None:
    """One task per GPU on two nodes; watched meanwhile."""
    run = new_run("short")
    run.submit(run.page(data=SLOW, trainer={"max_steps": 8}))
    run.wait_for_step(2)
    status = run.launch("status", str(run.run.path)).stdout
    assert f"job         {run.job}: RUNNING, for 0:" in status and "on n[1-2]" in status
    assert "images/s, 0 restarts, ETA " in status
    refused = run.launch("resume", str(run.run.path))
    assert refused.returncode == ExitCode.CONFIG
    assert f"its job {run.job} is RUNNING; it goes on by itself, or end it first with: sdtrain-launch" in refused.stderr
    slurm("scancel", "--signal=TERM", run.job)
    assert run.wait_for_end() == "COMPLETED", run.said()
    assert (run.word().code, run.word().step, run.restarts()) == (0, 8, 1)
    told, again = run.events("end")[0], run.events("start")[1]
    assert (told["code"], told["reason"].split(":")[0]) == (ExitCode.REQUEUE, "SIGTERM")
    assert again["step"] == told["step"] > 0 and again["world_size"] == 2
    logs = run.launch("logs", str(run.run.path), "--rank", "0").stdout
    assert f"slurm-{run.job}.1/rank-0.log <==\n" in logs and "ended with code 0 at step 8: complete" in logs
    assert "1 restarts" in run.launch("status", str(run.run.path)).stdout
    assert "is COMPLETED already; nothing to cancel" in run.launch("cancel", str(run.run.path)).stderr


@pytest.mark.long
def test_a_cancelled_job_saves_and_its_run_is_resumed_on_one_node(new_run: NewRun) -> None:
    run = new_run("cancelled")
    run.submit(run.page(data=SLOW, trainer={"max_steps": 12}))
    run.wait_for_step(2)
    first = run.job
    assert "saves after its next step and ends" in run.launch("cancel", str(run.run.path)).stdout
    assert run.wait_for_end() == "COMPLETED"
    assert (run.word().code, run.restarts()) == (0, 0)
    assert run.word().reason.startswith("STOP file: saved and stopped")
    run.resubmit("--nodes", "1")
    assert run.job != first
    assert run.wait_for_end() == "COMPLETED", run.said()
    assert (run.word().reason, run.word().step) == ("complete", 12)
    assert [row["world_size"] for row in run.events("start")] == [2, 1]


@pytest.mark.long
def test_a_waiting_job_is_cancelled_at_once(new_run: NewRun) -> None:
    run = new_run("waiting")
    run.submit(run.page())
    slurm("scontrol", "hold", run.job)
    if run.state() == "PENDING":
        assert "cancelled; go on with" in run.launch("cancel", str(run.run.path)).stdout
    else:
        run.launch("cancel", str(run.run.path), "--now")
    assert run.wait_for_end() == "CANCELLED"


@pytest.mark.long
@pytest.mark.parametrize("mode", ["srun", "torchrun"])
def test_the_script_is_submitted_by_hand(new_run: NewRun, mode: str) -> None:
    """Without our launcher, on two nodes with two ranks each."""
    run = new_run("by-hand")
    page = run.page(trainer={"max_steps": 2})
    variables = f"SDTRAIN_MODE={mode},SDTRAIN_MASTER_ADDR=127.0.0.1,DS_ACCELERATOR=cpu,OMP_NUM_THREADS=1"
    run.job = slurm(
        *("sbatch", "--parsable", f"--chdir={REPOSITORY}", f"--output={run.folder}/by-hand.log", "--nodes=2"),
        *("--gpus-per-node=2", "--ntasks-per-node=2", f"--export=ALL,{variables}"),
        *(str(REPOSITORY / "slurm" / "train.sbatch"), str(page), "trainer.max_steps=3"),
    )
    assert run.wait_for_end() == "COMPLETED", run.said() + (run.folder / "by-hand.log").read_text()
    assert (run.word().code, run.word().step) == (0, 3)
    assert [row["world_size"] for row in run.events("start")] == [4]


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--partition", "mian"],
            "--partition mian: the cluster has no such partition, only main, urgent; did you mean",
        ),
        (
            ["--gpus-per-node", "16", "data.batch_size=32"],
            "--nodes 1 --gpus-per-node 16: partition main has 0 such nodes (nodes with GPUs",
        ),
        (["--nodes", "4"], "--nodes 4 --gpus-per-node 1: partition main has 2 such nodes (nodes with GPUs on each: 2"),
        (["--time", "tomorrow"], "--time tomorrow: give HH:MM:SS or D-HH:MM:SS, such as 24:00:00 or 2-00:00:00"),
        (["--time", "00:02:00"], "--time 00:02:00: a job is told to leave 120 s before the limit (save_seconds"),
        (
            ["--time", "9-00:00:00", "--partition", "urgent"],
            "--time 9-00:00:00: partition urgent ends jobs after 24:00:",
        ),
        (["--nodes", "2", "--gpus-per-node", "5"], "data.batch_size = 8 does not split into micro-batches"),
        (["trainer.max_stepz=1"], "trainer.max_stepz"),
        (["run_dir=/proc/run"], "run_dir = /proc/run: /proc/run/logs/slurm.jsonl cannot be written: No such file"),
        (["--constraint", "no-such-feature"], "sbatch --parsable failed: sbatch: error: Batch job submission failed: "),
    ],
)
def test_what_cannot_run_is_not_submitted(new_run: NewRun, arguments: list[str], message: str) -> None:
    run = new_run("refused")
    options = ("--site", str(run.site), "--time", "01:00:00", "--gpus-per-node", "1")
    done = run.launch("slurm", str(run.page()), *options, *arguments)
    assert done.returncode in (ExitCode.CONFIG, ExitCode.STORAGE)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert slurm("squeue", "--noheader", "--states=pending,running") == ""


def test_a_run_folder_of_one_node_is_not_submitted(new_run: NewRun, tmp_path: Path) -> None:
    run = new_run("local")
    site = tmp_path / "site.yaml"
    site.write_text("gpus_per_node: 1\n")
    done = run.launch("slurm", str(run.page()), "--site", str(site), "run_dir=/dev/shm/sdtrain-run")
    assert done.returncode == ExitCode.CONFIG
    assert "run_dir = /dev/shm/sdtrain-run: lies on /dev/shm, a disk of this node (tmpfs) that other" in done.stderr
    site.write_text("gpus_per_node: 1\nshared_folders: [/dev]\npartition: nowhere\n")
    done = run.launch("slurm", str(run.page()), "--site", str(site), "run_dir=/dev/shm/sdtrain-run")
    assert "the cluster has no such partition" in done.stderr, "it got as far as this"


@pytest.mark.long
def test_a_process_that_is_left_is_named(tmp_path: Path) -> None:
    """Processes that start.sh did not start are shown, not ended."""
    (tmp_path / "pids").touch()
    left = subprocess.Popen(["sleep", "100"], env={**os.environ, "SDTRAIN_LOCAL_CLUSTER": str(tmp_path)})
    try:
        stopped = subprocess.run([SCRIPTS / "stop.sh", tmp_path], capture_output=True, text=True)
        assert stopped.returncode == 1
        assert "stop.sh: still there:" in stopped.stderr and f"{left.pid}" in stopped.stderr
        assert left.poll() is None
    finally:
        left.kill()
        left.wait()


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path: Path) -> None:
    for needed in ("bash", "env", "realpath", "id"):
        (tmp_path / needed).symlink_to(shutil.which(needed) or needed)
    script = (SCRIPTS / "start.sh").read_text().replace("/usr/sbin", "/nowhere")
    (tmp_path / "start.sh").write_text(script)
    command = [str(tmp_path / "bash"), str(tmp_path / "start.sh"), str(tmp_path / "cluster")]
    started = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert started.returncode == 9
    assert started.stderr == (
        "start.sh: slurmctld is missing; install Slurm with: "
        "apt-get update && apt-get install --yes slurmctld slurmd slurm-client munge\n"
    )


def test_the_cluster_is_not_started_twice_and_nothing_stops_what_is_not_there(cluster: None, tmp_path: Path) -> None:
    stopped = subprocess.run([SCRIPTS / "stop.sh", tmp_path], capture_output=True, text=True)
    assert stopped.returncode == 2
    assert f"stop.sh: {tmp_path}/pids is not there: no cluster was started in this folder" in stopped.stderr
    (tmp_path / "pids").touch()
    started = subprocess.run([SCRIPTS / "start.sh", tmp_path], capture_output=True, text=True)
    assert started.returncode == 9
    assert "a cluster was started here; stop it first" in started.stderr
