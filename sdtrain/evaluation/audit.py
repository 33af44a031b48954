"""`sdtrain inspect RUN --audit`: from the ledger alone, that the surviving weights saw every position exactly once.

Beside the proof (see `lineage`) stand the attempts, the steps that were lost, and what the run's time went into.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sdtrain.errors import CheckpointError, ConfigError
from sdtrain.evaluation.lineage import Lineage, trace
from sdtrain.evaluation.run_story import Attempt, read_attempts
from sdtrain.run_dir import RunDir
from sdtrain.training.goodput import TimeUse, time_use
from sdtrain.training.progress import duration


@dataclass(frozen=True, slots=True)
class Audit:
    """What the ledger proves, and what a run's time went into.

    Attributes:
        run: The run's folder.
        lineage: Of the checkpoint that the next start would resume from.
        attempts: Every start, in order.
        time_use: What the time went into; None where no attempt was timed.
    """

    run: str
    lineage: Lineage
    attempts: tuple[Attempt, ...]
    time_use: TimeUse | None

    @property
    def num_lost_steps(self) -> int:
        """Steps that were trained and did not survive."""
        return sum(attempt.lost_steps for attempt in self.attempts)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with what is drawn from them beside them."""
        use = {} if self.time_use is None else {"goodput": self.time_use.goodput, **asdict(self.time_use)}
        return asdict(self) | {"verdict": self.lineage.verdict, "lost_steps": self.num_lost_steps, "time_use": use}


def audit(run: Path, *, as_json: bool = False, console: Console | None = None) -> Audit:
    """Print the proof and the attempts of a run.

    Args:
        run: The run's folder.
        as_json: One JSON object in place of tables.
        console: Where to print; standard output by default.

    Raises:
        CheckpointError: The ledger does not add up.
        ConfigError: `run` holds no ledger.
    """
    found = examine(run)
    console = console or Console()
    if as_json:
        console.print(json.dumps(found.to_json(), indent=2), markup=False, highlight=False, soft_wrap=True)
    else:
        _print(found, console)
    if found.lineage.problems:
        raise CheckpointError(
            f"{RunDir(run).ledger}: {found.lineage.verdict}. The weights did not see the data as planned: say so "
            "beside every figure of this run, or start again from a checkpoint before the first problem"
        )
    return found


def examine(run: Path) -> Audit:
    """What `audit` prints, as a record."""
    folder = RunDir(run)
    if not folder.ledger.is_file():
        raise ConfigError(f"{run}: holds no {folder.ledger.name}; give the run_dir of a `sdtrain train`")
    lineage = trace(folder.ledger_rows())
    saved = lineage.commits[-1].step if lineage.commits else 0
    return Audit(str(run), lineage, read_attempts(folder, saved_step=saved), time_use(folder))


# Printing -----------------------------------------------------------------------------------------------------------


def _print(found: Audit, console: Console) -> None:
    table = Table(title=f"attempts of {found.run}", title_justify="left")
    for column, side in (
        ("attempt", "left"),
        ("start", "left"),
        ("end", "left"),
        ("ranks", "right"),
        ("from step", "right"),
        ("to step", "right"),
        ("lost", "right"),
        ("outcome", "left"),
    ):
        table.add_column(column, justify="right" if side == "right" else "left", overflow="fold")
    for attempt in found.attempts:
        table.add_row(
            attempt.name,
            _clock(attempt.started),
            _clock(attempt.ended),
            "?" if attempt.world_size is None else str(attempt.world_size),
            f"{attempt.start_step:,}",
            f"{attempt.last_step:,}",
            f"{attempt.lost_steps:,}" if attempt.lost_steps else "-",
            attempt.end,
        )
    console.print(table)
    for skip in found.lineage.skips:
        line = f"left out on purpose: samples {skip.first} to {skip.last - 1}: {skip.reason or 'no reason given'}"
        console.print(line, markup=False, highlight=False)
    console.print(f"time    {_time_text(found.time_use)}", markup=False, highlight=False)
    console.print(f"lost    {found.num_lost_steps:,} steps were trained and did not survive", highlight=False)
    console.print(f"order   {found.lineage.verdict}", markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _time_text(use: TimeUse | None) -> str:
    if use is None:
        return "no attempt was timed"
    parts = {
        "useful": use.useful_seconds,
        "waiting for data or skipped": use.idle_seconds,
        "lost and trained again": use.lost_seconds,
        "starting, validating, sampling, saving": use.other_seconds,
        "between attempts": use.between_seconds,
    }
    told = ", ".join(f"{duration(seconds)} {name}" for name, seconds in parts.items())
    return f"goodput {use.goodput:.1%} of {duration(use.wall_seconds)}: {told}"
