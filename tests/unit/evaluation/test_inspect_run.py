from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sdtrain.checkpoints.manifest import folder_name
from sdtrain.checkpoints.protocol import commit
from sdtrain.errors import ConfigError
from sdtrain.evaluation.inspect_run import Inspection, examine, inspect, trace_lineage
from sdtrain.run_dir import Exit, RunDir

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
    assert found.lineage.problems == []
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
    assert examine(run.path).lineage.problems == []


def test_a_row_lost_to_a_kill_right_after_the_commit_is_made_up_from_the_manifest(run: RunDir) -> None:
    rows = [row for row in run.ledger_rows() if row.get("step") != 20 or row["event"] != "commit"]
    run.ledger.unlink()
    for row in rows:
        run.log(row.pop("event"), **row)
    found = examine(run.path)
    assert found.lineage.problems == []
    assert [(link.step, link.start, link.stop) for link in found.lineage.links] == [
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


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run folder; it holds none of checkpoints/, ledger.jsonl, metrics.jsonl"):
        examine(tmp_path)


def row(step: int, parent: int | None, first: int, last: int, attempt: str = "a") -> dict[str, Any]:
    name = None if parent is None else folder_name(parent)
    return {
        "event": "commit",
        "step": step,
        "parent": name,
        "first_position": first,
        "last_position": last,
        "attempt": attempt,
    }


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([row(1, None, 0, 8), row(2, 1, 9, 16)], "samples 8 to 8 were skipped before step-00000002"),
        ([row(1, None, 8, 16), row(2, 1, 16, 24)], "samples 0 to 7 were skipped before step-00000001"),
        ([row(1, None, 0, 8), row(2, 1, 4, 16)], "samples 4 to 7 were trained on again in step-00000002"),
        ([row(2, 1, 8, 16)], "step-00000001 is in the lineage, the ledger holds no commit of it"),
        ([row(1, 2, 8, 16), row(2, 1, 16, 24)], "step-00000002 is in the lineage, the ledger holds no commit of it"),
        ([row(1, None, 0, 8), row(2, 1, 8, 4)], "step-00000002 ends at sample 4, before its start 8"),
    ],
)
def test_anything_but_exactly_once_is_named(rows: list[dict[str, Any]], problem: str) -> None:
    lineage = trace_lineage(rows, 2)
    assert problem in lineage.problems
    assert lineage.verdict.startswith("not exactly once: ")


def test_dead_branches_do_not_count_and_the_later_row_of_a_step_does() -> None:
    rows = [
        row(1, None, 0, 8),
        row(2, 1, 8, 16),
        row(3, 2, 16, 24),  # lost: damaged, the run resumed at step 2
        row(3, 2, 16, 24, "b"),
        row(4, 3, 24, 32, "b"),
    ]
    lineage = trace_lineage(rows, 4)
    assert [(link.step, link.attempt) for link in lineage.links] == [(1, "a"), (2, "a"), (3, "b"), (4, "b")]
    assert lineage.problems == []


def test_no_valid_checkpoint_has_no_lineage() -> None:
    assert trace_lineage([row(1, None, 0, 8)], None).links == []
