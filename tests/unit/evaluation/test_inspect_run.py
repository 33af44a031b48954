from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sdtrain.checkpoints.manifest import Checkpoint, content_digest, folder_name
from sdtrain.checkpoints.protocol import commit
from sdtrain.errors import ConfigError
from sdtrain.evaluation.inspect_run import Inspection, examine, inspect
from sdtrain.evaluation.lineage import trace
from sdtrain.run_dir import Exit, RunDir
from sdtrain.training.fork import ancestry
from tests.support import tiny_page

BATCH = 8


def save(run: RunDir, step: int, parent: int, attempt: str, *, skip: int = 0) -> Path:
    """What a training does at a save: commit, then the ledger's row."""
    before = folder_name(parent) if parent else None
    facts = {"samples_seen": step * BATCH, "parent": before}
    path = commit(
        run.checkpoints,
        step=step,
        attempt=attempt,
        files={"extra.rank00000.safetensors": {"x": torch.ones(step)}},
        facts=facts,
    )
    assert path is not None
    run.log(
        "commit",
        attempt=attempt,
        step=step,
        checkpoint=path.name,
        parent=before,
        first_position=parent * BATCH + skip,
        last_position=step * BATCH,
    )
    return path


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Two attempts: the first one died after step 25, the second one resumed at 20."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.log("start", attempt="a", step=0)
    save(run, 10, 0, "a")
    save(run, 20, 10, "a")
    run.log("start", attempt="b", step=20)
    save(run, 30, 20, "b")
    run.write_exit(Exit(85, "SIGUSR1: saved", 30, 0, "b"))
    return run


def shown(run: RunDir, **options: Any) -> tuple[str, Inspection]:
    out = io.StringIO()
    found = inspect(run.path, console=Console(file=out, width=160), **options)
    return out.getvalue(), found


def test_a_healthy_run(run: RunDir) -> None:
    (run.checkpoints / "step-00000010" / "PINNED").touch()
    text, found = shown(run)
    assert [(entry.step, entry.status, entry.parent) for entry in found.checkpoints] == [
        (30, "valid", "step-00000020"),
        (20, "valid", "step-00000010"),
        (10, "valid", None),
    ]
    assert found.lineage.problems == ()
    assert "samples 0 to 239 were trained on exactly once: 3 contiguous ranges, 2 attempts" in text
    assert "step-00000010 pinned" in text
    assert "ledger  2 start, 3 commit" in text
    assert "85 REQUEUE at step 30, said by rank 0 of attempt b: SIGUSR1: saved" in text


def test_a_corrupt_newest_one_is_named_and_the_lineage_starts_at_the_next(run: RunDir) -> None:
    (run.checkpoints / "step-00000030" / "extra.rank00000.safetensors").write_bytes(b"")
    text, found = shown(run)
    assert [entry.status for entry in found.checkpoints] == ["corrupt", "valid", "valid"]
    assert "step-00000030: extra.rank00000.safetensors: truncated to 0 of " in text
    assert found.lineage.verdict == "samples 0 to 159 were trained on exactly once: 2 contiguous ranges, 1 attempt"


def test_without_verification_manifests_are_believed_unless_they_are_damaged(run: RunDir) -> None:
    (run.checkpoints / "step-00000030" / "extra.rank00000.safetensors").write_bytes(b"")
    (run.checkpoints / "step-00000020" / "MANIFEST.json").unlink()
    text, found = shown(run, verify=False)
    assert [entry.status for entry in found.checkpoints] == ["not verified", "corrupt", "not verified"]
    assert "step-00000020: MANIFEST.json is missing" in text


def test_json_holds_the_same(run: RunDir) -> None:
    text, found = shown(run, as_json=True)
    said = json.loads(text)
    assert said == json.loads(json.dumps(found.to_json()))
    assert said["verdict"].startswith("samples 0 to 239 were trained on exactly once")
    assert said["last_exit"]["code"] == 85
    assert said["checkpoints"][0]["problems"] == []
    assert said["events"] == {"start": 2, "commit": 3}


def test_retention_does_not_end_the_proof(run: RunDir) -> None:
    (run.checkpoints / "step-00000010").rename(run.path / "gone")
    assert examine(run.path).lineage.problems == ()


