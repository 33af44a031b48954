"""Two real ranks of which one stops, sleeps for ever or dies: all is over in time, named, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from sdtrain.errors import ExitCode
from sdtrain.run_dir import Exit, RunDir, read_json_lines
from sdtrain.training.watchdog import OVER_SECONDS, SETTLE_SECONDS
from tests.support import make_latent_manifest, tiny_page

pytestmark = pytest.mark.heavy

HANG_SECONDS = 6.0
LEAVING_SECONDS = max(SETTLE_SECONDS, OVER_SECONDS - HANG_SECONDS) + 8.0
"""What a hang costs beyond its limit: the verdict, and processes that end on a busy machine."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_latent_manifest(tmp_path_factory.mktemp("world"), train=40, validation=8)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


@dataclass
class Launched:
    """`sdtrain-launch torchrun` on two ranks, and everything that it started."""

    launcher: subprocess.Popen[str]
    run: RunDir

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + 150
        while max((row.get("step", 0) for row in read_json_lines(self.run.metrics)), default=0) < step:
            assert self.launcher.poll() is None, "the run ended before it got there"
            assert time.monotonic() < end, "the run did not get going"
            time.sleep(0.05)

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.launcher.pid).children(recursive=True)

    def rank(self, number: int) -> int:
        """Process id of a rank."""
        [found] = [
            one.pid for one in self.processes() if "train" in one.cmdline() and one.environ().get("RANK") == str(number)
        ]
        return found

    def end(self, timeout: float) -> tuple[int, Exit, str]:
        """The launcher's exit code, the word, and what was said; all processes must be gone."""
        everyone = self.processes()
        _, said = self.launcher.communicate(timeout=timeout)
        _, left = psutil.wait_procs(everyone, timeout=5)
        assert left == [], f"still there: {[one.cmdline() for one in left]}"
        word = self.run.read_exit()
        assert word is not None, said[-3000:]
        return self.launcher.returncode, word, said


Launch = Callable[..., Launched]


@pytest.fixture
def launch(manifest: Path, tmp_path: Path, run: RunDir) -> Iterator[Launch]:
    jobs: list[Launched] = []

    def start(patch: str = "") -> Launched:
        """Start; `patch` is Python that every rank runs before it trains."""
        trainer = {"max_steps": 5000, "timeout_seconds": 60.0, "hang_timeout_seconds": HANG_SECONDS}
        page = tiny_page(tmp_path, manifest, trainer=trainer, checkpoint={"every_steps": 1000})
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if patch:
            (tmp_path / "sitecustomize.py").write_text(patch)
            environment["PYTHONPATH"] = str(tmp_path)
        command = [sys.executable, "-c", "from launcher.cli import main; main()", "torchrun", str(page), "--nproc", "2"]
        launcher = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        )
        jobs.append(Launched(launcher, run))
        return jobs[-1]

    yield start
    for job in jobs:  # what a failed test leaves
        if job.launcher.poll() is None:
            for one in [*job.processes(), job.launcher]:
                one.kill()
            job.launcher.communicate()


def test_a_stopped_rank_is_named_and_all_is_over_within_the_limit(launch: Launch, run: RunDir) -> None:
    job = launch()
    job.wait_for_step(3)
    os.kill(job.rank(1), signal.SIGSTOP)
    stopped = time.monotonic()
    code, word, said = job.end(timeout=HANG_SECONDS + LEAVING_SECONDS)
    assert time.monotonic() - stopped < HANG_SECONDS + LEAVING_SECONDS
    assert code == ExitCode.HANG, said[-3000:]
    assert (word.code, word.rank) == (ExitCode.HANG, 1)
    assert word.reason.startswith("hang: rank 1 on ")
    assert " is stopped (state T: SIGSTOP or a suspended job) in phase " in word.reason
    assert "; rank 0 waits in phase " in word.reason
    assert f"ended with code 6 at step {word.step}: hang: rank 1 on" in said
    stacks = (run.stacks / word.attempt / "rank-0.txt").read_text()
    assert 'trainer.py", line' in stacks and " in fit\n" in stacks
    assert word.step >= 3


SLEEPER = """
import os, sys, threading, time

def patch():
    while "sdtrain.training.run" not in sys.modules:
        time.sleep(0.01)
    from sdtrain.tasks.latent_diffusion import LatentDiffusionTask
    real = LatentDiffusionTask.loss
    def loss(self, name, batch, step):
        if step == 3 and os.environ["RANK"] == "1":
            time.sleep(10_000)
        return real(self, name, batch, step)
    LatentDiffusionTask.loss = loss

if os.environ.get("RANK") and "train" in sys.orig_argv:
    threading.Thread(target=patch, daemon=True).start()
"""


@pytest.mark.long
def test_a_rank_that_sleeps_in_its_loss_is_the_late_one(launch: Launch, run: RunDir) -> None:
    job = launch(SLEEPER)
    job.wait_for_step(3)
    slept = time.monotonic()
    code, word, said = job.end(timeout=HANG_SECONDS + LEAVING_SECONDS)
    assert time.monotonic() - slept < HANG_SECONDS + LEAVING_SECONDS
    assert (code, word.code, word.rank, word.step) == (6, 6, 1, 3), said[-3000:]
    assert " stands still in phase forward of step 3; rank 0 waits in phase " in word.reason
    assert " in loss\n" in (run.stacks / word.attempt / "rank-1.txt").read_text()
    assert "distributed_c10d.py" in (run.stacks / word.attempt / "rank-0.txt").read_text()


@pytest.mark.long
def test_a_killed_rank_is_named_at_once(launch: Launch) -> None:
    job = launch()
    job.wait_for_step(3)
    os.kill(job.rank(1), signal.SIGKILL)
    killed = time.monotonic()
    code, word, _ = job.end(timeout=30)
    assert time.monotonic() - killed < 15
    assert (code, word.code, word.rank) == (6, 6, 1)
    assert " died in phase " in word.reason and " without a word" in word.reason


@pytest.mark.long
def test_a_peer_that_never_comes_is_noticed_before_anybody_met(manifest: Path, tmp_path: Path, run: RunDir) -> None:
    """Rank 0 of two, alone; the others' nodes did not boot."""
    page = tiny_page(tmp_path, manifest, trainer={"max_steps": 4, "timeout_seconds": 8.0, "hang_timeout_seconds": 4.0})
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "sdtrain", "train", str(page)],
        env={**os.environ, **place},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert time.monotonic() - started < 60
    word = run.read_exit()
    assert word is not None
    assert (word.code, word.rank) == (ExitCode.HANG, 1)
    assert word.reason.startswith(
        "hang: rank 1 of 2 is silent: the node is gone, or never came; rank 0 waits in phase rendezvous of step 0; "
    )
