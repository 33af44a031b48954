"""A real Slurm of two nodes on this machine, and runs that are submitted to it by our own commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from launcher.slurm_journal import Journal
from sdtrain.run_dir import Exit, RunDir, read_json_lines
from tests.support import tiny_page

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "slurm" / "local_cluster"
MISSING_PACKAGES = 9
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@contextmanager
def local_cluster(folder: Path) -> Iterator[None]:
    """Our scripts start it, and stop it however the tests ended; SLURM_CONF leads to it in between."""
    subprocess.run([SCRIPTS / "start.sh", folder], check=True, stdout=subprocess.DEVNULL)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield
    finally:
        del os.environ["SLURM_CONF"]
        subprocess.run([SCRIPTS / "stop.sh", folder], check=True)


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def wait_until(met: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, f"{what} within {seconds:g} s"
        time.sleep(0.2)


@dataclass
class ClusterJob:
    """A job that our own commands have submitted."""

    folder: Path
    site: Path
    job: str = field(default="", init=False)

    @property
    def run(self) -> RunDir:
        """The folder that it works in."""
        return RunDir(self.folder / "run")

    def launch(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """One of our own commands."""
        program = Path(sys.executable).with_name("sdtrain-launch")
        return subprocess.run([program, *arguments], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)

    def resubmit(self, *arguments: str) -> None:
        done = self.launch("resume", str(self.run.path), *arguments)
        assert done.returncode == 0, done.stderr
        self.job = str(Journal(self.run).newest_job())

    def state(self) -> str:
        return slurm("squeue", "--noheader", "--states=all", f"--jobs={self.job}", "--format=%T")

    def restarts(self) -> int:
        return int(slurm("squeue", "--noheader", "--states=all", f"--jobs={self.job}", "--Format=RestartCnt"))

    def hurry(self) -> None:
        """Start a requeued job, which waits for half a minute otherwise.

        Not within three seconds: nodes have revoked what lets a job of this number start, by clocks of whole seconds.
        """
        if self.state() == "PENDING":
            time.sleep(3)
            subprocess.run(["scontrol", "update", f"jobid={self.job}", "StartTime=now"], capture_output=True)

    def wait_for_end(self, *, seconds: float = 240) -> str:
        """The job's last state; it is hurried through its requeues."""

        def has_ended() -> bool:
            self.hurry()
            return self.state() in ENDED

        wait_until(has_ended, seconds, f"the end: {self.state()}")
        assert self.processes() == [], "nothing may stay behind"
        return self.state()

    def exit_code(self) -> int:
        """Of the batch script."""
        for word in slurm("scontrol", "show", "job", self.job).split():
            if word.startswith("ExitCode="):
                return int(word.removeprefix("ExitCode=").split(":")[0])
        raise AssertionError("the scheduler has forgotten this job")

    def said(self) -> str:
        """What the batch script and the ranks said."""
        logs = self.run.path / "logs"
        files = [*sorted(logs.glob("slurm-*.out")), *sorted(logs.glob("slurm-*/*.log"))]
        return "\n".join(f"{file.name}: {file.read_text(errors='replace')[-3000:]}" for file in files)

    def processes(self) -> list[psutil.Process]:
        """Everything of this job that is alive, settled or not."""

        def alive() -> list[psutil.Process]:
            found = []
            for one in psutil.process_iter():
                try:
                    environment = one.environ()
                    of_job = environment.get("SLURM_JOB_ID") == self.job
                    if of_job and environment.get("SLURM_CONF") == os.environ["SLURM_CONF"]:
                        found.append(one)
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            return found

        end = time.monotonic() + 10
        while (found := alive()) and time.monotonic() < end:
            time.sleep(0.2)
        return found


@dataclass
class ClusterRun(ClusterJob):
    """A run whose ranks are tasks of a job."""

    manifest: Path

    def page(self, **sections: Any) -> Path:
        return tiny_page(self.folder, self.manifest, **sections)

    def submit(self, page: Path, *arguments: str) -> None:
        options = ("--nodes", "2", "--gpus-per-node", "1", "--time", "01:00:00", "--site", str(self.site))
        done = self.launch("slurm", str(page), *options, *arguments)
        assert done.returncode == 0, done.stderr
        self.job = str(Journal(self.run).newest_job())

    def wait_for_step(self, step: int, *, seconds: float = 180) -> None:
        def is_there() -> bool:
            assert self.state() not in ENDED, self.said()
            return max((row.get("step", 0) for row in read_json_lines(self.run.metrics)), default=0) >= step

        wait_until(is_there, seconds, f"step {step}: {self.said()}")

    def word(self) -> Exit:
        left = self.run.read_exit()
        assert left is not None, self.said()
        return left

    def events(self, event: str) -> list[dict[str, Any]]:
        return [row for row in self.run.ledger_rows() if row["event"] == event]

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        for one in psutil.process_iter():
            try:
                environment, command = one.environ(), one.cmdline()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            is_task = environment.get("SLURM_JOB_ID") == self.job and environment.get("RANK") == str(number)
            if is_task and "train" in command and "sdtrain.training.watchdog" not in command:
                return one
        raise AssertionError(f"rank {number} of job {self.job} is not alive")

    def kill(self, number: int, sent: signal.Signals) -> None:
        self.rank(number).send_signal(sent)
