"""The first thing of a job on a real cluster: all nodes are checked, and bad ones named, left out or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.slurm_journal import Journal
from sdtrain.errors import ExitCode
from sdtrain.run_dir import PREFLIGHT_FILE, read_json_lines
from tests.slurm.cluster import ClusterRun, slurm

pytestmark = [pytest.mark.heavy, pytest.mark.long, pytest.mark.timeout(600)]

NewRun = Callable[[str], ClusterRun]

# A node whose scratch disk is not mounted: what its prolog would set leads nowhere there.
WITHOUT_SCRATCH = """
import os, sys
if "doctor" in sys.orig_argv and os.environ.get("SLURMD_NODENAME") == "n1":
    os.environ["TMPDIR"] = "/nowhere/scratch"
"""


@pytest.fixture
def checked(new_run: NewRun, tmp_path: Path) -> Callable[..., ClusterRun]:
    """A run that begins with a preflight; on n1 something can be wrong."""

    def make(name: str, *, wrong: str = "", **settings: Any) -> ClusterRun:
        run = new_run(name)
        site = json.loads(run.site.read_text()) | {"preflight": True} | settings
        (tmp_path / "sitecustomize.py").write_text(wrong)
        site["environment"] = {**site["environment"], "PYTHONPATH": str(tmp_path)}
        run.site = tmp_path / "site.yaml"
        run.site.write_text(json.dumps(site))
        return run

    return make


def preflight_rows(run: ClusterRun) -> list[dict[str, Any]]:
    return [row for row in read_json_lines(Journal(run.run).path) if row["event"] == "preflight"]


def submit_on_one_node(run: ClusterRun, *arguments: str) -> None:
    run.submit(run.page(trainer={"max_steps": 3}), *arguments, "--nodes", "1")


BAD = "preflight found bad nodes: n1 (scratch: TMPDIR = /nowhere/scratch: cannot be written to: No such file or"


@pytest.mark.parametrize("mode", ["srun", "torchrun"])
def test_sound_nodes_pass_and_train(checked: Callable[..., ClusterRun], mode: str) -> None:
    run = checked("sound")
    run.submit(run.page(trainer={"max_steps": 3}), "--mode", mode)
    assert run.wait_for_end() == "COMPLETED", run.said()
    assert (run.word().code, run.word().step, run.restarts()) == (0, 3, 0)
    (row,) = preflight_rows(run)
    assert (row["passed"], row["failing"], row["excluded"]) == (True, {}, [])
    report = json.loads((run.run.path / "logs" / f"slurm-{run.job}.0" / PREFLIGHT_FILE).read_text())
    assert report["hosts"] == ["n1", "n2"] and report["measured"]["bus_bytes_per_second"] > 0
    said = run.said()
    assert "preflight of 2 nodes: passed in " in said
    assert "all-reduce      ok       all 2 nodes, as n1: the known sum; bus bandwidth " in said
    print(f"{mode}: preflight of 2 ranks in {report['seconds']:.1f} s")


def test_a_bad_node_is_left_out_and_the_job_finishes_on_the_other(checked: Callable[..., ClusterRun]) -> None:
    run = checked("left-out", wrong=WITHOUT_SCRATCH, exclude_bad_nodes=True)
    submit_on_one_node(run)
    assert run.wait_for_end() == "COMPLETED", run.said()
    assert (run.word().code, run.word().step, run.restarts()) == (0, 3, 1)
    assert "ExcNodeList=n1" in slurm("scontrol", "show", "job", run.job)
    first, second = preflight_rows(run)
    assert (first["passed"], first["excluded"], list(first["failing"])) == (False, ["n1"], ["n1"])
    assert (second["passed"], second["excluded"]) == (True, [])
    assert BAD in run.said() and "; requeued, to go on from the newest checkpoint without n1\n" in run.said()
    assert len(run.events("start")) == 1, "what was refused became no attempt"


def test_without_the_option_the_job_ends_and_names_the_node(checked: Callable[..., ClusterRun]) -> None:
    run = checked("named", wrong=WITHOUT_SCRATCH)
    submit_on_one_node(run)
    assert run.wait_for_end() == "FAILED", run.said()
    assert (run.exit_code(), run.restarts()) == (ExitCode.PREFLIGHT, 0)
    assert f"; leave them out with: sdtrain-launch resume {run.run.path} --exclude=n1 (by hand: sbatch" in run.said()
    assert sorted(path.name for path in run.run.path.iterdir()) == ["logs"], "the run's folder is not touched"
    status = run.launch("status", str(run.run.path)).stdout
    assert "preflight   failed: n1 (scratch: TMPDIR = /nowhere/scratch: cannot be written to" in status
    run.resubmit("--exclude=n1")
    assert run.wait_for_end() == "COMPLETED", run.said()
    assert (run.word().code, run.word().step) == (0, 3)


def test_no_node_can_take_the_place_of_a_bad_one(checked: Callable[..., ClusterRun]) -> None:
    run = checked("too-few", wrong=WITHOUT_SCRATCH)
    run.submit(run.page(trainer={"max_steps": 3}), "--exclude-bad-nodes")
    assert run.wait_for_end() == "FAILED", run.said()
    assert (run.exit_code(), run.restarts()) == (ExitCode.PREFLIGHT, 0)
    assert BAD in run.said()
    assert "without n1 partition main has 1 usable nodes with 1 GPUs, and the job needs 2: mend them, or" in run.said()
