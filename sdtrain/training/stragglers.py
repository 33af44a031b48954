"""Which rank slows the others down. A step takes equally long on all, who wait for the slowest: own work tells."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from sdtrain import distributed

OWN_PHASES = frozenset({"data", "forward"})
"""Where a rank waits for nobody: the backward already reduces gradients."""

log = logging.getLogger(__name__)


class WorkClock:
    """Seconds that a rank worked for itself; on a GPU the forward counts by the device's own time.

    A host only queues kernels, so its time in the forward says nothing there. Events cost microseconds and are read at
    a report, when the host has waited for the device anyway.
    """

    def __init__(self, *, on_device: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start at zero.

        Args:
            on_device: Whether the forward runs on a GPU.
            clock: Seconds.
        """
        self._on_device = on_device
        self._clock = clock
        self._phase = ""
        self._since = 0.0
        self._seconds = 0.0
        self._forwards: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def beat(self, phase: str) -> None:
        """Enter a phase, and leave the last one."""
        now = self._clock()
        if self._on_device and self._phase == "forward":
            self._forwards[-1][1].record()
        elif self._phase in OWN_PHASES:
            self._seconds += now - self._since
        if self._on_device and phase == "forward":
            self._forwards.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._forwards[-1][0].record()
        self._phase, self._since = phase, now

    def take(self) -> float:
        """Seconds of own work since the last call; between two phases, and not inside a forward."""
        seconds, self._seconds = self._seconds, 0.0
        for start, end in self._forwards:
            end.synchronize()
            seconds += start.elapsed_time(end) / 1000
        self._forwards.clear()
        return seconds


class Stragglers:
    """Compares the ranks' own work at every report, and names one that is slower again and again."""

    def __init__(
        self, clock: WorkClock, hosts: Sequence[str], *, factor: float = 1.5, share: float = 0.1, in_a_row: int = 3
    ) -> None:
        """Compare `len(hosts)` ranks.

        Args:
            clock: This rank's own work.
            hosts: Every rank's host, for the warning.
            factor: How many times the median's work a rank may do.
            share: What it must cost, as a share of the step, to be worth a warning.
            in_a_row: Reports that the same rank must be too slow in.
        """
        self.clock = clock
        self._hosts = hosts
        self._factor = factor
        self._share = share
        self._in_a_row = in_a_row
        self._suspect = (-1, 0)

    def figures(self, window_seconds: float) -> dict[str, float]:
        """Figures of the work since the last report; collective, the same on all ranks.

        Args:
            window_seconds: Wall time since the last report.
        """
        seconds = distributed.gather_values(self.clock.take())
        if len(seconds) == 1:
            return {}
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        median = statistics.median_low(seconds)  # of two ranks the faster one
        ratio = seconds[slowest] / median if median > 0 else 1.0
        costs = seconds[slowest] - median > self._share * window_seconds
        self._watch(slowest, ratio, costs and ratio > self._factor)
        return {"train/slowest_rank": float(slowest), "train/step_seconds_max_over_median": ratio}

    def _watch(self, rank: int, ratio: float, is_slow: bool) -> None:
        """Warn when one rank is the slow one often enough, and again as often as it goes on."""
        before, times = self._suspect
        self._suspect = (-1, 0) if not is_slow else (rank, times + 1 if rank == before else 1)
        if is_slow and self._suspect[1] % self._in_a_row == 0 and distributed.ranks().is_main:
            log.warning(
                "rank %d on %s needs %.1f times the median time for its own part of a step (reading and the forward), "
                "for %d reports in a row: all ranks wait for it. Look at its GPU's clock and temperature, other "
                "processes and the disk of that node.",
                rank,
                self._hosts[rank],
                ratio,
                self._suspect[1],
            )
