"""A checkpoint is there as a whole or not at all, whatever dies or fills up; and what is damaged is never used."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain.checkpoints.manifest import Checkpoint, rank_file
from sdtrain.checkpoints.protocol import CHECKPOINT_STAGES, commit, find, list_checkpoints, sweep, verify
from sdtrain.checkpoints.recut import KINDS, Layout, spans, tensor_name
from sdtrain.errors import CheckpointError, ExitCode
from tests.faults.commits import COMMITTED, assert_state_is, final_names, flip, job, run_jobs, small_disk

__all__ = ["small_disk"]

# Killed ranks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int]]:
    """Per stage: a folder with step 1 committed, whose commit of step 2 was killed there; and the victim's code."""
    root = tmp_path_factory.mktemp("killed")
    jobs = [
        part
        for stage in CHECKPOINT_STAGES
        for part in (job(root / stage, 1, 1), job(root / stage, 2, 1, die=[0, stage]))
    ]
    outcomes = run_jobs(jobs)
    return {stage: (root / stage, outcomes[2 * i + 1][0]["code"]) for i, stage in enumerate(CHECKPOINT_STAGES)}


@pytest.mark.parametrize("stage", CHECKPOINT_STAGES)
def test_killed_at_every_stage_of_a_commit(stage: str, killed_alone: dict[str, tuple[Path, int]]) -> None:
    folder, code = killed_alone[stage]
    assert code == -9
    expected = 2 if stage in COMMITTED else 1
    assert final_names(folder) == [f"step-{step:08d}" for step in range(expected, 0, -1)]
    for checkpoint in list_checkpoints(folder):
        assert verify(checkpoint) == []
    found = find(folder, "auto")
    assert found is not None
    assert found.step == expected
    assert_state_is(found, expected)


def test_the_next_start_sweeps_and_commits_the_same_step(
    killed_alone: dict[str, tuple[Path, int]], tmp_path: Path
) -> None:
    for stage in CHECKPOINT_STAGES:
        shutil.copytree(killed_alone[stage][0], tmp_path / stage)
        sweep(tmp_path / stage)
        left = ["step-00000001", "step-00000002"] if stage in COMMITTED else ["step-00000001"]
        assert sorted(path.name for path in (tmp_path / stage).iterdir()) == ["LATEST", *left], stage
    outcomes = run_jobs([job(tmp_path / stage, 2, 1, attempt="again") for stage in CHECKPOINT_STAGES])
    assert outcomes == [[{"code": 0, "returned": "step-00000002"}]] * len(CHECKPOINT_STAGES)
    for stage in CHECKPOINT_STAGES:
        assert (tmp_path / stage / "LATEST").read_text() == "step-00000002\n"
        assert verify(list_checkpoints(tmp_path / stage)[0]) == []


@pytest.mark.heavy
def test_one_of_two_ranks_killed_at_every_stage(tmp_path: Path) -> None:
    victims = [
        (rank, stage) for rank in (0, 1) for stage in CHECKPOINT_STAGES if rank == 0 or stage not in COMMITTED[:2]
    ]
    victims.remove((1, "manifest"))  # as `renamed` and `latest`, a stage of rank 0 alone
    jobs = [
        part
        for rank, stage in victims
        for part in (job(tmp_path / f"{rank}{stage}", 1, 2), job(tmp_path / f"{rank}{stage}", 2, 2, die=[rank, stage]))
    ]
    outcomes = run_jobs(jobs)
    for index, (rank, stage) in enumerate(victims):
        folder = tmp_path / f"{rank}{stage}"
        assert [outcome["code"] for outcome in outcomes[2 * index]] == [0, 0]
        assert outcomes[2 * index + 1][rank]["code"] == -9, (rank, stage)
        # A rank that dies after it said that its bytes are on the disk does not keep rank 0 from committing.
        committed = stage in COMMITTED or (rank == 1 and stage == "agreed")
        found = find(folder, "auto")
        assert found is not None
        assert found.step == (2 if committed else 1), (rank, stage)
        assert_state_is(found, found.step)
        assert all(verify(checkpoint) == [] for checkpoint in list_checkpoints(folder))


