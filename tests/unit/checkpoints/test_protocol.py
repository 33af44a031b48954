from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdtrain import distributed
from sdtrain.checkpoints import protocol
from sdtrain.checkpoints.manifest import Checkpoint
from sdtrain.checkpoints.protocol import CHECKPOINT_STAGES, commit, find, list_checkpoints, sweep, verify
from sdtrain.checkpoints.rankfile import digest_file
from sdtrain.errors import CheckpointError, ConfigError, ExitCode

FILE = "extra.rank00000.safetensors"


def write(folder: Path, step: int, value: float = 0.0, **more: Any) -> Path | None:
    given = {"attempt": "a", "facts": {"samples_seen": 8 * step, "parent": None}, **more}
    return commit(folder, step=step, files={FILE: {"x": torch.full((9,), step + value)}}, **given)


def test_a_commit_holds_what_was_given_and_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    stages: list[str] = []
    path = write(folder, 12, texts={"config.yaml": "a: 1\n"}, on_stage=stages.append)
    assert path == folder / "step-00000012"
    assert stages == list(CHECKPOINT_STAGES)
    assert sorted(entry.name for entry in folder.iterdir()) == ["LATEST", "step-00000012"]
    assert (folder / "LATEST").read_text() == "step-00000012\n"
    assert torch.equal(load_file(path / FILE)["x"], torch.full((9,), 12.0))
    assert (path / "config.yaml").read_text() == "a: 1\n"
    manifest = dict(Checkpoint.open(path).manifest)
    assert manifest.pop("written_at").endswith("Z")
    assert 0 <= manifest.pop("write_seconds") < 10
    files = {name: digest_file(path / name) for name in (FILE, "config.yaml")}
    assert manifest == {
        "format": 1,
        "step": 12,
        "attempt": "a",
        "world_size": 1,
        "samples_seen": 96,
        "parent": None,
        "files": {
            name: {"sha256": written.sha256, "size_bytes": written.size_bytes, "rank": 0}
            for name, written in files.items()
        },
    }


def test_facts_cannot_overrule_what_the_protocol_knows(tmp_path: Path) -> None:
    path = write(tmp_path, 1, facts={"step": 99, "world_size": 7})
    assert path is not None
    assert Checkpoint.open(path).manifest["step"] == 1
    assert Checkpoint.open(path).world_size == 1


def test_a_replayed_step_keeps_the_valid_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = write(tmp_path, 1)
    assert path is not None
    before = (path / "MANIFEST.json").stat().st_mtime_ns
    write(tmp_path, 2)
    stages: list[str] = []
    assert write(tmp_path, 1, value=0.5, attempt="b", on_stage=stages.append) == path
    assert stages == ["begin"]
    assert (path / "MANIFEST.json").stat().st_mtime_ns == before
    assert f"{path} stands already and verifies: kept" in caplog.text
    assert (tmp_path / "LATEST").read_text() == "step-00000001\n"


def test_a_replayed_step_replaces_a_damaged_checkpoint_and_keeps_the_evidence(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    assert path is not None
    (path / FILE).write_bytes(b"damaged")
    assert write(tmp_path, 1, value=0.5, attempt="b") == path
    assert verify(Checkpoint.open(path)) == []
    assert Checkpoint.open(path).manifest["attempt"] == "b"
    [aside] = tmp_path.glob("step-00000001.corrupt-b-*")
    assert (aside / FILE).read_bytes() == b"damaged"
    assert [checkpoint.path for checkpoint in list_checkpoints(tmp_path)] == [path]


@pytest.mark.parametrize("stage", ["writing", "written", "manifest"])
def test_a_failure_before_the_rename_leaves_everything_as_it_was(
    tmp_path: Path, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))

    def fail(now: str) -> None:
        if now == stage:
            raise RuntimeError("CUDA error: out of memory")

    assert write(tmp_path, 2, on_stage=fail) is None
    assert sorted(tmp_path.rglob("*")) == before
    assert "checkpoint of step 2 abandoned: rank 0: RuntimeError: CUDA error: out of memory" in caplog.text
    assert write(tmp_path, 2) is not None  # the same attempt can try the same step again