def test_a_row_lost_to_a_kill_right_after_the_commit_is_made_up_from_the_manifest(run: RunDir) -> None:
    rows = [row for row in run.ledger_rows() if row.get("step") != 20 or row["event"] != "commit"]
    run.ledger.unlink()
    for row in rows:
        run.log(row.pop("event"), **row)
    found = examine(run.path)
    assert found.lineage.problems == ()
    assert [(commit.step, commit.first, commit.last) for commit in found.lineage.commits] == [
        (10, 0, 80),
        (20, 80, 160),
        (30, 160, 240),
    ]


def test_a_run_that_has_not_saved_yet(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.log("start", attempt="a", step=0)
    text, found = shown(run)
    assert f"no checkpoints in {tmp_path}" in text
    assert found.lineage.verdict == "no commit in the ledger"
    assert "no word from the newest attempt: it still runs, or it crashed" in text


def test_what_stays_what_was_uploaded_and_where_a_run_comes_from(tmp_path: Path) -> None:
    grandparent = {"checkpoint": str(tmp_path / "gone"), "run": "x", "step": 7, "load": "ema", "manifest_sha256": "0"}
    parent, run = RunDir(tmp_path / "parent"), RunDir(tmp_path / "child")
    for one, origin in ((parent, grandparent), (run, None)):
        one.path.mkdir()
        if origin is None:
            source = Checkpoint.open(parent.checkpoints / folder_name(3))
            origin = ancestry(source, "all")
        one.log("start", attempt="a", step=0, forked_from=origin)
        for step, loss in ((1, 0.2), (2, 0.1), (3, 0.3)):
            facts = {"forked_from": origin, "figures": {"validation/loss": loss}, "samples_seen": 8 * step}
            files = {"extra.rank00000.safetensors": {"x": torch.ones(step)}}
            path = commit(one.checkpoints, step=step, attempt="a", files=files, facts=facts)
            assert path is not None
    sections = {"checkpoint": {"keep_best": 1}, "validation": {"every_steps": 1, "num_samples": 1, "batch_size": 1}}
    tiny_page(run.path, tmp_path / "manifest.json", **sections).rename(run.config)
    (run.checkpoints / folder_name(2) / "PINNED").touch()
    sent = content_digest(Checkpoint.open(run.checkpoints / folder_name(3)).manifest)
    run.log("upload", checkpoint=folder_name(3), url="s3://b/run", manifest_sha256=sent)
    run.log("upload", checkpoint=folder_name(1), url="s3://b/run", manifest_sha256="of other bytes")
    text, found = shown(run)
    assert [(entry.step, entry.retained, entry.uploaded) for entry in found.checkpoints] == [
        (3, "", "s3://b/run"),
        (2, "pinned, best", ""),
        (1, "", ""),
    ]
    assert "step-00000003 uploaded" in text
    assert found.ancestry == [ancestry(source, "all"), grandparent]
    assert f"forked  from all of {source.path} (step 3 of the run begun as a)" in text
    assert f"forked  from ema of {tmp_path / 'gone'} (step 7 of the run begun as x)" in text


def test_the_chain_of_parents_is_shown_and_a_long_one_shortened(run: RunDir) -> None:
    text, _ = shown(run)
    assert "chain   start > step-00000010 > step-00000020 > step-00000030\n" in text
    for step in range(40, 130, 10):
        save(run, step, step - 10, "b")
    text, _ = shown(run)
    assert "chain   start > step-00000010 > ... 6 more ... > step-00000080 > step-00000090 > " in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run folder; it holds none of checkpoints/, ledger.jsonl, metrics.jsonl"):
        examine(tmp_path)


def test_a_rollback_is_no_gap(run: RunDir) -> None:
    """The run went back from 35 to 30 and left out what it had consumed since."""
    facts = {"checkpoint": folder_name(30), "position": 240, "left_out": [[240, 280]], "reason": "the loss ran away"}
    run.log("rollback", attempt="b", step=35, **facts)
    save(run, 40, 30, "b", skip=40)
    text, found = shown(run)
    assert found.lineage.problems == ()
    assert "samples 0 to 319 were trained on exactly once, but for 40 that were left out on purpose: 4 contig" in text


def test_no_valid_checkpoint_has_no_lineage(run: RunDir) -> None:
    for step in (10, 20, 30):
        (run.checkpoints / folder_name(step) / "MANIFEST.json").unlink()
    assert examine(run.path).lineage.commits == ()
    assert trace([]).commits == ()