# Ranks that fail ------------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_all_ranks_abandon_when_one_cannot_write(tmp_path: Path) -> None:
    failures = [(0, "writing"), (1, "writing"), (1, "written"), (0, "manifest")]
    folders = [tmp_path / f"{rank}{stage}" for rank, stage in failures]
    jobs = []
    for folder, failure in zip(folders, failures, strict=True):
        jobs += [job(folder, 1, 2), job(folder, 2, 2, fail=list(failure)), job(folder, 3, 2)]
    outcomes = run_jobs(jobs)
    for index, folder in enumerate(folders):
        first, second, third = outcomes[3 * index : 3 * index + 3]
        assert first == [{"code": 0, "returned": "step-00000001"}] * 2
        assert second == [{"code": 0, "returned": None}] * 2, failures[index]
        assert third == [{"code": 0, "returned": "step-00000003"}] * 2  # training went on
        assert sorted(path.name for path in folder.iterdir()) == ["LATEST", "step-00000001", "step-00000003"]
        assert_state_is(list_checkpoints(folder)[0], 3)


@pytest.mark.heavy
def test_two_ranks_agree_on_what_to_resume_from(tmp_path: Path) -> None:
    run_jobs([job(tmp_path, step, 2) for step in (1, 2, 3)])
    flip(tmp_path / "step-00000003" / rank_file("denoiser", 1), 200)
    (tmp_path / "step-00000002" / rank_file("extra", 0)).unlink()
    seek = job(tmp_path, 0, 2, action="find")
    [found] = run_jobs([seek])
    assert found == [{"code": 0, "returned": "step-00000001"}] * 2
    assert (
        tmp_path / "step-00000003" / "CORRUPT"
    ).read_text() == "denoiser.rank00001.safetensors: bytes were changed\n"
    assert (tmp_path / "step-00000002" / "CORRUPT").read_text() == "extra.rank00000.safetensors: is missing\n"

    flip(tmp_path / "step-00000001" / "config.yaml", 3)
    [refused] = run_jobs([seek])
    assert [outcome["code"] for outcome in refused] == [ExitCode.CHECKPOINT] * 2
    assert refused[0]["error"] == refused[1]["error"]
    assert "3 checkpoints are present and none is valid" in refused[0]["error"]

    [fresh] = run_jobs([job(tmp_path / "empty", 0, 2, action="find")])
    assert fresh == [{"code": 0, "returned": None}] * 2


# Damage ---------------------------------------------------------------------------------------------------------------

LAYOUT = Layout.of([{"weight": (40, 3)}])
HALF = rank_file("denoiser", 0)
OTHER = rank_file("critic", 0)


