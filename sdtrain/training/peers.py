"""Who is on which host, and who of them still answers over the network. Imports no torch.

Once at the start the ranks tell each other where they are. Every rank's watchdog keeps a socket that listens and is
never read: the kernel of a living host answers for it, also while its processes stand still or are stopped. Nothing is
sent before something is wrong; then whoever judges calls the roll, and knows of every rank whether its host is there.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum

ANSWER_SECONDS = 3.0
"""How long a host may take to answer: two attempts of TCP."""
_BACKLOG = 4096
_MAX_CALLS = 512
_SHOWN_HOSTS = 4


class Answer(StrEnum):
    """What came of a call to a rank's watchdog."""

    HERE = "here"
    GONE = "gone"
    """Its host answers, and says that nobody listens: rank and watchdog have ended."""
    SILENT = "silent"
    """Nothing comes back: the host is down, or cut off."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a rank is.

    Attributes:
        rank: Global rank.
        host: Its node's name.
        address: Address of its host on the way to rank 0; empty where it has none, and cannot be called.
        port: Port of its watchdog's socket.
    """

    rank: int
    host: str
    address: str = ""
    port: int = 0


def host_name() -> str:
    """This node's name; under Slurm the one that its commands take, by which the node can be left out."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def listen_beside(rank: int) -> tuple[Peer, socket.socket | None]:
    """A socket at the address from which this host reaches rank 0, and where it is to be found.

    A host that cannot say how it would reach rank 0 has no socket: the rendezvous tells what is wrong with that.
    """
    here = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with suppress(OSError):
        family, kind, *_, there = socket.getaddrinfo(here, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as way:
            way.connect(there)  # of a datagram socket: looks the route up, and sends nothing
            address = way.getsockname()[0]
        door = socket.create_server((address, 0), family=family, backlog=_BACKLOG)
        return Peer(rank, host_name(), address, door.getsockname()[1]), door
    return Peer(rank, host_name()), None


def to_bytes(peers: Sequence[Peer]) -> bytes:
    """The roll, for `from_bytes`."""
    return json.dumps([asdict(peer) for peer in peers]).encode()


def from_bytes(roll: bytes) -> list[Peer]:
    """What `to_bytes` wrote; empty before the ranks have met."""
    return [Peer(**row) for row in json.loads(roll)] if roll else []


# The roll call --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RollCall:
    """What a rank knows of the others.

    Attributes:
        caller: Who called.
        roll: Where all ranks are, by rank; empty before they have met.
        answers: What each of the others answered.
    """

    caller: int = 0
    roll: Mapping[int, Peer] = field(default_factory=dict)
    answers: Mapping[int, Answer] = field(default_factory=dict)

    def of(self, answer: Answer) -> list[int]:
        """The ranks that answered so."""
        return sorted(rank for rank, given in self.answers.items() if given is answer)

    def is_cut_off(self) -> bool:
        """Whether it is the caller's own host that is lost: most hosts do not answer it.

        Between two halves the caller's stays: it is the one that still writes into the run's folder.
        """
        silent = {self._place(rank) for rank in self.of(Answer.SILENT)}
        if not silent:
            return False
        reached = {self._place(rank) for rank in self.answers} - silent | {self._place(self.caller)}
        return len(silent) > len(reached)

    def of_own_host(self) -> list[int]:
        """The ranks beside the caller, and the caller."""
        return sorted(rank for rank in self.roll if self._place(rank) == self._place(self.caller))

    def named(self, ranks: Collection[int]) -> str:
        """`rank 1 on host2`, or `ranks 8-15 on node3 and ranks 24-31 on node5`; without hosts before ranks have met."""
        if not ranks or any(rank not in self.roll for rank in ranks):
            return ranks_in_words(ranks)
        places: dict[tuple[str, str], list[int]] = {}
        for rank in sorted(ranks):
            places.setdefault(self._place(rank), []).append(rank)
        told = [f"{ranks_in_words(numbers)} on {host}" for (host, _), numbers in places.items()]
        if len(told) > _SHOWN_HOSTS:
            told = [*told[: _SHOWN_HOSTS - 1], f"the ranks of {len(told) - _SHOWN_HOSTS + 1} more hosts"]
        return " and ".join(told)

    def _place(self, rank: int) -> tuple[str, str]:
        """A host; containers may all have the same name."""
        peer = self.roll[rank]
        return peer.host, peer.address


def call_roll(caller: int, peers: Sequence[Peer]) -> RollCall:
    """Call all other ranks' watchdogs, all hosts at the same time; of a silent host one rank is asked.

    Takes `ANSWER_SECONDS` at most for a host that is silent, and milliseconds otherwise.
    """
    hosts: dict[tuple[str, str], list[Peer]] = {}
    from_loopback = any(peer.rank == caller and _is_loopback(peer) for peer in peers)
    for peer in peers:
        is_mine = peer.rank == caller or (_is_loopback(peer) and not from_loopback)  # or would lead to this host
        if peer.address and not is_mine:
            hosts.setdefault((peer.host, peer.address), []).append(peer)
    with ThreadPoolExecutor(_MAX_CALLS) as callers:
        answers = {rank: answer for told in callers.map(_call_host, hosts.values()) for rank, answer in told.items()}
    return RollCall(caller, {peer.rank: peer for peer in peers}, answers)


def _is_loopback(peer: Peer) -> bool:
    """Whether it can be called from its own host only, as where a node's name leads to 127.0.1.1 on itself."""
    return bool(peer.address) and ipaddress.ip_address(peer.address.partition("%")[0]).is_loopback


def _call_host(peers: Sequence[Peer]) -> dict[int, Answer]:
    answers: dict[int, Answer] = {}
    for peer in peers:
        answers[peer.rank] = _call(peer)
        if answers[peer.rank] is Answer.SILENT:
            return {one.rank: answers.get(one.rank, Answer.SILENT) for one in peers}
    return answers


def _call(peer: Peer) -> Answer:
    try:
        socket.create_connection((peer.address, peer.port), timeout=ANSWER_SECONDS).close()
    except ConnectionRefusedError:
        return Answer.GONE
    except OSError:  # no route, or a time-out
        return Answer.SILENT
    return Answer.HERE


def ranks_in_words(numbers: Collection[int]) -> str:
    """`rank 3`, or `ranks 0-6, 8`."""
    ordered = sorted(numbers)
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    listed = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank {listed}" if len(ordered) == 1 else f"ranks {listed}"
