"""How ranks find each other before a job: within a bounded time, and with names for those that never come.

A process group says nothing of who is missing; it only times out. So rank 0 holds a store that every rank signs first.
The store outlives a collective that hangs, and tells which ranks had not come as far as the others.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from sdtrain.distributed import Ranks
from sdtrain.errors import PreflightError

GRACE_SECONDS = 15.0
"""How much longer than rank 0 the others wait: for its word about who is missing."""
FAREWELL_SECONDS = 5.0
"""How long rank 0 keeps the store up for those who have not heard its word yet."""
POLL_SECONDS = 0.1
CONNECT_SECONDS = 5.0
PULSE_SECONDS = 1.0
LISTEN_SECONDS = 3.5
"""How long a living rank cannot be silent: a few pulses, as a machine may be busy."""
STORE_SECONDS = 3600.0
"""How long a rank waits for another one's item; whoever uses a meeting sets a limit to all of it."""


class AbsentError(PreflightError):
    """Ranks have not come.

    Attributes:
        absent: What is known of them: host, or numbers of the ranks where nobody named the hosts -> why.
    """

    def __init__(self, absent: dict[str, str]) -> None:
        self.absent = absent
        super().__init__("; ".join(f"{where}: {why}" for where, why in absent.items()))


@dataclass(frozen=True, slots=True)
class Word:
    """What rank 0 tells the others: every rank's host in rank order, or where ranks are missing and why."""

    hosts: list[str]
    absent: dict[str, str]


class Meeting:
    """All ranks of a job, once all have come.

    Attributes:
        place: Where this rank stands.
        hosts: Every rank's host, in rank order.
    """

    def __init__(self, store: dist.TCPStore, place: Ranks, hosts: Sequence[str], stages: Sequence[str]) -> None:
        """Used by `join`.

        Args:
            store: That all ranks share.
            place: Where this rank stands.
            hosts: Every rank's host.
            stages: What the ranks are going to do together, in order.
        """
        self.store = store
        self.place = place
        self.hosts = list(hosts)
        self._stages = list(stages)
        self.stage = stages[0]
        self._over = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="preflight-pulse").start()

    @property
    def leaders(self) -> list[int]:
        """The first rank of every host, in order."""
        return [rank for rank, host in enumerate(self.hosts) if self.hosts.index(host) == rank]

    @property
    def leads(self) -> bool:
        """Whether this rank is the first one of its host."""
        return self.place.rank in self.leaders

    @property
    def ranks_here(self) -> int:
        """Ranks on this rank's host."""
        return self.hosts.count(self.hosts[self.place.rank])

    def give(self, what: str, item: Any) -> None:
        """Put this rank's own down for rank 0; needs no process group."""
        self.store.set(f"{what}/{self.place.rank}", json.dumps(item))

    def collect(self, what: str) -> list[Any]:
        """On rank 0 what every rank gives, in rank order; nothing elsewhere."""
        if not self.place.is_main:
            return []
        return [json.loads(self.store.get(f"{what}/{rank}")) for rank in range(self.place.world_size)]

    def tell(self, what: str, item: Any) -> Any:
        """Rank 0's item on every rank."""
        if self.place.is_main:
            self.store.set(what, json.dumps(item))
            return item
        return json.loads(self.store.get(what))

    def part(self) -> None:
        """Leave, with a word of it; rank 0 as the last one, as the store goes with it."""
        self._over.set()
        self.store.set(f"left/{self.place.rank}", "")
        if self.place.is_main:
            _wait_for_others(self.store, "left", self.place.world_size)

    def enter(self, stage: str) -> None:
        """Say that this rank begins something that all do together."""
        self.stage = stage
        self.store.set(f"stage/{self.place.rank}", stage)

    def lost(self) -> dict[str, str]:
        """Host -> what is wrong with a rank there: it is silent, or not as far as others; empty where none is.

        Asks over a connection of its own, as another thread may wait inside the first.
        """
        store = self._another_connection()
        every = range(self.place.world_size)
        before = {rank: store.add(f"pulse/{rank}", 0) for rank in every}
        time.sleep(LISTEN_SECONDS)
        left = {rank for rank in every if store.check([f"left/{rank}"])}
        silent = {rank for rank in every if rank not in left and store.add(f"pulse/{rank}", 0) == before[rank]}
        stages = [store.get(f"stage/{rank}").decode() for rank in every]
        if silent:
            return {self.hosts[rank]: f"rank {rank} died or was stopped in '{stages[rank]}'" for rank in silent}
        reached = [self._stages.index(stage) for stage in stages]
        return {
            self.hosts[rank]: f"rank {rank} has not left '{stages[rank]}', and others have"
            for rank in every
            if reached[rank] < max(reached)
        }

    def _beat(self) -> None:
        """Tell that this process lives, until it leaves or rank 0 has gone."""
        with suppress(RuntimeError):
            store = self._another_connection()
            while not self._over.wait(PULSE_SECONDS):
                store.add(f"pulse/{self.place.rank}", 1)

    def _another_connection(self) -> dist.TCPStore:
        ask_within = timedelta(seconds=FAREWELL_SECONDS)
        return dist.TCPStore(self.store.host, self.store.port, is_master=False, timeout=ask_within)


