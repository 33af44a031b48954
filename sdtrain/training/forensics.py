"""What a thrown-away step leaves behind for whoever looks into it: `sick/step-N.json` in the run folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sdtrain import distributed
from sdtrain.records import Batch, LossOutput
from sdtrain.run_dir import write_atomically
from sdtrain.training.engine import StepResult
from sdtrain.training.health import Cause, Health, StepLoss
from sdtrain.training.window import Sums


@dataclass(frozen=True, slots=True)
class MicroStep:
    """One micro-batch of this rank and what became of it, without the graph."""

    batch: Batch
    losses: Tensor
    timesteps: Tensor | None

    def described(self) -> dict[str, Any]:
        """As JSON values; waits for the device."""
        told: dict[str, Any] = {
            "keys": list(self.batch.keys),
            "positions": self.batch.positions.tolist(),
            "weights": numbers(self.batch.weights.tolist()),
            "losses": numbers(self.losses.tolist()),
        }
        if self.timesteps is not None:
            told["timesteps"] = numbers(self.timesteps.tolist())
        return told


@dataclass(slots=True)
class Evidence:
    """One step of one trainable while it is taken, on this rank.

    Attributes:
        limit: Where ordinary noise of its loss ends.
        loss: Its loss so far.
        sums: Its figures, which count once it is applied.
        micro_steps: What was computed.
        lost: Set where some rank lacked memory: what this one was told by its allocator, empty if nothing.
    """

    limit: float
    loss: StepLoss = field(default_factory=StepLoss)
    sums: Sums = field(default_factory=Sums)
    micro_steps: list[MicroStep] = field(default_factory=list)
    lost: str | None = None

    def add(self, trainable: str, batch: Batch, output: LossOutput) -> None:
        """Take down a forward."""
        self.loss.add(output)
        self.sums.add_loss(trainable, output)
        timesteps = output.metrics.get("timesteps")
        self.micro_steps.append(MicroStep(batch, output.losses.detach(), timesteps))

    @property
    def cause(self) -> Cause:
        """Why the step was thrown away, once it was; the same on all ranks."""
        loss = self.loss.read()
        if self.lost is not None or loss is None:
            return Cause.OUT_OF_MEMORY
        if not math.isfinite(loss):
            return Cause.LOSS
        return Cause.SPIKE if loss > self.limit else Cause.GRADIENTS

    def described(self) -> dict[str, Any]:
        """This rank's part as JSON values; waits for the device."""
        return {
            "rank": distributed.ranks().rank,
            "error": self.lost or "",
            "micro_steps": [micro_step.described() for micro_step in self.micro_steps],
        }


@dataclass(frozen=True, slots=True)
class SickStep:
    """A thrown-away step.

    Attributes:
        step: Steps finished before it.
        applied_steps: Updates of the trainable applied before it.
    """

    step: int
    trainable: str
    applied_steps: int
    evidence: Evidence
    result: StepResult
    health: Health


def write_record(folder: Path, attempt: str, sick: SickStep) -> Path:
    """Gather a thrown-away step's evidence from all ranks and leave it in `folder`; collective.

    Returns:
        The file, on every rank: `step-N.json`, or `step-N-2.json` for the second one of that step.
    """
    ranks: list[dict[str, Any]] = distributed.gather_objects(sick.evidence.described())
    path = folder / "?"
    if distributed.ranks().is_main:
        record = {
            "step": sick.step,
            "attempt": attempt,
            "time": time.time(),
            "trainable": sick.trainable,
            "cause": str(sick.evidence.cause),
            "ranks_at_fault": [part["rank"] for part in ranks if _is_at_fault(part)],
            "loss": number(sick.evidence.loss.read()),
            "loss_limit": number(sick.evidence.limit),
            "loss_history": numbers(sick.health.history.losses),
            "gradient_norm": number(float(sick.result.gradient_norm)),
            "learning_rate": sick.result.learning_rate,
            "applied_steps": sick.applied_steps,
            "ranks": ranks,
        }
        path = _unused(folder, f"step-{sick.step:08d}")
        write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return distributed.broadcast_object(path)


def number(value: float | None) -> float | str | None:
    """A number as strict JSON knows it; `nan`, `inf` and `-inf` become words."""
    return value if value is None or math.isfinite(value) else str(value)


def numbers(values: Sequence[float]) -> list[float | str | None]:
    """`number` of each."""
    return [number(value) for value in values]


def _is_at_fault(part: dict[str, Any]) -> bool:
    losses = [loss for micro_step in part["micro_steps"] for loss in micro_step["losses"]]
    return bool(part["error"]) or any(isinstance(loss, str) for loss in losses)


def _unused(folder: Path, stem: str) -> Path:
    path, times = folder / f"{stem}.json", 1
    while path.exists():
        times += 1
        path = folder / f"{stem}-{times}.json"
    return path
