"""Saving beside training keeps the one promise of a commit: the state of its step as a whole, or nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain.checkpoints.host_buffers import HostBuffers
from sdtrain.checkpoints.manifest import rank_file
from sdtrain.checkpoints.protocol import CHECKPOINT_STAGES, find, list_checkpoints, verify
from sdtrain.checkpoints.saver import Saver
from sdtrain.run_dir import RunDir, read_json_lines
from tests.engines import one_rank, sdtrain
from tests.faults.commits import COMMITTED, assert_state_is, final_names, job, run_jobs, small_disk
from tests.support import make_latent_manifest, tiny_page

__all__ = ["small_disk"]

STAGES = (*CHECKPOINT_STAGES[:4], "boundary", *CHECKPOINT_STAGES[4:])


def background(folder: Path, step: int, world_size: int, **more: Any) -> dict[str, Any]:
    return job(folder, step, world_size, asynchronous=True, **more)


def test_killed_at_every_stage_of_a_save_beside_training(tmp_path: Path) -> None:
    jobs = [
        part
        for stage in STAGES
        for part in (background(tmp_path / stage, 1, 1), background(tmp_path / stage, 2, 1, die=[0, stage]))
    ]
    jobs += [background(tmp_path / stage, 3, 1) for stage in STAGES]
    outcomes = run_jobs(jobs)
    for index, stage in enumerate(STAGES):
        folder = tmp_path / stage
        assert outcomes[2 * index] == [{"code": 0, "returned": "step-00000001"}]
        assert outcomes[2 * index + 1][0]["code"] == -9, stage
        assert outcomes[2 * len(STAGES) + index] == [{"code": 0, "returned": "step-00000003"}]
        expected = [3, 2, 1] if stage in COMMITTED else [3, 1]
        assert final_names(folder) == [f"step-{step:08d}" for step in expected], stage
        for checkpoint in list_checkpoints(folder):
            assert verify(checkpoint) == []
            assert_state_is(checkpoint, checkpoint.step)


@pytest.mark.heavy
def test_one_of_two_ranks_killed_or_failing_beside_training(tmp_path: Path) -> None:
    deaths = [(1, "folder"), (0, "writing"), (1, "writing"), (1, "written"), (0, "boundary"), (0, "manifest")]
    failures = [(0, "writing"), (1, "writing"), (1, "written"), (0, "manifest")]
    jobs = []
    for what, cases in (("die", deaths), ("fail", failures)):
        for rank, stage in cases:
            folder = tmp_path / f"{what}-{rank}-{stage}"
            jobs += [background(folder, 1, 2), background(folder, 2, 2, **{what: [rank, stage]})]
    jobs += [background(tmp_path / f"fail-{rank}-{stage}", 3, 2) for rank, stage in failures]
    outcomes = run_jobs(jobs)
    for index, (rank, stage) in enumerate(deaths):
        assert [outcome["code"] for outcome in outcomes[2 * index]] == [0, 0]
        assert outcomes[2 * index + 1][rank]["code"] == -9, (rank, stage)
        found = find(tmp_path / f"die-{rank}-{stage}", "auto")
        assert found is not None
        assert found.step == 1, (rank, stage)
        assert_state_is(found, 1)
    for index, (rank, stage) in enumerate(failures):
        first = 2 * (len(deaths) + index)
        assert outcomes[first + 1] == [{"code": 0, "returned": None}] * 2, (rank, stage)
        assert outcomes[2 * (len(deaths) + len(failures)) + index] == [{"code": 0, "returned": "step-00000003"}] * 2
        folder = tmp_path / f"fail-{rank}-{stage}"
        assert sorted(path.name for path in folder.iterdir()) == ["LATEST", "step-00000001", "step-00000003"]
        assert_state_is(list_checkpoints(folder)[0], 3)


# Whole runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_saving_beside_training_leaves_the_same_bits_and_says_what_it_cost(tmp_path: Path) -> None:
    manifest = make_latent_manifest(tmp_path / "data", train=40, validation=8)
    runs: dict[bool, RunDir] = {}
    with one_rank():
        for asynchronous in (True, False):
            folder = tmp_path / str(asynchronous)
            folder.mkdir()
            runs[asynchronous] = RunDir(folder / "run")
            checkpoint = {"every_steps": 1, "keep_every_steps": 1, "asynchronous": asynchronous}
            assert sdtrain("train", tiny_page(folder, manifest, checkpoint=checkpoint)) == 0
    beside, still = (list_checkpoints(runs[asynchronous].checkpoints) for asynchronous in (True, False))
    assert [checkpoint.step for checkpoint in beside] == [checkpoint.step for checkpoint in still] == [6, 5, 4, 3, 2, 1]
    for one, other in zip(beside, still, strict=True):
        state = [name for name in one.files if name.endswith(".safetensors")]
        assert state
        assert [one.files[name]["sha256"] for name in state] == [other.files[name]["sha256"] for name in state]
    for run in runs.values():
        commits = [row for row in run.ledger_rows() if row["event"] == "commit"]
        assert [row["step"] for row in commits] == [1, 2, 3, 4, 5, 6]
        assert all(row["stall_seconds"] > 0 and row["write_seconds"] > 0 for row in commits)
        stalls = [row["train/checkpoint_stall_seconds"] for row in read_json_lines(run.metrics) if stalled(row)]
        assert len(stalls) == 6
        assert all(seconds > 0 for seconds in stalls)


def stalled(row: dict[str, Any]) -> bool:
    return "train/checkpoint_stall_seconds" in row


# One rank in this process ---------------------------------------------------------------------------------------------

FILE = rank_file("extra", 0)


def begin(saver: Saver, step: int, tensor: torch.Tensor) -> None:
    saver.begin(step=step, attempt="a", files={FILE: {"x": tensor}}, facts={}, texts={})


def held(folder: Path, step: int) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / f"step-{step:08d}" / FILE)["x"]


def test_the_state_is_the_one_of_its_step_and_the_buffers_are_used_again(tmp_path: Path) -> None:
    go_on, places = threading.Event(), []
    buffers = HostBuffers()
    saver = Saver(tmp_path, asynchronous=True, on_stage=lambda stage: stage == "writing" and go_on.wait(10))
    saver._buffers = buffers
    state = torch.zeros(5)
    for step in (1, 2):
        state.fill_(step)
        begin(saver, step, state)
        assert saver.is_writing
        assert saver.step == step
        assert list_checkpoints(tmp_path)[:1] == list_checkpoints(tmp_path)[: step - 1], (
            "nothing is there before all is"
        )
        state.fill_(-1)
        places.append(buffers._buffers[FILE, "x"].data_ptr())
        go_on.set()
        saved = saver.finish()
        go_on.clear()
        assert saved is not None
        assert (saved.step, saved.path) == (step, tmp_path / f"step-{step:08d}")
        assert torch.equal(held(tmp_path, step), torch.full((5,), float(step)))
    assert places[0] == places[1]
    assert saver.finish() is None
    assert (saver.step, saver.is_writing) == (None, False)
    saver.close()


def test_a_disk_that_fills_beside_training(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, ballast = small_disk / "checkpoints", small_disk / "ballast"

    def fill(stage: str) -> None:
        if stage == "writing" and not ballast.exists():
            with open(ballast, "wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass

    saver = Saver(folder, asynchronous=True)
    begin(saver, 1, torch.ones(5000))
    assert saver.finish() is not None
    full = Saver(folder, asynchronous=True, on_stage=fill)
    begin(full, 2, torch.ones(5000))
    saved = full.finish()
    assert saved is not None
    assert saved.path is None
    assert "checkpoint of step 2 abandoned: rank 0: OSError: [Errno 28] No space left on device" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["LATEST", "step-00000001"]
    ballast.unlink()
    begin(saver, 3, torch.ones(5000))
    saved = saver.finish()
    assert saved is not None
    assert saved.path == folder / "step-00000003"
    assert all(verify(checkpoint) == [] for checkpoint in list_checkpoints(folder))


def test_a_host_without_memory_for_the_copy_is_a_failed_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*shape: Any, **more: Any) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    saver = Saver(tmp_path, asynchronous=True)
    monkeypatch.setattr(torch, "empty", refuse)
    begin(saver, 1, torch.ones(5))
    saved = saver.finish()
    assert saved is not None
    assert saved.path is None
    assert (
        "checkpoint of step 1 abandoned: rank 0: RuntimeError: DefaultCPUAllocator: can't allocate memory (while "
        "copying the state to host memory; checkpoint.asynchronous: false saves without a copy)"
    ) in caplog.text
    monkeypatch.undo()
    begin(saver, 2, torch.ones(5))
    assert saver.finish() is not None
    assert final_names(tmp_path) == ["step-00000002"]