def join(place: Ranks, host: str, stages: Sequence[str], *, expected: Sequence[str] = (), seconds: float) -> Meeting:
    """Meet at MASTER_ADDR:MASTER_PORT, where rank 0 waits.

    Args:
        place: Where this rank stands.
        host: What its node is called.
        stages: What the ranks are going to do together; all begin in the first one.
        expected: Hosts of the job as its launcher knows them, so that those of which nobody comes have a name.
        seconds: How long rank 0 waits for the others.

    Raises:
        AbsentError: Not all came in time; alike on all ranks that did.
    """
    store = _store(place, expected, seconds)
    store.set(f"stage/{place.rank}", stages[0])
    store.set(f"host/{place.rank}", host)
    if place.is_main:
        word = _wait_for_all(store, place.world_size, expected, seconds)
        store.set("word", json.dumps(asdict(word)))
        if word.absent:
            _wait_for_others(store, "heard", place.world_size)
    else:
        word = _hear(store, place, expected, seconds)
    if word.absent:
        raise AbsentError(word.absent)
    store.set_timeout(timedelta(seconds=STORE_SECONDS))
    return Meeting(store, place, word.hosts, stages)


def _store(place: Ranks, expected: Sequence[str], seconds: float) -> dist.TCPStore:
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT", "0" if place.world_size == 1 else "29500"))
    if not place.is_main:
        try:
            _wait_for_listener(address, port, seconds + GRACE_SECONDS)
        except OSError as error:
            raise AbsentError(_without_first(expected, f"{address}:{port} ({error})", seconds)) from None
    patience = timedelta(seconds=seconds + GRACE_SECONDS)
    try:
        return dist.TCPStore(address, port, place.world_size, place.is_main, patience, wait_for_workers=False)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise PreflightError(f"rank {place.rank} on {address}:{port}: {said}; set another MASTER_PORT") from None


def _wait_for_listener(address: str, port: int, seconds: float) -> None:
    """Wait until a port answers. The store's own client waits as well, but longer than it is told to, and noisily.

    Raises:
        OSError: It does not, or the name leads nowhere.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((address, port), timeout=CONNECT_SECONDS):
                return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(POLL_SECONDS)


def _without_first(expected: Sequence[str], where: str, seconds: float) -> dict[str, str]:
    first = expected[0] if expected else "the node of rank 0"
    return {first: f"rank 0 could not be reached at {where} within {seconds + GRACE_SECONDS:.0f} s"}


def _wait_for_all(store: dist.Store, world_size: int, expected: Sequence[str], seconds: float) -> Word:
    """Rank 0: everybody's host, or who has not come."""
    end = time.monotonic() + seconds
    waiting = set(range(world_size))
    while waiting and time.monotonic() < end:
        waiting -= {rank for rank in waiting if store.check([f"host/{rank}"])}
        if waiting:
            time.sleep(POLL_SECONDS)
    hosts = {rank: store.get(f"host/{rank}").decode() for rank in range(world_size) if rank not in waiting}
    return Word(list(hosts.values()), _absent(hosts, waiting, expected, seconds))


def _absent(hosts: dict[int, str], waiting: set[int], expected: Sequence[str], seconds: float) -> dict[str, str]:
    """Names for the ranks that have not come: hosts of which nobody came, else their own numbers."""
    if not waiting:
        return {}
    silent = [host for host in expected if host not in hosts.values()]
    if silent:
        return dict.fromkeys(silent, f"none of its ranks came within {seconds:.0f} s")
    numbers = ", ".join(str(rank) for rank in sorted(waiting)[:8]) + (", ..." if len(waiting) > 8 else "")
    came = ", ".join(dict.fromkeys(hosts.values()))
    return {f"ranks {numbers}": f"did not come within {seconds:.0f} s; hosts that came: {came}"}


def _wait_for_others(store: dist.Store, mark: str, world_size: int) -> None:
    """Rank 0: keep the store up for a while, until all that came have set a mark."""
    end = time.monotonic() + FAREWELL_SECONDS
    came = [rank for rank in range(1, world_size) if store.check([f"host/{rank}"])]
    while time.monotonic() < end and not all(store.check([f"{mark}/{rank}"]) for rank in came):
        time.sleep(POLL_SECONDS)


def _hear(store: dist.Store, place: Ranks, expected: Sequence[str], seconds: float) -> Word:
    try:
        store.wait(["word"], timedelta(seconds=seconds + GRACE_SECONDS))
        word = Word(**json.loads(store.get("word")))
        store.set(f"heard/{place.rank}", "")
    except RuntimeError:
        raise AbsentError(_without_first(expected, "its own port: it left", seconds)) from None
    return word
