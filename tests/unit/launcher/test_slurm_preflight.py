"""What a preflight leads to: on with it, again without bad nodes, or an end that names them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher import cli, slurm_job, slurm_preflight
from launcher.site import Site
from launcher.slurm import job_of
from launcher.slurm_job import Surroundings, begin
from launcher.slurm_journal import Journal
from launcher.slurm_preflight import settle
from launcher.slurm_queue import QueuedJob, excluded_nodes, host_names, requeue, usable_nodes
from launcher.status import read_status, render
from sdtrain.errors import ConfigError, ExitCode, NoProgressError
from sdtrain.run_dir import PREFLIGHT_FILE, REFUSALS, Exit, RunDir
from tests.support import tiny_page

NODES = ("n1", "n2", "n3")
SCRATCH = {"n2": ["scratch: TMPDIR is full"]}
HOT = {"n2": ["a product takes 2.0 times the median"]}


class Scheduler:
    """Knows one running job and the nodes that could take it; remembers what it is asked for."""

    def __init__(self) -> None:
        self.usable = list(NODES)
        self.excluded = ""
        self.requeued: list[tuple[str, ...]] = []

    def requeue(self, job: str, *, delay_seconds: int, exclude: Sequence[str]) -> None:
        self.requeued.append(tuple(exclude))


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    found = Scheduler()
    monkeypatch.delenv(REFUSALS, raising=False)
    running = QueuedJob("RUNNING", "None", "1:00", "1:00:00", "n[1-2]", "N/A")
    monkeypatch.setattr(slurm_job, "find_job", lambda job: running)
    monkeypatch.setattr(slurm_job, "requeue", found.requeue)
    monkeypatch.setattr(slurm_preflight, "host_names", lambda nodes: nodes.split(",") if nodes else [])
    monkeypatch.setattr(slurm_preflight, "excluded_nodes", lambda job: found.excluded)
    monkeypatch.setattr(slurm_preflight, "usable_nodes", lambda partition, gpus: found.usable)
    return found


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def here(restart: int = 0) -> Surroundings:
    return Surroundings("7", restart, 2, 1, "gpu", "n1,n2")


def after(run: RunDir, *, exclude: bool, restart: int = 0, max_restarts: int = 5, **found: Any) -> int | None:
    """Begin a start, leave what its preflight found, and settle it."""
    logs = begin(run, here(restart), max_restarts)
    failing = found.get("failing", {})
    row = {"passed": not failing, "reason": "why" if failing else "", "failing": {}, "slow": {}, **found}
    (logs / PREFLIGHT_FILE).write_text(json.dumps(row))
    return settle(run, here(restart), logs, max_restarts, 0, exclude=exclude)


@pytest.mark.parametrize("exclude", [False, True])
def test_a_sound_job_goes_on(run: RunDir, scheduler: Scheduler, exclude: bool) -> None:
    assert after(run, exclude=exclude) is None
    assert scheduler.requeued == []
    row = Journal(run).newest_preflight()
    assert row is not None and (row["passed"], row["excluded"]) == (True, [])
    assert "preflight   passed\n" in render(read_status(run.path))


def test_a_bad_node_ends_the_job_and_is_named(
    run: RunDir, scheduler: Scheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    assert after(run, exclude=False, failing=SCRATCH) == ExitCode.PREFLIGHT
    assert scheduler.requeued == []
    assert capsys.readouterr().err == (
        "[sdtrain-launch] preflight found bad nodes: n2 (scratch: TMPDIR is full); leave them out with: "
        f"sdtrain-launch resume {run.path} --exclude=n2 (by hand: sbatch --exclude=n2), or have jobs do so by "
        "themselves: --exclude-bad-nodes\n"
    )
    assert "preflight   failed: n2 (scratch: TMPDIR is full)\n" in render(read_status(run.path))


def test_a_bad_node_is_left_out(run: RunDir, scheduler: Scheduler, capsys: pytest.CaptureFixture[str]) -> None:
    assert after(run, exclude=True, failing=SCRATCH, slow={"n1": ["slow"]}) == ExitCode.PREFLIGHT
    assert scheduler.requeued == [("n2",)], "failing nodes first"
    said = capsys.readouterr().err
    assert said.endswith("TMPDIR is full); requeued, to go on from the newest checkpoint without n2\n")
    assert "preflight   failed: n1 (slow); n2 (scratch: TMPDIR is full); requeued without n2" in (
        render(read_status(run.path))
    )


def test_a_slow_node_is_left_out_only_if_asked(
    run: RunDir, scheduler: Scheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    assert after(run, exclude=False, slow=HOT) is None
    said = capsys.readouterr().err
    assert "n2 (a product takes 2.0 times the median); training goes on with them: leave them out with" in said
    assert after(run, exclude=True, restart=1, slow=HOT) == ExitCode.PREFLIGHT
    assert scheduler.requeued == [("n2",)]


def test_no_other_node_can_take_its_place(
    run: RunDir, scheduler: Scheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    """Failing nodes end the job then, slow ones do not."""
    scheduler.excluded = "n3"
    assert after(run, exclude=True, failing=SCRATCH) == ExitCode.PREFLIGHT
    assert scheduler.requeued == []
    few = "without n2, n3 partition gpu has 1 usable nodes with 1 GPUs, and the job needs 2: mend them, or resume with"
    assert few in capsys.readouterr().err
    assert after(run, exclude=True, restart=1, slow=HOT) is None
    assert f"training goes on with them: {few}" in capsys.readouterr().err


def test_what_is_no_node_s_fault_ends_the_job(
    run: RunDir, scheduler: Scheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    why = "n1, n2: manifest: m.json: no such file"
    assert after(run, exclude=True, passed=False, reason=why) == ExitCode.PREFLIGHT
    assert scheduler.requeued == []
    assert f"[sdtrain-launch] preflight failed: {why}\n" == capsys.readouterr().err


def test_ranks_without_a_node_s_name_are_not_left_out(run: RunDir, scheduler: Scheduler) -> None:
    assert after(run, exclude=True, failing={"ranks 2, 3": ["did not come"]}) == ExitCode.PREFLIGHT
    assert scheduler.requeued == []


def test_a_restart_without_bad_nodes_counts_as_one_but_not_as_in_vain(run: RunDir, scheduler: Scheduler) -> None:
    for restart in range(4):
        assert after(run, exclude=True, restart=restart, max_restarts=4, failing=SCRATCH) == ExitCode.PREFLIGHT
    assert len(scheduler.requeued) == 4
    assert after(run, exclude=True, restart=4, max_restarts=4, failing=SCRATCH) == ExitCode.PREFLIGHT
    assert len(scheduler.requeued) == 4, "capped"
    with pytest.raises(NoProgressError, match="job had 4 restarts, and --max-restarts is 4"):
        begin(run, here(5), 4)


def test_doctors_that_were_told_to_leave(run: RunDir, scheduler: Scheduler, capsys: pytest.CaptureFixture[str]) -> None:
    logs = begin(run, here(), 5)
    assert settle(run, here(), logs, 5, 138, exclude=False) == ExitCode.HANG
    assert scheduler.requeued == [()]
    assert "(srun was ended by SIGUSR1)" in capsys.readouterr().err


def test_doctors_that_refuse_the_page(
    run: RunDir, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(REFUSALS, str(tmp_path / "refusals"))
    logs = begin(run, here(), 5)
    RunDir(tmp_path / "refusals").write_exit(Exit(2, "no such key", -1, 0, "none"))
    assert settle(run, here(), logs, 5, 2, exclude=True) == ExitCode.CONFIG
    assert scheduler.requeued == []


# Slurm's own commands -------------------------------------------------------------------------------------------------


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins that write down how they are called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    return folder


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n{text}\n')
    path.chmod(0o755)


def test_usable_nodes(programs: Path) -> None:
    states = ["idle", "mixed", "allocated", "down*", "drained", "draining", "idle*", "maint", "completing"]
    rows = [f"n{index}|gpu:h100:8|{state}" for index, state in enumerate(states)]
    program(programs, "sinfo", "\n".join(f"echo '{row}'" for row in [*rows, "n9|gpu:4|idle", "n10|(null)|idle"]))
    assert usable_nodes("gpu", 8) == ["n0", "n1", "n2", "n8"]
    assert "--partition=gpu" in (programs / "calls").read_text()


@pytest.mark.parametrize(("written", "found"), [("n[3-4]", "n[3-4]"), ("(null)", "")])
def test_excluded_nodes(programs: Path, written: str, found: str) -> None:
    program(programs, "scontrol", f"echo '   ReqNodeList=(null) ExcNodeList={written}'")
    assert excluded_nodes("7") == found
    assert host_names("") == []


def test_a_requeued_job_keeps_what_it_was_without(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    program(programs, "scontrol", "echo 'ExcNodeList=n[3-4]'")
    requeue("7", exclude=["n1", "n2"])
    calls = (programs / "calls").read_text().splitlines()
    assert calls == ["show job 7", "requeue 7", "update jobid=7 ExcNodeList=n[3-4],n1,n2"]


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "site", "wanted"),
    [
        ({}, {}, "on"),
        ({}, {"exclude_bad_nodes": True}, "exclude"),
        ({"exclude_bad_nodes": True}, {}, "exclude"),
        ({"exclude_bad_nodes": False}, {"exclude_bad_nodes": True}, "on"),
        ({"preflight": False}, {"exclude_bad_nodes": True}, "off"),
        ({}, {"preflight": False}, "off"),
        ({"preflight": True}, {"preflight": False}, "on"),
    ],
)
def test_options_win_over_the_site(options: dict[str, bool], site: dict[str, bool], wanted: str) -> None:
    assert job_of({"gpus_per_node": 8, **options}, Site.model_validate(site), "n", "auto").preflight == wanted


def test_options_that_contradict_each_other() -> None:
    options = {"gpus_per_node": 8, "preflight": False, "exclude_bad_nodes": True}
    with pytest.raises(ConfigError, match=r"--exclude-bad-nodes needs the preflight that finds them; leave --no-"):
        job_of(options, Site(), "n", "auto")


def test_options_reach_the_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tiny_page(tmp_path, tmp_path / "manifest.json")
    given = ("--gpus-per-node", "1", "--exclude", "n[3-4],n7", "--exclude-bad-nodes", "--dry-run")
    monkeypatch.setattr(sys, "argv", ["sdtrain-launch", "slurm", str(page), *given])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    script = capsys.readouterr().out
    assert "#SBATCH --exclude='n[3-4],n7'\n" in script and "\npreflight=exclude\n" in script
