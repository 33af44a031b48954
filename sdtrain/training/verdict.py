"""Who holds a hung run up: what a watchdog reports of its rank, and how the reports are judged. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sdtrain.run_dir import RunDir, write_atomically
from sdtrain.training.peers import Answer, RollCall, ranks_in_words

HALTED = {
    "T": "is stopped (state T: SIGSTOP or a suspended job)",
    "t": "is held by a debugger (state t)",
    "Z": "is dead (state Z)",
    "X": "is gone",
}
_STATE = re.compile(r"^(?P<pid>\d+) \(.*\) (?P<state>\S) (?P<parent>-?\d+) ", re.DOTALL)
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")


# A process, as the kernel sees it -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProcessState:
    """One process in `/proc`.

    Attributes:
        state: The kernel's letter: R, S, D (waits for a disk), T (stopped), t (traced), Z (dead); X if it is gone.
        waits_in: Kernel function that the process sleeps in; empty where the kernel does not tell.
    """

    state: str
    waits_in: str = ""


def look_at(pid: int, proc: Path = Path("/proc")) -> ProcessState:
    """State of a process, by its main thread."""
    try:
        found = _STATE.match((proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ProcessState("X")
    try:
        waits_in = (proc / str(pid) / "wchan").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        waits_in = ""
    return ProcessState(found["state"] if found else "?", "" if waits_in == "0" else waits_in)


def descendants(pid: int, proc: Path = Path("/proc")) -> list[int]:
    """Children, grandchildren, ... of a process; data workers are among a rank's."""
    children: dict[int, list[int]] = {}
    for stat in proc.glob("[0-9]*/stat"):
        try:
            found = _STATE.match(stat.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue  # ended meanwhile
        if found:
            children.setdefault(int(found["parent"]), []).append(int(found["pid"]))
    family, seen = [], [pid]
    while seen:
        young = children.get(seen.pop(), [])
        family += young
        seen += young
    return family


# What a watchdog tells the others -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Report:
    """What a watchdog says of its rank that stands still.

    Attributes:
        alarmed: Whether the rank stands longer than its phase allows; before that the report is a precaution, so that
            the others know it by the time one of them is alarmed.
        quiet_seconds: How long it stands.
        ticks: Beats since the step changed.
        time: Wall clock, in seconds since the epoch.
    """

    rank: int
    host: str
    pid: int
    attempt: str
    alarmed: bool
    quiet_seconds: float
    phase: str
    step: int
    micro_step: int
    ticks: int
    state: str
    waits_in: str
    time: float

    @property
    def place(self) -> str:
        """`phase data of step 7`, counted from 0 like the run's positions."""
        return f"phase {self.phase} of step {self.step}"


class Board:
    """The folder in which the watchdogs of one launch report; untouched as long as nothing hangs."""

    def __init__(self, run: RunDir, launch: str, *, since: float) -> None:
        """Open the board of a launch.

        Args:
            launch: What the ranks of a launch have in common before they meet.
            since: Wall clock of this launch's start; older reports were left by an earlier launch of the same name.
        """
        self._folder = run.hangs / launch
        self._since = since

    def publish(self, report: Report) -> None:
        """Put a rank's report up, over its last one."""
        write_atomically(self._path(report.rank), json.dumps(asdict(report), indent=2) + "\n")

    def withdraw(self, rank: int) -> None:
        """Take a rank's report down: it moves again."""
        self._path(rank).unlink(missing_ok=True)

    def read(self, rank: int) -> Report | None:
        """A rank's report; None where there is none of this launch."""
        try:
            report = Report(**json.loads(self._path(rank).read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError, TypeError):
            return None
        return report if report.time >= self._since else None

    def read_all(self, world_size: int) -> dict[int, Report]:
        """Every rank's report."""
        found = {rank: self.read(rank) for rank in range(world_size)}
        return {rank: report for rank, report in found.items() if report is not None}

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"


def launch_name(environment: Mapping[str, str]) -> str:
    """What all ranks of one launch have in common before they have met: job, restart, meeting point."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID")
    names += ("TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
    parts = [environment[name] for name in names if environment.get(name)]
    return _UNSAFE.sub("_", "-".join(parts)) or "alone"


# The judgement --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which rank the others wait for, and how that shows."""

    rank: int
    reason: str


def decide(reports: Mapping[int, Report], world_size: int, call: RollCall | None = None) -> Verdict:
    """Find the rank that holds the run up; the strongest sign first.

    A stopped or dead process explains everything; then a host that does not answer; then a rank without a report.
    Otherwise the one that did least in its step is the one that the others wait for. Where all stand at the same
    place, no rank is to blame by what can be seen from outside.

    Args:
        reports: By rank; at least one.
        world_size: Number of ranks.
        call: What the judge knows of the others' hosts; None knows nothing.
    """
    call = call or RollCall()
    halted = [report for report in reports.values() if report.state in HALTED]
    missing = [rank for rank in range(world_size) if rank not in reports]
    least = min((report.step, report.ticks) for report in reports.values())
    behind = [report for report in reports.values() if (report.step, report.ticks) == least]
    others = [report for report in reports.values() if report not in (halted or behind)]
    if halted:
        return Verdict(halted[0].rank, _joined(map(_told, halted), others))
    blamed = _lost(call, reports) or _missing(missing, world_size, call)
    if blamed is not None:
        waiting = [report for rank, report in reports.items() if rank not in lost_ranks(call)]
        return Verdict(blamed.rank, _joined([blamed.reason], waiting))
    if others:
        return Verdict(behind[0].rank, _joined(map(_told, behind), others))
    if world_size == 1:
        return Verdict(0, _told(behind[0]))
    first = behind[0]
    return Verdict(
        first.rank,
        f"all {world_size} ranks wait in {first.place} and none is behind: a collective that does not end (network?), "
        "or ranks in different ones (compare their stacks)",
    )


def lost_ranks(call: RollCall) -> list[int]:
    """The ranks on hosts that are down or cut off; on the caller's own host, where most others do not answer it."""
    return call.of_own_host() if call.is_cut_off() else call.of(Answer.SILENT)


def lost_peers(call: RollCall) -> Verdict | None:
    """Who is to blame for a connection that broke; None where everyone is there."""
    return _lost(call, ()) or _gone(call.of(Answer.GONE), call)


def _lost(call: RollCall, reports: Collection[int]) -> Verdict | None:
    """Hosts that do not answer, in words; a rank among `reports` can still be heard through the run's folder."""
    lost = lost_ranks(call)
    if not lost:
        return None
    says = f"{call.named(lost)} {_are(lost)} "
    if call.is_cut_off():
        says += "cut off: most of the other hosts do not answer over the network"
    elif all(rank in reports for rank in lost):
        says += "lost: reports come through the run folder, but the host does not answer over the network: a cut link"
    else:
        says += "lost: the host does not answer over the network: it is down or cut off"
    return Verdict(lost[0], says)


def _missing(missing: list[int], world_size: int, call: RollCall) -> Verdict | None:
    """Ranks without a report, on hosts that are not known to be lost."""
    gone = _gone([rank for rank in missing if call.answers.get(rank) is Answer.GONE], call)
    if gone is not None or not missing:
        return gone
    why = "no report came, though the host answers" if call.answers else "the node is gone, or never came"
    return Verdict(missing[0], f"{call.named(missing)} of {world_size} {_are(missing)} silent: {why}")


def _gone(gone: list[int], call: RollCall) -> Verdict | None:
    """Ranks that ended together with their watchdogs, in words."""
    if not gone:
        return None
    why = "and no watchdog there says why: the job was ended on that node"
    return Verdict(gone[0], f"{call.named(gone)} {_are(gone)} gone, {why}")


def _are(ranks: Collection[int]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _told(report: Report) -> str:
    """One rank in words: `rank 1 on node7 is stopped (state T: ...) in phase data of step 7`."""
    who = f"rank {report.rank} on {report.host}"
    words = HALTED.get(report.state, "stands still")
    if report.state == "D":
        words = f"waits for a disk or a file system (state D, in {report.waits_in or 'an unknown call'})"
    return f"{who} {words} in {report.place}"


def _joined(causes: Iterable[str], waiting: list[Report]) -> str:
    text = "; ".join(causes)
    if not waiting:
        return text
    places = sorted({report.place for report in waiting})
    verb = "waits" if len(waiting) == 1 else "wait"
    return f"{text}; {ranks_in_words([report.rank for report in waiting])} {verb} in {' and '.join(places)}"
