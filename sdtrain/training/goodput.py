"""What a run's time went into, over all its attempts: goodput is the share that moved the surviving weights."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdtrain.run_dir import RunDir, read_json_lines

SECONDS = "train/seconds"
USEFUL = "train/useful_seconds"


def useful_seconds(*, seconds: float, data_wait_seconds: float, steps: int, skipped: int) -> float:
    """The part of a stretch of training that moved the weights: without waiting for data and without skipped steps.

    Args:
        seconds: Wall time, events such as saving excluded.
        data_wait_seconds: The part of it in which the loop stood still for data.
        steps: Steps in it.
        skipped: Steps of them that were not applied.
    """
    return max(seconds - data_wait_seconds, 0.0) * (1 - skipped / max(steps, 1))


@dataclass(frozen=True, slots=True)
class TimeUse:
    """Wall time from the first start to the last sign of life, in parts that add up to it.

    Attributes:
        started: When the first attempt's process began, seconds since the epoch.
        wall_seconds: From there on, pauses between attempts included.
        useful_seconds: Steps that are in the surviving lineage, applied, and not waiting for data.
        idle_seconds: Waiting for data, and skipped steps, in the surviving lineage.
        lost_seconds: Steps of dead attempts that were trained again.
        between_seconds: Nobody ran: from an attempt's last sign of life to the next one's start.
        other_seconds: Everything else while an attempt ran: starting up, validating, sampling, saving, a killed tail.
    """

    started: float
    wall_seconds: float
    useful_seconds: float
    idle_seconds: float
    lost_seconds: float
    between_seconds: float

    @property
    def other_seconds(self) -> float:
        """See the class."""
        parts = (self.useful_seconds, self.idle_seconds, self.lost_seconds, self.between_seconds)
        return max(self.wall_seconds - sum(parts), 0.0)

    @property
    def goodput(self) -> float:
        """useful_seconds / wall_seconds, in [0, 1]."""
        return self.useful_seconds / self.wall_seconds if self.wall_seconds > 0 else 0.0


@dataclass(slots=True)
class _Life:
    """First and last sign of an attempt, seconds since the epoch."""

    first: float
    last: float


def time_use(run: RunDir) -> TimeUse | None:
    """What the time of a run went into, by its ledger and its metrics; None where no attempt was timed."""
    metrics = [row for row in read_json_lines(run.metrics) if isinstance(row, dict)]
    lives = _lives([*metrics, *run.ledger_rows()])
    if not lives:
        return None
    kept, lost = _split(metrics)
    started, ended = lives[0].first, max(life.last for life in lives)
    between, alive_until = 0.0, lives[0].last
    for life in lives[1:]:
        between += max(life.first - alive_until, 0.0)
        alive_until = max(alive_until, life.last)
    useful = sum(row.get(USEFUL, 0.0) for row in kept)
    return TimeUse(
        started=started,
        wall_seconds=ended - started,
        useful_seconds=useful,
        idle_seconds=sum(row[SECONDS] for row in kept) - useful,
        lost_seconds=sum(row[SECONDS] for row in lost),
        between_seconds=between,
    )


def _lives(rows: Iterable[Mapping[str, Any]]) -> list[_Life]:
    """Every timed attempt, in the order of their starts."""
    found: dict[str, _Life] = {}
    for row in rows:
        if "attempt" not in row or "time" not in row:
            continue
        first, last = row.get("process_started", row["time"]), row["time"]
        life = found.setdefault(row["attempt"], _Life(first, last))
        life.first, life.last = min(life.first, first), max(life.last, last)
    return sorted(found.values(), key=lambda life: life.first)


def _split(metrics: Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Timed rows of the surviving lineage, and those past a step at which a later attempt resumed."""
    kept: list[Mapping[str, Any]] = []
    lost: list[Mapping[str, Any]] = []
    for row in metrics:
        if "resumed_step" in row:
            lost += [past for past in kept if past["step"] > row["resumed_step"]]
            kept = [past for past in kept if past["step"] <= row["resumed_step"]]
        elif "step" in row and SECONDS in row:
            kept.append(row)
    return kept, lost


@dataclass(slots=True)
class Goodput:
    """The goodput of a run while it trains: what earlier attempts left, and what this one adds.

    Attributes:
        started: When the run's first process began, seconds since the epoch.
        useful: Useful seconds so far, of the lineage that this attempt continues.
    """

    started: float
    useful: float = field(default=0.0)

    @classmethod
    def of(cls, run: RunDir) -> Goodput:
        """Of a run whose newest attempt has opened its metrics log."""
        past = time_use(run)
        return cls(time.time()) if past is None else cls(past.started, past.useful_seconds)

    def add(self, seconds: float) -> float:
        """Add useful seconds; returns the run's goodput as of now."""
        self.useful += seconds
        wall = time.time() - self.started
        return min(self.useful / wall, 1.0) if wall > 0 else 0.0
