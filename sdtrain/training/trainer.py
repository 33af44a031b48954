"""The training loop. It knows named trainables and a task, nothing about diffusion."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdtrain import distributed
from sdtrain.data.randomness import philox_bits
from sdtrain.errors import DataError, DivergedError
from sdtrain.records import Batch, LossOutput, Task, Tombstone
from sdtrain.training.engine import Engine, StepResult
from sdtrain.training.forensics import Evidence, SickStep
from sdtrain.training.health import Cause, Health, HealthSettings, StepLost, agree, for_keeps
from sdtrain.training.rollback import Restart
from sdtrain.training.window import Report, Window

__all__ = ["Beat", "Periodic", "Report", "StepResult", "Trainer", "TrainerSettings"]

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
    max_bad_fraction: float = 0.01
    health: HealthSettings = field(default_factory=HealthSettings)


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


class Trainer:
    """Runs a task's trainables over a stream of micro-batches.

    A step that is sick on any rank is thrown away on all of them; see `health`. `leaves_after(step)` is asked on all
    ranks after every step; a true answer, the same on all of them, ends the loop.

    Attributes:
        step: Finished optimiser steps.
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
        health: Mapping[str, Mapping[str, Any]] | None = None,
        rollbacks: int = 0,
        events: Sequence[Periodic] = (),
        on_report: Callable[[Report], None] = lambda report: None,
        beat: Beat = lambda phase, step, micro_step: None,
        leaves_after: Callable[[int], bool] = lambda step: False,
        on_unreadable: Callable[[int, Sequence[Tombstone]], None] = lambda step, tombstones: None,
        on_sick: Callable[[SickStep], Path | None] = lambda sick: None,
        roll_back: Callable[[int, int, str], Restart | None] = lambda first_sick_step, finished_steps, story: None,
    ) -> None:
        """Put the loop together.

        Args:
            learning_rate: (trainable, applied steps) -> rate.
            health: Trainable -> what was known of its last steps, see `health_state`; none where a run begins.
            rollbacks: Times that the run went back already.
            on_unreadable: Told of the samples of a step that this rank could not read.
            on_sick: Leaves a record of a thrown-away step; collective.
            roll_back: (steps before the sickness, finished steps, what happened) -> where to go on, or None where
                there is nothing to go back to; collective.
        """
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
        self._on_unreadable = on_unreadable
        self._on_sick = on_sick
        self._roll_back = roll_back
        self._window = Window()
        self._paused_at: float | None = None  # when the event began that is running
        self._health = self._healths(health or {})
        self._last_record: Path | None = None
        self._rollbacks = rollbacks
        self._read: list[Batch] = []  # micro-batches of this step so far
        self._samples_read = 0

    def fit(self) -> bool:
        """Train until `max_steps`, or until a rank is asked to leave; returns whether the run is complete."""
        max_steps = self.settings.max_steps
        while self.step < max_steps:
            self._read = []
            for name in [name for name in self.engines if self.task.is_active(name, self.step)]:
                self._update(name)
            self.step += 1
            self._window.steps += 1
            if any(health.is_sick for health in self._health.values()):
                self._go_back()
                continue
            if self.step % self.settings.log_every_steps == 0 or self.step == max_steps:
                self._report()
            for event in self._events:
                if event.is_due(self.step, max_steps):
                    self._run(event.action)
            if self._leaves_after(self.step):
                break
        self.report_rest()
        return self.step >= max_steps

    # One step ---------------------------------------------------------------------------------------------------------

    def _update(self, name: str) -> None:
        """Accumulate one step's micro-batches and step one trainable, or throw the step away, on all ranks alike."""
        engine = self.engines[name]
        for each in self.engines.values():
            each.begin()
        evidence = Evidence(limit=self._health[name].history.limit)
        applied_steps = engine.applied_steps
        with engine.alone([other for other in self.engines.values() if other is not engine]):
            self._accumulate(name, evidence)
            if evidence.lost is not None:
                engine.discard()
            self._beat("step", self.step, 0)
            result = engine.step(self._learning_rate(name, applied_steps))
        assert result is not None, "all micro-steps are accumulated or discarded"
        if result.applied:
            self._health[name].applied(evidence.loss.read())
            self._window.sums.update(evidence.sums)
            self._window.results[name] = result
        else:
            self._note(SickStep(self.step, name, applied_steps, evidence, result, self._health[name]))

    def _accumulate(self, name: str, evidence: Evidence) -> None:
        """All micro-steps of a trainable, up to the one for which some rank lacks memory."""
        last = self.settings.grad_accum_steps - 1
        try:
            for micro_step in range(last + 1):
                loss = self._forward(name, micro_step, evidence)
                verdict = evidence.loss.verdict(evidence.limit) if micro_step == last else None
                self._beat("backward", self.step, micro_step)
                self.engines[name].backward(loss.losses, loss.weights, verdict)
        except StepLost as lost:
            evidence.lost = str(lost)

    def _forward(self, name: str, micro_step: int, evidence: Evidence) -> LossOutput:
        """Read a micro-batch and run the forward; no rank goes on into the backward, in which all wait, alone."""
        batch, loss, error = None, None, None
        try:
            batch = self._batch(micro_step)
            self._seed_torch(micro_step)
            self._beat("forward", self.step, micro_step)
            loss = self.task.loss(name, batch, self.step)
        except Exception as raised:
            error = for_keeps(raised)
        self._beat("agree", self.step, micro_step)
        agree(error)
        assert batch is not None and loss is not None, "no rank has an error"
        evidence.add(name, batch, loss)
        return loss

    def _batch(self, micro_step: int) -> Batch:
        """A micro-batch of this step, read once; what a thrown-away step left unread is passed over."""
        started = time.perf_counter()
        while len(self._read) <= micro_step:
            self._beat("data", self.step, micro_step)
            step, micro, batch = self._next()
            self._samples_read += len(batch)
            self.tombstones += batch.errors
            self._on_unreadable(step, batch.errors)
            if step == self.step:
                assert micro == len(self._read), "the loader and the loop count alike"
                self._read.append(batch)
        self._window.data_wait_seconds += time.perf_counter() - started
        return self._read[micro_step].to(distributed.device())

    def _next(self) -> tuple[int, int, Batch]:
        try:
            return next(self._batches)
        except MemoryError as error:  # unlike a forward without memory this cannot be passed over: the reader is dead
            raise DataError(
                f"host memory was not enough to read samples: {error}. Lower data.num_workers or data.prefetch."
            ) from error

    def _seed_torch(self, micro_step: int) -> None:
        """What torch draws inside a network (dropout) depends on (seed, step, micro-step, rank) alone."""
        position = self.step * self.settings.grad_accum_steps + micro_step
        stream = f"torch/rank{distributed.ranks().rank}"
        torch.manual_seed(int(philox_bits(self.settings.seed, stream, position, 1)[0] >> 1))

    # Sickness ---------------------------------------------------------------------------------------------------------

    def _note(self, sick: SickStep) -> None:
        """Take back what a thrown-away step left beside the weights, and write down what it was."""
        cause = sick.evidence.cause
        for name, engine in self.engines.items():
            engine.rewind(keeps_scale=name != sick.trainable or cause is Cause.GRADIENTS)
        self._window.skipped[cause] += 1
        self._last_record = self._on_sick(sick)
        sick.health.skipped(sick.step, cause)

    def _go_back(self) -> None:
        """Go on from an older checkpoint, without the samples since; or give up."""
        name, health = next((name, health) for name, health in self._health.items() if health.is_sick)
        may_go_back = self._rollbacks < self.settings.health.max_rollbacks
        restart = None
        if may_go_back:
            self._beat("rollback", self.step, 0)
            restart = self._roll_back(health.first_sick_step, self.step, f"{name}: {health.story}")
        if restart is None:
            why = "there is no checkpoint to go back to" if may_go_back else f"{self._rollbacks} rollbacks did not help"
            raise DivergedError(
                f"{name}: {health.story}, the last one in step {self.step - 1}, and {why}. What went into it: "
                f"{self._last_record}. Lower optimizer.learning_rate, lengthen optimizer.warmup_steps or look at these "
                "samples, then resume from an older checkpoint; where memory is short, lower data.micro_batch_size. "
                "health.max_rollbacks counts over all starts of the run."
            )
        self.step, self._batches = restart.step, restart.batches
        self._health = self._healths(restart.health)
        self._window = Window()
        self._rollbacks += 1

    def health_state(self) -> dict[str, dict[str, Any]]:
        """What is known of every trainable's last steps, as plain values; a checkpoint holds it."""
        return {name: health.state() for name, health in self._health.items()}

    def _healths(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, Health]:
        return {name: Health(self.settings.health, states.get(name)) for name in self.engines}

    # Between steps ----------------------------------------------------------------------------------------------------

    def report_rest(self) -> None:
        """Report the finished steps that no report covers yet; collective, for whoever takes a checkpoint of them.

        Reports then end where checkpoints do: a resume, which drops what was reported of later steps, leaves no step
        without a report and none in two.
        """
        if self._window.steps:
            self._report()

    def _run(self, action: Event) -> None:
        """Run an event without counting its time as training time."""
        self._paused_at = time.perf_counter()
        action(self.step)
        self._window.started += time.perf_counter() - self._paused_at
        self._paused_at = None

    def _report(self) -> None:
        self._beat("report", self.step, 0)
        window, means = self._window, self._window.sums.means()  # waits for the device, whose time counts
        now = time.perf_counter() if self._paused_at is None else self._paused_at
        self._window = Window(started=now)
        self._on_report(
            Report(
                step=self.step,
                samples_seen=self.step * self.settings.batch_size,
                means=means,
                results=window.results,
                seconds=now - window.started,
                data_wait_seconds=window.data_wait_seconds,
                images=window.steps * self.settings.batch_size,
                skipped=window.skipped.total(),
                causes=dict(window.skipped),
                rollbacks=self._rollbacks,
            )
        )
        self._refuse_too_many_tombstones()

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
