"""`metrics.jsonl`, the run's own record of its figures: authoritative, append-only, true after any resume."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        append_json_line(self._path, {"attempt": attempt, "resumed_step": resumed_step})

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Append figures of `step` finished steps, such as `train/loss`; several rows of one step are joined."""
        append_json_line(self._path, {"step": step, "attempt": self._attempt, **row})


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


def last_logged_step(path: Path) -> int:
    """The last step that any attempt logged, dead ones included; -1 if none did. Copies (W&B) continue after it."""
    return max((row["step"] for row in read_json_lines(path) if isinstance(row, dict) and "step" in row), default=-1)


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
