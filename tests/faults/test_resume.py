"""Kill, stop and re-cut: what a run that was interrupted has in common with one that was not."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from sdtrain.checkpoints.manifest import Checkpoint
from sdtrain.checkpoints.recut import KINDS, assemble
from sdtrain.run_dir import RunDir, read_json_lines
from sdtrain.training.metrics import read_metrics
from tests.ranks import Ranks
from tests.support import free_port, make_latent_manifest, tiny_page

STEPS = 14

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_latent_manifest(folder / "data", train=40, validation=8)
    return folder


def page(world: Path, name: str, **trainer: object) -> Path:
    folder = world / name
    folder.mkdir()
    settings = {"max_steps": STEPS, **trainer}
    return tiny_page(folder, world / "data" / "manifest.json", trainer=settings, checkpoint={"every_steps": 3})


@pytest.fixture(scope="module")
def whole(world: Path, ranks: Ranks) -> RunDir:
    """The uninterrupted run on two ranks."""
    path = page(world, "whole")
    done = ranks.run(2, "-m", "sdtrain", "train", path)
    assert done.codes == [0, 0], done.said()
    return RunDir(path.parent / "run")


def losses(run: RunDir) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_metrics(run.metrics) if "train/loss" in row}


def state(run: RunDir, step: int = STEPS) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(run.checkpoints / f"step-{step:08d}")
    return {
        f"{kind}/{name}": tensor for kind in KINDS for name, tensor in assemble(checkpoint, "denoiser", kind).items()
    }


def kill_a_rank(path: Path, *, after_step: int, rank: int) -> None:
    """Start two ranks under torchrun, kill one with -9 once `after_step` is logged, and wait until all is over."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), "-m", "sdtrain", "train", str(path)]
    agent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = path.parent / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while max((row.get("step", 0) for row in read_json_lines(metrics)), default=0) < after_step:
        assert agent.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.01)
    victims = [child for child in psutil.Process(agent.pid).children() if child.environ().get("RANK") == str(rank)]
    assert len(victims) == 1
    os.kill(victims[0].pid, signal.SIGKILL)
    assert agent.wait(timeout=90) != 0


def test_killed_run_ends_with_the_same_bits(world: Path, whole: RunDir, ranks: Ranks) -> None:
    path = page(world, "killed")
    run = RunDir(path.parent / "run")
    kill_a_rank(path, after_step=5, rank=1)
    reached = max(losses(run))
    assert not (run.checkpoints / f"step-{STEPS:08d}").exists(), "the kill must have come before the end"
    done = ranks.run(2, "-m", "sdtrain", "train", path)
    assert done.codes == [0, 0], done.said()
    starts = [row for row in run.ledger_rows() if row["event"] == "start"]
    assert len(starts) == 2
    assert starts[1]["resumed_from"] is not None
    assert 0 < starts[1]["step"] <= reached
    expected, found = state(whole), state(run)
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert different == []
    assert losses(run) == losses(whole)


def test_two_ranks_then_one_then_two_see_the_same_samples_once(world: Path, whole: RunDir, ranks: Ranks) -> None:
    path = page(world, "recut")
    run = RunDir(path.parent / "run")
    # The schedule knows the whole length; STOP ends each leg at a step boundary.
    for nproc, until in ((2, 5), (1, 10), (2, STEPS)):
        stop_after(ranks, path, nproc, until)
    starts = [row for row in run.ledger_rows() if row["event"] == "start"]
    assert [row["world_size"] for row in starts] == [2, 1, 2]
    commits = [row for row in run.ledger_rows() if row["event"] == "commit"]
    spans = [(row["first_position"], row["last_position"]) for row in commits]
    assert spans[0][0] == 0
    assert spans[-1][1] == STEPS * 8
    assert all(left[1] == right[0] for left, right in itertools.pairwise(spans)), "exactly once"
    mine, theirs = losses(run), losses(whole)
    assert mine.keys() == theirs.keys()
    assert all(abs(mine[step] - theirs[step]) <= 1e-4 * abs(theirs[step]) for step in theirs)
    expected, found = state(whole), state(run)
    error = torch.cat([(found[name] - expected[name]).flatten() for name in expected]).norm()
    assert error / torch.cat([value.flatten() for value in expected.values()]).norm() < 1e-4


def stop_after(ranks: Ranks, path: Path, nproc: int, step: int) -> None:
    """Run until `step` steps are logged, then ask it to stop by a STOP file, as a person would."""
    run = path.parent / "run"
    start = ranks.start(nproc, "-m", "sdtrain", "train", path)
    while not start.is_over(0.01):
        reached = max((row.get("step", 0) for row in read_json_lines(run / "metrics.jsonl")), default=0)
        if reached >= step and step < STEPS:
            (run / "STOP").touch()
            break
    start.wait(120)
    assert start.codes == [0] * nproc, start.said()
    assert json.loads((run / "exit.json").read_text())["code"] == 0
