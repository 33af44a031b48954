"""`sdtrain doctor`: one machine alone, or all ranks of a job before it begins.

Every part is bounded in time. A rank that never comes, stands still or dies is named by rank 0, through a store that
needs no collective; the others follow its word.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdtrain import distributed
from sdtrain.config.run import TrainingConfig
from sdtrain.errors import ExitCode
from sdtrain.run_dir import PREFLIGHT_FILE, REFUSED_STEP, Exit, RunDir, tell_launcher, write_atomically
from sdtrain.training.outcome import Refused, leave_refused
from sdtrain.training.peers import host_name
from sdtrain.training.preflight import collective
from sdtrain.training.preflight.findings import Finding, failing_hosts, merge, named, table
from sdtrain.training.preflight.meeting import AbsentError, Meeting, join
from sdtrain.training.preflight.node_checks import examine, examine_device, guarded, machine, software
from sdtrain.training.preflight.node_speed import Speed

STAGES = (
    "this node",
    "comparison",
    "process group",
    "shared folder",
    "clocks",
    "all-reduce",
    "network links",
    "verdict",
)
JOIN_SECONDS = 300.0
"""Until all ranks have come: a cold import of torch from a busy file system takes minutes."""
CHECK_SECONDS = 300.0
"""From then to the end, which takes some ten seconds where all is well."""
LATER_SECONDS = 15.0
"""How much longer than rank 0 the others last: it asks who is still there."""
SLOW_CHECKS = frozenset({"speed"})


@dataclass(frozen=True)
class Report:
    """What a preflight found, as `preflight.json` has it.

    Attributes:
        hosts: Of the job, in rank order.
        findings: Of all nodes.
        failing: Host -> what failed there, for those that the job would do better without.
        slow: Host -> what is slow there.
        measured: Figures by name.
        seconds: How long it took.
    """

    hosts: list[str]
    findings: list[Finding]
    failing: dict[str, list[str]]
    slow: dict[str, list[str]]
    measured: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the job may go on."""
        return not self.reason

    @property
    def reason(self) -> str:
        """What failed, in one line; empty where nothing did."""
        failed = [one for one in self.findings if one.status == "failed"]
        return "; ".join(f"{named(one.hosts)}: {one.check}: {one.found}" for one in failed)

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"passed": self.passed, "reason": self.reason, "time": time.time(), **asdict(self)}

    def write(self, folder: Path) -> None:
        """Leave it in a folder, for launchers."""
        write_atomically(folder / PREFLIGHT_FILE, json.dumps(self.as_json(), indent=2) + "\n")

    def text(self) -> str:
        """For people."""
        nodes = f"{len(self.hosts)} node{'s' if len(self.hosts) > 1 else ''}"
        end = "passed" if self.passed else "FAILED"
        return f"{table(self.findings, len(self.hosts))}\npreflight of {nodes}: {end} in {self.seconds:.1f} s"


def report_of(by_host: Mapping[str, Sequence[Finding]], together: Sequence[Finding] = (), **facts: Any) -> Report:
    """Findings of nodes and of all of them together, and who is to blame.

    Args:
        by_host: Every host's own.
        together: Those that name their hosts already.
        facts: `measured` and `seconds`.
    """
    findings = [*merge(by_host), *together]
    slow: dict[str, list[str]] = {}
    for one in findings:
        for host in one.hosts if one.check in SLOW_CHECKS and one.status != "ok" else ():
            slow.setdefault(host, []).append(one.found)
    return Report(list(by_host), findings, failing_hosts(findings, by_host), slow, **facts)


def examine_alone(config: TrainingConfig | None) -> Report:
    """This machine and all of its devices."""
    start = time.monotonic()
    findings = examine(config)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
    findings += [examine_device(device)[0] for device in devices]
    return report_of({host_name(): findings}, seconds=time.monotonic() - start)


def examine_as_rank(load: Callable[[], TrainingConfig], folder: Path, **limits: Any) -> int:
    """Be one rank of `examine_together`; returns the exit code, which all ranks share, with a refusal for launchers."""
    word = examine_together(load, folder, **limits)
    if not word:
        return int(ExitCode.DONE)
    return int(leave_refused("none", Refused(ExitCode.PREFLIGHT, f"preflight failed: {word}")))


# All ranks of a job ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What one rank measured together with others."""

    reduction: collective.Reduction
    links: dict[str, float]


