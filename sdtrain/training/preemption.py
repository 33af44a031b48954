"""What a person or the scheduler asks of a running training: save, stop, make room."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any


class Request(IntEnum):
    """What is asked, weakest first, so that the ranks' maximum is what all of them do."""

    NONE = 0
    SAVE = 1
    STOP = 2
    REQUEUE = 3


class Interrupted(Exception):
    """A long event is left on all ranks together, because one of them was asked to leave the run."""


_SIGNALS = {signal.SIGUSR1: Request.REQUEUE, signal.SIGTERM: Request.REQUEUE, signal.SIGINT: Request.STOP}
_FILES = {"SAVE": Request.SAVE, "STOP": Request.STOP}


class Preemption:
    """Remembers signals, looks for `SAVE` and `STOP` files in the run folder, and keeps the run's own time limit.

    The loop acts at a step boundary. Events that take long ask in between and are left at once; a save is always
    finished, so no signal, however often it comes, leaves half of one behind.

    USR1 and TERM come from the scheduler (time limit, preemption): save, leave, be started again. INT comes from a
    keyboard, STOP from a person: save and leave. SAVE saves and goes on. A handler only sets a flag: anything more
    inside a signal handler can deadlock. A second INT is a person who does not want to wait: KeyboardInterrupt.
    """

    def __init__(
        self,
        folder: Path,
        *,
        watch_files: bool = True,
        max_hours: float | None = None,
        poll_every_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch `folder`; the time limit begins now.

        Args:
            folder: The run's folder.
            watch_files: On rank 0 alone, so that a thousand ranks do not poll one server.
            max_hours: After this time the run saves and asks to be started again.
            poll_every_seconds: Least time between two looks at the folder.
            clock: Seconds that do not jump.
        """
        self._files = {folder / name: asked for name, asked in _FILES.items()} if watch_files else {}
        self._poll_every_seconds = poll_every_seconds
        self._clock = clock
        self._next_poll = -float("inf")
        self._max_hours = max_hours
        self._end = float("inf") if max_hours is None else clock() + max_hours * 3600
        self._by_file = (Request.NONE, "")
        self._for_good = (Request.NONE, "")  # never taken back: who was told to leave leaves
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take over USR1, TERM and INT; main thread only."""
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)

    def uninstall(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @property
    def wants_save(self) -> bool:
        """Whether this rank was asked to save, which every stop implies."""
        return self.poll() >= Request.SAVE

    @property
    def wants_stop(self) -> bool:
        """Whether this rank was asked to leave after saving."""
        return self.poll() >= Request.STOP

    @property
    def wants_requeue(self) -> bool:
        """Whether the job should be started again after it left (exit code 85)."""
        return self.poll() >= Request.REQUEUE

    @property
    def request(self) -> Request:
        """The strongest request seen so far; looks for no files."""
        return max(self._for_good[0], self._by_file[0])

    @property
    def reason(self) -> str:
        """Where the strongest request came from, such as `SIGUSR1` or `STOP file`; empty if nothing is asked."""
        return max(self._for_good, self._by_file, key=lambda asked: asked[0])[1]

    def poll(self) -> Request:
        """The strongest request so far; cheap enough for every step. Ranks agree by the maximum of it."""
        if self._clock() >= self._end:
            self._ask((Request.REQUEUE, f"trainer.max_hours = {self._max_hours:g} is over"))
        if self._files and self._clock() >= self._next_poll:
            self._next_poll = self._clock() + self._poll_every_seconds
            there = [(asked, f"{path.name} file") for path, asked in self._files.items() if path.exists()]
            self._by_file = max([self._by_file, *there], key=lambda asked: asked[0])
        return self.request

    def acknowledge(self, done: Request = Request.REQUEUE) -> None:
        """Say what was done: files that asked for no more go, or the next start would stop at once."""
        for path, asked in self._files.items():
            if asked <= done:
                path.unlink(missing_ok=True)
        if self._by_file[0] <= done:
            self._by_file = (Request.NONE, "")
        self._next_poll = -float("inf")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self._ask((_SIGNALS[signal.Signals(number)], name))
        os.write(2, f"{name}: saving and leaving as soon as this step allows\n".encode())  # safe in a handler

    def _ask(self, asked: tuple[Request, str]) -> None:
        """Remember a request that is never taken back; of two equal ones the first counts."""
        self._for_good = max(self._for_good, asked, key=lambda one: one[0])
