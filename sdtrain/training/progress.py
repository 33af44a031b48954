"""What a person sees while a run trains: a live line on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as LiveBar


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


def figures(
    *,
    loss: float,
    learning_rate: float,
    images_per_second: float,
    data_wait_share: float,
    memory_gib: float,
    eta_seconds: float,
) -> list[str]:
    """The figures as short words, in the order in which an eye looks for them."""
    return [
        f"loss {loss:.4f}",
        f"lr {learning_rate:.2e}",
        f"{images_per_second:.1f} images/s",
        f"data wait {data_wait_share:.0%}",
        f"mem {memory_gib:.1f} GiB",
        f"ETA {duration(eta_seconds)}",
    ]


class Progress:
    """A live line on a terminal, else a plain line every so many seconds; rank 0 only."""

    def __init__(
        self,
        *,
        total_steps: int,
        start_step: int = 0,
        every_seconds: float = 15.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the line.

        Args:
            total_steps: Steps of the whole run.
            start_step: Finished steps that this attempt starts from.
            every_seconds: Least time between two plain lines; the first and the last step always get one.
            console: Where to write; standard error by default.
            clock: Seconds, for tests.
        """
        self._total_steps = total_steps
        self._every_seconds = every_seconds
        self._clock = clock
        self._console = console or Console(stderr=True)
        self._next_line = -math.inf
        self._live: LiveBar | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            self._live = _live_bar(self._console)
            self._task = self._live.add_task("train", total=total_steps, completed=start_step, figures="starting")
            self._live.start()

    def advance(self, step: int) -> None:
        """Move the bar between reports; nothing in a log file."""
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def update(
        self,
        *,
        step: int,
        loss: float,
        learning_rate: float,
        images_per_second: float,
        data_wait_share: float,
        memory_gib: float,
        eta_seconds: float,
    ) -> None:
        """Show a report.

        Args:
            step: Finished optimiser steps.
            loss: Mean since the last report.
            learning_rate: Of the last step.
            images_per_second: Of all ranks.
            data_wait_share: Part of the time, in [0, 1], in which the loop stood still for data.
            memory_gib: Peak memory of a rank.
            eta_seconds: What the rest takes; infinite if it is not known.
        """
        words = figures(
            loss=loss,
            learning_rate=learning_rate,
            images_per_second=images_per_second,
            data_wait_share=data_wait_share,
            memory_gib=memory_gib,
            eta_seconds=eta_seconds,
        )
        if self._live is not None:
            self._live.update(self._task, completed=step, figures="  ".join(words))
        elif self._clock() >= self._next_line or step >= self._total_steps:
            self._next_line = self._clock() + self._every_seconds
            self.say(f"step {step}/{self._total_steps} | " + " | ".join(words))

    def say(self, text: str) -> None:
        """One line of news (saved, resumed, validated), above the live line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Give the terminal back; more than once is fine."""
        if self._live is not None:
            self._live.stop()


def _live_bar(console: Console) -> LiveBar:
    return LiveBar(
        TextColumn("[bold]step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("[cyan]{task.fields[figures]}"),
        TimeElapsedColumn(),
        console=console,
        expand=True,
    )
