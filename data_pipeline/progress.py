"""How far a stage is: a live bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_SECONDS = 10.0


class StageProgress:
    """Context manager that follows one stage.

    Args:
        console: Where to show it.
        name: The stage's name.
        total: Number of its units.
        done: Units that were up to date at the start; they count as done but not for the rate.
    """

    def __init__(self, console: Console, name: str, total: int, done: int = 0):
        self._console = console
        self._name = name
        self._total = total
        self._done_before = done
        self._finished = 0
        self._failed = 0
        self._started = time.monotonic()
        self._last_line = self._started
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(name, total=total, completed=done, rate="")

    def advance(self, *, failed: bool = False) -> None:
        """One more unit is committed, or dead."""
        self._finished += 1
        self._failed += failed
        self._bar.update(self._task, advance=1, rate=self._rate())
        is_due = time.monotonic() - self._last_line >= _LINE_EVERY_SECONDS
        if is_due and not self._console.is_terminal:
            self._last_line = time.monotonic()
            self._print(self.line())

    def line(self) -> str:
        """`filter: 12/40, 3.1 units/s, 9 s left`."""
        done = self._done_before + self._finished
        left = (self._total - done) * self._elapsed() / max(self._finished, 1)
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{self._name}: {done}/{self._total}{failed}, {self._rate()}, {left:.0f} s left"

    def _elapsed(self) -> float:
        return max(time.monotonic() - self._started, 1e-3)

    def _rate(self) -> str:
        return f"{self._finished / self._elapsed():.2g} units/s"

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def __enter__(self) -> StageProgress:
        self._bar.start()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        self._bar.stop()
        if exc_type is None:
            failed = f", {self._failed} failed" if self._failed else ""
            self._print(
                f"{self._name}: {self._finished - self._failed} units in {self._elapsed():.1f} s "
                f"({self._rate()}){failed}"
            )
