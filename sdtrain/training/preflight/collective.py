"""The checks that nodes can only make together. All functions here are collective unless they say otherwise.

Who is slow does not show in an all-reduce: every rank waits for the slowest and measures the same time. So each rank
times its own device alone, and first ranks of nodes time the link to two neighbours each; the median of all is what a
node is compared with, and a node is blamed for a link only where both of its links are slow, as the one link that two
nodes share says nothing about which of them it is.
"""

from __future__ import annotations

import os
import secrets
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed as dist

from sdtrain import distributed
from sdtrain.training.preflight.findings import Finding
from sdtrain.training.preflight.meeting import Meeting
from sdtrain.training.preflight.node_speed import timings

SHARED_SECONDS = 30.0
"""How long another node's file may take to be seen: NFS keeps what it knows of a folder for 30 s (acdirmin)."""
CLOCK_WARNING_SECONDS = 1.0
"""Beyond it times in logs and metrics of different nodes stand in a wrong order."""
CLOCK_FAILURE_SECONDS = 120.0
"""munge refuses credentials that are 300 s off, and object storage signatures that are 900 s off; a clock that is
minutes off drifts on, and a job should not find out in its second week."""
CLOCK_ROUNDS = 5
ALL_REDUCE_BYTES = {"cpu": 4 * 2**20, "cuda": 128 * 2**20}
"""On GPUs as much as a reduction of gradients moves at a time; beyond that the bus bandwidth hardly grows."""
LINK_BYTES = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}
REPEATS = 5
LATENCY_REPEATS = 20
BUS_WARNING_BYTES_PER_SECOND = 2e9
"""860M gradients in fp32 are 3.4 GB: at 2 GB/s their reduction takes 1.7 s of every step. RDMA is ten times as quick;
less than this is TCP on a management network, as NCCL falls back to where it finds no other."""
SLOW_FACTOR = {"cpu": 2.0, "cuda": 1.3}
"""Times the median. GPUs of one model differ by a few percent, and by a third where one is throttled; cores of a CPU
are shared with others."""


# Equal? ---------------------------------------------------------------------------------------------------------------


