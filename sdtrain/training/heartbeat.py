"""A rank's sign of life: a record in memory that it shares with its watchdog. Imports no torch.

The record lives in an anonymous memory file that the watchdog process inherits: a beat is one store of a few words, and
no file system, least of all the one that 64 nodes share, hears of it.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass

STEP_PHASES = frozenset({"data", "forward", "backward", "step", "report", "agree"})
"""Parts of a step. Everything else (start, validation, saving, a phase that nobody named here) may take long."""
LEAVING = "leaving"
"""The phase of a rank that has met its end and says its last words."""

_COUNT = struct.Struct("<Q")
_BODY = struct.Struct("<qqqd32s96s")  # step, micro-step, ticks, allowance, phase, attempt
_BODY_AT, _BEGUN_AT = _COUNT.size, _COUNT.size + _BODY.size
_SIZE = _BEGUN_AT + _COUNT.size
"""The record: number of the last finished beat, its body, number of the last one that was begun."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a rank last said of itself.

    Attributes:
        count: Beats since the start; a rank whose count stands is standing still.
        step: Finished optimiser steps.
        micro_step: Micro-step within the step.
        ticks: Beats since the step changed. All ranks beat at the same places of a step, so (step, ticks) says who is
            behind.
        allowance_seconds: How long this phase may stand still.
        phase: Where it is: `data`, `forward`, `validation`, ...
        attempt: Name of this start of the run.
    """

    count: int
    step: int
    micro_step: int
    ticks: int
    allowance_seconds: float
    phase: str
    attempt: str


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a rank may stand still before it counts as hung.

    Attributes:
        step_seconds: Within a step.
        long_seconds: In long phases, and until the first step is over, which may compile.
    """

    step_seconds: float
    long_seconds: float


class Heartbeat:
    """The rank's side of the record; a beat costs about a microsecond."""

    def __init__(self, patience: Patience, *, attempt: str) -> None:
        """Make the record; `fd` is for the watchdog to inherit."""
        self.fd = os.memfd_create("sdtrain-heartbeat")
        os.ftruncate(self.fd, _SIZE)
        self._memory = mmap.mmap(self.fd, _SIZE)
        self._patience = patience
        self._attempt = attempt.encode()
        self._count, self._ticks, self._step = 0, 0, 0
        self._first_step: int | None = None
        self.beat("start")

    def name_attempt(self, attempt: str) -> None:
        """Take over the name that the ranks agreed on."""
        self._attempt = attempt.encode()
        self.beat("start", self._step)

    def beat(self, phase: str, step: int | None = None, micro_step: int = 0) -> None:
        """Say that this rank reached `phase`; every rank must call it at the same places of a step.

        Args:
            phase: One of `STEP_PHASES`, or the name of something long.
            step: Finished optimiser steps; None keeps the last one.
            micro_step: Micro-step within the step.
        """
        if step is not None and step != self._step:
            self._step, self._ticks = step, 0
        self._count += 1
        self._ticks += 1
        allowance = self._allowance(phase)
        _COUNT.pack_into(self._memory, _BEGUN_AT, self._count)
        body = (self._step, micro_step, self._ticks, allowance, phase.encode(), self._attempt)
        _BODY.pack_into(self._memory, _BODY_AT, *body)
        _COUNT.pack_into(self._memory, 0, self._count)

    def _allowance(self, phase: str) -> float:
        if phase not in STEP_PHASES:
            return self._patience.long_seconds
        if self._first_step is None:
            self._first_step = self._step
        is_first = self._step == self._first_step
        return self._patience.long_seconds if is_first else self._patience.step_seconds

    def close(self) -> None:
        """Give the memory back; the watchdog's view of it stays readable."""
        self._memory.close()
        os.close(self.fd)


class PulseReader:
    """The watchdog's side of the record."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, _SIZE, prot=mmap.PROT_READ)

    def read(self) -> Pulse:
        """The last beat; one that is being written at this moment is read again."""
        while True:
            finished = self._memory[: _COUNT.size]
            step, micro_step, ticks, allowance, phase, attempt = _BODY.unpack_from(self._memory, _BODY_AT)
            if self._memory[_BEGUN_AT:] == finished:  # no beat was begun while the body was read
                (count,) = _COUNT.unpack(finished)
                return Pulse(count, step, micro_step, ticks, allowance, _text(phase), _text(attempt))


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode(errors="replace")
