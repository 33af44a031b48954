"""The training loop. It knows named trainables and a task, nothing about diffusion."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdtrain import distributed
from sdtrain.data.randomness import philox_bits
from sdtrain.errors import DataError, DivergedError
from sdtrain.records import Batch, Task, Tombstone
from sdtrain.training.engine import Engine, StepResult

Event = Callable[[int], None]
Beat = Callable[[str, int, int], None]
"""Told (phase, step, micro-step) at the same places of a step on all ranks."""


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """What the loop needs to know; plain values."""

    max_steps: int
    batch_size: int
    grad_accum_steps: int
    seed: int
    log_every_steps: int = 10
    max_skipped_in_a_row: int = 25
    max_bad_fraction: float = 0.01


@dataclass(frozen=True, slots=True)
class Periodic:
    """Something that happens after every n-th step and, if asked, after the last one.

    Attributes:
        every_steps: Interval in steps.
        action: Called with the number of finished steps on all ranks together.
        at_end: Whether the last step counts too.
    """

    every_steps: int
    action: Event
    at_end: bool = True

    def is_due(self, step: int, max_steps: int) -> bool:
        """Whether `step` finished steps are a moment for it."""
        return step % self.every_steps == 0 or (self.at_end and step == max_steps)


@dataclass(slots=True)
class Window:
    """Sums since the last report, kept on the device: reading them any earlier is a CPU-GPU sync point."""

    steps: int = 0
    skipped: int = 0
    data_wait_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    results: dict[str, StepResult] = field(default_factory=dict)

    def add(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Add per-sample figures; a sample of weight 0 does not count."""
        values = values.detach().double()
        seen = (weights > 0).double()
        total = torch.where(seen > 0, values, 0.0).sum()
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + seen.sum()

    def means(self) -> dict[str, float]:
        """Means over all samples of all ranks; collective."""
        names = sorted(self.sums)
        local = [float(self.sums[name]) for name in names] + [float(self.counts[name]) for name in names]
        gathered = torch.tensor(distributed.gather_objects(local), dtype=torch.float64).sum(0)
        sums, counts = gathered[: len(names)], gathered[len(names) :]
        return {name: float(total / count.clamp(min=1)) for name, total, count in zip(names, sums, counts, strict=True)}


@dataclass(frozen=True, slots=True)
class Report:
    """One line of the run's diary, the same on all ranks.

    Attributes:
        step: Finished steps.
        means: Per-sample means since the last report, `<trainable>/loss` and the task's own figures.
        results: The last applied update of every trainable.
        seconds: Wall time since the last report, events (saving, validation) excluded.
        images: Images consumed by all ranks since the last report.
    """

    step: int
    samples_seen: int
    means: dict[str, float]
    results: dict[str, StepResult]
    seconds: float
    data_wait_seconds: float
    images: int
    skipped: int