def compare_versions(by_host: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """What differs between nodes; hosts that differ from most others are named. Not collective.

    Args:
        by_host: Name -> version, for every host. Two kinds of GPU under `machine` are slow, other differences wrong.
    """
    findings = []
    names = dict.fromkeys(name for facts in by_host.values() for name in facts)
    for name in names:
        values = {host: facts.get(name, "none") for host, facts in by_host.items()}
        usual, times = Counter(values.values()).most_common(1)[0]
        others = tuple(host for host, value in values.items() if value != usual)
        if not others:
            continue
        is_clear = 2 * times > len(values)  # else nobody can say who is wrong
        blamed = others if is_clear else tuple(values)
        text = f"{name} is {usual} on {values_on(values, usual)}"
        text += "".join(f", {value} on {host}" for host, value in values.items() if host in others)
        if name == "machine":
            advice = "ask for one kind of node (--constraint): all wait for the slowest"
            findings.append(Finding("equality", "warning", text, advice, hosts=blamed))
        else:
            advice = "install the same environment on all nodes, or use one that they share"
            findings.append(Finding("equality", "failed", text, advice, of_node=is_clear, hosts=blamed))
    return findings or [
        Finding("equality", "ok", "versions and source are the same on all nodes", hosts=tuple(by_host))
    ]


def values_on(values: Mapping[str, str], value: str) -> str:
    """Where a value was found: one host by its name, several by their number. Not collective."""
    hosts = [host for host, one in values.items() if one == value]
    return hosts[0] if len(hosts) == 1 else f"{len(hosts)} nodes"


# The file system ------------------------------------------------------------------------------------------------------


def check_shared(meeting: Meeting, folder: Path, *, seconds: float = SHARED_SECONDS) -> Finding:
    """Every node reads what rank 0 writes, and rank 0 what every node writes; all of it is removed again.

    Args:
        meeting: The ranks.
        folder: On the file system of the run's folder; made where it is missing.
        seconds: How long a file may take to be seen.
    """
    token = distributed.broadcast_object(secrets.token_hex(8))
    place = meeting.place
    mine = folder / f".preflight-{token}-{place.rank}"
    problem = _write(mine, token) if meeting.leads else ""
    try:
        distributed.barrier()
        if meeting.leads and not place.is_main and not problem:
            seen = _can_read(folder / f".preflight-{token}-0", token, seconds)
            problem = "" if seen else f"does not see what {meeting.hosts[0]} writes there"
        problems = distributed.gather_objects(problem)
        if place.is_main:
            end = time.monotonic() + seconds
            problems = [
                problem or _unseen(meeting, rank, folder, token, end - time.monotonic())
                for rank, problem in enumerate(problems)
            ]
        problems = distributed.broadcast_object(problems)
    finally:
        with suppress(OSError):
            mine.unlink(missing_ok=True)
    return _judge_shared(
        meeting, folder, {meeting.hosts[rank]: problem for rank, problem in enumerate(problems) if problem}
    )


def _judge_shared(meeting: Meeting, folder: Path, bad: Mapping[str, str]) -> Finding:
    """The folder is at fault, not a node, where no other node shares it with rank 0's."""
    hosts = tuple(dict.fromkeys(meeting.hosts))
    if not bad:
        return Finding("shared folder", "ok", f"{folder}: all nodes see each other's files", hosts=hosts)
    of_nodes = len(bad) < len(hosts) - 1
    return Finding(
        "shared folder",
        "failed",
        f"{folder}: " + ", ".join(f"{host} {problem}" for host, problem in bad.items()),
        "mount the file system of the run's folder there, or give a run_dir that all nodes share",
        of_node=of_nodes,
        hosts=tuple(bad) if of_nodes else hosts,
    )


def _unseen(meeting: Meeting, rank: int, folder: Path, token: str, seconds: float) -> str:
    """Rank 0: what is wrong with another node's file; it has stood there for a while, so it is there or not."""
    if rank not in meeting.leaders or _can_read(folder / f".preflight-{token}-{rank}", token, seconds):
        return ""
    return f"writes there what {meeting.hosts[0]} does not see"


def _write(path: Path, text: str) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"cannot write there: {error.strerror}"
    return ""


def _can_read(path: Path, text: str, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            if path.read_text(encoding="utf-8") == text:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


# Clocks ---------------------------------------------------------------------------------------------------------------


def clock_offsets(meeting: Meeting, clock: Callable[[], float] = time.time) -> dict[str, float]:
    """Host -> seconds that its clock is ahead of rank 0's, on rank 0; empty elsewhere.

    Rank 0 asks each node for its time and takes the middle of question and answer for the moment that it was read, so
    the error is at most half of the round trip; the quickest of several rounds counts. (Cristian's algorithm.)

    Args:
        meeting: The ranks.
        clock: Seconds since the epoch.
    """
    offsets: dict[str, float] = {}
    for leader in meeting.leaders[1:]:
        rounds = []
        for _ in range(CLOCK_ROUNDS):
            if meeting.place.is_main:
                asked, start = clock(), time.perf_counter()
                dist.send(torch.zeros(1, dtype=torch.float64), leader)
                answer = torch.empty(1, dtype=torch.float64)
                dist.recv(answer, leader)
                trip = time.perf_counter() - start
                rounds.append((trip, float(answer) - asked - trip / 2))
            elif meeting.place.rank == leader:
                dist.recv(torch.empty(1, dtype=torch.float64), 0)
                dist.send(torch.tensor([clock()], dtype=torch.float64), 0)
        if rounds:
            offsets[meeting.hosts[leader]] = min(rounds)[1]
    return offsets


def judge_clocks(offsets: Mapping[str, float]) -> list[Finding]:
    """A finding for every clock that is off, or one for all; not collective.

    Of many clocks the one that differs from their median is wrong; of two nobody can say which.

    Args:
        offsets: Host -> seconds ahead of rank 0's clock, of all hosts.
    """
    middle = statistics.median_low(offsets.values())
    advice = "have its time service looked at (chronyc tracking)"
    findings = []
    for host, offset in offsets.items():
        off = offset - middle
        if abs(off) > CLOCK_WARNING_SECONDS:
            status = "failed" if abs(off) > CLOCK_FAILURE_SECONDS else "warning"
            text = f"{host} is {abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} the other nodes"
            is_clear = len(offsets) > 2
            where = (host,) if is_clear else tuple(offsets)
            findings.append(Finding("clock", status, text, advice, of_node=is_clear, hosts=where))
    most = max(abs(offset - middle) for offset in offsets.values())
    return findings or [Finding("clock", "ok", f"clocks agree within {most * 1e3:.1f} ms", hosts=tuple(offsets))]


# The network ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reduction:
    """What an all-reduce was like.

    Attributes:
        is_right: Whether this rank got the known sum in every element.
        latency_seconds: Of one that moves a single number; the median.
        bus_bytes_per_second: As nccl-tests define it, which does not depend on the number of ranks n: bytes of the
            tensor / seconds x 2 (n - 1) / n. The median.
    """

    is_right: bool
    latency_seconds: float
    bus_bytes_per_second: float


def measure_all_reduce(device: torch.device) -> Reduction:
    """Add up numbers whose sum is known, and time it.

    Element i of rank r is i mod 128 + r, so the sum over n ranks is n (i mod 128) + n (n - 1) / 2: an integer that
    float32 holds exactly up to thousands of ranks.
    """
    place = distributed.ranks()
    ranks, size = place.world_size, ALL_REDUCE_BYTES[device.type] // 4
    pattern = torch.arange(size, device=device, dtype=torch.float32) % 128
    given = pattern + place.rank
    dist.all_reduce(given)
    is_right = torch.equal(given, ranks * pattern + ranks * (ranks - 1) / 2)
    given.zero_()
    seconds = statistics.median(timings(lambda: dist.all_reduce(given), device, REPEATS))
    one = torch.zeros(1, device=device)
    latency = statistics.median(timings(lambda: dist.all_reduce(one), device, LATENCY_REPEATS))
    return Reduction(is_right, latency, ALL_REDUCE_BYTES[device.type] / seconds * 2 * (ranks - 1) / ranks)


def judge_all_reduce(reductions: Mapping[str, Sequence[Reduction]], device_type: str) -> Finding:
    """Right, and quick enough? Not collective.

    Args:
        reductions: Host -> of its ranks.
        device_type: `cpu` or `cuda`; nobody expects speed of the first.
    """
    every = [one for ranks in reductions.values() for one in ranks]
    bus = min(one.bus_bytes_per_second for one in every)
    text = f"bus bandwidth {bus / 1e9:.2f} GB/s, latency {max(one.latency_seconds for one in every) * 1e6:.0f} us"
    wrong = tuple(host for host, ranks in reductions.items() if not all(one.is_right for one in ranks))
    if wrong:
        advice = "leave these nodes out one by one: a network card or GPU changes what it moves"
        return Finding("all-reduce", "failed", f"the known sum came out wrong; {text}", advice, hosts=wrong)
    if device_type == "cuda" and bus < BUS_WARNING_BYTES_PER_SECOND:
        advice = "see which interface NCCL took (NCCL_DEBUG=INFO), and set NCCL_SOCKET_IFNAME and NCCL_IB_HCA"
        return Finding("all-reduce", "warning", text, advice, hosts=tuple(reductions))
    return Finding("all-reduce", "ok", f"the known sum; {text}", hosts=tuple(reductions))


def measure_links(meeting: Meeting, device: torch.device) -> dict[str, float]:
    """Host -> seconds for `LINK_BYTES` there and back over the better of its two links, on this rank's host alone.

    The first ranks of all nodes form a ring. Its links are timed in two rounds in which no node has more than one, or
    three where their number is odd. Empty on ranks that are not the first of their node.
    """
    leaders = meeting.leaders
    seconds: list[float] = []
    for pairs in ring_rounds(len(leaders)):
        for left, right in pairs:
            if meeting.place.rank in (leaders[left], leaders[right]):
                peer = leaders[right] if meeting.place.rank == leaders[left] else leaders[left]
                seconds.append(_time_link(peer, device, begins=meeting.place.rank == leaders[left]))
        distributed.barrier()
    return {meeting.hosts[meeting.place.rank]: min(seconds)} if seconds else {}


def ring_rounds(count: int) -> list[list[tuple[int, int]]]:
    """Links of a ring of nodes, in rounds in which each node has at most one; not collective."""
    if count < 2:
        return []
    links = [(index, (index + 1) % count) for index in range(count if count > 2 else 1)]
    rounds = [links[0::2], links[1::2]]
    if count > 2 and count % 2:
        rounds = [links[0:-1:2], links[1::2], links[-1:]]
    return [each for each in rounds if each]


def _time_link(peer: int, device: torch.device, *, begins: bool) -> float:
    tensor = torch.zeros(LINK_BYTES[device.type] // 4, device=device)

    def there_and_back() -> None:
        for sends in (begins, not begins):
            if sends:
                dist.send(tensor, peer)
            else:
                dist.recv(tensor, peer)

    return statistics.median(timings(there_and_back, device, REPEATS))


# Who is slow ----------------------------------------------------------------------------------------------------------


def judge_speed(what: str, seconds: Mapping[str, Sequence[float]], factor: float) -> list[Finding]:
    """A warning for every host with a rank that takes too long beside the median; not collective.

    Args:
        what: What was timed.
        seconds: Host -> of its ranks.
        factor: Times the median.
    """
    middle = statistics.median_low(each for ranks in seconds.values() for each in ranks)  # of two the quicker
    findings = []
    for host, ranks in seconds.items():
        ratio = max(ranks) / middle
        if ratio > factor:
            text = f"{what} takes {ratio:.1f} times the median: {max(ranks) * 1e3:.1f} ms and {middle * 1e3:.1f} ms"
            advice = "look at its clocks, temperature, other processes and network cards: all ranks wait for it"
            findings.append(Finding("speed", "warning", text, advice, of_node=True, hosts=(host,)))
    return findings


def judge_links(seconds: Mapping[str, float], factor: float) -> list[Finding]:
    """A warning for every host both of whose links are slow; not collective. Of two nodes nobody can be blamed."""
    if len(seconds) < 3:
        return []
    return judge_speed("its network link", {host: [each] for host, each in seconds.items()}, factor)
