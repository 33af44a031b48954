"""Manners towards one host: how many requests at once, how far apart, and when it asked to be left alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from data_pipeline.transport_policy import Reason, RefusedError

_MAX_CLOSED_SECONDS = 3600.0
_MAX_HOSTS = 4096


@dataclass
class _Host:
    """What is known of one host.

    Attributes:
        slots: Requests that may still be started.
        users: Threads that hold or wait for a slot.
        next_start: When the next request may start, on the monotonic clock.
        closed_until: When the host wants to be asked again.
    """

    slots: threading.BoundedSemaphore
    users: int = 0
    next_start: float = 0.0
    closed_until: float = 0.0


@dataclass
class Hosts:
    """Keeps the requests of many threads apart, host by host.

    Attributes:
        limit: Requests in flight to one host.
        gap_seconds: Least time between the starts of two requests to one host.
        sleep: Waits.
        clock: Monotonic time in seconds.
    """

    limit: int
    gap_seconds: float = 0.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _hosts: dict[str, _Host] = field(default_factory=dict)

    @contextmanager
    def visit(self, name: str, patience_seconds: float) -> Iterator[None]:
        """Wait for a slot, for the gap, and for the end of a `Retry-After`; hold the slot inside the block.

        Args:
            name: The host.
            patience_seconds: Longest wait for a host that asked for one; slots and gaps are waited for without limit.

        Raises:
            RefusedError: With reason retry_after: the host is closed for longer than that. Nothing was sent.
        """
        with self._lock:
            host = self._hosts.setdefault(name, _Host(threading.BoundedSemaphore(self.limit)))
            host.users += 1
        try:
            with host.slots:
                pause = self._reserve(name, host, patience_seconds)
                if pause > 0:
                    self.sleep(pause)
                yield
        finally:
            with self._lock:
                host.users -= 1
                self._forget(name, host)

    def close(self, name: str, seconds: float) -> None:
        """Send nothing to a host for a while: its `Retry-After`, of which an hour is remembered at most."""
        with self._lock:
            host = self._hosts.setdefault(name, _Host(threading.BoundedSemaphore(self.limit)))
            host.closed_until = max(host.closed_until, self.clock() + min(seconds, _MAX_CLOSED_SECONDS))

    def _reserve(self, name: str, host: _Host, patience_seconds: float) -> float:
        """Take the next start; returns the seconds until then."""
        with self._lock:
            now = self.clock()
            closed = host.closed_until - now
            if closed > patience_seconds:
                raise RefusedError(Reason.RETRY_AFTER, f"{name} asked for no request in the next {closed:.0f} s")
            start = max(now, host.next_start, host.closed_until)
            host.next_start = start + self.gap_seconds
            return start - now

    def _forget(self, name: str, host: _Host) -> None:
        """Drop a host without users whose times have passed, and the oldest wishes where hostile names pile them up."""
        if host.users == 0 and max(host.next_start, host.closed_until) <= self.clock():
            self._hosts.pop(name, None)
        while len(self._hosts) > _MAX_HOSTS:
            idle = next((each for each, known in self._hosts.items() if known.users == 0), None)
            if idle is None:
                return
            del self._hosts[idle]