class Trainer:
    """Runs a task's trainables over a stream of micro-batches.

    `leaves_after(step)` is asked on all ranks after every step; a true answer, the same on all of them, ends the loop.

    Attributes:
        step: Finished optimiser steps; sample positions below `step * batch_size` are consumed.
        tombstones: Every sample that this rank could not read.
    """

    def __init__(
        self,
        *,
        task: Task,
        engines: Mapping[str, Engine],
        settings: TrainerSettings,
        batches: Iterator[tuple[int, int, Batch]],
        learning_rate: Callable[[str, int], float],
        start_step: int = 0,
        events: Sequence[Periodic] = (),
        on_report: Callable[[Report], None] = lambda report: None,
        beat: Beat = lambda phase, step, micro_step: None,
        leaves_after: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self.task = task
        self.engines = engines
        self.settings = settings
        self.step = start_step
        self.tombstones: list[Tombstone] = []
        self._batches = batches
        self._learning_rate = learning_rate
        self._events = events
        self._on_report = on_report
        self._beat = beat
        self._leaves_after = leaves_after
        self._window = Window()
        self._skipped_in_a_row = dict.fromkeys(engines, 0)
        self._samples_read = 0

    def fit(self) -> bool:
        """Train until `max_steps`, or until a rank is asked to leave; returns whether the run is complete."""
        max_steps = self.settings.max_steps
        while self.step < max_steps:
            batches = self._read()
            for name in [name for name in self.engines if self.task.is_active(name, self.step)]:
                result = self._update(name, batches)
                self._watch(name, result)
            self.step += 1
            self._window.steps += 1
            if self.step % self.settings.log_every_steps == 0 or self.step == max_steps:
                self._report()
            for event in self._events:
                if event.is_due(self.step, max_steps):
                    self._run(event.action)
            if self._leaves_after(self.step):
                break
        return self.step >= max_steps

    def _read(self) -> list[Batch]:
        """The micro-batches of one step; how long the loop stood still for data is a figure of its own."""
        started = time.perf_counter()
        batches = []
        for micro_step in range(self.settings.grad_accum_steps):
            self._beat("data", self.step, micro_step)
            step, micro, batch = next(self._batches)
            assert (step, micro) == (self.step, micro_step), "the loader and the loop count alike"
            batches.append(batch.to(distributed.device()))
            self._samples_read += len(batch)
            self.tombstones += batch.errors
        self._window.data_wait_seconds += time.perf_counter() - started
        return batches

    def _refuse_too_many_tombstones(self) -> None:
        """Stop on all ranks together when one rank could not read more samples than the config allows."""
        allowed = max(1.0, self.settings.max_bad_fraction * self._samples_read)
        bad = int(distributed.max_over_ranks(len(self.tombstones)))
        if bad > allowed:
            listed = "\n  ".join(map(str, self.tombstones[:20])) or "(all on other ranks)"
            raise DataError(
                f"{bad} of {self._samples_read} samples of one rank could not be read; data.max_bad_fraction = "
                f"{self.settings.max_bad_fraction:g} allows {int(allowed)}. The first ones of this rank:\n  {listed}\n"
                "Repair the shards or raise data.max_bad_fraction."
            )

    def _update(self, name: str, batches: Sequence[Batch]) -> StepResult:
        """Accumulate one step's micro-batches and step one trainable."""
        engine = self.engines[name]
        engine.module.train()
        learning_rate = self._learning_rate(name, engine.applied_steps)
        result = None
        with engine.alone([other for other in self.engines.values() if other is not engine]):
            for micro_step, batch in enumerate(batches):
                self._seed_torch(micro_step)
                self._beat("forward", self.step, micro_step)
                loss = self.task.loss(name, batch, self.step)
                self._window.add(f"{name}/loss", loss.losses, loss.weights)
                for metric, values in loss.metrics.items():
                    self._window.add(f"{name}/{metric}", values, loss.weights)
                self._beat("backward", self.step, micro_step)
                engine.backward(loss.losses, loss.weights)
                self._beat("step", self.step, micro_step)
                result = engine.step(learning_rate)
        assert result is not None, "the last micro-step is the accumulation boundary"
        return result

    def _seed_torch(self, micro_step: int) -> None:
        """What torch draws inside a network (dropout) depends on (seed, step, micro-step, rank) alone."""
        position = self.step * self.settings.grad_accum_steps + micro_step
        stream = f"torch/rank{distributed.ranks().rank}"
        torch.manual_seed(int(philox_bits(self.settings.seed, stream, position, 1)[0] >> 1))

    def _watch(self, name: str, result: StepResult) -> None:
        """Count updates that DeepSpeed skipped on all ranks together; too many in a row of one trainable: diverged."""
        if result.applied:
            self._skipped_in_a_row[name] = 0
            self._window.results[name] = result
            return
        self._window.skipped += 1
        self._skipped_in_a_row[name] += 1
        if self._skipped_in_a_row[name] >= self.settings.max_skipped_in_a_row:
            raise DivergedError(
                f"{name}: gradients were not finite for {self._skipped_in_a_row[name]} updates in a row, the last one "
                f"at step {self.step}. Lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or resume from "
                "an older checkpoint."
            )

    def _run(self, action: Event) -> None:
        """Run an event without counting its time as training time."""
        started = time.perf_counter()
        action(self.step)
        self._window.started += time.perf_counter() - started

    def _report(self) -> None:
        self._beat("report", self.step, 0)
        self._refuse_too_many_tombstones()
        window, self._window = self._window, Window()
        self._on_report(
            Report(
                step=self.step,
                samples_seen=self.step * self.settings.batch_size,
                means=window.means(),
                results=window.results,
                seconds=time.perf_counter() - window.started,
                data_wait_seconds=window.data_wait_seconds,
                images=window.steps * self.settings.batch_size,
                skipped=window.skipped,
            )
        )
