"""What happens to jobs on a real cluster: every one goes on by itself to the same bits, or stops and says why."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
import torch

from sdtrain.errors import ExitCode
from tests.slurm.cluster import ClusterRun, slurm, wait_until

pytestmark = [pytest.mark.heavy, pytest.mark.long, pytest.mark.timeout(600)]

STEPS = 24
NewRun = Callable[[str], ClusterRun]


def page_of(run: ClusterRun, **trainer: object) -> Path:
    """A run of two nodes that takes long enough to be disturbed, and commits every fourth step."""
    settings = {"max_steps": STEPS, "timeout_seconds": 120.0, "hang_timeout_seconds": 8.0, **trainer}
    return run.page(data={"batch_size": 16}, trainer=settings, checkpoint={"every_steps": 4, "keep_last": 2})


def final_state(run: ClusterRun) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    folder = run.run.checkpoints / f"step-{STEPS:08d}"
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= {f"{file.name}/{name}": tensor for name, tensor in load_file(file).items()}
    return state


@pytest.fixture(scope="module")
def whole(new_run: NewRun) -> dict[str, torch.Tensor]:
    """What a run that nobody disturbs ends with."""
    run = new_run("whole")
    run.submit(page_of(run))
    assert run.wait_for_end() == "COMPLETED", run.said()
    assert run.restarts() == 0
    return final_state(run)


def assert_finished_alike(run: ClusterRun, whole: dict[str, torch.Tensor], *, restarts: int = 1) -> None:
    assert run.wait_for_end() == "COMPLETED", run.said()
    assert (run.word().code, run.word().step, run.restarts()) == (0, STEPS, restarts), run.said()
    found = final_state(run)
    assert found.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(whole[name], found[name])] == []


def assert_saved_and_requeued(run: ClusterRun, sign: str) -> None:
    """The first attempt saved where it was told to, and the second went on from there."""
    ended, started = run.events("end")[0], run.events("start")[1]
    assert (ended["code"], ended["reason"].split(":")[0]) == (ExitCode.REQUEUE, sign)
    assert started["step"] == ended["step"] > 0


# It goes on by itself -------------------------------------------------------------------------------------------------


def test_told_ahead_of_the_time_limit(new_run: NewRun, whole: dict[str, torch.Tensor]) -> None:
    """The scheduler itself sends USR1 when little of a job's time is left."""
    run = new_run("limit")
    run.submit(page_of(run))
    run.wait_for_step(2)
    slurm("scontrol", "update", f"jobid={run.job}", "TimeLimit=2")  # minutes; save_seconds is 120
    wait_until(lambda: bool(run.events("end")), 60, "USR1 is heard")
    slurm("scontrol", "update", f"jobid={run.job}", "TimeLimit=60")
    assert_finished_alike(run, whole)
    assert_saved_and_requeued(run, "SIGUSR1")


@pytest.mark.parametrize("mode", ["srun", "torchrun"])
def test_told_by_scancel_to_save_and_leave(new_run: NewRun, whole: dict[str, torch.Tensor], mode: str) -> None:
    run = new_run("term")
    run.submit(page_of(run), "--mode", mode)
    run.wait_for_step(2)
    slurm("scancel", "--signal=TERM", run.job)
    assert_finished_alike(run, whole)
    assert_saved_and_requeued(run, "SIGTERM")


def test_told_through_the_batch_script(new_run: NewRun, whole: dict[str, torch.Tensor]) -> None:
    """What reaches the script alone, it passes on."""
    run = new_run("batch")
    run.submit(page_of(run))
    run.wait_for_step(2)
    slurm("scancel", "--batch", "--signal=TERM", run.job)
    assert_finished_alike(run, whole)
    assert_saved_and_requeued(run, "SIGUSR1")


def test_preempted_by_a_more_urgent_job(new_run: NewRun, whole: dict[str, torch.Tensor]) -> None:
    run = new_run("preempted")
    run.submit(page_of(run))
    run.wait_for_step(2)
    wish = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--parsable", "--wrap=sleep 2")
    urgent = slurm("sbatch", *wish)
    wait_until(lambda: slurm("squeue", "-h", "--states=all", f"-j{urgent}", "-o%T") == "COMPLETED", 60, "it gets room")
    assert_finished_alike(run, whole)
    assert_saved_and_requeued(run, "SIGTERM")