def write(folder: Path, step: int, **more: Any) -> Path | None:
    """One rank's commit of two trainables, in this process."""
    owned = spans(LAYOUT, [120], 1)
    files = {
        rank_file(name, 0): {tensor_name(0, kind): torch.full((120,), step + 0.5 * i) for kind in KINDS}
        for i, name in enumerate(("denoiser", "critic"))
    }
    names = ("denoiser", "critic")
    facts = {"layouts": dict.fromkeys(names, LAYOUT.to_json()), "spans": dict.fromkeys(names, owned)}
    texts = {"config.yaml": "schema_version: 1\n"}
    return commit(folder, step=step, attempt=f"a{step}", files=files, facts=facts, texts=texts, **more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (1, 2):
        write(tmp_path, step)
    return tmp_path


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


Harm = Callable[[Path], None]
HARMS: dict[str, tuple[Harm, str]] = {
    "first bit": (lambda path: flip(path / HALF, 0), f"{HALF}: bytes were changed"),
    "header": (lambda path: flip(path / HALF, 20, 3), f"{HALF}: bytes were changed"),
    "middle": (lambda path: flip(path / HALF, 1000, 7), f"{HALF}: bytes were changed"),
    "last bit": (lambda path: flip(path / HALF, -1, 7), f"{HALF}: bytes were changed"),
    "config": (lambda path: flip(path / "config.yaml", 2), "config.yaml: bytes were changed"),
    "truncated": (lambda path: truncate(path / HALF), f"{HALF}: truncated to "),
    "empty": (lambda path: os.truncate(path / HALF, 0), f"{HALF}: truncated to 0 of "),
    "appended": (lambda path: append(path / HALF), f"{HALF}: 2217 bytes, 2216 were written"),
    "deleted": (lambda path: (path / HALF).unlink(), f"{HALF}: is missing"),
    "swapped": (lambda path: swap(path / HALF, path / OTHER), f"{HALF}: holds the bytes of {OTHER} (files swapped)"),
    "no manifest": (lambda path: (path / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
    "manifest bit": (lambda path: flip(path / "MANIFEST.json", 300), "MANIFEST.json "),
    "manifest torn": (lambda path: os.truncate(path / "MANIFEST.json", 100), "MANIFEST.json "),
    "folder renamed": (lambda path: path.rename(path.with_name("step-00000009")), "MANIFEST.json is of step 2"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_named_and_the_older_checkpoint_is_used(
    folder: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, message = HARMS[harm]
    damage(folder / "step-00000002")
    newest = list_checkpoints(folder)[0]
    problems = verify(newest)
    assert any(problem.startswith(message) for problem in problems), problems
    found = find(folder, "auto")
    assert found is not None
    assert found.path.name == "step-00000001"
    assert (newest.path / "CORRUPT").read_text().splitlines() == problems
    assert f"{newest.path} is corrupt and not used: " in caplog.text
    assert len(list_checkpoints(folder)) == 2  # nothing is deleted


def test_any_flipped_bit_of_any_file_is_noticed(folder: Path) -> None:
    draw = random.Random(0)
    checkpoint = folder / "step-00000002"
    for path in sorted(checkpoint.iterdir()):
        for _ in range(40):
            position, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
            flip(path, position, bit)
            assert verify(Checkpoint.open(checkpoint)), (path.name, position, bit)
            flip(path, position, bit)
    assert verify(Checkpoint.open(checkpoint)) == []


def test_none_valid_ends_with_its_own_exit_code_and_touches_nothing(folder: Path) -> None:
    flip(folder / "step-00000002" / HALF, 900)
    (folder / "step-00000001" / OTHER).unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as raised:
        find(folder, "auto")
    assert raised.value.exit_code == ExitCode.CHECKPOINT == 4
    assert str(raised.value).splitlines()[:3] == [
        f"{folder}: 2 checkpoints are present and none is valid:",
        f"  step-00000002: {HALF}: bytes were changed",
        f"  step-00000001: {OTHER}: is missing",
    ]
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "CORRUPT"}
    assert after == before


def test_a_lost_hint_costs_nothing(folder: Path) -> None:
    (folder / "LATEST").unlink()
    found = find(folder, "auto")
    assert found is not None
    assert found.step == 2
    (folder / "LATEST").write_text("step-00000777\n")
    found = find(folder, "auto")
    assert found is not None
    assert found.step == 2


# Disk full ------------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_during_a_save(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, ballast = small_disk / "checkpoints", small_disk / "ballast"
    write(folder, 1)

    def fill(stage: str) -> None:
        if stage == "writing" and not ballast.exists():
            with open(ballast, "wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass

    assert write(folder, 2, on_stage=fill) is None
    assert "checkpoint of step 2 abandoned: rank 0: OSError: [Errno 28] No space left on device" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["LATEST", "step-00000001"]
    assert verify(list_checkpoints(folder)[0]) == []

    ballast.unlink()
    assert write(folder, 3) == folder / "step-00000003"  # training went on and saves again
    found = find(folder, "auto")
    assert found is not None
    assert found.step == 3


def test_a_disk_without_room_is_noticed_before_a_byte_is_written(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = small_disk / "checkpoints"
    stages: list[str] = []
    big = {"big.safetensors": {"x": torch.zeros(300_000)}}
    assert commit(folder, step=1, attempt="a", files=big, facts={}, on_stage=stages.append) is None
    assert stages == ["begin"]
    assert not folder.exists()
    assert "1.0 MiB free, 1.4 MiB needed" in caplog.text


def test_a_disk_without_inodes_is_noticed_before_a_byte_is_written(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = small_disk / "checkpoints"
    write(folder, 1)
    for index in range(28):
        (small_disk / str(index)).touch()
    assert write(folder, 2) is None
    assert "inodes free, 10 needed" in caplog.text
    assert find(folder, "auto") is not None
