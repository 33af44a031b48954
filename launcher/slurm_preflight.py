"""What follows from a job's preflight: go on, come back without its bad nodes, or end and name them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.slurm_job import Surroundings, end, training, write_end
from launcher.slurm_queue import excluded_nodes, host_names, usable_nodes
from sdtrain.errors import ExitCode
from sdtrain.run_dir import PREFLIGHT_FILE, RunDir


@dataclass(frozen=True, slots=True)
class Preflight:
    """What `sdtrain doctor` left of it.

    Attributes:
        passed: Whether nothing failed.
        reason: What did, in words.
        failing: Node -> what failed there and is its own fault.
        slow: Node -> what is slow there.
    """

    passed: bool
    reason: str
    failing: Mapping[str, list[str]]
    slow: Mapping[str, list[str]]

    @classmethod
    def read(cls, logs: Path) -> Preflight | None:
        """From the folder of a start's logs; None where the ranks had no time to leave it."""
        try:
            row = json.loads((logs / PREFLIGHT_FILE).read_text(encoding="utf-8"))
            return cls(row["passed"], row["reason"], row["failing"], row["slow"])
        except (FileNotFoundError, json.JSONDecodeError, KeyError):
            return None


def settle(
    run_dir: RunDir, here: Surroundings, logs: Path, max_restarts: int, step_status: int, *, exclude: bool
) -> int | None:
    """Decide by `preflight.json` whether the job goes on.

    Args:
        run_dir: The run.
        here: The job.
        logs: Folder of this start's logs.
        max_restarts: How often the job may be started again.
        step_status: What srun returned.
        exclude: Whether the job is to come back without its bad nodes.

    Returns:
        The batch script's exit code; None where it goes on.
    """
    found = Preflight.read(logs)
    if found is None:
        return int(end(run_dir, here, max_restarts, step_status))  # told to leave, or a crash
    names = host_names(here.node_list)
    failing = [node for node in found.failing if node in names]  # ranks that never came may have no name
    slow = [node for node in found.slow if node in names]
    bad = failing or slow
    why_not = _why_not_without(here, bad) if exclude and bad else None
    if found.passed and (not exclude or not bad or why_not):
        _note(run_dir, here, found, [])
        if slow:
            _say(f"{_told(slow, found.slow)}; training goes on with them: {why_not or _leave_out(run_dir, slow)}")
        return None
    excluded = bad if exclude and bad and why_not is None else []
    _note(run_dir, here, found, excluded)
    told = _told(failing, found.failing) if failing else f"preflight failed: {found.reason or _told(slow, found.slow)}"
    if not excluded and failing:
        told = f"{told}; {why_not or _leave_out(run_dir, failing)}"
    elif found.passed:
        told = _told(slow, found.slow)
    return write_end(
        training(run_dir), here, max_restarts, int(ExitCode.PREFLIGHT), told, again=bool(excluded), exclude=excluded
    )


def _told(nodes: Iterable[str], why: Mapping[str, list[str]]) -> str:
    listed = "; ".join(f"{node} ({', '.join(why[node])})" for node in nodes)
    return f"preflight found bad nodes: {listed}"


def _leave_out(run_dir: RunDir, nodes: Iterable[str]) -> str:
    listed = ",".join(nodes)
    return (
        f"leave them out with: sdtrain-launch resume {run_dir.path} --exclude={listed} (by hand: sbatch "
        f"--exclude={listed}), or have jobs do so by themselves: --exclude-bad-nodes"
    )


def _why_not_without(here: Surroundings, bad: Iterable[str]) -> str | None:
    """Why the job could not run without some nodes; None where other nodes can take their place."""
    without = {*bad, *host_names(excluded_nodes(here.job))}
    usable = [node for node in usable_nodes(here.partition, here.ranks_per_node) if node not in without]
    if len(usable) >= here.nodes:
        return None
    return (
        f"without {', '.join(sorted(without))} partition {here.partition} has {len(usable)} usable nodes with "
        f"{here.ranks_per_node} GPUs, and the job needs {here.nodes}: mend them, or resume with fewer --nodes"
    )


def _note(run_dir: RunDir, here: Surroundings, found: Preflight, excluded: list[str]) -> None:
    """Write the decision down, for `sdtrain-launch status`; a full disk must not keep a job from it."""
    facts = {"job": here.job, "restart": here.restart, "passed": found.passed, "reason": found.reason}
    facts |= {"failing": found.failing, "slow": found.slow, "excluded": excluded}
    journal = training(run_dir).journal
    try:
        journal.add("preflight", facts)
    except OSError as error:
        _say(f"{journal.path} could not be written: {error.strerror}")


def _say(message: str) -> None:
    print(f"[sdtrain-launch] {message}", file=sys.stderr, flush=True)
