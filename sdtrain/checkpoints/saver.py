"""Saves beside training: a copy at the step boundary, the disk in a thread, the commit at a later boundary.

The protocol is the one of `protocol`: `begin` and `publish` are collective and run on the main thread of every rank,
`write` asks no other rank and runs in the thread. One save is in flight at a time.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sdtrain.checkpoints.host_buffers import HostBuffers
from sdtrain.checkpoints.protocol import Begun, RankFile, Report, begin, compose, publish, putter, write
from sdtrain.checkpoints.rankfile import tensor_bytes

NICENESS = 10


@dataclass(frozen=True, slots=True)
class Saved:
    """What became of a save, the same on all ranks but for the seconds.

    Attributes:
        step: Optimiser step.
        path: The committed folder; None where any rank failed.
        stall_seconds: How long training stood still for it on this rank.
    """

    step: int
    path: Path | None
    stall_seconds: float


@dataclass(slots=True)
class _Flight:
    """A save between its beginning and its end."""

    begun: Begun
    facts: Mapping[str, Any]
    report: Future[Report]
    stall_seconds: float = 0.0


def _at_once(report: Report) -> Future[Report]:
    """A report that nobody has to wait for."""
    done: Future[Report] = Future()
    done.set_result(report)
    return done


def _step_back() -> None:
    """Let this thread have the cores that training leaves; on Linux a thread has a niceness of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


class Saver:
    """Commits one checkpoint after the other, each rank its part.

    Ranks call the methods in the same order; between `begin` and `finish` they ask each other whether anyone
    `is_writing` still, and finish together once nobody does, or at once where they cannot wait.
    """

    def __init__(self, folder: Path, *, asynchronous: bool, on_stage: Callable[[str], None] | None = None) -> None:
        """Save into `folder`; without `asynchronous`, `begin` returns when everything is on the disk."""
        self._folder = folder
        self._asynchronous = asynchronous
        self._on_stage = on_stage
        self._buffers = HostBuffers()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer", initializer=_step_back)
        self._flight: _Flight | None = None
        self._reserving: Future[None] | None = None

    def reserve(self, files: Mapping[str, RankFile]) -> None:
        """Make room in host memory for copies of such tensors, in the thread: the first save then stalls no longer."""
        if self._asynchronous:
            self._reserving = self._thread.submit(self._buffers.reserve, files)

    @property
    def step(self) -> int | None:
        """The step whose save is in flight."""
        return None if self._flight is None else self._flight.begun.step

    @property
    def is_writing(self) -> bool:
        """Whether this rank has bytes in flight that are not all on the disk."""
        return self._flight is not None and not self._flight.report.done()

    def begin(
        self,
        *,
        step: int,
        attempt: str,
        files: Mapping[str, RankFile],
        facts: Mapping[str, Any],
        texts: Mapping[str, str],
    ) -> None:
        """Take the state of a step boundary; arguments as for `protocol.commit`. Collective.

        When this returns, training may change the tensors.
        """
        assert self._flight is None, "one save is in flight at a time"
        started = time.monotonic()
        begun = begin(
            self._folder,
            step=step,
            attempt=attempt,
            num_bytes=sum(map(tensor_bytes, files.values())),
            num_files=len(files),
            on_stage=self._on_stage,
        )
        flight = self._flight = _Flight(begun, facts, self._writing(begun, files, texts))
        flight.stall_seconds = time.monotonic() - started

    def _writing(self, begun: Begun, files: Mapping[str, RankFile], texts: Mapping[str, str]) -> Future[Report]:
        """This rank's report, once it stands; a copy that fails is a report like any other failure."""
        if self._asynchronous and begun.temporary is not None:
            try:
                if self._reserving is not None:
                    wait([self._reserving])  # if it failed, so will the copy
                copies = self._buffers.copy(files)
            except (RuntimeError, MemoryError) as error:
                return _at_once(
                    Report(
                        f"{type(error).__name__}: {error} (while copying the state to host memory; "
                        "checkpoint.asynchronous: false saves without a copy)"
                    )
                )
            return self._thread.submit(write, begun, putter(copies, texts, begun.tell))
        return _at_once(write(begun, putter(files, texts, begun.tell)))

    def finish(self) -> Saved | None:
        """Wait for this rank's bytes, then commit with all ranks or abandon; collective.

        Returns:
            What became of the save; None where none was in flight.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return None
        started = time.monotonic()
        path = publish(flight.begun, flight.report.result(), partial(compose, flight.begun, flight.facts))
        return Saved(flight.begun.step, path, flight.stall_seconds + time.monotonic() - started)

    def close(self) -> None:
        """End the thread; a save that is still in flight is left as a temporary folder."""
        self._thread.shutdown(wait=False, cancel_futures=True)
