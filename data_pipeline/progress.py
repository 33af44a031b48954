"""How far a run is: a live bar on a terminal, plain lines elsewhere, and a file that `sdtrain-data status` reads."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sdtrain.run_dir import write_atomically

PROGRESS_FILE = "progress.json"
_LINE_EVERY_SECONDS = 10.0
_WRITE_EVERY_SECONDS = 1.0
_MAX_IN_FLIGHT_SHOWN = 20
_ROW_COUNTS = ("rows", "rows_in", "samples", "captions", "stored")


def rows_of(stats: Mapping[str, Any]) -> int:
    """How many rows a unit worked on, by whichever of a stage's counts says so; 0 where none does."""
    found = next((stats[name] for name in _ROW_COUNTS if name in stats), 0)
    return sum(found.values()) if isinstance(found, Mapping) else int(found)


def start_ticks(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None where it is gone.

    Process numbers are used again; a number and its start are not. A zombie is gone.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


class RunProgress:
    """Context manager that keeps `progress.json`: who is running, since when, and how far each stage is.

    Args:
        output: Folder of the run.
        stages: Name -> folder of the run's stages, in order.
        chosen: Names of those that this attempt brings up to date.
    """

    def __init__(self, output: Path, stages: Mapping[str, Path], chosen: Sequence[str]):
        self._path = output / PROGRESS_FILE
        now = time.time()
        self._attempt: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start_ticks": start_ticks(os.getpid()),
            "since": now,
            "updated": now,
            "state": "running",
            "message": None,
        }
        before = {row["name"]: row for row in read_progress(output).get("stages", [])}
        self._stages: dict[str, dict[str, Any]] = {}
        for name, folder in stages.items():
            fresh = {"name": name, "folder": folder.name, "state": "waiting"}
            self._stages[name] = fresh if name in chosen else before.get(name, fresh)
        self._stages |= {name: row for name, row in before.items() if name not in stages}
        self._written = 0.0

    def tell(self, name: str, facts: Mapping[str, Any], *, at_once: bool = True) -> None:
        """Take over what is new of a stage; written at most once a second unless `at_once`."""
        self._stages[name] |= facts
        if at_once or time.monotonic() - self._written >= _WRITE_EVERY_SECONDS:
            self._write()

    def _write(self) -> None:
        self._attempt["updated"] = time.time()
        self._written = time.monotonic()
        row = {"attempt": self._attempt, "stages": list(self._stages.values())}
        with contextlib.suppress(OSError):  # a full disk is for those to tell who write data
            write_atomically(self._path, json.dumps(row, indent=1) + "\n")

    def __enter__(self) -> RunProgress:
        self._write()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._attempt["state"] = "done" if exc is None else "failed" if isinstance(exc, Exception) else "interrupted"
        self._attempt["message"] = None if exc is None else f"{exc}" or type(exc).__name__
        for row in self._stages.values():
            if row["state"] in ("checking", "running"):
                row |= {"state": self._attempt["state"], "in_flight": 0, "oldest": []}
        self._write()


def read_progress(output: Path) -> dict[str, Any]:
    """What `progress.json` of a run's folder says; empty where there is none."""
    try:
        return json.loads((output / PROGRESS_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


class StageProgress:
    """Context manager that follows one stage.

    Args:
        console: Where to show it.
        name: The stage's name.
        total: Number of its units.
        done: Units that were up to date at the start; they count as done but not for the rate.
        rows: Rows of those units.
        tell: Takes the stage's figures after each change, and whether they must be seen at once.
    """

    def __init__(
        self,
        console: Console,
        name: str,
        total: int,
        done: int = 0,
        *,
        rows: int = 0,
        tell: Callable[[Mapping[str, Any], bool], None] = lambda facts, at_once: None,
    ):
        self._console = console
        self._name = name
        self._total = total
        self._done_before = done
        self._rows_before = rows
        self._tell = tell
        self._finished = 0
        self._failed = 0
        self._retries = 0
        self._rows = 0
        self._in_flight: dict[str, tuple[int, float]] = {}
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

    def start(self, unit: str, attempt: int) -> None:
        """An attempt at a unit is on its way to a worker."""
        self._in_flight[unit] = (attempt, time.time())

    def retry(self, unit: str) -> None:
        """An attempt failed; there will be another one."""
        self._in_flight.pop(unit, None)
        self._retries += 1

    def advance(self, unit: str = "", *, rows: int = 0, failed: bool = False) -> None:
        """One more unit is committed, or dead."""
        self._in_flight.pop(unit, None)
        self._finished += 1
        self._failed += failed
        self._rows += rows
        self._bar.update(self._task, advance=1, rate=self._rate())
        is_due = time.monotonic() - self._last_line >= _LINE_EVERY_SECONDS
        if is_due and not self._console.is_terminal:
            self._last_line = time.monotonic()
            self._print(self.line())

    def beat(self) -> None:
        """Let the file follow; called at every turn of the runner's loop."""
        self._tell(self.facts(), False)

    def line(self) -> str:
        """`filter: 12/40, 3.1 units/s, 9 s left`."""
        done = self._done_before + self._finished
        left = (self._total - done) * self._elapsed() / max(self._finished, 1)
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{self._name}: {done}/{self._total}{failed}, {self._rate()}, {left:.0f} s left"

    def facts(self) -> dict[str, Any]:
        """As JSON: `done` and `rows` count all that stands; `finished`, `finished_rows`, `seconds` this attempt."""
        oldest = sorted(self._in_flight.items(), key=lambda item: item[1][1])[:_MAX_IN_FLIGHT_SHOWN]
        return {
            "units": self._total,
            "done": self._done_before + self._finished - self._failed,
            "failed": self._failed,
            "retries": self._retries,
            "in_flight": len(self._in_flight),
            "oldest": [{"unit": unit, "attempt": attempt, "since": since} for unit, (attempt, since) in oldest],
            "rows": self._rows_before + self._rows,
            "finished": self._finished,
            "finished_rows": self._rows,
            "seconds": round(self._elapsed(), 3),
        }

    def _elapsed(self) -> float:
        return max(time.monotonic() - self._started, 1e-3)

    def _rate(self) -> str:
        return f"{self._finished / self._elapsed():.2g} units/s"

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def __enter__(self) -> StageProgress:
        self._bar.start()
        self._tell(self.facts(), True)
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        self._bar.stop()
        self._tell(self.facts(), True)
        if exc_type is None:
            failed = f", {self._failed} failed" if self._failed else ""
            self._print(
                f"{self._name}: {self._finished - self._failed} units in {self._elapsed():.1f} s "
                f"({self._rate()}){failed}"
            )
