"""Told to leave at the worst moments: in validation, in a grid, while saving, again and again, at a time limit.

One rank in this process for most of it; two real ranks, of which one alone is told, at the end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sdtrain.checkpoints.manifest import list_checkpoints
from sdtrain.checkpoints.protocol import verify
from sdtrain.errors import ExitCode
from sdtrain.records import Batch
from sdtrain.run_dir import RunDir
from sdtrain.tasks.latent_diffusion import LatentDiffusionTask
from sdtrain.training import run as run_module
from sdtrain.training.metrics import MetricsLog, read_metrics
from sdtrain.training.preemption import Preemption
from tests.engines import one_rank, sdtrain
from tests.support import make_latent_manifest, tiny_page, torchrun

pytestmark = pytest.mark.engine

STEPS = 4
EVENTS: dict[str, Any] = {
    "validation": {"every_steps": 2, "num_samples": 8, "batch_size": 2},
    "samples": {"every_steps": 2, "prompts": ["a red square", "a blue circle"], "num_steps": 5},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_latent_manifest(folder, train=40, validation=8)
    return folder


@pytest.fixture(scope="module")
def rank(world: Path) -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture
def page(rank: None, world: Path, tmp_path: Path) -> Path:
    return make_page(tmp_path, world)


def make_page(folder: Path, world: Path, **trainer: Any) -> Path:
    return tiny_page(folder, world / "manifest.json", trainer={"max_steps": STEPS, **trainer}, **EVENTS)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def word(run: RunDir) -> tuple[int, str, int]:
    left = run.read_exit()
    assert left is not None
    return left.code, left.reason, left.step


def interrupted(run: RunDir) -> list[tuple[str, int]]:
    return [(row["phase"], row["step"]) for row in run.ledger_rows() if row["event"] == "interrupted"]


def figures(run: RunDir, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in read_metrics(run.metrics) if name in row}


def final_state(run: RunDir) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run.checkpoints / f"step-{STEPS:08d}" / "denoiser.rank00000.safetensors")


@pytest.fixture(scope="module")
def whole(rank: None, world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    assert sdtrain("train", make_page(folder, world)) == 0
    return RunDir(folder / "run")


Act = Callable[[], object]


def during_validation(monkeypatch: pytest.MonkeyPatch, act: Act, *, call: int = 2) -> list[int]:
    """Act within the n-th batch of all validations; the calls that were made."""
    calls: list[int] = []
    real = LatentDiffusionTask.validate

    def validate(self: LatentDiffusionTask, batch: Batch) -> Any:
        calls.append(len(calls) + 1)
        if len(calls) == call:
            act()
        return real(self, batch)

    monkeypatch.setattr(LatentDiffusionTask, "validate", validate)
    return calls


def during_a_grid(monkeypatch: pytest.MonkeyPatch, act: Act, *, call: int = 2) -> list[int]:
    """Act within the n-th step of all samplers; the calls that were made."""
    calls: list[int] = []
    real = LatentDiffusionTask._predict

    def predict(self: LatentDiffusionTask, *arguments: Any) -> Any:
        if not torch.is_grad_enabled() and not self.denoiser.training and len(arguments[0]) == 4:  # guided: 2 x 2
            calls.append(len(calls) + 1)
            if len(calls) == call:
                act()
        return real(self, *arguments)

    monkeypatch.setattr(LatentDiffusionTask, "_predict", predict)
    return calls


def told(*numbers: signal.Signals) -> Act:
    return lambda: [signal.raise_signal(number) for number in numbers]


# In the middle of events ----------------------------------------------------------------------------------------------


def test_a_signal_within_validation_leaves_it_and_the_run_goes_on_as_if_nothing_was(
    page: Path, run: RunDir, whole: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = during_validation(monkeypatch, told(signal.SIGUSR1))
    assert sdtrain("train", page) == ExitCode.REQUEUE
    assert batches == [1, 2], "of four"
    assert word(run) == (85, "SIGUSR1: saved at step 2, start again to go on", 2)
    assert interrupted(run) == [("validation", 2), ("samples", 2)]
    monkeypatch.undo()
    assert sdtrain("train", page) == 0
    assert figures(run, "validation/loss") == {4: figures(whole, "validation/loss")[4]}, "what was left is not made up"
    assert [path.name for path in sorted(run.samples.iterdir())] == ["step-00000004.png"]
    expected, found = final_state(whole), final_state(run)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_signal_within_a_grid_leaves_it(
    page: Path, run: RunDir, whole: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = during_a_grid(monkeypatch, told(signal.SIGTERM))
    assert sdtrain("train", page) == ExitCode.REQUEUE
    assert steps == [1, 2], "of five"
    assert word(run) == (85, "SIGTERM: saved at step 2, start again to go on", 2)
    assert interrupted(run) == [("samples", 2)]
    assert not run.samples.exists()
    assert figures(run, "validation/loss") == {2: figures(whole, "validation/loss")[2]}
    monkeypatch.undo()
    assert sdtrain("train", page) == 0
    expected, found = final_state(whole), final_state(run)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_stop_file_within_validation_stops_and_a_save_file_waits_for_its_end(
    page: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "Preemption", partial(Preemption, poll_every_seconds=0.0))
    during_validation(monkeypatch, (run.path / "SAVE").touch)
    assert sdtrain("train", page, "checkpoint.every_steps=100") == 0
    assert [checkpoint.step for checkpoint in list_checkpoints(run.checkpoints)] == [4, 2]
    assert interrupted(run) == []
    assert len(figures(run, "validation/loss")) == 2
    assert not (run.path / "SAVE").exists()

    monkeypatch.undo()
    monkeypatch.setattr(run_module, "Preemption", partial(Preemption, poll_every_seconds=0.0))
    during_validation(monkeypatch, (run.path / "STOP").touch)
    assert sdtrain("train", page, "trainer.max_steps=8") == 0
    assert word(run) == (0, "STOP file: saved and stopped at step 6", 6)
    assert interrupted(run) == [("validation", 6), ("samples", 6)]
    assert not (run.path / "STOP").exists()


def test_a_signal_that_comes_many_times_while_saving_corrupts_nothing(
    page: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_module.CheckpointKeeper.save

    def save(self: Any, step: int) -> None:
        signal.raise_signal(signal.SIGTERM)
        real(self, step)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(run_module.CheckpointKeeper, "save", save)
    assert sdtrain("train", page) == ExitCode.REQUEUE
    assert word(run) == (85, "SIGTERM: saved at step 2, start again to go on", 2)
    [checkpoint] = list_checkpoints(run.checkpoints)
    assert (checkpoint.step, verify(checkpoint)) == (2, [])
    assert [path.name for path in run.checkpoints.iterdir() if ".tmp" in path.name] == []


# Limits ---------------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that tests move by hours."""

    def __init__(self) -> None:
        self.hours = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.hours * 3600


