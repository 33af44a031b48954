"""Saves and restores a run: what goes into a checkpoint beside the tensors, retention, the ledger."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sdtrain import distributed
from sdtrain.checkpoints.manifest import Checkpoint, folder_name
from sdtrain.checkpoints.retention import Retention, retain
from sdtrain.checkpoints.saver import Saved, Saver
from sdtrain.checkpoints.uploader import Uploader
from sdtrain.errors import CheckpointError, StorageError
from sdtrain.run_dir import RunDir
from sdtrain.training.engine import Engine
from sdtrain.training.fork import Load, ancestry, take_over
from sdtrain.training.health import without_skips
from sdtrain.training.positions import Positions
from sdtrain.training.state import rank_files, restore, state_facts

log = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3


@dataclass(kw_only=True)
class CheckpointKeeper:
    """Commits checkpoints of one attempt and remembers what the ledger has to say.

    With `asynchronous`, `save` takes the state and returns; the first step boundary at which no rank `is_writing` any
    more commits it (`join`). Whoever reads checkpoints or ends the run joins first, however long that takes.

    Attributes:
        identity: What a resume must find unchanged: manifest digest, seed, order version, batch size.
        config_text: The resolved page, stored in every checkpoint.
        uploader: Sends what is committed to a store; rank 0 alone has one.
        before_save: Called on all ranks when a save begins, for what else is to be on disk before the checkpoint is;
            returns what the loop knows of its last steps, which the manifest holds as `health`.
        on_saved: Is told what became of every save.
        parent: Name of the newest checkpoint in this lineage; None before the first.
        saved_step: Its step; 0 before the first.
        resumed_from: Name of the checkpoint that this attempt started from.
        positions: Where in the order of samples the steps of this lineage begin.
        origin: Name of the run's first attempt, by which its checkpoints are known in any folder.
        forked_from: Whose checkpoint the run began with, see `fork.ancestry`; None for a run from fresh weights.
        inherited_steps: How many of the updates that an engine counts as applied were that other run's.
        health: What the loop knew of its last steps where this lineage goes on; see `health.Health`.
    """

    run: RunDir
    attempt: str
    engines: Mapping[str, Engine]
    batch_size: int
    config_text: str
    identity: Mapping[str, Any]
    environment: Mapping[str, Any]
    retention: Retention
    asynchronous: bool = True
    uploader: Uploader | None = None
    before_save: Callable[[], Mapping[str, Any]] = dict
    on_saved: Callable[[Saved], None] = lambda saved: None
    parent: str | None = None
    saved_step: int = 0
    resumed_from: str | None = None
    origin: str = field(default="", init=False)
    forked_from: Mapping[str, Any] | None = field(default=None, init=False)
    inherited_steps: Mapping[str, int] = field(default_factory=dict, init=False)
    health: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, init=False)
    positions: Positions = field(init=False)
    _is_first_boundary: bool = field(default=True, init=False)
    _figures: tuple[int, Mapping[str, float]] = field(default=(-1, {}), init=False)
    _failed: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.positions = Positions(self.batch_size)
        self.origin = self.attempt

    @cached_property
    def _saver(self) -> Saver:
        return Saver(self.run.checkpoints, asynchronous=self.asynchronous)

    # Saving -------------------------------------------------------------------------------------------------------

    def reserve(self) -> None:
        """Make room in host memory for the copies that saves take, beside whatever the loop does meanwhile."""
        self._saver.reserve(rank_files(self.engines))

    def note(self, step: int, figures: Mapping[str, float]) -> None:
        """Remember what validation measured after `step` finished steps: a checkpoint of that step holds it."""
        self._figures = (step, dict(figures))
        if self.retention.keep_best is not None and self.retention.best_by not in figures:
            log.warning(
                "checkpoint.best_by = %s is no figure of validation (%s): no checkpoint is kept for it",
                self.retention.best_by,
                ", ".join(figures),
            )

    def save(self, step: int) -> None:
        """Take the state after `step` finished steps, unless it is saved or in flight; collective.

        A failed save leaves training going on.

        Raises:
            StorageError: The third save in a row failed.
        """
        if step in (self.saved_step, self._saver.step):
            return
        health = self.before_save()
        if self._saver.is_writing:
            log.warning(
                "checkpoint of step %s is still being written at step %d: training waits for it. Raise "
                "checkpoint.every_steps, or write to a faster file system.",
                self._saver.step,
                step,
            )
        self.join()
        self._saver.begin(
            step=step,
            attempt=self.attempt,
            files=rank_files(self.engines),
            facts={**self._facts(step), "health": health},
            texts={"config.yaml": self.config_text},
        )
        if not self.asynchronous:
            self.join()

    @property
    def is_writing(self) -> bool:
        """Whether this rank has a save in flight that is not all on its disk."""
        return self._saver.is_writing

    def join(self) -> Path | None:
        """Wait until the save in flight, if there is one, is committed or abandoned; collective.

        Returns:
            The newest committed checkpoint of this lineage.

        Raises:
            StorageError: The third save in a row failed.
        """
        saved = self._saver.finish()
        if saved is not None:
            self._settle(saved)
            self.on_saved(saved)
        if self.uploader is not None and (saved is not None or self._is_first_boundary):
            self._is_first_boundary = False
            self.uploader.look()
        return self.run.checkpoints / self.parent if self.parent else None

    def finish(self, step: int) -> None:
        """See to it that the state after `step` finished steps is committed, trying again where it fails; collective.

        Raises:
            StorageError: It could not be committed.
        """
        self.join()
        while self.saved_step != step:
            self.save(step)
            self.join()

    def _facts(self, step: int) -> dict[str, Any]:
        figures = {"figures": self._figures[1]} if self._figures[0] == step else {}
        return {
            "first_position": self.positions.at(self.saved_step),
            "last_position": self.positions.at(step),
            "left_out": self.positions.left_out,
            "samples_seen": step * self.batch_size,
            "parent": self.parent,
            "config_sha256": hashlib.sha256(self.config_text.encode()).hexdigest(),
            "identity": dict(self.identity),
            "run": self.origin,
            "forked_from": self.forked_from,
            "inherited_steps": self.inherited_steps,
            **figures,
            **self.environment,
            **state_facts(self.engines),
        }

    def _settle(self, saved: Saved) -> None:
        if saved.path is None:
            self._failed += 1
            if self._failed >= MAX_FAILED_SAVES:
                raise StorageError(
                    f"{self.run.checkpoints}: {self._failed} saves in a row failed (see the log). Free some space or "
                    "repair the file system, then start again: the newest committed checkpoint is intact."
                )
            return
        self._failed = 0
        self.saved_step, self.parent = saved.step, folder_name(saved.step)
        if distributed.ranks().is_main:
            self._log_commit(Checkpoint.open(saved.path), stall_seconds=round(saved.stall_seconds, 3))
            uploading = None if self.uploader is None else self.uploader.uploading
            busy = [] if uploading is None else [uploading]
            retain(self.run.checkpoints, self.retention, resumed_from=self.resumed_from, pinned=busy)

    def _log_commit(self, checkpoint: Checkpoint, **more: Any) -> None:
        """One ledger row per commit; a rank killed between the commit and its row leaves this to the next attempt."""
        known = ("attempt", "last_position")  # an attempt that was rolled back commits the same step again
        told = [
            (row.get("checkpoint"), *map(row.get, known)) for row in self.run.ledger_rows() if row["event"] == "commit"
        ]
        manifest = checkpoint.manifest
        if (checkpoint.path.name, *map(manifest.get, known)) in told:
            return
        shown = ("attempt", "step", "parent", "world_size", "first_position", "last_position", "write_seconds")
        facts = {name: manifest.get(name) for name in shown}
        self.run.log("commit", checkpoint=checkpoint.path.name, **facts, **more)

    # Resuming -----------------------------------------------------------------------------------------------------

    def restore(self, checkpoint: Checkpoint) -> int:
        """Take over a checkpoint; returns its step. Collective.

        Raises:
            CheckpointError: It was written over other data, another seed or another order.
        """
        self.join()
        refuse_other_runs(checkpoint, self.identity)
        restore(checkpoint, self.engines)
        self.positions = self.positions.resumed(self.run, checkpoint)
        self.health = checkpoint.manifest.get("health", {})
        if self.positions.rollbacks > len(checkpoint.manifest.get("left_out", [])):  # it went back here, and died
            self.health = without_skips(self.health)
        if distributed.ranks().is_main:
            self._log_commit(checkpoint)
        self.parent, self.saved_step, self.resumed_from = checkpoint.path.name, checkpoint.step, checkpoint.path.name
        self.origin = checkpoint.manifest.get("run", checkpoint.manifest["attempt"])
        self.forked_from = checkpoint.manifest.get("forked_from")
        self.inherited_steps = checkpoint.manifest.get("inherited_steps", {})
        if self.uploader is not None:
            self.uploader.resumed_from = self.resumed_from
        return checkpoint.step

    def fork(self, source: Checkpoint, load: Load) -> None:
        """Begin this run with another one's state; collective, before the first step.

        Raises:
            CheckpointError: It does not fit.
        """
        take_over(source, load, self.engines)
        self.forked_from = ancestry(source, load)
        self.inherited_steps = {name: engine.applied_steps for name, engine in self.engines.items()}

    def close(self, *, wait_for_uploads: bool = False) -> None:
        """End the writing thread, without waiting for it; then wait, if asked, until all is uploaded or given up."""
        self._saver.close()
        if self.uploader is not None and wait_for_uploads:
            self.uploader.wait()


def refuse_other_runs(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Let a checkpoint be resumed only over the same samples in the same order.

    Raises:
        CheckpointError: It was written over other data, another seed or another order; names what differs.
    """
    saved = checkpoint.manifest.get("identity", {})
    changed = [
        f"{key}: {saved.get(key)!r} then, {value!r} now" for key, value in identity.items() if saved.get(key) != value
    ]
    if changed:
        raise CheckpointError(
            f"{checkpoint.path}: belongs to another run:\n  " + "\n  ".join(changed) + "\nA resume must see the same "
            "samples in the same order: restore these settings, or choose another run_dir for a new run."
        )
