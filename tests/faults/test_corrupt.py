"""A damaged checkpoint is named and never used; where all are damaged, nothing starts and nothing is touched."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdtrain.checkpoints.manifest import list_checkpoints
from sdtrain.evaluation.inspect_run import examine
from sdtrain.run_dir import RunDir
from sdtrain.training.metrics import read_metrics
from tests.engines import one_rank, sdtrain
from tests.support import make_latent_manifest, tiny_page

pytestmark = pytest.mark.engine

STATE = "denoiser.rank00000.safetensors"


@pytest.fixture(scope="module")
def place() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def whole(place: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 6 steps with checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    manifest = make_latent_manifest(folder / "data", train=40, validation=8)
    page = tiny_page(folder, manifest)
    assert sdtrain("train", page) == 0
    assert [checkpoint.step for checkpoint in list_checkpoints(folder / "run" / "checkpoints")] == [6, 4]
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> RunDir:
    """A copy of the run's folder, to be damaged."""
    shutil.copytree(whole / "run", tmp_path / "run")
    return RunDir(tmp_path / "run")


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0b100
    path.write_bytes(content)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def test_a_flipped_bit_costs_two_steps_and_not_one_bit_of_the_result(
    whole: Path, run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    newest = run.checkpoints / "step-00000006"
    flip_one_bit(newest / STATE)
    assert digests(newest) != digests(whole / "run" / "checkpoints" / newest.name)
    with caplog.at_level(logging.ERROR):
        assert sdtrain("train", whole / "train.yaml", f"run_dir={run.path}") == 0
    assert f"{newest} is corrupt and not used: {STATE}: bytes were changed" in caplog.text
    starts = [row for row in run.ledger_rows() if row["event"] == "start"]
    assert [(row["resumed_from"], row["step"]) for row in starts] == [(None, 0), ("step-00000004", 4)]
    assert digests(newest) == digests(whole / "run" / "checkpoints" / newest.name)
    mine, theirs = (
        {row["step"]: row["train/loss"] for row in read_metrics(one.metrics)} for one in (run, RunDir(whole / "run"))
    )
    assert mine == theirs
    (kept,) = run.checkpoints.glob("step-00000006.corrupt-*")
    assert (kept / "CORRUPT").read_text() == f"{STATE}: bytes were changed\n", "kept beside, for whoever looks into it"
    found = examine(run.path)
    assert found.lineage.problems == (), "and the ledger still proves that every sample was seen once"
    assert found.lineage.commits[-1].last == 6 * 8


def everything(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Time, size and digest of every file."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.stat().st_size,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_where_all_are_damaged_the_process_exits_with_4_and_overwrites_nothing(whole: Path, run: RunDir) -> None:
    flip_one_bit(run.checkpoints / "step-00000006" / STATE)
    (run.checkpoints / "step-00000004" / STATE).unlink()
    before = everything(run.path)
    command = [sys.executable, "-m", "sdtrain", "train", str(whole / "train.yaml"), f"run_dir={run.path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4, done.stderr[-3000:]
    assert (
        f"{run.checkpoints}: 2 checkpoints are present and none is valid:\n"
        f"  step-00000006: {STATE}: bytes were changed\n"
        f"  step-00000004: {STATE}: is missing\n"
        "Nothing was changed. Restore one of them, or move the folder away to start afresh."
    ) in done.stderr
    left = json.loads(run.exit_file.read_text())
    assert (left["code"], left["step"], left["rank"]) == (4, 0, 0)
    assert left["reason"].startswith(f"CheckpointError: {run.checkpoints}: 2 checkpoints are present and none is valid")
    after = everything(run.path)
    marks = {f"checkpoints/step-{step:08d}/CORRUPT" for step in (4, 6)}
    assert set(after) == set(before) | marks, "only the reasons are left beside the damage"
    told = {"exit.json", "ledger.jsonl"}
    assert {name: after[name] for name in before if name not in told} == {
        name: facts for name, facts in before.items() if name not in told
    }


def test_a_checkpoint_that_was_asked_for_by_name_is_not_replaced_by_another(whole: Path, run: RunDir) -> None:
    named = run.checkpoints / "step-00000004"
    flip_one_bit(named / STATE)
    assert sdtrain("train", whole / "train.yaml", f"run_dir={run.path}", "--resume", named) == 4
    left = run.read_exit()
    assert left is not None
    assert (
        left.reason == f"CheckpointError: {named}: not a valid checkpoint to resume from: {STATE}: bytes were changed"
    )