def examine_together(
    load: Callable[[], TrainingConfig],
    folder: Path,
    *,
    expected: Sequence[str] = (),
    join_seconds: float = JOIN_SECONDS,
    check_seconds: float = CHECK_SECONDS,
    clock: Callable[[], float] = time.time,
) -> str:
    """Check all nodes of a job; called on every rank.

    Args:
        load: Reads the page, which this node may not even see.
        folder: Where rank 0 leaves `preflight.json`.
        expected: Hosts of the job as its launcher knows them.
        join_seconds: How long rank 0 waits for the others.
        check_seconds: How long everything may take from then on.
        clock: Seconds since the epoch.

    Returns:
        What failed, the same on all ranks; empty where nothing did. Rank 0 has printed all of it.
    """
    start = time.monotonic()
    place = distributed.ranks()
    try:
        meeting = join(place, host_name(), STAGES, expected=expected, seconds=join_seconds)
    except AbsentError as error:
        return _tell_absent(error, folder, time.monotonic() - start)
    with _no_longer_than(check_seconds, meeting, folder):
        try:
            word = _check(meeting, load, folder, start, clock)
        except RuntimeError as error:  # of torch.distributed's all are
            word = _tell_lost(meeting, folder, start, error)
        distributed.shutdown()  # which a group that broke may not let go of
    return word


def _check(
    meeting: Meeting, load: Callable[[], TrainingConfig], folder: Path, start: float, clock: Callable[[], float]
) -> str:
    config, findings, speed = _examine_here(meeting, load)
    facts = software() | {"device": distributed.device().type, "machine": machine()} if meeting.leads else {}
    meeting.give("local", {"findings": [asdict(one) for one in findings], "facts": facts, "speed": _plain(speed)})
    meeting.enter("comparison")
    local = meeting.collect("local")
    devices = {rank["facts"].get("device") for rank in local} - {None}
    is_sound = meeting.tell("sound", len(devices) == 1 and all(_is_sound(rank) for rank in local))
    together, measured = [], {}
    if is_sound:
        assert config is not None, "a page that cannot be read is not sound"
        together, measured = _measure_together(meeting, RunDir(config.resolved_run_dir).path / "logs", local, clock)
    meeting.enter("verdict")
    report = _judged(meeting, local, together, measured, time.monotonic() - start) if meeting.place.is_main else None
    if report is not None:
        _publish(report, folder)
    word = meeting.tell("word of all", None if report is None else report.reason)
    meeting.part()
    return word


def _examine_here(
    meeting: Meeting, load: Callable[[], TrainingConfig]
) -> tuple[TrainingConfig | None, list[Finding], Speed | None]:
    """Once per node what the node has, once per rank what its device does."""
    config: TrainingConfig | None = None

    def read() -> Finding:
        nonlocal config
        config = load()
        return Finding("page", "ok", f"run folder {config.resolved_run_dir}")

    findings = [guarded("page", read, of_node=False)]
    if meeting.leads:
        findings += examine(config, meeting.ranks_here)
    device, speed = distributed.device(), None
    if device.type == "cpu" or (device.index or 0) < torch.cuda.device_count():
        found, speed = examine_device(device)
        findings.append(found)
    return config, findings, speed


def _is_sound(rank: Mapping[str, Any]) -> bool:
    """Whether a rank can take part in collectives: its page is read and its device computes."""
    needed = ("page", "gpus", "computing")
    return rank["speed"] is not None and not any(
        one["status"] == "failed" and one["check"] in needed for one in rank["findings"]
    )


def _measure_together(
    meeting: Meeting, logs: Path, local: Sequence[Mapping[str, Any]], clock: Callable[[], float]
) -> tuple[list[Finding], dict[str, Any]]:
    """All collective checks; findings and figures on rank 0, nothing elsewhere."""
    meeting.enter("process group")
    distributed.initialize(timeout_seconds=CHECK_SECONDS, store=meeting.store)
    device, hosts = distributed.device(), list(dict.fromkeys(meeting.hosts))
    together: list[Finding] = []
    meeting.enter("shared folder")
    if len(hosts) > 1:
        together.append(collective.check_shared(meeting, logs))
    meeting.enter("clocks")
    offsets = collective.clock_offsets(meeting, clock)
    meeting.enter("all-reduce")
    reduction = collective.measure_all_reduce(device)
    meeting.enter("network links")
    gathered = distributed.gather_objects(Measured(reduction, collective.measure_links(meeting, device)))
    if not meeting.place.is_main:
        return [], {}
    if len(hosts) > 1:
        together += collective.judge_clocks({hosts[0]: 0.0, **offsets})
    reductions = _by_host(meeting.hosts, [one.reduction for one in gathered])
    if meeting.place.world_size > 1:
        together.append(collective.judge_all_reduce(reductions, device.type))
    links = {host: seconds for one in gathered for host, seconds in one.links.items()}
    factor = collective.SLOW_FACTOR[device.type]
    matmul = _by_host(meeting.hosts, [rank["speed"]["matmul_seconds"] for rank in local])
    copies = _by_host(meeting.hosts, [rank["speed"]["copy_seconds"] for rank in local])
    together += collective.judge_speed("a product of two matrices", matmul, factor)
    together += collective.judge_speed("a copy into its device's memory", copies, factor)
    together += collective.judge_links(links, factor)
    measured = {
        "matmul_seconds": matmul,
        "copy_seconds": copies,
        "link_seconds": links,
        "clock_offset_seconds": offsets,
    }
    measured["bus_bytes_per_second"] = min(one.bus_bytes_per_second for each in reductions.values() for one in each)
    measured["latency_seconds"] = max(one.latency_seconds for each in reductions.values() for one in each)
    return together, measured


