"""The way back: a sick run takes over an older checkpoint and leaves out the samples that it was trained on since."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdtrain import distributed
from sdtrain.checkpoints.manifest import LATEST, Checkpoint, list_checkpoints, set_aside
from sdtrain.checkpoints.verify import verify_together
from sdtrain.errors import StorageError
from sdtrain.records import Batch
from sdtrain.run_dir import write_atomically
from sdtrain.training.health import without_skips
from sdtrain.training.keeper import CheckpointKeeper

log = logging.getLogger(__name__)

Batches = Iterator[tuple[int, int, Batch]]


@dataclass(frozen=True, slots=True)
class Restart:
    """Where the loop goes on.

    Attributes:
        step: Finished steps.
        batches: (step, micro-step, batch) from there.
        health: Trainable -> what is known of its steps before, see `health.Health`.
    """

    step: int
    batches: Batches
    health: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Takes a run back; all ranks call it together.

    Attributes:
        keeper: Restores, and knows the positions of the steps.
        batches_after: (step) -> the batches behind so many finished steps, at the keeper's positions.
        on_restart: Told the step that the run goes on from.
    """

    keeper: CheckpointKeeper
    batches_after: Callable[[int], Batches]
    on_restart: Callable[[int], None]

    def __call__(self, first_sick_step: int, finished_steps: int, story: str) -> Restart | None:
        """Go back to the newest checkpoint that is not younger than the sickness, or to the oldest one that is kept.

        The latter lost its elders to retention while steps were thrown away, which changed no weights. The samples
        between the checkpoint and `finished_steps` are left out: the first sick step only shows when the trouble was
        noticed, and the same samples in the same order would lead to the same place.

        Args:
            first_sick_step: Steps that were finished before the first of the steps that were thrown away.
            finished_steps: Steps taken, the last sick one included.
            story: What happened, for the ledger.

        Returns:
            Where the loop goes on; None where no checkpoint verifies.

        Raises:
            StorageError: Younger checkpoints cannot be set aside.
        """
        keeper = self.keeper
        keeper.join()
        checkpoint = self._choose(first_sick_step)
        if checkpoint is None:
            return None
        reached = keeper.positions.at(finished_steps)
        self._set_aside(checkpoint)
        keeper.restore(checkpoint)
        first = keeper.positions.at(checkpoint.step)
        keeper.positions = keeper.positions.leaving_out(first, reached)
        if distributed.ranks().is_main:
            facts = {"step": finished_steps, "checkpoint": checkpoint.path.name, "reason": story}
            place = {"position": checkpoint.manifest["last_position"], "left_out": keeper.positions.left_out}
            keeper.run.log("rollback", attempt=keeper.attempt, **facts, **place)
            log.error("back to %s, samples %d to %d left out: %s", checkpoint.path, first, reached - 1, story)
        if keeper.uploader is not None:
            keeper.uploader.look()
        self.on_restart(checkpoint.step)
        return Restart(checkpoint.step, self.batches_after(checkpoint.step), without_skips(keeper.health))

    def _choose(self, first_sick_step: int) -> Checkpoint | None:
        listed: list[Checkpoint] = []
        if distributed.ranks().is_main:
            listed = list_checkpoints(self.keeper.run.checkpoints)
        listed = distributed.broadcast_object(listed)  # newest first
        elder = [checkpoint for checkpoint in listed if checkpoint.step <= first_sick_step]
        younger = [checkpoint for checkpoint in reversed(listed) if checkpoint.step > first_sick_step]
        return next((checkpoint for checkpoint in [*elder, *younger] if not verify_together(checkpoint)), None)

    def _set_aside(self, checkpoint: Checkpoint) -> None:
        """Give younger checkpoints other names, or the next start would resume from the sickness they hold.

        Their copies in a store follow (`Uploader`), by this attempt or by the next one that finds those names.
        """
        problem = ""
        if distributed.ranks().is_main:
            folder = self.keeper.run.checkpoints
            try:
                for younger in list_checkpoints(folder):
                    if younger.step > checkpoint.step:
                        set_aside(younger)
                write_atomically(folder / LATEST, checkpoint.path.name + "\n")
            except OSError as error:
                problem = f"{type(error).__name__}: {error}"
        problem = distributed.broadcast_object(problem)
        if problem:
            raise StorageError(
                f"{self.keeper.run.checkpoints}: checkpoints younger than {checkpoint.path.name} hold a sick state and "
                f"cannot be renamed: {problem}. Rename them by hand, then start again."
            )
