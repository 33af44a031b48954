"""An error that one rank of two meets alone: both leave in time with its word, and the run resumes to the same bits."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch

from sdtrain.checkpoints.manifest import Checkpoint, list_checkpoints
from sdtrain.checkpoints.protocol import verify
from sdtrain.checkpoints.recut import KINDS, assemble
from sdtrain.run_dir import RunDir
from tests.faults.planted import TEXT
from tests.ranks import Ranks
from tests.support import make_latent_manifest, tiny_page

STEPS = 6
SECONDS = 40
"""For a whole start: much less than the 240 s of the process groups."""
PLANTED = Path(__file__).with_name("planted.py")

pytestmark = [pytest.mark.heavy, pytest.mark.long]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_latent_manifest(folder, train=40, validation=8)
    return folder


def page(world: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    validation = {"every_steps": 3, "num_samples": 8, "batch_size": 2}
    return tiny_page(folder, world / "manifest.json", trainer={"max_steps": STEPS}, validation=validation)


def state(run: RunDir) -> dict[str, torch.Tensor]:
    last = Checkpoint.open(run.checkpoints / f"step-{STEPS:08d}")
    return {f"{kind}/{name}": one for kind in KINDS for name, one in assemble(last, "denoiser", kind).items()}


@pytest.fixture(scope="module")
def whole(world: Path, ranks: Ranks) -> RunDir:
    """The run that meets no error."""
    path = page(world, world / "whole")
    done = ranks.run(2, "-m", "sdtrain", "train", path)
    assert done.codes == [0, 0], done.said()
    return RunDir(path.parent / "run")


@pytest.mark.parametrize(("place", "calls"), [("data", 9), ("loss", 7), ("load", 0), ("validation", 1)])
@pytest.mark.parametrize("rank", [0, 1])
def test_both_ranks_leave_with_the_word_of_one(
    ranks: Ranks, world: Path, whole: RunDir, tmp_path: Path, place: str, calls: int, rank: int
) -> None:
    path, run = page(world, tmp_path), RunDir(tmp_path / "run")
    if place == "load":
        shutil.copytree(whole.path, run.path)
        shutil.rmtree(run.checkpoints / f"step-{STEPS:08d}")
    before = {one.path.name for one in list_checkpoints(run.checkpoints)}
    began = time.monotonic()
    done = ranks.run(2, PLANTED, rank, place, calls, "train", path, timeout=SECONDS)
    word = run.read_exit()
    assert word is not None and TEXT in word.reason, done.said()
    assert word.code in done.codes and word.rank == rank and 0 not in done.codes, (word, done.codes)
    assert TEXT in done.said() and time.monotonic() - began < SECONDS
    committed = list_checkpoints(run.checkpoints)
    assert before <= {one.path.name for one in committed} and not any(verify(one) for one in committed)
    assert ranks.run(2, "-m", "sdtrain", "train", path).codes == [0, 0]
    expected, found = state(whole), state(run)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_save_costs_the_checkpoint_and_no_step(
    ranks: Ranks, world: Path, whole: RunDir, tmp_path: Path, rank: int
) -> None:
    path, run = page(world, tmp_path), RunDir(tmp_path / "run")
    done = ranks.run(2, PLANTED, rank, "save", 1, "train", path, timeout=SECONDS)
    assert done.codes == [0, 0] and TEXT in done.said(), done.said()
    assert {one.step for one in list_checkpoints(run.checkpoints)} == {4, 6}
    expected, found = state(whole), state(run)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
