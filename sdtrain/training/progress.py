"""What a person sees while a run trains: a live line on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


@dataclass(frozen=True, slots=True)
class Reading:
    """The figures of one report.

    Attributes:
        step: Finished optimiser steps.
        losses: Mean loss since the last report, by trainable.
        learning_rate: Of the last step.
        images_per_second: Of all ranks.
        data_wait_share: Part of the time, in [0, 1], in which the loop stood still for data.
        memory_bytes: Peak memory of this rank; None if it is not known.
        eta_seconds: What the rest takes; infinite if it is not known.
    """

    step: int
    losses: dict[str, float]
    learning_rate: float
    images_per_second: float
    data_wait_share: float
    memory_bytes: int | None
    eta_seconds: float


def duration(seconds: float) -> str:
    """Time in the two largest units: `3d 04h`, `2h 05m`, `4m 10s`, `9s`; `?` if it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def figures(reading: Reading) -> list[str]:
    """The figures as short words, in the order in which an eye looks for them."""
    only = len(reading.losses) == 1
    losses = [f"loss {value:.4f}" if only else f"{name} {value:.4f}" for name, value in reading.losses.items()]
    memory = [] if reading.memory_bytes is None else [f"mem {reading.memory_bytes / 2**30:.1f} GiB"]
    return [
        *losses,
        f"lr {reading.learning_rate:.2e}",
        f"{reading.images_per_second:.1f} images/s",
        f"data wait {reading.data_wait_share:.0%}",
        *memory,
        f"ETA {duration(reading.eta_seconds)}",
    ]


class ProgressLine:
    """A live line on a terminal, else a plain line every so many seconds; silent where `shown` is False (rank > 0)."""

    def __init__(
        self,
        *,
        total_steps: int,
        start_step: int = 0,
        shown: bool = True,
        every_seconds: float = 15.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._shown = shown
        self._every_seconds = every_seconds
        self._clock = clock
        self._console = console or Console(stderr=True)
        self._next_line = -math.inf
        self._live: Progress | None = None
        self._task = TaskID(0)
        if shown and self._console.is_terminal:
            self._live = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("[cyan]{task.fields[figures]}"),
                TimeElapsedColumn(),
                console=self._console,
                expand=True,
            )
            self._task = self._live.add_task("train", total=total_steps, completed=start_step, figures="starting")

    def __enter__(self) -> ProgressLine:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, step: int) -> None:
        """Move the bar between reports; nothing in a log file."""
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def update(self, reading: Reading) -> None:
        """Show a report. In a log file the first one, the last one, and one every `every_seconds` between."""
        if self._live is not None:
            self._live.update(self._task, completed=reading.step, figures="  ".join(figures(reading)))
        elif self._shown and (self._clock() >= self._next_line or reading.step >= self._total_steps):
            self._next_line = self._clock() + self._every_seconds
            self._plain(f"step {reading.step}/{self._total_steps} | " + " | ".join(figures(reading)))

    def say(self, text: str) -> None:
        """One line of news (saved, resumed, validated), above the live line."""
        if self._shown:
            self._plain(text)

    def _plain(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