def test_a_node_goes_down(new_run: NewRun, whole: dict[str, torch.Tensor]) -> None:
    """The scheduler requeues; what was not committed is trained again."""
    run = new_run("down")
    run.submit(page_of(run))
    run.wait_for_step(6)
    slurm("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    wait_until(lambda: run.state() == "PENDING", 60, "the job is back in the queue")
    resume = ("scontrol", "update", "nodename=n2", "state=resume")  # refused where its slurmd has registered again
    subprocess.run(resume, capture_output=True)
    assert_finished_alike(run, whole)
    assert run.events("start")[1]["resumed_from"] is not None


@pytest.mark.parametrize("mode", ["srun", "torchrun"])
def test_a_rank_is_killed(new_run: NewRun, whole: dict[str, torch.Tensor], mode: str) -> None:
    run = new_run("killed")
    run.submit(page_of(run), "--mode", mode)
    run.wait_for_step(6)
    run.kill(1, signal.SIGKILL)
    assert_finished_alike(run, whole)
    ended = run.events("end")[0]
    assert (ended["code"], ended["rank"]) == (ExitCode.HANG, 1)
    assert ended["reason"].startswith("rank 1 on n2 died in phase ")


def test_a_rank_hangs(new_run: NewRun, whole: dict[str, torch.Tensor]) -> None:
    run = new_run("hangs")
    run.submit(page_of(run))
    run.wait_for_step(6)
    run.kill(1, signal.SIGSTOP)
    assert_finished_alike(run, whole)
    ended = run.events("end")[0]
    assert (ended["code"], ended["rank"]) == (ExitCode.HANG, 1)
    assert ended["reason"].startswith("hang: rank 1 on n2 is stopped (state T")


def test_an_earlier_start_of_the_job_is_still_alive(new_run: NewRun) -> None:
    """As after a node was cut off from the scheduler: the job comes back later instead of ending."""
    run = new_run("alive")
    page = page_of(run, max_steps=4)
    run.run.path.mkdir()
    run.run.lease.write_text("{}")
    with subprocess.Popen([sys.executable, "-c", HOLDER, run.run.lease], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            run.submit(page)
            signed = {"attempt": "a", "host": "n9", "pid": holder.pid, "since": 0, "job": run.job}
            run.run.lease.write_text(json.dumps(signed))
            wait_until(lambda: run.state() == "PENDING" and run.restarts() == 1, 150, "the job is back in the queue")
        finally:
            holder.kill()
    begins = datetime.fromisoformat(slurm("squeue", "--noheader", f"--jobs={run.job}", "--format=%S"))
    assert 180 < (begins - datetime.now()).total_seconds() <= 240
    assert run.wait_for_end() == "COMPLETED", run.said()
    assert (run.word().code, run.word().step, run.restarts()) == (0, 4, 1)
    assert f"attempt a is alive here, as process {holder.pid} of n9 since " in run.said()
    assert "requeued, to go on from the newest checkpoint in 4 minutes or later" in run.said()


# It stops, and says why -----------------------------------------------------------------------------------------------


def test_a_sample_that_always_crashes_stops_after_three_starts(new_run: NewRun, tmp_path: Path) -> None:
    """Native code that dies of one sample: no requeue helps, and the job does not spin for ever."""
    run = new_run("poison")
    (tmp_path / "sitecustomize.py").write_text(POISON)
    site = json.loads(run.site.read_text())
    site["environment"]["PYTHONPATH"] = str(tmp_path)
    run.site = tmp_path / "site.yaml"
    run.site.write_text(json.dumps(site))
    run.submit(page_of(run))
    assert run.wait_for_end(seconds=400) == "FAILED", run.said()
    assert (run.exit_code(), run.restarts(), len(run.events("start"))) == (ExitCode.NO_PROGRESS, 2, 3)
    assert "not requeued: 3 starts in a row made no new checkpoint" in run.said()
    assert "died in phase data of step 1 without a word" in run.word().reason


def test_a_job_is_restarted_no_more_often_than_allowed(new_run: NewRun) -> None:
    run = new_run("capped")
    run.submit(page_of(run), "--max-restarts", "0")
    run.wait_for_step(2)
    slurm("scancel", "--signal=TERM", run.job)
    assert run.wait_for_end() == "FAILED"
    assert (run.exit_code(), run.word().code, run.restarts()) == (85, 85, 0)
    assert "not requeued: job had 0 restarts, and --max-restarts is 0. Go on with: sdtrain-launch resume" in run.said()


def test_who_cancels_a_job_means_it(new_run: NewRun) -> None:
    run = new_run("cancelled")
    run.submit(page_of(run))
    run.wait_for_step(2)
    assert run.launch("cancel", str(run.run.path), "--now").returncode == 0
    assert run.wait_for_end() == "CANCELLED"
    assert run.restarts() == 0
    assert f"to the scheduler job {run.job} is" in run.said()


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "r+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""
POISON = """
import os, signal, sys
if "train" in sys.orig_argv:
    from sdtrain.data.dataset import ShardDataset
    read = ShardDataset.__getitem__
    def poisoned(self, position, *rest):
        if position == 17:
            os.kill(os.getpid(), signal.SIGSEGV)
        return read(self, position, *rest)
    ShardDataset.__getitem__ = poisoned
"""
