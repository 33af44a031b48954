"""`metrics.jsonl`, the run's own record of its figures: authoritative, append-only, true after any resume."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sdtrain.run_dir import RunDir, append_json_line, read_json_lines


class MetricsLog:
    """Appends rows to `metrics.jsonl`; rank 0 only.

    An attempt that resumes at step N says so in a row of its own. Rows of dead attempts beyond N stay in the file
    (nothing is ever rewritten) and are left out by `read_metrics`.
    """

    def __init__(self, run_dir: RunDir, *, attempt: str, resumed_step: int = 0) -> None:
        """Open the log at the start of an attempt.

        Args:
            run_dir: The run's folder.
            attempt: Unique name of this start.
            resumed_step: Finished steps of the checkpoint that this attempt starts from; 0 for a fresh start.
        """
        self._path = run_dir.metrics
        self._attempt = attempt
        start = {"attempt": attempt, "resumed_step": resumed_step, "time": time.time()}
        append_json_line(self._path, start | {"process_started": psutil.Process().create_time()})

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Append figures of `step` finished steps, such as `train/loss`; several rows of one step are joined."""
        append_json_line(self._path, {"step": step, "attempt": self._attempt, "time": time.time(), **row})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The figures of the surviving lineage: one row per step, ascending.

    A later row of the same step supersedes key by key; rows past the point where a later attempt resumed are the dead
    attempt's and do not count.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for row in read_json_lines(path):
        if not isinstance(row, dict):
            continue
        if "resumed_step" in row:
            by_step = {step: kept for step, kept in by_step.items() if step <= row["resumed_step"]}
        elif "step" in row:
            by_step[row["step"]] = by_step.get(row["step"], {}) | row
    return [by_step[step] for step in sorted(by_step)]


def joined_pairs(means: Mapping[str, float]) -> dict[str, float]:
    """Means with every pair `name.sum`, `name.count` replaced by its quotient `name`; see `LossOutput.metrics`.

    A pair that nobody counted for is left out: there is no such figure.
    """
    figures = {}
    for name, value in means.items():
        stem, _, part = name.rpartition(".")
        count = means.get(f"{stem}.count")
        if count is None or part not in ("sum", "count"):
            figures[name] = value
        elif part == "sum" and count > 0:
            figures[stem] = value / count
    return figures


class SpikeWatch:
    """Tells a loss that stands out from those before it."""

    def __init__(self, *, factor: float = 3.0, memory: int = 50, least: int = 10) -> None:
        """Compare with the median of the last `memory` values, once there are `least` of them."""
        self._factor = factor
        self._least = least
        self._values: deque[float] = deque(maxlen=memory)

    def see(self, value: float) -> float | None:
        """How many times the median `value` is, if it stands out; a value that is not finite always does (infinity).

        A median is not moved by a few spikes, and follows a loss that stays high.
        """
        median = statistics.median(self._values) if len(self._values) >= self._least else math.inf
        if not math.isfinite(value):
            return math.inf
        self._values.append(value)
        return value / median if value > self._factor * median > 0 else None


@dataclass(frozen=True, slots=True)
class _Stretch:
    images: int
    seconds: float
    data_wait_seconds: float


class Throughput:
    """Speed over the last stretches of training, events such as saving excluded by whoever measures the stretches."""

    def __init__(self, *, stretches: int = 10) -> None:
        """Remember the last `stretches` reports."""
        self._stretches: deque[_Stretch] = deque(maxlen=stretches)

    def add(self, *, images: int, seconds: float, data_wait_seconds: float) -> None:
        """Add a report: images of all ranks, wall time, and the part of it that waited for data."""
        self._stretches.append(_Stretch(images, seconds, data_wait_seconds))

    @property
    def images_per_second(self) -> float:
        """Images of all ranks per second; 0 before the first stretch."""
        return self._images / self._seconds if self._seconds > 0 else 0.0

    @property
    def data_wait_share(self) -> float:
        """Part of the time, in [0, 1], in which the loop stood still for data."""
        return (
            sum(stretch.data_wait_seconds for stretch in self._stretches) / self._seconds if self._seconds > 0 else 0.0
        )

    def eta_seconds(self, images_left: int) -> float:
        """Time that the rest takes at this speed; infinite before the first stretch."""
        return images_left / self.images_per_second if self.images_per_second > 0 else float("inf")

    @property
    def _images(self) -> int:
        return sum(stretch.images for stretch in self._stretches)

    @property
    def _seconds(self) -> float:
        return sum(stretch.seconds for stretch in self._stretches)