def test_a_folder_that_cannot_be_made_abandons(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert write(tmp_path / "file" / "checkpoints", 1) is None
    assert "checkpoint of step 1 abandoned" in caplog.text


def test_rank_0_that_cannot_make_the_temporary_folder_abandons(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, **more: Any) -> None:
        if ".tmp-" in self.name:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert write(tmp_path, 1) is None
    assert f"abandoned: rank 0 cannot make a folder in {tmp_path}" in caplog.text


def test_a_hint_that_cannot_be_written_does_not_undo_a_commit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(protocol, "write_atomically", refuse)
    path = write(tmp_path, 1)
    assert path is not None
    assert verify(Checkpoint.open(path)) == []
    assert "LATEST could not be replaced (only a hint)" in caplog.text


def test_two_ranks_may_not_write_one_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "gather_objects", lambda item: [item, item])
    assert write(tmp_path, 1) is None
    assert f"abandoned: {FILE}: written by more than one rank" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_sweep_removes_leftovers_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for name in ("step-00000002.tmp-a", ".trash-step-00000000-ff", "step-00000003.corrupt-a-ff"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    (tmp_path / ".LATEST.0a1b.tmp").touch()
    removed = sweep(tmp_path)
    assert sorted(removed) == [".LATEST.0a1b.tmp", ".trash-step-00000000-ff", "step-00000002.tmp-a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step-00000001", "step-00000003.corrupt-a-ff"]
    assert sweep(tmp_path / "absent") == []


def test_a_fresh_folder_starts_fresh(tmp_path: Path) -> None:
    assert find(tmp_path / "absent", "auto") is None
    assert find(tmp_path, "never") is None


def test_never_refuses_to_mix_runs(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    with pytest.raises(ConfigError) as raised:
        find(tmp_path, "never")
    assert str(raised.value) == (
        f"{tmp_path}: holds 2 checkpoints (newest step-00000002) and resume is 'never'; "
        "resume with 'auto', or choose another run_dir, or move the folder away: nothing is overwritten"
    )


def test_a_named_checkpoint_is_taken_and_newer_ones_are_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, 1)
    write(tmp_path, 2)
    assert path is not None
    found = find(tmp_path, path)
    assert found is not None
    assert found.path == path
    assert "step-00000002 beside it are newer, and `resume: auto` would take those" in caplog.text


def test_a_named_checkpoint_is_never_replaced_by_another(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    assert path is not None
    (path / FILE).unlink()
    with pytest.raises(CheckpointError, match=f"not a valid checkpoint to resume from: {FILE}: is missing") as raised:
        find(tmp_path, path)
    assert raised.value.exit_code == ExitCode.CHECKPOINT
    with pytest.raises(CheckpointError, match=r"not a valid checkpoint to resume from: MANIFEST.json is missing"):
        find(tmp_path, tmp_path / "step-00000077")


def test_a_mark_goes_when_the_files_are_whole_again(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    write(tmp_path, 0)
    assert path is not None
    (path / FILE).rename(path / "aside")
    found = find(tmp_path, "auto")
    assert found is not None
    assert found.step == 0
    assert (path / "CORRUPT").exists()
    (path / "aside").rename(path / FILE)
    found = find(tmp_path, "auto")
    assert found is not None
    assert found.step == 1
    assert not (path / "CORRUPT").exists()


def test_a_folder_that_cannot_be_listed_is_no_fresh_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> list[Checkpoint]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(protocol, "list_checkpoints", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be listed: .*Permission denied"):
        find(tmp_path, "auto")


def test_an_unreadable_file_is_a_problem_not_a_crash(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    assert path is not None
    (path / FILE).unlink()
    (path / FILE).mkdir()
    checkpoint = Checkpoint.open(path)
    checkpoint.manifest["files"][FILE]["size_bytes"] = (path / FILE).stat().st_size
    [problem] = verify(checkpoint)
    assert problem.startswith(f"{FILE}: [Errno 21] Is a directory")