def test_the_time_limit_saves_and_asks_to_be_started_again(
    page: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, real = Clock(), MetricsLog.log

    def log(self: MetricsLog, step: int, row: dict[str, Any]) -> None:
        real(self, step, row)
        clock.hours += 0.5 if "train/loss" in row else 0.0

    monkeypatch.setattr(MetricsLog, "log", log)
    monkeypatch.setattr(run_module, "Preemption", partial(Preemption, clock=clock))
    assert sdtrain("train", page, "trainer.max_hours=1.4") == ExitCode.REQUEUE
    assert word(run) == (85, "trainer.max_hours = 1.4 is over: saved at step 3, start again to go on", 3)
    assert sdtrain("train", page, "trainer.max_hours=1.4") == 0, "every start has its own hours"


def test_who_is_told_before_the_first_step_leaves_before_it(
    page: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building takes minutes at full size; the first step, which may compile, is not begun."""
    real = run_module.Attempt._write_down

    def write_down(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(run_module.Attempt, "_write_down", write_down)
    assert sdtrain("train", page) == ExitCode.REQUEUE
    assert word(run) == (85, "SIGUSR1: saved at step 0, start again to go on", 0)
    assert list_checkpoints(run.checkpoints) == []


def test_a_run_that_never_gets_further_is_not_started_for_ever(
    page: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(self: Any, name: str, batch: Batch, step: int) -> Any:
        raise RuntimeError("connection reset by peer")

    monkeypatch.setattr("sdtrain.training.outcome.LOST_PEER_SECONDS", 0.1)
    with monkeypatch.context() as broken:
        broken.setattr(LatentDiffusionTask, "loss", loss)
        assert [sdtrain("train", page) for _ in range(4)] == [6, 6, 6, ExitCode.NO_PROGRESS]
    code, reason, step = word(run)
    assert (code, step) == (7, 0)
    assert reason.startswith("NoProgressError: the last 3 attempts began at step 0 as well and ended without a new")
    assert "RuntimeError: connection reset by peer" in reason
    assert sdtrain("train", page) == ExitCode.NO_PROGRESS, "until somebody does something about it"
    assert sdtrain("train", page, "checkpoint.every_steps=1") == 0, "such as another page"


# One of two real ranks ------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("phase", ["validation", "samples"])
def test_one_rank_is_told_and_both_leave_a_long_event(phase: str, world: Path, tmp_path: Path) -> None:
    """By a plan that takes hours; rank 1 alone hears USR1, and nobody else."""
    events = {
        "validation": {"every_steps": 2, "num_samples": 8, "batch_size": 1},
        "samples": {"every_steps": 2, "prompts": ["a red square"], "num_steps": 500},
    }
    driver = tmp_path / "driver.py"
    driver.write_text(SLOW_EVENTS)
    path = tiny_page(tmp_path, world / "manifest.json", **{phase: events[phase]})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--local-addr"]
    command += ["127.0.0.1", "--signals-to-handle", "SIGTERM", str(driver), "train", str(path)]
    agent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "in-event").exists():
            assert agent.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        [victim] = [one for one in psutil.Process(agent.pid).children() if one.environ().get("RANK") == "1"]
        os.kill(victim.pid, signal.SIGUSR1)
        asked = time.monotonic()
        _, errors = agent.communicate(timeout=100)
    finally:
        if agent.poll() is None:
            agent.terminate()
            agent.communicate()
    assert time.monotonic() - asked < 30, "a part of an event is what a request waits for, not the event"
    left = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (left["code"], left["step"]) == (85, 2), errors[-3000:]
    assert left["reason"].startswith("SIGUSR1: saved at step 2")
    assert interrupted(RunDir(tmp_path / "run")) == [(phase, 2)]


@pytest.mark.long
def test_an_error_of_one_rank_within_an_event_ends_both_with_its_word(world: Path, tmp_path: Path) -> None:
    """Rank 1 has drawn nothing and goes on to put the weights back; rank 0 cannot write the grid, and leaves."""
    samples = {"every_steps": 2, "prompts": ["a red square"], "num_steps": 2}
    path = tiny_page(tmp_path, world / "manifest.json", samples=samples)
    (tmp_path / "run" / "samples" / "step-00000002.png").mkdir(parents=True)
    started = time.monotonic()
    done = torchrun(2, "-m", "sdtrain", "train", str(path), timeout=100)
    assert done.returncode != 0
    assert time.monotonic() - started < 60
    code, reason, step = word(RunDir(tmp_path / "run"))
    assert (code, step) == (1, 2), done.stderr[-3000:]
    assert reason.startswith("IsADirectoryError: ")


SLOW_EVENTS = """
import sys, time
from pathlib import Path
from sdtrain import cli
from sdtrain.tasks.latent_diffusion import LatentDiffusionTask

def slowed(real):
    def slow(self, *arguments, **named):
        if not self.denoiser.training:
            (Path(sys.argv[2]).parent / "in-event").touch()
            time.sleep(2.0)
        return real(self, *arguments, **named)
    return slow

LatentDiffusionTask.validate = slowed(LatentDiffusionTask.validate)
predict = LatentDiffusionTask._predict
LatentDiffusionTask._predict = slowed(predict)
cli.main(sys.argv[1:])
"""