def _by_host(hosts: Sequence[str], values: Sequence[Any]) -> dict[str, list[Any]]:
    """Host -> its ranks' values."""
    found: dict[str, list[Any]] = {}
    for host, value in zip(hosts, values, strict=True):
        found.setdefault(host, []).append(value)
    return found


def _judged(
    meeting: Meeting,
    local: Sequence[Mapping[str, Any]],
    together: Sequence[Finding],
    measured: Mapping[str, Any],
    seconds: float,
) -> Report:
    by_host: dict[str, list[Finding]] = {}
    for host, rank in zip(meeting.hosts, local, strict=True):
        by_host.setdefault(host, []).extend(Finding(**one) for one in rank["findings"])
    facts = {meeting.hosts[rank]: local[rank]["facts"] for rank in meeting.leaders}
    equal = collective.compare_versions(facts) if len(facts) > 1 else []
    return report_of(by_host, [*equal, *together], measured=dict(measured), seconds=seconds)


def _plain(speed: Speed | None) -> dict[str, Any] | None:
    return None if speed is None else asdict(speed)


def _publish(report: Report, folder: Path) -> None:
    print(report.text(), flush=True)
    report.write(folder)


# Who is missing or lost -----------------------------------------------------------------------------------------------


def _tell_absent(error: AbsentError, folder: Path, seconds: float) -> str:
    """Ranks never came: rank 0 says so, or whoever waited for rank 0 in vain."""
    missing = [Finding("ranks", "failed", why, _ADVICE_ABSENT, True, (where,)) for where, why in error.absent.items()]
    report = report_of({where: [] for where in error.absent}, missing, seconds=seconds)
    place = distributed.ranks()
    if place.is_main or (place.local_rank == 0 and not (folder / PREFLIGHT_FILE).exists()):
        _publish(report, folder)
    return report.reason


_ADVICE_ABSENT = "see what its log says; a node that cannot start Python or reach the first node must be left out"


def _tell_lost(meeting: Meeting, folder: Path, start: float, error: BaseException) -> str:
    """A collective broke: rank 0 names who is gone or not as far as the others."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    if not meeting.place.is_main:
        with suppress(RuntimeError):  # rank 0 may be what is lost
            meeting.part()
        return f"{meeting.stage}: {said}"
    report = _lost(meeting, meeting.lost(), said, time.monotonic() - start)
    _publish(report, folder)
    return report.reason


def _lost(meeting: Meeting, lost: Mapping[str, str], said: str, seconds: float) -> Report:
    hosts = dict.fromkeys(meeting.hosts)
    advice = "look at its log and its GPUs, or leave it out"
    findings = [Finding("ranks", "failed", f"{why} ({said})", advice, True, (host,)) for host, why in lost.items()]
    if not findings:
        text = f"all ranks came to '{meeting.stage}', and it did not end ({said})"
        findings = [Finding("ranks", "failed", text, "look at the network between these nodes", hosts=tuple(hosts))]
    return report_of({host: [] for host in hosts}, findings, seconds=seconds)


@contextmanager
def _no_longer_than(seconds: float, meeting: Meeting, folder: Path) -> Iterator[None]:
    """End the process where the body takes longer, which may stand in a kernel that never comes back."""

    def leave() -> None:
        try:
            if meeting.place.is_main:
                report = _lost(meeting, meeting.lost(), f"not over after {seconds:.0f} s", seconds)
                _publish(report, folder)
                tell_launcher(Exit(int(ExitCode.PREFLIGHT), report.reason, REFUSED_STEP, 0, "none"))
        finally:
            os._exit(int(ExitCode.PREFLIGHT))

    grace = 0.0 if meeting.place.is_main else LATER_SECONDS
    timer = threading.Timer(seconds + grace, leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
