"""Figures between two reports, kept on the device until then."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdtrain import distributed
from sdtrain.records import LossOutput
from sdtrain.training.engine import StepResult
from sdtrain.training.health import Cause


@dataclass(slots=True)
class Sums:
    """Sums of per-sample figures, on the device: reading them any earlier than at a report is a CPU-GPU sync point."""

    values: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Add per-sample figures; a sample of weight 0 does not count."""
        seen = weights > 0
        total = torch.where(seen, values.detach().double(), 0.0).sum()
        self._add(name, total, seen.double().sum())

    def add_loss(self, trainable: str, loss: LossOutput) -> None:
        """Add a micro-step's losses and the task's own figures."""
        self.add(f"{trainable}/loss", loss.losses, loss.weights)
        for metric, values in loss.metrics.items():
            self.add(f"{trainable}/{metric}", values, loss.weights)

    def update(self, other: Sums) -> None:
        """Add all of another's sums."""
        for name, total in other.values.items():
            self._add(name, total, other.counts[name])

    def means(self) -> dict[str, float]:
        """Means over all samples of all ranks; collective."""
        names = sorted(self.values)
        local = [float(self.values[name]) for name in names] + [float(self.counts[name]) for name in names]
        gathered = torch.tensor(distributed.gather_objects(local), dtype=torch.float64).sum(0)
        sums, counts = gathered[: len(names)], gathered[len(names) :]
        return {name: float(total / count.clamp(min=1)) for name, total, count in zip(names, sums, counts, strict=True)}

    def _add(self, name: str, total: Tensor, count: Tensor) -> None:
        self.values[name] = self.values.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count


@dataclass(slots=True)
class Window:
    """What happened since the last report."""

    steps: int = 0
    skipped: Counter[Cause] = field(default_factory=Counter)
    data_wait_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    sums: Sums = field(default_factory=Sums)
    results: dict[str, StepResult] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """One line of the run's diary, the same on all ranks.

    Attributes:
        step: Finished steps.
        means: Per-sample means over the applied steps since the last report, `<trainable>/loss` and the task's own
            figures.
        results: The last applied update of every trainable.
        seconds: Wall time since the last report, events (saving, validation) excluded.
        images: Images consumed by all ranks since the last report.
        skipped: Updates thrown away since the last report.
        causes: The same by cause.
        rollbacks: Times that the run went back to an older checkpoint.
    """

    step: int
    samples_seen: int
    means: dict[str, float]
    results: dict[str, StepResult]
    seconds: float
    data_wait_seconds: float
    images: int
    skipped: int
    causes: dict[Cause, int] = field(default_factory=dict)
    rollbacks: int = 0
